//! The fetcher as a process of its own, and the process that keeps one running.
//!
//! ```text
//!  owner (a disk's daemon, or a tool)           keeper.rs                   server.rs
//!    Process::start ---- stdin: control socket --> run
//!                                                    | starts, and starts again --> run
//!    Process::attach -- list of blobs, socket -----> | keeps and passes on -------> Fetcher::attach
//!    resolve() -------- reference, socket ---------> | keeps and passes on -------> image_lookup::find
//!    client socket <==================== fetches, answers, descriptors ==========>
//! ```
//! The owner may enter a sandbox that starts no programs; the keeper stays outside of it, has no
//! network and parses nothing. It holds the fetcher's ends of the sockets, so that what a fetcher
//! did not read when it died is read by the next one. The keeper has a standby, which holds the same and
//! takes its place if it is killed. All end when no owner has its control socket open and no disk its
//! connection: a disk needs no control socket once it is attached.
//!
//! The fetcher also resolves references to images: what it learned of the registry to get the manifest
//! (how to log in, the token, open connections) serves the first request for a layer. A process of its
//! own for this would have to hand tokens on, and pay for each round trip again. The owner reads a short,
//! checked list of layers, and never what a registry wrote.
//!
//! Disks of a host may share one fetcher ([`Process::share`]): their daemons connect to a socket at which the
//! keeper listens.
//!
//! Keeper, standby and fetcher are this same program, told apart by the name they are called by;
//! so the binaries call [`run_if_asked`] before anything else. None ends by SIGINT or SIGTERM,
//! which a terminal or a service manager sends to all processes of a service: the disk still needs
//! them to finish its reads.

mod held;
mod keeper;
mod message;
mod resolver;
mod server;
mod shared;

use std::ffi::{CString, OsStr};
use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitCode, Stdio};
use std::sync::Arc;
use std::thread;
use std::time::{Duration, Instant};

use serde::{Deserialize, Serialize};
use signal_hook::consts::{SIGHUP, SIGINT, SIGTERM};
use thiserror::Error;

use super::download::Download;
use super::sandbox::{self, Reach};
use crate::cache::{self, Cache};
use crate::logging;
use crate::reason::reason;
use crate::registry::args::RegistryArgs;
use crate::registry::client::Client;
use crate::registry::credential_source::Source;
use crate::registry::credentials;
use crate::registry::reference::Reference;
use crate::registry::repository;
use crate::registry::service_config::{self, ServiceConfig};
use crate::source::RemoteBlob;
use crate::source::link;
use message::{Listed, Order};

pub(super) use message::MAX_TEXT;

/// The running program, also if its file was replaced since.
pub const ITSELF: &str = "/proc/self/exe";

/// Names that this program is called by.
const KEEPER: &str = "ovbd-fetch-keeper";
const STANDBY: &str = "ovbd-fetch-standby";
const FETCHER: &str = "ovbd-fetcher";

/// How long another process may take to end.
const PATIENCE: Duration = Duration::from_secs(2);

const TICK: Duration = Duration::from_millis(100);

/// Configuration of a fetcher.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Config {
    /// The cache directory.
    pub cache: PathBuf,
    /// How to reach registries. Files that are named here are read again by each new fetcher.
    pub registry: RegistryArgs,
    /// Whether the fetcher enters its sandbox.
    pub sandbox: bool,
}

/// The cache and the client that a configuration describes.
#[derive(Debug)]
struct Access {
    cache: Cache,
    client: Client,
    service: ServiceConfig,
    reach: Option<Reach>,
}

impl Config {
    /// Reads what is named, to report here what the fetcher could only fail at again and again.
    fn check(&self) -> Result<(), ProcessError> {
        self.open_cache()?;
        let (options, service) = self.registry.clone().into_options()?;
        Client::check(&options).map_err(|error| ProcessError::Registry(Box::new(error)))?;
        options.credentials.check()?;
        service.report_ignored();
        Ok(())
    }

    fn open_cache(&self) -> Result<Cache, ProcessError> {
        let cache = Cache::open(&self.cache);
        cache.map_err(|error| ProcessError::Cache(Box::new(error)))
    }

    /// Opens the cache and prepares a client of registries.
    fn open(&self) -> Result<Access, ProcessError> {
        let cache = self.open_cache()?;
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
    fn confine(&self) -> Result<(), ProcessError> {
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
    /// The file of credentials cannot be used.
    #[error("cannot use the credentials")]
    Credentials(#[from] credentials::Error),
    /// Registries cannot be used as configured.
    #[error("cannot reach registries")]
    Registry(#[source] Box<crate::registry::error::Error>),
    /// The cache cannot be used.
    #[error(transparent)]
    Cache(Box<cache::Error>),
    /// The fetcher's sandbox cannot be entered.
    #[error("cannot enter the fetcher's sandbox; only `ovbd-vhost` can disable it (--sandbox off)")]
    Sandbox(#[source] sandbox::Error),
    /// Other users could listen in the directory of a shared fetcher.
    #[error(
        "the directory {} of the shared fetcher belongs to user {owner} and has mode {mode:o}; expected user \
         {user} and write access for no other",
        path.display()
    )]
    Directory {
        /// The directory.
        path: PathBuf,
        /// Its owner.
        owner: u32,
        /// Its permissions.
        mode: u32,
        /// The user of this process.
        user: u32,
    },
    /// The text of a message is malformed.
    #[error("malformed message to the fetcher")]
    Message(#[from] serde_json::Error),
}

impl From<io::Error> for ProcessError {
    fn from(error: io::Error) -> Self {
        Self::Start(error)
    }
}

/// A running fetcher. Ends when it is dropped and no disk is attached any more.
#[derive(Debug)]
pub struct Process {
    // Dropped first: the keeper ends then.
    control: Control,
    /// The keeper, if this process started it.
    keeper: Option<Keeper>,
    registry: RegistryArgs,
}

/// The owner's end of the control socket. The fetcher ends when it was dropped and no disk is attached any
/// more.
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
        config.check()?;
        let (ours, theirs) = link::pair()?;
        let cache = Some(config.cache.as_os_str());
        let keeper = command(program, KEEPER, cache, theirs).spawn()?;
        let process = Self {
            control: Control(ours),
            keeper: Some(Keeper(keeper)),
            registry: config.registry.clone(),
        };
        message::send(&process.control.0, config, None)?;
        Ok(process)
    }

    /// Process number of the keeper, whose children are the fetcher and the standby; `None` if another process started it.
    pub fn keeper(&self) -> Option<u32> {
        self.keeper.as_ref().map(|keeper| keeper.0.id())
    }

    /// Detaches from the child process: a sandbox may forbid its owner to wait for it. It stays a zombie
    /// until the owner ends.
    pub fn into_control(self) -> Control {
        std::mem::forget(self.keeper);
        self.control
    }

    /// Lets go of a fetcher that serves attached disks: it ends with the last of them.
    pub fn detach(self) {
        drop(self.into_control());
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
        let blobs = blobs.iter().map(|blob| Listed {
            digest: blob.digest.to_string(),
            size: blob.size,
            blobs_url: blob.blobs_url.clone(),
        });
        let blobs = blobs.collect();
        let (ours, theirs) = link::pair()?;
        let order = Order::Attach { blobs, download };
        message::send(&self.control.0, &order, Some(theirs))?;
        Ok(ours)
    }

    /// Lets the fetcher find the layers of an image; returns the stream with its answer.
    pub(super) fn ask_for_image(
        &self,
        reference: &Reference,
        patience: Duration,
    ) -> Result<UnixStream, ProcessError> {
        let (ours, theirs) = UnixStream::pair()?;
        let reference = reference.to_string();
        let order = Order::Resolve {
            reference,
            patience,
        };
        message::send(&self.control.0, &order, Some(theirs.into()))?;
        Ok(ours)
    }

    /// How registries are reached.
    pub(super) fn registry(&self) -> &RegistryArgs {
        &self.registry
    }
}

/// Runs keeper, standby or fetcher if this program was called by the name of one.
pub fn run_if_asked() -> Option<ExitCode> {
    let name = std::env::args_os().next()?;
    let name = name.to_str()?;
    let run = match name {
        KEEPER => keeper::run,
        STANDBY => keeper::run_standby,
        FETCHER => server::run,
        _ => return None,
    };
    set_name(name);
    // The control socket. Its number is free again then: nothing else reads standard input.
    let control = io::stdin().as_fd().try_clone_to_owned();
    Some(match control.map_err(ProcessError::Start).and_then(run) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            log::error!("{}", reason(&error));
            ExitCode::FAILURE
        }
    })
}

/// Ignores the signals that a terminal or a service manager sends to all processes of a service.
fn ignore_signals() {
    // A session that ends may have others of its disks elsewhere; the processes end with the last disk.
    for signal in [SIGHUP, SIGINT, SIGTERM] {
        if let Err(error) = signal_hook::flag::register(signal, Arc::default()) {
            log::warn!("cannot ignore signal {signal}: {error}");
        }
    }
}

/// Names the process, as lists of processes show it.
fn set_name(name: &str) {
    if let Ok(name) = CString::new(name) {
        let _ = rustix::thread::set_name(&name);
    }
}

/// The command that starts a program, called by this name, with a socket as its standard input. The argument is
/// for people who list processes.
fn command(program: &Path, name: &str, argument: Option<&OsStr>, input: OwnedFd) -> Command {
    let mut command = Command::new(program);
    command.arg0(name).args(argument).stdin(Stdio::from(input));
    logging::pass_format(&mut command);
    command.stdout(Stdio::null());
    command
}
