//! The socket front-ends connect to: bound here, or passed by the service manager.
//!
//! Whether a socket at the path is stale, and its replacement, must be one step: of two daemons that
//! find the same dead socket, the second would remove the first one's live one. So each locks the
//! directory meanwhile.

use std::fs::{File, Metadata};
use std::io;
use std::os::unix::fs::{FileTypeExt, MetadataExt};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::thread;
use std::time::{Duration, Instant};

use rustix::fs::{FlockOperation, Mode, flock};
use rustix::io::Errno;

use super::Error;

/// How long the directory may be locked by others: to look at a socket takes no time.
const LOCK_LIMIT: Duration = Duration::from_secs(5);

/// A listening socket. Where it was bound here, its path goes away with it.
#[derive(Debug)]
pub struct Listener {
    /// Before the socket: as long as that listens, nobody replaces what is at the path.
    bound: Option<Bound>,
    socket: UnixListener,
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
        let _lock = lock(directory(path)).map_err(failed)?;
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
        self.bound.as_ref().map(|bound| directory(&bound.path))
    }
}

fn directory(path: &Path) -> &Path {
    match path.parent() {
        Some(parent) if !parent.as_os_str().is_empty() => parent,
        _ => Path::new("."),
    }
}

/// Keeps other daemons from binding in `directory` as long as the result is open.
fn lock(directory: &Path) -> io::Result<File> {
    let file = File::open(directory)?;
    let start = Instant::now();
    loop {
        match flock(&file, FlockOperation::NonBlockingLockExclusive) {
            Ok(()) => return Ok(file),
            Err(Errno::WOULDBLOCK) if start.elapsed() < LOCK_LIMIT => {
                thread::sleep(Duration::from_millis(1));
            }
            Err(Errno::WOULDBLOCK) => {
                return Err(io::Error::other(
                    "another process keeps its directory locked",
                ));
            }
            Err(errno) => return Err(errno.into()),
        }
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

#[cfg(test)]
mod tests {
    use std::sync::Barrier;

    use super::*;

    #[test]
    fn of_many_that_replace_a_stale_socket_one_wins() {
        const RACERS: usize = 8;
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("socket");
        for round in 0..50 {
            // Closed, and its path left behind.
            drop(UnixListener::bind(&path).unwrap());
            let start = Barrier::new(RACERS);
            let race = || {
                start.wait();
                Listener::bind(&path, 0o600)
            };
            let results = thread::scope(|scope| {
                let racers: Vec<_> = (0..RACERS).map(|_| scope.spawn(race)).collect();
                let ended = racers.into_iter().map(|racer| racer.join().unwrap());
                ended.collect::<Vec<_>>()
            });
            let (won, lost): (Vec<_>, Vec<_>) = results.into_iter().partition(Result::is_ok);
            assert_eq!(won.len(), 1, "round {round}");
            for error in lost.into_iter().map(Result::unwrap_err) {
                assert!(matches!(error, Error::SocketInUse { .. }), "{error:?}");
            }
            UnixStream::connect(&path).unwrap();
            drop(won);
            assert!(!path.exists(), "the path goes away with its socket");
        }
    }

    #[test]
    fn a_directory_that_stays_locked_is_not_waited_for() {
        let folder = tempfile::tempdir().unwrap();
        let _held = lock(folder.path()).unwrap();
        let error = Listener::bind(&folder.path().join("socket"), 0o600).unwrap_err();
        assert!(matches!(error, Error::Socket { .. }), "{error:?}");
    }
}
