//! Connections to unix sockets with a time limit.

use std::io;
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::time::Duration;

use rustix::net::sockopt::{Timeout, set_socket_timeout};
use rustix::net::{AddressFamily, SocketAddrUnix, SocketFlags, SocketType, socket_with};

/// Connects to the socket at `path`. Waits up to `limit` while the server's backlog is full, which
/// `UnixStream::connect` does without limit. Each later write waits for at most as long.
///
/// # Errors
/// [`io::ErrorKind::TimedOut`] after `limit`; else an error of the system.
pub fn connect(path: &Path, limit: Duration) -> io::Result<UnixStream> {
    let socket = socket_with(
        AddressFamily::UNIX,
        SocketType::STREAM,
        SocketFlags::CLOEXEC,
        None,
    )?;
    // Zero would be no limit.
    let limit = limit.max(Duration::from_millis(1));
    set_socket_timeout(&socket, Timeout::Send, Some(limit))?;
    match rustix::net::connect(&socket, &SocketAddrUnix::new(path)?).map_err(io::Error::from) {
        Ok(()) => Ok(UnixStream::from(socket)),
        Err(error) if error.kind() == io::ErrorKind::WouldBlock => {
            Err(io::ErrorKind::TimedOut.into())
        }
        Err(error) => Err(error),
    }
}

#[cfg(test)]
mod tests {
    use rustix::net::{bind, listen};

    use super::*;

    #[test]
    fn a_full_backlog_is_waited_for_until_the_limit() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("socket");
        let socket = socket_with(
            AddressFamily::UNIX,
            SocketType::STREAM,
            SocketFlags::CLOEXEC,
            None,
        );
        let socket = socket.unwrap();
        bind(&socket, &SocketAddrUnix::new(&path).unwrap()).unwrap();
        listen(&socket, 0).unwrap();
        let limit = Duration::from_millis(20);
        let waiting: Vec<_> = (0..9).map(|_| connect(&path, limit)).collect();
        assert!(waiting[0].is_ok());
        let late = waiting[8].as_ref().unwrap_err();
        assert_eq!(late.kind(), io::ErrorKind::TimedOut);
        drop((socket, waiting));
        let absent = connect(&path, limit).unwrap_err();
        assert_eq!(absent.kind(), io::ErrorKind::ConnectionRefused);
    }
}
