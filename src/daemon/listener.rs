//! The socket front-ends connect to: bound here, or passed by the service manager.

use std::fs::Metadata;
use std::io;
use std::os::unix::fs::{FileTypeExt, MetadataExt};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};

use rustix::fs::Mode;

use super::Error;

/// A listening socket. Where it was bound here, its path goes away with it.
#[derive(Debug)]
pub struct Listener {
    socket: UnixListener,
    bound: Option<Bound>,
}

/// A path that is ours.
#[derive(Debug)]
struct Bound {
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
        Ok(Listener {
            socket,
            bound: Some(Bound {
                path: path.to_owned(),
                identity: identity(&meta),
            }),
        })
    }

    /// Takes a socket over that listens already. If `named` is given, it must be the socket's path.
    ///
    /// # Errors
    ///
    /// It has another path, or the system refuses.
    pub fn passed(socket: UnixListener, named: Option<&Path>) -> Result<Listener, Error> {
        if let Some(path) = named {
            let at = |path: &Path| path.metadata().ok().as_ref().map(identity);
            let own = socket.local_addr().ok();
            let own = own.as_ref().and_then(|address| address.as_pathname());
            if own.and_then(at).is_none_or(|own| Some(own) != at(path)) {
                return Err(Error::OtherSocket {
                    path: path.to_owned(),
                });
            }
        }
        let failed = |source| Error::Socket {
            path: named.unwrap_or(Path::new("the passed socket")).to_owned(),
            source,
        };
        socket.set_nonblocking(true).map_err(failed)?;
        Ok(Listener {
            socket,
            bound: None,
        })
    }

    /// The socket; accepting from it does not block.
    pub fn socket(&self) -> &UnixListener {
        &self.socket
    }

    /// The directory in which the socket is removed at the end, if it is.
    pub fn directory(&self) -> Option<&Path> {
        let parent = self.bound.as_ref()?.path.parent();
        parent.map(|parent| match parent.as_os_str().is_empty() {
            true => Path::new("."),
            false => parent,
        })
    }
}

fn identity(meta: &Metadata) -> (u64, u64) {
    (meta.dev(), meta.ino())
}

/// Binds with exactly the permissions asked for, from the first moment.
fn bind(path: &Path, mode: u32) -> io::Result<UnixListener> {
    let before = rustix::process::umask(Mode::from_raw_mode(!mode & 0o777));
    let socket = UnixListener::bind(path);
    rustix::process::umask(before);
    socket
}

impl Drop for Bound {
    fn drop(&mut self) {
        let ours = |meta: Metadata| identity(&meta) == self.identity;
        if self.path.symlink_metadata().is_ok_and(ours) {
            // The next daemon replaces what we cannot remove.
            let _ = std::fs::remove_file(&self.path);
        }
    }
}
