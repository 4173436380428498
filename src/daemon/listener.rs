//! Listening Unix sockets: bound by the daemon, or passed by the service manager.
//!
//! A socket is bound in two steps. [`Claim::new`] examines the path before the daemon enters its
//! sandbox, inside of which it cannot connect to a socket. [`Claim::listen`] binds the path once the image is
//! open, so that no front-end connects before the disk can be served.
//!
//! Finding a stale socket and removing it must be one step: of two daemons at one path, one could
//! otherwise remove the other's live socket. So each locks the directory during both steps.
//!
//! A bound socket refuses connections until it listens. It is therefore bound under another
//! name, and renamed to its path once it listens.

use std::ffi::OsStr;
use std::fs::{File, Metadata, TryLockError};
use std::io;
use std::os::fd::OwnedFd;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::{FileTypeExt, MetadataExt};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::time::Duration;

use rustix::fs::Mode;
use rustix::net::{AddressFamily, SocketAddrUnix, SocketFlags, SocketType};

use super::Error;
use crate::io::directory::parent_of;
use crate::io::file_lock::{LockKind, lock_within};
use crate::io::regular::open_directory;

/// How long another process may hold the lock of the directory; a daemon holds it for milliseconds.
const LOCK_LIMIT: Duration = Duration::from_secs(5);

/// Most connections that wait to be accepted; the system may allow fewer.
const BACKLOG: i32 = 128;

/// Most bytes in the path of a socket: the system's field for it, less the final zero.
const MAX_PATH: usize = 107;

/// A listening socket. If this process bound it, dropping it removes its path.
#[derive(Debug)]
pub struct Listener {
    /// Dropped before the socket: while the socket listens, no other daemon replaces the path.
    _bound: Option<Bound>,
    socket: UnixListener,
}

/// A path at which this process has bound a socket.
#[derive(Debug)]
struct Bound {
    path: PathBuf,
    /// Device and inode of the socket, so that no other process's socket is removed.
    identity: (u64, u64),
}

/// A path at which no daemon listens, and the socket to bind to it.
#[derive(Debug)]
pub struct Claim {
    path: PathBuf,
    mode: u32,
    socket: OwnedFd,
    /// The directory of the path.
    directory: File,
}

impl Claim {
    /// Makes a socket to bind to `path` with permissions `mode`. Removes a stale socket at the path.
    ///
    /// # Errors
    ///
    /// [`Error::SocketInUse`] if a process listens at the path; [`Error::NotASocket`] if the path is another kind of
    /// file; [`Error::SocketPath`] if the path is too long; [`Error::Socket`] for errors of the system.
    pub fn new(path: &Path, mode: u32) -> Result<Claim, Error> {
        let len = path.as_os_str().len();
        if len > MAX_PATH {
            return Err(Error::SocketPath {
                path: path.to_owned(),
                len,
                limit: MAX_PATH,
            });
        }
        let failed = |source| Error::Socket {
            path: path.to_owned(),
            source,
        };
        let directory = open_directory(parent_of(path)).map_err(failed)?;
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

    /// Returns the directory of the path.
    pub fn directory(&self) -> &Path {
        parent_of(&self.path)
    }

    /// Listens at the path.
    ///
    /// # Errors
    ///
    /// [`Error::SocketInUse`] if another daemon has bound the path meanwhile; [`Error::Socket`] for errors of the
    /// system.
    pub fn listen(self) -> Result<Listener, Error> {
        let failed = |source| Error::Socket {
            path: self.path.clone(),
            source,
        };
        let locked = lock(&self.directory).map_err(failed)?;
        if self.path.symlink_metadata().is_ok() {
            return Err(Error::SocketInUse { path: self.path });
        }
        let early = early_path(&self.path);
        bind(&self.socket, &early, self.mode).map_err(failed)?;
        let meta = early.symlink_metadata();
        let listening = meta.and_then(|meta| {
            rustix::net::listen(&self.socket, BACKLOG)?;
            std::fs::rename(&early, &self.path)?;
            Ok(identity(&meta))
        });
        let identity = listening.map_err(|error| {
            // A leftover is replaced by the next daemon.
            let _ = std::fs::remove_file(&early);
            failed(error)
        })?;
        drop(locked);
        Ok(Listener {
            socket: UnixListener::from(self.socket),
            _bound: Some(Bound {
                identity,
                path: self.path,
            }),
        })
    }
}

/// Returns the path at which a socket is bound before it listens: in the same directory, with a name of the same
/// length, because the length is limited.
fn early_path(path: &Path) -> PathBuf {
    let mut name = path.file_name().unwrap_or_default().as_bytes().to_vec();
    if let Some(first) = name.first_mut() {
        *first = if *first == b'~' { b'-' } else { b'~' };
    }
    path.with_file_name(OsStr::from_bytes(&name))
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
    /// Takes over a passed socket, which listens already. `named`, if given, must be its path.
    ///
    /// # Errors
    ///
    /// [`Error::OtherSocket`] if it has another path; [`Error::Socket`] for errors of the system.
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

    /// Returns the socket; accepting does not block.
    pub fn socket(&self) -> &UnixListener {
        &self.socket
    }
}

/// The lock of a directory: no other daemon binds in it.
struct Locked<'a>(&'a File);

impl Drop for Locked<'_> {
    fn drop(&mut self) {
        // Closing the directory unlocks it as well.
        let _ = self.0.unlock();
    }
}

fn lock(directory: &File) -> io::Result<Locked<'_>> {
    match lock_within(directory, LockKind::Exclusive, LOCK_LIMIT) {
        Ok(()) => Ok(Locked(directory)),
        Err(TryLockError::WouldBlock) => {
            let seconds = LOCK_LIMIT.as_secs();
            let text =
                format!("another process kept the directory of the socket locked for {seconds} s");
            Err(io::Error::new(io::ErrorKind::TimedOut, text))
        }
        Err(TryLockError::Error(error)) => Err(error),
    }
}

fn identity(meta: &Metadata) -> (u64, u64) {
    (meta.dev(), meta.ino())
}

/// Binds a socket that has the permissions `mode` from the first moment. Replaces a socket that a killed daemon left
/// at `path`; the directory is locked.
fn bind(socket: &OwnedFd, path: &Path, mode: u32) -> io::Result<()> {
    let left = path.symlink_metadata();
    if left.is_ok_and(|left| left.file_type().is_socket()) {
        std::fs::remove_file(path)?;
    }
    let address = SocketAddrUnix::new(path)?;
    let before = rustix::process::umask(Mode::from_raw_mode(!mode & 0o777));
    let bound = rustix::net::bind(socket, &address);
    rustix::process::umask(before);
    Ok(bound?)
}

impl Drop for Bound {
    fn drop(&mut self) {
        let ours = |meta: Metadata| identity(&meta) == self.identity;
        if self.path.symlink_metadata().is_ok_and(ours) {
            // A leftover is replaced by the next daemon.
            let _ = std::fs::remove_file(&self.path);
        }
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Barrier;
    use std::thread;

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

    /// A front-end that waits for the path to appear can connect at once.
    #[test]
    fn a_socket_that_is_there_listens() {
        let folder = tempfile::tempdir().unwrap();
        for round in 0..200 {
            let path = folder.path().join(format!("socket{round}"));
            let waiting = path.clone();
            let front_end = thread::spawn(move || {
                while !waiting.exists() {
                    std::hint::spin_loop();
                }
                UnixStream::connect(waiting).map(drop)
            });
            let listener = Claim::new(&path, 0o600).unwrap().listen().unwrap();
            front_end.join().unwrap().unwrap();
            drop(listener);
        }
        assert_eq!(folder.path().read_dir().unwrap().count(), 0);
    }

    #[test]
    fn what_a_killed_daemon_left_is_replaced() {
        let folder = tempfile::tempdir().unwrap();
        for name in ["socket", "~ocket", "s", "~"] {
            let path = folder.path().join(name);
            let early = early_path(&path);
            assert_ne!(early, path);
            assert_eq!(early.as_os_str().len(), path.as_os_str().len());
            drop(UnixListener::bind(&early).unwrap());
            drop(Claim::new(&path, 0o600).unwrap().listen().unwrap());
            assert!(!early.exists() && !path.exists(), "{name}");
        }
    }

    #[test]
    fn a_path_that_is_too_long_is_refused_with_its_length() {
        let path = Path::new("/tmp").join("x".repeat(150));
        let error = Claim::new(&path, 0o600).unwrap_err();
        let text = error.to_string();
        let expected = "socket path has 155 bytes; the limit is 107";
        assert!(text.ends_with(expected), "{text}");
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
