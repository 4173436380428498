//! HTTP/1.1 with JSON on a unix socket.
//!
//! `routes` is the table that `docs/openapi.yaml` describes; a test holds the two against each other.

pub mod exporter;
mod reply;
pub mod routes;

use std::fs;
use std::io;
use std::os::unix::fs::{FileTypeExt, PermissionsExt};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use hyper::server::conn::http1;
use hyper::service::service_fn;
use hyper_util::rt::{TokioIo, TokioTimer};
use tokio::net::{UnixListener, UnixStream};
use tokio::sync::Semaphore;

use super::disks::Disks;
use super::error::Error;
use crate::io::file_lock::{LockKind, lock_within};
use crate::io::regular::open_regular;
use crate::ratelimited_log;
use routes::{Caller, Context};

/// Connections that are served at a time; more wait. Many clients may wait for events, and a silent client has its
/// connection for [`HEADER_LIMIT`].
const MAX_CONNECTIONS: usize = 512;

/// How long another node may take to bind the control socket.
pub const BIND_LIMIT: Duration = Duration::from_secs(10);

/// How long the headers of a request may take to arrive.
const HEADER_LIMIT: Duration = Duration::from_secs(10);

/// Binds the control socket with mode 600. A socket that no process listens on is replaced. The lock beside the socket
/// makes this one step among nodes; another node may hold it for `limit`.
///
/// # Errors
/// [`Error::ControlInUse`] if a process listens there; [`Error::NotASocket`] if another kind of file is there;
/// [`Error::ControlLocked`] if the lock stays held; [`Error::File`] for failures of the system.
pub fn bind(path: &Path, limit: Duration) -> Result<UnixListener, Error> {
    if path.as_os_str().len() > super::launch::MAX_SOCKET_PATH {
        return Err(Error::LongPath {
            path: path.to_owned(),
            limit: super::launch::MAX_SOCKET_PATH,
        });
    }
    let lock = PathBuf::from(path).with_extension("lock");
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
    if std::os::unix::net::UnixStream::connect(path).is_ok() {
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
    let listener = UnixListener::bind(path).map_err(Error::file("bind", path))?;
    fs::set_permissions(path, fs::Permissions::from_mode(0o600))
        .map_err(Error::file("protect", path))?;
    Ok(listener)
}

/// Serves connections for ever.
pub async fn serve(listener: UnixListener, disks: Arc<Disks>) {
    let context = Arc::new(Context { disks });
    let slots = Arc::new(Semaphore::new(MAX_CONNECTIONS));
    loop {
        let Ok(slot) = slots.clone().acquire_owned().await else {
            return;
        };
        match listener.accept().await {
            Ok((stream, _)) => {
                let context = context.clone();
                tokio::spawn(async move {
                    connection(stream, context).await;
                    drop(slot);
                });
            }
            Err(error) => {
                ratelimited_log::warn(format_args!("cannot accept a client: {error}"));
                // As when descriptors run out: others may be closed meanwhile.
                tokio::time::sleep(Duration::from_millis(100)).await;
            }
        }
    }
}

async fn connection(stream: UnixStream, context: Arc<Context>) {
    let caller = stream.peer_cred().map_or(Caller::default(), |peer| Caller {
        uid: Some(peer.uid()),
        pid: peer.pid(),
    });
    let service = service_fn(|request| routes::answer(request, context.clone(), caller));
    let served = http1::Builder::new()
        .timer(TokioTimer::new())
        .header_read_timeout(HEADER_LIMIT)
        .serve_connection(TokioIo::new(stream), service)
        .await;
    if let Err(error) = served {
        log::debug!("a client's connection ended: {error}");
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn a_control_socket_whose_lock_stays_held_is_given_up() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("control.sock");
        let lock = fs::File::create(path.with_extension("lock")).unwrap();
        lock.lock().unwrap();
        let error = bind(&path, Duration::from_millis(5)).unwrap_err();
        assert!(matches!(error, Error::ControlLocked { .. }), "{error:?}");
        drop(lock);
        bind(&path, BIND_LIMIT).unwrap();
    }
}
