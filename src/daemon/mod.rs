//! The `ovbd-vhost` daemon: from command line to running device.
//!
//! [`run`] opens the image and what is written above it (`device`), binds the socket ([`listener`]) or
//! takes the one passed to it ([`activation`]), gives up what it does not need any more
//! ([`sandbox`]), says that it is ready ([`notify`]), answers who controls it ([`control`]) and
//! serves one front-end after the other ([`accept`]) until a signal ends it.

pub mod accept;
pub mod activation;
pub mod config;
pub mod control;
mod device;
pub mod error;
pub mod listener;
pub mod notify;
pub mod sandbox;

use std::fs::File;
use std::io::Write;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::AtomicBool;
use std::time::Instant;

use signal_hook::consts::{SIGINT, SIGTERM};

pub use config::Config;
pub use error::Error;

use sd_notify::NotifyState;

use crate::engine::Disk;
use crate::image::config::{Config as ImageConfig, Stack};
use crate::reason::reason;
use config::ImageSource;
use listener::Listener;
use notify::Manager;
use sandbox::privileges::{self, Identity};

/// Permissions of the control socket: its owner's only.
const CONTROL_MODE: u32 = 0o600;

/// Serves one device until SIGTERM or SIGINT; a second signal ends the process at once.
///
/// # Errors
///
/// The image cannot be opened or the socket not be bound, or reads did not end after a signal;
/// [`Error`] says which and why.
pub fn run(config: Config) -> Result<(), Error> {
    let passed = activation::take()?;
    let open = |config: &Config, stack: &Stack, upper| {
        let device = device::open(config, stack, upper)?;
        // A signal that comes while they are set up is lost: nobody knows of us before the socket.
        let signals = signals()?;
        // Bound last: who can connect will be served.
        Ok((device, signals, listen(config, passed)?))
    };
    let opened = match &config.image {
        ImageSource::Layers(layers) => open(&config, &Stack::new(layers), None),
        ImageSource::Config(path) => {
            let image = ImageConfig::load(path).map_err(Error::ImageConfig)?;
            // Made by whoever starts us: `open` may make us somebody else.
            let result = image.result_file().map(ResultFile::create).transpose()?;
            let parts = image.stack_and_upper().map_err(Error::ImageConfig);
            let opened = parts.and_then(|(stack, upper)| open(&config, &stack, upper));
            if let Some(result) = result {
                result.report(opened.as_ref().err())?;
            }
            opened
        }
    };
    let (device, signals, Sockets { guest, control }) = opened?;
    let disk = device.disk.clone();
    let manager = Manager::connect();
    if config.sandbox {
        let start = Instant::now();
        let sockets = [Some(&guest), control.as_ref()].into_iter().flatten();
        let removable: Vec<_> = sockets.filter_map(Listener::directory).collect();
        sandbox::enter(&removable, &upper_directories(&disk))?;
        log::debug!("entered the sandbox in {:?}", start.elapsed());
    }
    if let Some(control) = &control {
        control::start(control, device).map_err(Error::Control)?;
    }
    manager.tell(&NotifyState::Ready);
    let socket = config.socket.as_deref();
    log::info!(
        "serving {} layers, {} bytes, {} segments on {}",
        disk.volume.image().layers().len(),
        disk.volume.size(),
        disk.volume.image().index().len(),
        socket.map_or("the passed socket".into(), Path::to_string_lossy)
    );
    accept::serve(&guest, &disk, &signals, &manager)
}

/// The directories in which files of writable layers are replaced while they are served.
fn upper_directories(disk: &Disk) -> Vec<PathBuf> {
    let uppers = disk.volume.uppers();
    let files = uppers
        .iter()
        .flat_map(|upper| [&upper.paths().data, &upper.paths().index]);
    files
        .filter_map(|file| file.parent())
        .map(|parent| match parent.as_os_str().is_empty() {
            true => PathBuf::from("."),
            false => parent.to_owned(),
        })
        .collect()
}

/// What the daemon listens on.
struct Sockets {
    guest: Listener,
    control: Option<Listener>,
}

/// Becomes who the daemon is to be and listens: the sockets belong to that user from their first
/// moment, and can be removed at the end.
fn listen(config: &Config, passed: Option<UnixListener>) -> Result<Sockets, Error> {
    if config.sandbox {
        privileges::bound().map_err(sandbox::Error::Privileges)?;
    }
    if let Some(user) = &config.user {
        Identity::find(user, config.group.as_deref())?.assume()?;
    }
    let control = config.control.as_ref();
    let control = control.map(|path| Listener::bind(path, CONTROL_MODE));
    let guest = match (passed, &config.socket) {
        (Some(socket), named) => Listener::passed(socket, named.as_deref()),
        (None, Some(path)) => Listener::bind(path, config.socket_mode),
        (None, None) => Err(Error::NoSocket),
    };
    Ok(Sockets {
        control: control.transpose()?,
        guest: guest?,
    })
}

/// A stream that becomes readable when a signal asks the daemon to end. A second signal does not
/// ask.
fn signals() -> Result<UnixStream, Error> {
    let pipe = || -> std::io::Result<UnixStream> {
        let (read, write) = UnixStream::pair()?;
        let asked = Arc::new(AtomicBool::new(false));
        for signal in [SIGTERM, SIGINT] {
            // In this order: the first signal finds the flag down and raises it.
            signal_hook::flag::register_conditional_shutdown(signal, 1, asked.clone())?;
            signal_hook::flag::register(signal, asked.clone())?;
            signal_hook::low_level::pipe::register(signal, write.try_clone()?)?;
        }
        // A file as long as we may make it is an error of the write, and not our end.
        signal_hook::flag::register(libc::SIGXFSZ, Arc::default())?;
        Ok(read)
    };
    pipe().map_err(Error::Signals)
}

/// The file an image config wants to be told in.
struct ResultFile {
    path: PathBuf,
    file: File,
}

impl ResultFile {
    fn create(path: PathBuf) -> Result<Self, Error> {
        match File::create(&path) {
            Ok(file) => Ok(Self { path, file }),
            Err(source) => Err(Error::ResultFile { path, source }),
        }
    }

    /// Writes `success` or `failed:<reason>`.
    fn report(mut self, failure: Option<&Error>) -> Result<(), Error> {
        let text = match failure {
            None => "success".to_owned(),
            Some(error) => format!("failed:{}", reason(error)),
        };
        let path = self.path;
        let written = self.file.write_all(text.as_bytes());
        written.map_err(|source| Error::ResultFile { path, source })
    }
}
