//! A fetcher that several disks of a host share: its socket, and its first start.
//!
//! ```text
//!  DIR/CONFIGURATION.sock    owners connect here; the keeper listens
//!  DIR/CONFIGURATION.lock    held while a keeper is started: two disks that start at once share one
//!  DIR/CONFIGURATION.log     standard error of keeper and fetcher
//! ```
//! The names contain a digest of the configuration and of the program: disks with other credentials, or of
//! another version, share another fetcher. The first disk starts the keeper, which outlives that disk, and ends
//! with the last one. A keeper greets each owner: one that does not, because it was about to end, is replaced.

use std::fs::{self, DirBuilder, File, Permissions};
use std::io;
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::os::unix::fs::{DirBuilderExt, MetadataExt, OpenOptionsExt, PermissionsExt};
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::thread;
use std::time::{Duration, Instant};

use rustix::io::Errno;
use rustix::net::{
    AddressFamily, SocketAddrUnix, SocketFlags, SocketType, bind, connect, listen, socket_with,
};

use super::{Config, Control, KEEPER, Process, ProcessError, command, link, message};
use crate::format::digest::Digest;
use crate::source::link::{Link, Turn};

/// How long another disk may take to start the keeper, and a keeper to greet.
const PATIENCE: Duration = Duration::from_secs(10);
const TICK: Duration = Duration::from_millis(10);

/// Owners that wait to be greeted.
const BACKLOG: i32 = 1024;

/// Digits of the digest in names.
const NAME_LEN: usize = 16;

/// The files of one shared fetcher.
struct Place {
    /// The directory, open: the path of a socket in it may be too long for the system.
    directory: File,
    path: PathBuf,
    name: String,
}

impl Process {
    /// Connects to the fetcher that disks with this configuration share by `directory`, which is made if it is
    /// missing; starts one if there is none. Keeper and fetcher are `program`, whose `main` calls
    /// [`run_if_asked`](super::run_if_asked). Call it before the sandbox.
    ///
    /// # Errors
    /// As [`Process::start`].
    pub fn share(program: &Path, config: &Config, directory: &Path) -> Result<Self, ProcessError> {
        config.check()?;
        let place = Place::open(directory, config)?;
        let with = |control| Self {
            control: Control(control),
            // It outlives this process: its end is not waited for.
            keeper: None,
            registry: config.registry.clone(),
        };
        if let Some(control) = place.connect()? {
            return Ok(with(control));
        }
        let _lock = place.lock()?;
        // Another disk may have started it meanwhile.
        if let Some(control) = place.connect()? {
            return Ok(with(control));
        }
        let listener = place.listen()?;
        let (ours, theirs) = link::pair()?;
        let mut command = command(program, KEEPER, Some(config.cache.as_os_str()), theirs);
        // A signal to the disk's terminal is not for it.
        command.stderr(place.log()?).process_group(0);
        command.spawn()?;
        message::send(&ours, config, Some(listener))?;
        Ok(with(ours))
    }
}

impl Place {
    fn open(directory: &Path, config: &Config) -> Result<Self, ProcessError> {
        let mut builder = DirBuilder::new();
        builder.recursive(true).mode(0o700).create(directory)?;
        let opened = File::open(directory)?;
        let found = opened.metadata()?;
        let user = rustix::process::geteuid().as_raw();
        // Another user could listen there, and send wrong bytes.
        if found.uid() != user || found.mode() & 0o022 != 0 {
            return Err(ProcessError::Directory {
                path: directory.to_owned(),
                owner: found.uid(),
                mode: found.mode() & 0o777,
                user,
            });
        }
        let program = fs::metadata(super::ITSELF)?;
        let program = (program.dev(), program.ino(), program.mtime_nsec());
        let text = serde_json::to_vec(&(config, program))?;
        let mut name = Digest::of(&text).hex();
        name.truncate(NAME_LEN);
        Ok(Self {
            directory: opened,
            path: directory.to_owned(),
            name,
        })
    }

    fn file(&self, extension: &str) -> PathBuf {
        self.path.join(format!("{}.{extension}", self.name))
    }

    /// Address of the socket, by way of the open directory.
    fn address(&self) -> Result<SocketAddrUnix, ProcessError> {
        let directory = self.directory.as_fd().as_raw_fd();
        let path = format!("/proc/self/fd/{directory}/{}.sock", self.name);
        Ok(SocketAddrUnix::new(path).map_err(io::Error::from)?)
    }

    fn socket() -> io::Result<OwnedFd> {
        let (family, kind) = (AddressFamily::UNIX, SocketType::SEQPACKET);
        let flags = SocketFlags::CLOEXEC | SocketFlags::NONBLOCK;
        Ok(socket_with(family, kind, flags, None)?)
    }

    /// The control socket of a keeper that serves; `None` if there is none.
    fn connect(&self) -> Result<Option<OwnedFd>, ProcessError> {
        let address = self.address()?;
        let start = Instant::now();
        let socket = loop {
            let socket = Self::socket()?;
            match connect(&socket, &address) {
                Ok(()) => break socket,
                Err(Errno::NOENT | Errno::CONNREFUSED) => return Ok(None),
                // The backlog is full.
                Err(Errno::AGAIN | Errno::INTR) if start.elapsed() < PATIENCE => {
                    thread::sleep(TICK);
                }
                Err(errno) => return Err(io::Error::from(errno).into()),
            }
        };
        let link = Link::new(socket.try_clone()?)?;
        let mut is_greeted = false;
        while !is_greeted {
            match link.turn(TICK, |_| is_greeted = true) {
                Ok(Turn::Open) if start.elapsed() < PATIENCE => {}
                Ok(Turn::Open) => return Err(io::Error::from(io::ErrorKind::TimedOut).into()),
                Ok(Turn::Ended) | Err(_) => return Ok(is_greeted.then_some(socket)),
            }
        }
        Ok(Some(socket))
    }

    /// Waits for the right to start a keeper.
    fn lock(&self) -> Result<File, ProcessError> {
        let mut options = File::options();
        let options = options.read(true).write(true).create(true).mode(0o600);
        let file = options.open(self.file("lock"))?;
        let start = Instant::now();
        while file.try_lock().is_err() {
            if start.elapsed() > PATIENCE {
                return Err(io::Error::from(io::ErrorKind::TimedOut).into());
            }
            thread::sleep(TICK);
        }
        Ok(file)
    }

    /// Binds the socket. The caller holds the lock, and found that no keeper listens.
    fn listen(&self) -> Result<OwnedFd, ProcessError> {
        match fs::remove_file(self.file("sock")) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(error.into()),
            _ => {}
        }
        let socket = Self::socket()?;
        bind(&socket, &self.address()?).map_err(io::Error::from)?;
        fs::set_permissions(self.file("sock"), Permissions::from_mode(0o600))?;
        listen(&socket, BACKLOG).map_err(io::Error::from)?;
        Ok(socket)
    }

    fn log(&self) -> Result<File, ProcessError> {
        let mut options = File::options();
        let options = options.append(true).create(true).mode(0o600);
        let file = options.open(self.file("log"))?;
        file.set_len(0)?;
        Ok(file)
    }
}
