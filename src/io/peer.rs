//! Credentials of the process at the other end of a Unix socket.
#![allow(unsafe_code)] // `SO_PEERCRED` with a process number of 0 has no safe wrapper

use std::io;
use std::mem::{MaybeUninit, size_of};
use std::os::fd::AsRawFd;
use std::os::unix::net::UnixStream;

use rustix::process::Pid;

/// Credentials of the process that connected a Unix socket.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Credentials {
    /// The process. `None`: it is in a PID namespace that this process cannot see.
    pub pid: Option<Pid>,
    /// Its effective user.
    pub uid: u32,
}

/// Returns the credentials of the process that connected `stream`.
///
/// # Errors
///
/// Those of `getsockopt(2)`.
pub fn credentials(stream: &UnixStream) -> io::Result<Credentials> {
    let mut found = MaybeUninit::<libc::ucred>::zeroed();
    let mut len = size_of::<libc::ucred>() as libc::socklen_t;
    // SAFETY: `found` has `len` bytes, of which the kernel writes at most as many.
    let result = unsafe {
        libc::getsockopt(
            stream.as_raw_fd(),
            libc::SOL_SOCKET,
            libc::SO_PEERCRED,
            found.as_mut_ptr().cast(),
            &raw mut len,
        )
    };
    if result != 0 {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: all bytes are initialized, and any bytes are a valid `ucred`.
    let found = unsafe { found.assume_init() };
    Ok(Credentials {
        pid: Pid::from_raw(found.pid),
        uid: found.uid,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_pair_is_connected_by_this_process() {
        let (stream, _other) = UnixStream::pair().unwrap();
        let found = credentials(&stream).unwrap();
        let expected = Credentials {
            pid: Some(rustix::process::getpid()),
            uid: rustix::process::geteuid().as_raw(),
        };
        assert_eq!(found, expected);
    }
}
