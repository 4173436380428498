//! The fetcher as a process of its own, and the process that keeps one running.
//!
//! ```text
//!  owner (a disk's daemon, or the node)         keeper                      fetcher
//!    Process::start ---- stdin: control socket --> run_keeper
//!                                                    | starts, and starts again --> run_fetcher
//!    Process::attach -- list of blobs, socket -----> | keeps both, hands them on -> Fetcher::attach
//!    client socket <==================== fetches, answers, descriptors ==========>
//! ```
//! The owner may enter a sandbox that starts no programs; the keeper stays outside of it, has no
//! network and parses nothing. It holds the fetcher's ends of the sockets, so that what a fetcher
//! did not read when it died is read by the next one. Both end when the owner closes its end of
//! the control socket. If the keeper dies before, the fetcher serves on until its disks are gone;
//! only a new one is not started then.
//!
//! Keeper and fetcher are this same program, told apart by the name they are called by;
//! so the binaries call [`run_if_asked`] before anything else. Neither ends by SIGINT or SIGTERM,
//! which a terminal or a service manager sends to all processes of a service: the disk still needs
//! them to finish its reads.

use std::ffi::CString;
use std::fs::File;
use std::io::{self, Read, Seek, Write};
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::ffi::OsStrExt;
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitCode, Stdio};
use std::sync::Arc;
use std::thread;
use std::time::{Duration, Instant};

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::fs::{MemfdFlags, memfd_create};
use serde::{Deserialize, Serialize};
use signal_hook::consts::{SIGINT, SIGTERM};
use thiserror::Error;

use super::sandbox::{self, Reach};
use super::{Download, Fetcher, Offer, Options, RegistryBlob, resolve};
use crate::cache::{self, Cache, Limits};
use crate::reason::reason;
use crate::registry::args::RegistryArgs;
use crate::registry::blob::BlobRef;
use crate::registry::client::Client;
use crate::registry::credentials::Source;
use crate::registry::repository::{self, Repository};
use crate::registry::service_config::{self, ServiceConfig};
use crate::source::RemoteBlob;
use crate::source::link::{self, Link, Message, Turn};
use crate::source::protocol::MESSAGE_LEN;

/// The running program, also if its file was replaced since.
pub const ITSELF: &str = "/proc/self/exe";

/// Names that this program is called by.
const KEEPER: &str = "ovbd-fetch-keeper";
const FETCHER: &str = "ovbd-fetcher";

/// Longest text that describes a configuration or a list of blobs.
pub(super) const MAX_TEXT: u64 = 4 << 20;

/// How long another process may take to read, or to end.
const PATIENCE: Duration = Duration::from_secs(2);

const TICK: Duration = Duration::from_millis(100);

/// Pauses between two starts of a fetcher.
const FIRST_PAUSE: Duration = Duration::from_millis(50);
const LONGEST_PAUSE: Duration = Duration::from_secs(5);

/// A fetcher that ran for so long did not fail at its start.
const SETTLED: Duration = Duration::from_secs(10);

/// What a fetcher needs to know.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Config {
    /// The cache directory.
    pub cache: PathBuf,
    /// How to reach registries. Files that are named here are read again by each new fetcher.
    pub registry: RegistryArgs,
    /// Whether the fetcher gives up what fetching does not need.
    pub sandbox: bool,
}

/// What a configuration leads to.
#[derive(Debug)]
pub(super) struct Access {
    pub(super) cache: Cache,
    pub(super) client: Client,
    service: ServiceConfig,
    reach: Option<Reach>,
}

impl Config {
    /// Opens the cache and prepares a client of registries.
    pub(super) fn open(&self) -> Result<Access, ProcessError> {
        let cache = Cache::open(&self.cache);
        let cache = cache.map_err(|error| ProcessError::Cache(Box::new(error)))?;
        let (options, service) = self.registry.clone().into_options()?;
        let reach = self.sandbox.then(|| Reach {
            cache: self.cache.clone(),
            credentials: match &options.credentials {
                Source::File(path) => vec![path.clone()],
                Source::None | Source::Service(_) => Vec::new(),
            },
        });
        let client = Client::new(options);
        let client = client.map_err(|error| ProcessError::Registry(Box::new(error)))?;
        Ok(Access {
            cache,
            client,
            service,
            reach,
        })
    }
}

impl Access {
    /// Enters the sandbox, if there is to be one. Call it while the process has one thread.
    pub(super) fn confine(&self) -> Result<(), ProcessError> {
        let entered = self.reach.as_ref().map(sandbox::enter).transpose();
        entered.map(|_| ()).map_err(ProcessError::Sandbox)
    }
}

/// The fetcher cannot be started or used.
#[derive(Debug, Error)]
pub enum ProcessError {
    /// The system refuses a process or a socket.
    #[error("cannot start the fetcher")]
    Start(#[source] io::Error),
    /// A URL of blobs is malformed.
    #[error(transparent)]
    Url(#[from] repository::Error),
    /// The service configuration cannot be used.
    #[error(transparent)]
    Service(#[from] service_config::Error),
    /// Registries cannot be used as configured.
    #[error("cannot reach registries")]
    Registry(#[source] Box<crate::registry::error::Error>),
    /// The cache cannot be used.
    #[error(transparent)]
    Cache(Box<cache::Error>),
    /// The fetcher's sandbox cannot be entered.
    #[error("cannot enter the fetcher's sandbox; only `ovbd-vhost` can disable it (--sandbox off)")]
    Sandbox(#[source] sandbox::Error),
    /// The text of a message is malformed.
    #[error("malformed message to the fetcher")]
    Message(#[from] serde_json::Error),
}

impl From<io::Error> for ProcessError {
    fn from(error: io::Error) -> Self {
        Self::Start(error)
    }
}

/// Wire form of what a disk process may ask for.
#[derive(Debug, Serialize, Deserialize)]
struct Attachment {
    blobs: Vec<Listed>,
    download: Option<Download>,
}

/// Wire form of a blob.
#[derive(Debug, Serialize, Deserialize)]
struct Listed {
    digest: String,
    size: Option<u64>,
    blobs_url: String,
}

/// A running fetcher. Ends when dropped.
#[derive(Debug)]
pub struct Process {
    // Dropped first: the keeper ends then.
    control: Control,
    keeper: Keeper,
}

/// The owner's end of the control socket. The fetcher ends when it is dropped, or when the process
/// that holds it ends.
#[derive(Debug)]
pub struct Control(OwnedFd);

impl Drop for Control {
    fn drop(&mut self) {
        let _ = rustix::net::shutdown(&self.0, rustix::net::Shutdown::Both);
    }
}

#[derive(Debug)]
struct Keeper(Child);

impl Drop for Keeper {
    fn drop(&mut self) {
        // It ends by itself; waiting only spares a zombie.
        let start = Instant::now();
        while start.elapsed() < PATIENCE && matches!(self.0.try_wait(), Ok(None)) {
            thread::sleep(Duration::from_millis(5));
        }
    }
}

impl Process {
    /// Checks the configuration, and starts a fetcher and its keeper. Both are `program`, whose
    /// `main` calls [`run_if_asked`]. Call it before the sandbox.
    ///
    /// # Errors
    /// A [`ProcessError`]: the cache or the configuration cannot be used, or the system refuses.
    pub fn start(program: &Path, config: &Config) -> Result<Self, ProcessError> {
        // Here, where it can be reported: the fetcher could only fail again and again.
        config.open()?;
        let (ours, theirs) = link::pair()?;
        let keeper = spawn(program, KEEPER, theirs, Stdio::null())?;
        let process = Self {
            control: Control(ours),
            keeper: Keeper(keeper),
        };
        send(&process.control.0, text(config)?, None)?;
        Ok(process)
    }

    /// Process number of the keeper, whose only child is the fetcher.
    pub fn keeper(&self) -> u32 {
        self.keeper.0.id()
    }

    /// Gives up the child process: a sandbox may not let its owner wait for it. It stays a zombie
    /// until the owner ends.
    pub fn into_control(self) -> Control {
        std::mem::forget(self.keeper);
        self.control
    }

    /// Lets a disk process ask for the blobs by their places in the list, and downloads them
    /// meanwhile if that is asked for; returns the disk's end of the connection.
    ///
    /// # Errors
    /// [`ProcessError::Start`] if the system refuses a socket, or the keeper is gone.
    pub fn attach(
        &self,
        blobs: &[Arc<RemoteBlob>],
        download: Option<Download>,
    ) -> Result<OwnedFd, ProcessError> {
        let blobs = blobs
            .iter()
            .map(|blob| Listed {
                digest: blob.digest.to_string(),
                size: blob.size,
                blobs_url: blob.blobs_url.clone(),
            })
            .collect();
        let (ours, theirs) = link::pair()?;
        let attachment = Attachment { blobs, download };
        send(&self.control.0, text(&attachment)?, Some(theirs))?;
        Ok(ours)
    }
}

/// Runs keeper, fetcher or resolver if this program was called by the name of one.
pub fn run_if_asked() -> Option<ExitCode> {
    let name = std::env::args_os().next()?;
    let run = match name.to_str()? {
        KEEPER => run_keeper,
        FETCHER => run_fetcher,
        resolve::NAME => resolve::run,
        _ => return None,
    };
    if let Ok(name) = CString::new(name.as_bytes()) {
        let _ = rustix::thread::set_name(&name);
    }
    // The control socket or the question. Its number is free again then: nothing else reads
    // standard input.
    let control = io::stdin().as_fd().try_clone_to_owned();
    Some(match control.map_err(ProcessError::Start).and_then(run) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            log::error!("{}", reason(&error));
            ExitCode::FAILURE
        }
    })
}

/// A message of the owner: a text in a file in memory, and for a list of blobs a socket.
struct Owned {
    text: OwnedFd,
    socket: Option<OwnedFd>,
}

impl Owned {
    fn new(message: Message) -> Option<Self> {
        let mut files = message.files.into_iter();
        let text = files.next()?;
        let socket = files.next();
        Some(Self { text, socket })
    }

    fn try_clone(&self) -> io::Result<Self> {
        Ok(Self {
            text: self.text.try_clone()?,
            socket: self.socket.as_ref().map(OwnedFd::try_clone).transpose()?,
        })
    }

    /// Whether the disk process closed its end.
    fn is_over(&self) -> bool {
        let Some(socket) = &self.socket else {
            return false;
        };
        let mut polled = [PollFd::new(socket, PollFlags::HUP)];
        let now = Timespec::default();
        poll(&mut polled, Some(&now)).is_ok() && polled[0].revents().contains(PollFlags::HUP)
    }

    fn read<T: for<'de> Deserialize<'de>>(&self) -> Result<T, ProcessError> {
        read(self.text.try_clone()?)
    }
}

/// Reads a text in a file in memory, from its start.
pub(super) fn read<T: for<'de> Deserialize<'de>>(text: OwnedFd) -> Result<T, ProcessError> {
    let mut file = File::from(text);
    file.rewind()?;
    let mut text = String::new();
    file.take(MAX_TEXT).read_to_string(&mut text)?;
    Ok(serde_json::from_str(&text)?)
}

/// Survives what a terminal or a service manager sends to all processes of a service.
fn ignore_signals() {
    for signal in [SIGINT, SIGTERM] {
        if let Err(error) = signal_hook::flag::register(signal, Arc::default()) {
            log::warn!("cannot ignore signal {signal}: {error}");
        }
    }
}

/// Starts fetchers, one after the other died, until the owner closes the control socket.
fn run_keeper(control: OwnedFd) -> Result<(), ProcessError> {
    ignore_signals();
    let control = Link::new(control)?;
    let mut kept: Vec<Owned> = Vec::new();
    let mut pause = FIRST_PAUSE;
    loop {
        let started = Instant::now();
        let (ours, theirs) = link::pair()?;
        let mut fetcher = spawn(Path::new(ITSELF), FETCHER, theirs, Stdio::null())?;
        for owned in &kept {
            // A fetcher that is gone is noticed below; its successor gets all that is kept.
            let _ = hand_on(&ours, owned);
        }
        let ended = loop {
            let mut received = Vec::new();
            let turn = control.turn(TICK, |message| received.extend(Owned::new(message)))?;
            for owned in received {
                let _ = hand_on(&ours, &owned);
                kept.push(owned);
            }
            kept.retain(|owned| !owned.is_over());
            match (turn, fetcher.try_wait()?) {
                (Turn::Ended, _) => break None,
                (Turn::Open, Some(status)) => break Some(status),
                (Turn::Open, None) => {}
            }
        };
        let Some(status) = ended else {
            drop(ours);
            fetcher.wait()?;
            return Ok(());
        };
        log::warn!("the fetcher ended ({status}); starting another");
        pause = match started.elapsed() > SETTLED {
            true => FIRST_PAUSE,
            false => (pause * 2).min(LONGEST_PAUSE),
        };
        thread::sleep(pause);
    }
}

/// Serves disk processes until the keeper closes the control socket.
fn run_fetcher(control: OwnedFd) -> Result<(), ProcessError> {
    ignore_signals();
    let control = Link::new(control)?;
    let mut messages = Vec::new();
    let mut turn = Turn::Open;
    while messages.is_empty() && turn == Turn::Open {
        turn = control.turn(TICK, |message| messages.extend(Owned::new(message)))?;
    }
    let mut messages = messages.into_iter();
    let Some(first) = messages.next() else {
        return Ok(());
    };
    let config: Config = first.read()?;
    let access = config.open()?;
    access.confine()?;
    let client = Arc::new(access.client);
    let options = options(&access.service);
    let statuses = Arc::clone(client.statuses());
    let fetcher = Fetcher::start(access.cache, options, statuses)?;
    let mut waiting: Vec<_> = messages.collect();
    loop {
        for owned in waiting.drain(..) {
            if let Err(error) = attach(&fetcher, &client, owned) {
                log::error!("the fetcher cannot serve a daemon: {}", reason(&error));
            }
        }
        let turn = control.turn(TICK, |message| waiting.extend(Owned::new(message)))?;
        if turn == Turn::Ended {
            break;
        }
    }
    // The keeper may have been killed: the disks do not suffer from it.
    while fetcher.has_connections() {
        thread::sleep(TICK);
    }
    fetcher.leave();
    Ok(())
}

/// Options of a fetcher as the service configuration has them.
fn options(service: &ServiceConfig) -> Options {
    let default = Options::default();
    let concurrency = service.prefetch_concurrency.map(|count| count as usize);
    Options {
        limits: Limits {
            bytes: service.cache_size.unwrap_or(u64::MAX),
            ..Limits::default()
        },
        // The threads of a replay are those of all that nothing waits for.
        other_threads: concurrency.unwrap_or(default.other_threads),
        first_request: service.refill_size,
        ..default
    }
}

fn attach(fetcher: &Fetcher, client: &Arc<Client>, owned: Owned) -> Result<(), ProcessError> {
    let Attachment { blobs, download } = owned.read()?;
    let Some(socket) = owned.socket else {
        return Ok(());
    };
    let mut offers = Vec::new();
    for blob in blobs {
        let malformed = |error: &dyn std::error::Error| {
            ProcessError::Start(io::Error::other(error.to_string()))
        };
        let digest = blob.digest.parse().map_err(|error| malformed(&error))?;
        let repository = Repository::from_blob_url(&blob.blobs_url)?;
        let size = blob.size;
        let found = BlobRef {
            repository,
            digest,
            size,
        };
        offers.push(Offer {
            digest,
            len: size,
            origin: Arc::new(RegistryBlob::new(Arc::clone(client), found)),
        });
    }
    Ok(fetcher.attach(socket, offers, download)?)
}

/// Starts a program, called by this name, with a socket or file as its standard input.
pub(super) fn spawn(
    program: &Path,
    name: &str,
    input: OwnedFd,
    output: Stdio,
) -> Result<Child, ProcessError> {
    let mut command = Command::new(program);
    command.arg0(name).stdin(Stdio::from(input)).stdout(output);
    Ok(command.spawn()?)
}

/// A text in a file in memory.
pub(super) fn text<T: Serialize>(value: &T) -> Result<OwnedFd, ProcessError> {
    let memory = memfd_create("fetch", MemfdFlags::CLOEXEC).map_err(io::Error::from)?;
    let mut file = File::from(memory);
    file.write_all(&serde_json::to_vec(value)?)?;
    Ok(file.into())
}

fn hand_on(control: &OwnedFd, owned: &Owned) -> Result<(), ProcessError> {
    let Owned { text, socket } = owned.try_clone()?;
    send(control, text, socket)
}

/// Sends a text, and a socket, in a packet of its own.
fn send(control: &OwnedFd, text: OwnedFd, socket: Option<OwnedFd>) -> Result<(), ProcessError> {
    let files: Vec<OwnedFd> = std::iter::once(text).chain(socket).collect();
    Ok(link::send_once(
        control,
        &[0; MESSAGE_LEN],
        &files,
        PATIENCE,
    )?)
}
