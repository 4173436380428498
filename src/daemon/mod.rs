//! The `ovbd-vhost` daemon: serves one disk, from the parsed command line to the final flush.
//!
//! [`run`] opens the layers (`sources`) and finds the writable layer (`writable_files`). It claims the socket
//! ([`listener`]) or takes the one that the service manager passed ([`activation`]), enters the [`sandbox`], and loads
//! the disk (`device`). Then it listens, starts the control API ([`control`]), reports that it is ready ([`notify`]),
//! and accepts front-ends ([`accept`]) until a signal ends it.

pub mod accept;
pub mod activation;
pub mod config;
pub mod control;
mod device;
pub mod error;
mod fetching;
pub mod handover;
pub mod limits;
pub mod listener;
pub mod notify;
mod record;
pub mod recorder;
mod remote;
mod replay;
pub mod sandbox;
mod sources;
mod tables;
mod trace_source;
mod writable_files;

use std::fs::File;
use std::io::Write;
use std::os::fd::OwnedFd;
use std::os::unix::net::UnixListener;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, OnceLock};

use signal_hook::consts::{SIGINT, SIGTERM};

pub use config::Config;
pub use error::Error;

use sd_notify::NotifyState;
use serde_json::{Value, json};

use crate::engine::ring::Rings;
use crate::engine::stats::{DiskCell, StatsPage};
use crate::format::download::Download;
use crate::image::config::{ImageConfig, Stack, TracePath};
use crate::io::heap;
use crate::io::regular::open_regular;
use crate::io::sigbus;
use crate::io::signal_event;
use crate::ratelimited_log;
use crate::reason::reason;
use crate::registry::reference::Reference;
use crate::vhost::handler::Offered;
use crate::writable::Paths;
use crate::writable::journal;
use config::ImageSource;
use control::Control;
use device::{Device, DeviceParts};
use handover::Handover;
use limits::SystemLimits;
use listener::{Claim, Listener};
use notify::Manager;
use record::Recording;
use sandbox::privileges::{self, Identity};
use sandbox::{Reach, Sandbox};
use sources::Sources;
use tables::Tables;
use trace_source::{Trace, TraceSource};
use writable_files::WritableFiles;

/// Permissions of the control socket: access for its owner only.
const CONTROL_MODE: u32 = 0o600;

/// Serves one disk until SIGTERM or SIGINT; a second signal ends the process at once.
///
/// # Errors
///
/// [`Error`] if something cannot be opened, bound or confined, or does not end in time after a signal.
pub fn run(config: Config) -> Result<(), Error> {
    let (passed, node) = match config.started_by_node {
        true => {
            let handover = Handover::take().map_err(Error::Handover)?;
            (Some(handover.listener), Some(handover.node))
        }
        false => (activation::take()?, None),
    };
    let (started, result) = match &config.image {
        ImageSource::Layers(layers) => {
            let wanted = Wanted::Stack(Stack::new(layers), None, None, None);
            (start(&config, wanted, passed), None)
        }
        ImageSource::Reference(reference) => {
            (start(&config, Wanted::Image(reference), passed), None)
        }
        ImageSource::Config(path) => {
            let image = ImageConfig::load(path).map_err(Error::ImageConfig)?;
            // Created with the starter's rights, and written inside the sandbox.
            let result = image.result_file().map(ResultFile::create).transpose()?;
            let parts = image.stack_and_upper().map_err(Error::ImageConfig);
            let start = |(stack, upper)| {
                let trace = image.trace().map_err(Error::ImageConfig)?;
                let wanted = Wanted::Stack(stack, upper, image.download(), trace);
                start(&config, wanted, passed)
            };
            (parts.and_then(start), result)
        }
    };
    if let Some(result) = result {
        result.report(started.as_ref().err())?;
    }
    let Started {
        device,
        socket,
        control, // removes its path at the end
        recording,
        signals,
        manager,
    } = started?;
    manager.tell(&NotifyState::Ready);
    if let Some(node) = node {
        handover::report(node, &device.ready()).map_err(Error::NoNode)?;
    }
    let path = config.socket.as_deref();
    let volume = device.volume();
    log::info!(
        "serving {} layers, {} bytes, {} segments on {}",
        volume.image().layers().len(),
        volume.size(),
        volume.image().index().len(),
        path.map_or("the passed socket".into(), Path::to_string_lossy)
    );
    heap::trim();
    let served = accept::serve(&socket, control.as_ref(), &device, &signals, &manager);
    let recorded = recording.map_or(Ok(()), |recording| recording.finish(&device));
    served.and(recorded)
}

/// Returns the feature bits that disks of this program offer, as JSON. A program that offers fewer than another must not
/// take its place under a connected front-end.
pub fn offered_features() -> Value {
    json!({ "read_only": Offered::of(false), "writable": Offered::of(true) })
}

/// A disk that is ready to serve, with its sockets.
struct Started {
    device: Arc<Device>,
    socket: Arc<Listener>,
    control: Option<Arc<Control>>,
    recording: Option<Arc<Recording>>,
    signals: Arc<OwnedFd>,
    manager: Manager,
}

/// Image to serve.
enum Wanted<'a> {
    /// Layers; and the writable layer, the background download and the trace that an image config names.
    Stack(
        Stack,
        Option<Paths>,
        Option<&'a Download>,
        Option<TracePath>,
    ),
    /// An image in a registry.
    Image(&'a Reference),
}

/// The layers before the daemon changes its user.
enum Layers<'a> {
    Open(Sources),
    Named(&'a Reference),
}

/// Opens the files, enters the sandbox, parses the files, and listens.
fn start(
    config: &Config,
    wanted: Wanted<'_>,
    passed: Option<UnixListener>,
) -> Result<Started, Error> {
    let (layers, download, trace) = open_layers(config, wanted)?;
    let (trace, recording) = prepare_trace(config, trace)?;
    // Upstream's recordings have no download beside them.
    let off = Download::default();
    let download = recording.as_ref().map_or(download, |_| Some(&off));
    let stats = open_stats(config)?;
    let rings = device::make_rings(config.rings());
    let starting = Arc::new(AtomicBool::new(true));
    let signals = signals(&starting)?;
    let manager = Manager::connect();
    change_user(config)?;
    let sources = match layers {
        Layers::Open(sources) => sources,
        Layers::Named(reference) => Sources::resolve(config, reference)?,
    };
    let sources = sources.connect(config, download)?;
    let tables = Tables::find(recording.is_some(), &sources);
    let sources = sources.with_tables(tables.found());
    let upper = sources.upper();
    upper.map(WritableFiles::create_directory).transpose()?;
    // A socket may lie in the directory of the writable layer. Both lock that directory: the
    // claim for a moment, the writable files until the layer is open.
    let sockets = Sockets::claim(config, passed)?;
    let writable = upper.map(WritableFiles::find).transpose()?;
    let limits = SystemLimits::measure();
    limits.check_memory(config.queues(), writable.is_some())?;
    let writes = writable.is_some() || tables.are_wanted();
    let (files, recorded) = (writable.as_ref(), recording.as_ref());
    let sandbox = enter(config, &sockets, files, recorded, writes, &rings)?;
    let parts = DeviceParts {
        sources,
        writable,
        rings,
        record: recording.is_some(),
        stats,
    };
    let mut device = Device::load(config, parts, &limits)?;
    device.start_serving();
    starting.store(false, Ordering::Relaxed);
    let (socket, control) = sockets.listen()?;
    sandbox.map_or(Ok(()), Sandbox::tighten)?;
    let trace = trace.or(device.take_trace().map(TraceSource::Layer));
    let device = Arc::new(device);
    tables.write(Arc::clone(&device));
    let recording = start_trace(trace, recording, &device);
    let socket = Arc::new(socket);
    let control = control.map(|listener| Control::new(listener, socket.clone(), &device));
    Ok(Started {
        device,
        socket,
        control,
        recording,
        signals,
        manager,
    })
}

/// Returns the trace that is replayed, or the recording of one.
fn prepare_trace(
    config: &Config,
    trace: Option<Trace>,
) -> Result<(Option<TraceSource>, Option<Recording>), Error> {
    Ok(match (&config.remote.record, trace) {
        (Some(path), _) => (None, Some(Recording::create(path)?)),
        (None, Some(Trace::Record(path, file))) => {
            (None, Some(Recording::configured(&path, file)?))
        }
        (None, Some(Trace::Replay(source))) => (Some(source), None),
        (None, None) => (None, None),
    })
}

/// Starts the replay of the trace, unless reads are recorded: a replay would be recorded as reads.
fn start_trace(
    trace: Option<TraceSource>,
    recording: Option<Recording>,
    device: &Arc<Device>,
) -> Option<Arc<Recording>> {
    let recording = recording.map(Arc::new);
    match (&recording, trace) {
        (Some(recording), _) => Recording::watch(recording, device),
        (None, Some(trace)) => trace.start(Arc::clone(device)),
        (None, None) => {}
    }
    recording
}

/// Opens the statistics page, and counts in it the log lines that are left out and the faults in mapped files.
fn open_stats(config: &Config) -> Result<Arc<StatsPage>, Error> {
    let stats = match &config.stats {
        Some(path) => StatsPage::open(path)?,
        None => StatsPage::anonymous()?,
    };
    let counted = stats.clone();
    ratelimited_log::count_with(move || counted.count(DiskCell::LogDropped));
    // The handler of SIGBUS counts as long as the process runs.
    static KEPT: OnceLock<Arc<StatsPage>> = OnceLock::new();
    let kept = KEPT.get_or_init(|| stats.clone());
    let faults = kept.cell(DiskCell::Faults);
    sigbus::count_in(faults, kept.cell(DiskCell::WatchedRanges));
    Ok(stats)
}

/// Opens local layers and traces, with the rights of the starter. Registries are contacted later, as the daemon's
/// user.
fn open_layers<'a>(
    config: &Config,
    wanted: Wanted<'a>,
) -> Result<(Layers<'a>, Option<&'a Download>, Option<Trace>), Error> {
    let (layers, download, trace) = match wanted {
        Wanted::Stack(stack, upper, download, trace) => {
            let layers = Layers::Open(Sources::open(config, &stack, upper)?);
            (layers, download, trace)
        }
        Wanted::Image(reference) => (Layers::Named(reference), None, None),
    };
    let trace = Trace::open(config.remote.prefetch.as_deref(), trace.as_ref())?;
    Ok((layers, download, trace))
}

/// Switches to the user that the command line names. Sockets and writable layers belong to that user.
fn change_user(config: &Config) -> Result<(), Error> {
    if config.sandbox {
        privileges::bound().map_err(sandbox::Error::Privileges)?;
    }
    if let Some(user) = &config.user {
        Identity::find(user, config.group.as_deref())?.assume()?;
    }
    Ok(())
}

/// Enters the sandbox, unless the command line disables it. `writes` says whether open files are written
/// to. `recorded` creates and removes files at its end.
fn enter(
    config: &Config,
    sockets: &Sockets,
    writable: Option<&WritableFiles>,
    recorded: Option<&Recording>,
    writes: bool,
    rings: &Rings,
) -> Result<Option<Sandbox>, Error> {
    // Cached, because the sandbox allows no access to it.
    let _ = journal::boot_id();
    let (mut directories, links) = writable.map_or_else(Default::default, |writable| {
        (writable.paths().directories(), writable.paths().links())
    });
    directories.extend(recorded.and_then(Recording::directory));
    let reach = Reach {
        sockets: &sockets.directories(),
        directories: &directories,
        files: &links,
        write: writes,
        rings: rings.made() > 0,
        ..Reach::default()
    };
    let sandbox = config.sandbox.then(|| Sandbox::enter(&reach));
    Ok(sandbox.transpose()?)
}

/// The sockets of a daemon that does not listen yet.
struct Sockets {
    guest: GuestSocket,
    control: Option<Claim>,
}

enum GuestSocket {
    Claimed(Claim),
    Passed(Listener),
}

impl Sockets {
    /// Claims the paths of the sockets, as the daemon's user.
    fn claim(config: &Config, passed: Option<UnixListener>) -> Result<Sockets, Error> {
        let control = config.control.as_ref();
        let control = control.map(|path| Claim::new(path, CONTROL_MODE));
        let guest = match (passed, &config.socket) {
            (Some(socket), named) => {
                GuestSocket::Passed(Listener::passed(socket, named.as_deref())?)
            }
            (None, Some(path)) => GuestSocket::Claimed(Claim::new(path, config.socket_mode)?),
            (None, None) => return Err(Error::NoSocket),
        };
        let control = control.transpose()?;
        Ok(Sockets { guest, control })
    }

    /// Listens on all of them.
    fn listen(self) -> Result<(Listener, Option<Listener>), Error> {
        let control = self.control.map(Claim::listen).transpose()?;
        let guest = match self.guest {
            GuestSocket::Passed(socket) => socket,
            GuestSocket::Claimed(claim) => claim.listen()?,
        };
        Ok((guest, control))
    }

    /// Returns the directories in which sockets are bound, and removed at the end.
    fn directories(&self) -> Vec<PathBuf> {
        let guest = match &self.guest {
            GuestSocket::Claimed(claim) => Some(claim),
            GuestSocket::Passed(_) => None,
        };
        let claims = guest.into_iter().chain(&self.control);
        claims.map(|claim| claim.directory().to_owned()).collect()
    }
}

/// Returns an eventfd that becomes readable at the first SIGTERM or SIGINT. A second signal ends the process at once; so
/// does the first one while `starting` is set, because a start may wait for a registry.
fn signals(starting: &Arc<AtomicBool>) -> Result<Arc<OwnedFd>, Error> {
    let catch = || -> std::io::Result<Arc<OwnedFd>> {
        let event = signal_event::new()?;
        let asked = Arc::new(AtomicBool::new(false));
        for signal in [SIGTERM, SIGINT] {
            signal_hook::flag::register_conditional_shutdown(signal, 0, starting.clone())?;
            // In this order: the first signal finds the flag cleared, and sets it.
            signal_hook::flag::register_conditional_shutdown(signal, 1, asked.clone())?;
            signal_hook::flag::register(signal, asked.clone())?;
            signal_event::signal(signal, event.clone())?;
        }
        // A write beyond RLIMIT_FSIZE must fail with EFBIG, and not end the process.
        signal_hook::flag::register(libc::SIGXFSZ, Arc::default())?;
        Ok(event)
    };
    catch().map_err(Error::Signals)
}

/// The `resultFile` of an image config.
struct ResultFile {
    path: PathBuf,
    file: File,
}

impl ResultFile {
    /// Creates the file, or empties an existing one.
    fn create(path: PathBuf) -> Result<Self, Error> {
        let mut options = File::options();
        options.write(true).create(true);
        let opened = open_regular(&path, options).and_then(|file| {
            file.set_len(0)?;
            Ok(file)
        });
        match opened {
            Ok(file) => Ok(Self { path, file }),
            Err(source) => Err(Error::ResultFile { path, source }),
        }
    }

    /// Writes `success` or `failed:<reason>`. Scripts search the reason for upstream's words.
    fn report(mut self, failure: Option<&Error>) -> Result<(), Error> {
        let text = match failure {
            None => "success".to_owned(),
            Some(error) => match error.upstream_words() {
                None => format!("failed:{}", reason(error)),
                Some(words) => format!("failed:{words}: {}", reason(error)),
            },
        };
        let path = self.path;
        let written = self.file.write_all(text.as_bytes());
        written.map_err(|source| Error::ResultFile { path, source })
    }
}
