//! The socket front-ends connect to: bound here, or passed by the service manager.
//!
//! A socket is bound in two steps: [`Claim::new`] looks at the path before the daemon enters its
//! sandbox, in which no connection can be made, and [`Claim::listen`] binds the path once the image
//! is open, so that a front-end never connects to a disk that is not there yet.
//!
//! To find a stale socket and to remove it must be one step, and so must binding and listening: of
//! two daemons at one path, one would otherwise remove the other's live socket. So each locks the
//! directory during both steps.

use std::fs::{File, Metadata};
use std::io;
use std::os::fd::OwnedFd;
use std::os::unix::fs::{FileTypeExt, MetadataExt};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::thread;
use std::time::{Duration, Instant};

use rustix::fs::{FlockOperation, Mode, flock};
use rustix::io::Errno;
use rustix::net::{AddressFamily, SocketAddrUnix, SocketFlags, SocketType};

use super::Error;

/// How long the directory may be locked by others: to look at a socket takes no time.
const LOCK_LIMIT: Duration = Duration::from_secs(5);

/// Connections that wait to be accepted; the system may keep fewer.
const BACKLOG: i32 = 128;

/// A listening socket. Where it was bound here, its path goes away with it.
#[derive(Debug)]
pub struct Listener {
    /// Before the socket: as long as that listens, nobody replaces what is at the path.
    _bound: Option<Bound>,
    socket: UnixListener,
}

/// A path that is ours.
#[derive(Debug)]
struct Bound {
    path: PathBuf,
    /// Device and inode of the path, to remove no one else's.
    identity: (u64, u64),
}

/// A path at which no daemon listens, and a socket to be bound to it.
#[derive(Debug)]
pub struct Claim {
    path: PathBuf,
    mode: u32,
    socket: OwnedFd,
    /// The directory of the path.
    directory: File,
}

impl Claim {
    /// Takes a socket to be bound to `path` with permissions `mode`. Removes a stale socket there.
    ///
    /// # Errors
    ///
    /// [`Error::SocketInUse`] if a running daemon answers at the path, [`Error::NotASocket`] if
    /// something else is there, [`Error::Socket`] if the system refuses.
    pub fn new(path: &Path, mode: u32) -> Result<Claim, Error> {
        let failed = |source| Error::Socket {
            path: path.to_owned(),
            source,
        };
        let directory = File::open(directory(path)).map_err(failed)?;
        let locked = lock(&directory).map_err(failed)?;
        remove_stale(path)?;
        drop(locked);
        let socket = rustix::net::socket_with(
            AddressFamily::UNIX,
            SocketType::STREAM,
            SocketFlags::CLOEXEC | SocketFlags::NONBLOCK,
            None,
        );
        Ok(Claim {
            path: path.to_owned(),
            mode,
            socket: socket.map_err(|errno| failed(errno.into()))?,
            directory,
        })
    }

    /// The directory of the path.
    pub fn directory(&self) -> &Path {
        directory(&self.path)
    }

    /// Binds the path and listens.
    ///
    /// # Errors
    ///
    /// [`Error::SocketInUse`] if another daemon has bound the path meanwhile, [`Error::Socket`] if
    /// the system refuses.
    pub fn listen(self) -> Result<Listener, Error> {
        let failed = |source| Error::Socket {
            path: self.path.clone(),
            source,
        };
        let locked = lock(&self.directory).map_err(failed)?;
        match bind(&self.socket, &self.path, self.mode) {
            Err(error) if error.kind() == io::ErrorKind::AddrInUse => {
                return Err(Error::SocketInUse { path: self.path });
            }
            bound => bound.map_err(failed)?,
        }
        let meta = self.path.symlink_metadata().map_err(failed)?;
        drop(locked);
        Ok(Listener {
            socket: UnixListener::from(self.socket),
            _bound: Some(Bound {
                identity: identity(&meta),
                path: self.path,
            }),
        })
    }
}

/// Removes a socket at `path` that no process listens on.
fn remove_stale(path: &Path) -> Result<(), Error> {
    let failed = |source| Error::Socket {
        path: path.to_owned(),
        source,
    };
    let kind = match path.symlink_metadata() {
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(()),
        meta => meta.map_err(failed)?.file_type(),
    };
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
    std::fs::remove_file(path).map_err(failed)
}

impl Listener {
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
            _bound: None,
        })
    }

    /// The socket; accepting from it does not block.
    pub fn socket(&self) -> &UnixListener {
        &self.socket
    }
}

fn directory(path: &Path) -> &Path {
    match path.parent() {
        Some(parent) if !parent.as_os_str().is_empty() => parent,
        _ => Path::new("."),
    }
}

/// The lock of a directory, which keeps other daemons from binding in it.
struct Locked<'a>(&'a File);

impl Drop for Locked<'_> {
    fn drop(&mut self) {
        // Closing the directory unlocks it as well.
        let _ = flock(self.0, FlockOperation::Unlock);
    }
}

fn lock(directory: &File) -> io::Result<Locked<'_>> {
    let start = Instant::now();
    loop {
        match flock(directory, FlockOperation::NonBlockingLockExclusive) {
            Ok(()) => return Ok(Locked(directory)),
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

/// Binds and listens, with exactly the permissions asked for from the first moment.
fn bind(socket: &OwnedFd, path: &Path, mode: u32) -> io::Result<()> {
    let address = SocketAddrUnix::new(path)?;
    let before = rustix::process::umask(Mode::from_raw_mode(!mode & 0o777));
    let bound = rustix::net::bind(socket, &address);
    rustix::process::umask(before);
    bound?;
    Ok(rustix::net::listen(socket, BACKLOG)?)
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
                Claim::new(&path, 0o600)?.listen()
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
        let directory = File::open(folder.path()).unwrap();
        let _held = lock(&directory).unwrap();
        let error = Claim::new(&folder.path().join("socket"), 0o600).unwrap_err();
        assert!(matches!(error, Error::Socket { .. }), "{error:?}");
    }
}
