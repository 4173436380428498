//! Binds the control sockets.

use std::fs;
use std::io;
use std::os::unix::fs::FileTypeExt;
use std::os::unix::net::UnixStream;
use std::path::PathBuf;
use std::time::Duration;

use tokio::net::UnixListener;

use crate::io::file_lock::{LockKind, lock_within};
use crate::io::regular::open_regular;
use crate::node::error::Error;
use crate::node::launch::MAX_SOCKET_PATH;
use crate::node::socket::{self, BindError, SocketMode, SocketOwner, hidden};

/// How long another node may take to bind a control socket.
pub const BIND_LIMIT: Duration = Duration::from_secs(10);

/// A socket of the API.
#[derive(Clone, Debug)]
pub struct ControlSocket {
    /// Path.
    pub path: PathBuf,
    /// Permissions.
    pub mode: SocketMode,
    /// Owner; `None`: the user and group of the node.
    pub owner: Option<SocketOwner>,
}

/// Binds a control socket. A socket that no process listens on is replaced. The lock beside the socket makes this one step
/// among nodes; another node may hold it for `limit`.
///
/// # Errors
/// [`Error::ControlInUse`] if a process listens there; [`Error::NotASocket`] if another kind of file is there;
/// [`Error::ControlLocked`] if the lock stays held; [`Error::ControlOwner`] if its owner cannot be set; [`Error::File`]
/// for failures of the system.
pub fn bind(control: &ControlSocket, limit: Duration) -> Result<UnixListener, Error> {
    let path = &control.path;
    let hidden = hidden(path);
    if path.as_os_str().len().max(hidden.as_os_str().len()) > MAX_SOCKET_PATH {
        return Err(Error::LongPath {
            path: path.to_owned(),
            limit: MAX_SOCKET_PATH,
        });
    }
    let lock = path.with_extension("lock");
    let mut options = fs::File::options();
    options.write(true).create(true).truncate(false);
    let file = open_regular(&lock, options).map_err(Error::file("open", &lock))?;
    match lock_within(&file, LockKind::Exclusive, limit) {
        Ok(()) => {}
        Err(fs::TryLockError::WouldBlock) => {
            return Err(Error::ControlLocked { lock, limit });
        }
        Err(fs::TryLockError::Error(error)) => return Err(Error::file("lock", &lock)(error)),
    }
    if UnixStream::connect(path).is_ok() {
        return Err(Error::ControlInUse(path.to_owned()));
    }
    match fs::symlink_metadata(path) {
        Ok(found) if found.file_type().is_socket() => {
            fs::remove_file(path).map_err(Error::file("replace", path))?;
        }
        Ok(_) => return Err(Error::NotASocket(path.to_owned())),
        Err(error) if error.kind() == io::ErrorKind::NotFound => {}
        Err(error) => return Err(Error::file("examine", path)(error)),
    }
    let bound = socket::bind(path, control.mode, control.owner.as_ref());
    let listener = bound.map_err(|error| match error {
        BindError::Socket(source) => Error::file("bind", path)(source),
        source => Error::ControlOwner {
            path: path.to_owned(),
            source,
        },
    })?;
    listener
        .set_nonblocking(true)
        .and_then(|()| UnixListener::from_std(listener))
        .map_err(Error::file("bind", path))
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::PermissionsExt;

    use super::*;

    #[tokio::test]
    async fn a_control_socket_whose_lock_stays_held_is_given_up() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("control.sock");
        let lock = fs::File::create(path.with_extension("lock")).unwrap();
        lock.lock().unwrap();
        let socket = ControlSocket {
            path,
            mode: SocketMode::default(),
            owner: None,
        };
        let error = bind(&socket, Duration::from_millis(5)).unwrap_err();
        assert!(matches!(error, Error::ControlLocked { .. }), "{error:?}");
        drop(lock);
        bind(&socket, BIND_LIMIT).unwrap();
        let bound = fs::metadata(&socket.path).unwrap();
        assert_eq!(bound.permissions().mode() & 0o777, 0o600);
    }
}
