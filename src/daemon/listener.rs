//! The socket front-ends connect to.

use std::io;
use std::os::unix::fs::{FileTypeExt, MetadataExt};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};

use rustix::fs::Mode;

use super::Error;

/// A bound socket, whose path goes away with it.
#[derive(Debug)]
pub struct Listener {
    socket: UnixListener,
    path: PathBuf,
    /// Device and inode of the path, to remove no one else's.
    identity: (u64, u64),
}

impl Listener {
    /// Binds `path` with permissions `mode`.
    ///
    /// A socket nobody listens on any more is replaced.
    ///
    /// # Errors
    ///
    /// A running daemon answers there, something else is at the path, or the system refuses.
    pub fn bind(path: &Path, mode: u32) -> Result<Listener, Error> {
        let failed = |source| Error::Socket {
            path: path.to_owned(),
            source,
        };
        let socket = match bind(path, mode) {
            Err(error) if error.kind() == io::ErrorKind::AddrInUse => {
                let kind = path.symlink_metadata().map_err(failed)?.file_type();
                if !kind.is_socket() {
                    return Err(Error::NotASocket {
                        path: path.to_owned(),
                    });
                }
                match UnixStream::connect(path) {
                    Err(error) if error.kind() == io::ErrorKind::ConnectionRefused => {}
                    Err(error) => return Err(failed(error)),
                    Ok(_) => {
                        return Err(Error::SocketInUse {
                            path: path.to_owned(),
                        });
                    }
                }
                log::info!("replacing the stale socket {}", path.display());
                std::fs::remove_file(path).and_then(|()| bind(path, mode))
            }
            other => other,
        };
        let socket = socket.map_err(failed)?;
        socket.set_nonblocking(true).map_err(failed)?;
        let meta = path.symlink_metadata().map_err(failed)?;
        let identity = (meta.dev(), meta.ino());
        Ok(Listener {
            socket,
            path: path.to_owned(),
            identity,
        })
    }

    /// The socket; accepting from it does not block.
    pub fn socket(&self) -> &UnixListener {
        &self.socket
    }
}

/// Binds with exactly the permissions asked for, from the first moment.
fn bind(path: &Path, mode: u32) -> io::Result<UnixListener> {
    let before = rustix::process::umask(Mode::from_raw_mode(!mode & 0o777));
    let socket = UnixListener::bind(path);
    rustix::process::umask(before);
    socket
}

impl Drop for Listener {
    fn drop(&mut self) {
        let ours = |meta: std::fs::Metadata| (meta.dev(), meta.ino()) == self.identity;
        if self.path.symlink_metadata().is_ok_and(ours) {
            // The next daemon replaces what we cannot remove.
            let _ = std::fs::remove_file(&self.path);
        }
    }
}
