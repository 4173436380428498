//! One disk: its entry, its process, and the operations on it.
//!
//! ```text
//! starting ── listening ⇄ (process ends, started again) ── failed (5 ends within 60 s)
//!                 │                                           │
//!                 └──────────────── deleting ─────────────────┘── gone
//! ```

mod recovery;
mod view;

use std::os::unix::net::UnixListener;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use serde::Serialize;
use tokio::sync::Mutex as AsyncMutex;

use super::counters::Counters;
use super::crashes::Crashes;
use super::entry::Entry;
use super::error::{Code, Error, Failure};
use super::events::{Events, Kind};
use super::fd_store::FdStore;
use super::id::DiskId;
use super::launch::{Launcher, bind};
use super::process::Process;
use super::spec::DiskSpec;
use super::state_dir::StateDir;
use crate::daemon::handover::Ready;
use crate::ratelimited_log;
use crate::reason::reason;

/// How long the process may take to finish what is in flight.
pub const STOP_LIMIT: Duration = Duration::from_secs(10);

/// State of a disk.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum State {
    /// Its process was started and is not ready yet.
    Starting,
    /// It serves its socket.
    Listening,
    /// It cannot be served; `error` has the reason.
    Failed,
    /// It is being removed.
    Deleting,
}

impl State {
    /// All states.
    pub const ALL: [Self; 4] = [
        Self::Starting,
        Self::Listening,
        Self::Failed,
        Self::Deleting,
    ];

    /// The word in answers and metrics.
    pub fn word(self) -> &'static str {
        match self {
            Self::Starting => "starting",
            Self::Listening => "listening",
            Self::Failed => "failed",
            Self::Deleting => "deleting",
        }
    }
}

/// State of a disk that can change.
#[derive(Debug)]
struct Status {
    /// Absent for a disk whose entry is damaged.
    entry: Option<Entry>,
    state: State,
    error: Option<String>,
    known: Known,
}

/// Values that the process of a disk reports once it serves.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Known {
    /// Size of the disk in bytes.
    pub size: Option<u64>,
    /// Serial number.
    pub serial: Option<String>,
}

impl From<Ready> for Known {
    fn from(ready: Ready) -> Self {
        Self {
            size: Some(ready.size_bytes),
            serial: Some(ready.serial),
        }
    }
}

/// Services of the node that all disks share.
#[derive(Debug)]
pub struct Services {
    /// Where entries are kept.
    pub state: StateDir,
    /// Starts processes.
    pub launcher: Launcher,
    /// Keeps listening sockets while no node runs.
    pub fd_store: FdStore,
    /// Reports changes to clients.
    pub events: Events,
    /// Counters of the node.
    pub counters: Counters,
}

/// A disk.
#[derive(Debug)]
pub struct Disk {
    id: DiskId,
    /// Held by the operation under way; reading the state does not take it.
    operation: AsyncMutex<()>,
    status: Mutex<Status>,
    process: Mutex<Option<Arc<Process>>>,
    /// `None` if the process of a former node does not give it, until the process ends.
    listener: Mutex<Option<UnixListener>>,
    stopping: AtomicBool,
    /// Whether the node itself ends the process, to replace it.
    replacing: AtomicBool,
    /// Restarts after a crash.
    crashes: AtomicU64,
    /// Restarts that a client asked for.
    replacements: AtomicU64,
}

impl Disk {
    /// A disk that is not served yet.
    pub fn new(entry: Entry) -> Self {
        let id = entry.id.clone();
        Self::with(
            id,
            Status {
                entry: Some(entry),
                state: State::Starting,
                error: None,
                known: Known::default(),
            },
        )
    }

    /// A disk whose entry is damaged. It can only be removed.
    pub fn damaged(id: DiskId, reason: String) -> Self {
        Self::with(
            id,
            Status {
                entry: None,
                state: State::Failed,
                error: Some(reason),
                known: Known::default(),
            },
        )
    }

    fn with(id: DiskId, status: Status) -> Self {
        Self {
            id,
            operation: AsyncMutex::default(),
            status: Mutex::new(status),
            process: Mutex::default(),
            listener: Mutex::default(),
            stopping: AtomicBool::new(false),
            replacing: AtomicBool::new(false),
            crashes: AtomicU64::new(0),
            replacements: AtomicU64::new(0),
        }
    }

    /// Returns its name.
    pub fn id(&self) -> &DiskId {
        &self.id
    }

    /// Returns its state.
    pub fn state(&self) -> State {
        self.status().state
    }

    /// Returns its entry, unless that is damaged.
    pub fn entry(&self) -> Option<Entry> {
        self.status().entry.clone()
    }

    /// Returns the generation of its entry; 0 if that is damaged.
    pub fn generation(&self) -> u64 {
        let status = self.status();
        status.entry.as_ref().map_or(0, |entry| entry.generation)
    }

    /// Checks that its process can be asked.
    ///
    /// # Errors
    /// [`Code::Starting`] while it starts; [`Code::Conflict`] if it failed; [`Code::NotFound`] while it is removed.
    pub fn check_served(&self) -> Result<(), Failure> {
        let id = &self.id;
        let status = self.status();
        let (code, text) = match status.state {
            State::Listening => return Ok(()),
            State::Starting => (
                Code::Starting,
                format!("the process of disk {id} is starting; try again"),
            ),
            State::Failed => {
                let reason = status.error.as_deref().unwrap_or("unknown");
                (
                    Code::Conflict,
                    format!("disk {id} has failed; restart or remove it: {reason}"),
                )
            }
            State::Deleting => (Code::NotFound, format!("disk {id} is being removed")),
        };
        Err(Failure::new(code, text))
    }

    /// Returns whether it uses the directory `upper` or the socket `socket`: the name of what it uses.
    pub fn uses(&self, upper: Option<&PathBuf>, socket: &Path) -> Option<&'static str> {
        let status = self.status();
        let entry = status.entry.as_ref()?;
        match upper.is_some() && entry.upper.as_ref() == upper {
            true => Some("the writable layer's directory"),
            false => (entry.socket == *socket).then_some("the socket"),
        }
    }

    /// Returns the size in bytes, once its process has reported it.
    pub fn size(&self) -> Option<u64> {
        self.status().known.size
    }

    /// Returns how often its process was started again.
    pub fn restarts(&self) -> u64 {
        self.restarts_by_reason()
            .map(|(_, count)| count)
            .iter()
            .sum()
    }

    /// Returns the restarts of its process by their reason.
    pub fn restarts_by_reason(&self) -> [(&'static str, u64); 2] {
        [
            ("crash", self.crashes.load(Ordering::Relaxed)),
            ("request", self.replacements.load(Ordering::Relaxed)),
        ]
    }

    /// Locked by operations, one after the other.
    pub async fn operation(&self) -> tokio::sync::MutexGuard<'_, ()> {
        self.operation.lock().await
    }

    /// Replaces the specification, which changes the generation, durably.
    ///
    /// # Errors
    /// The state directory cannot be written; the disk stays as it is.
    pub async fn set_spec(&self, spec: DiskSpec, services: &Services) -> Result<(), Error> {
        let Some(mut entry) = self.entry() else {
            return Ok(());
        };
        entry.spec = spec;
        entry.generation += 1;
        services.state.store(&entry).await?;
        self.status().entry = Some(entry);
        Ok(())
    }

    /// Records another size.
    pub fn set_size(&self, size: u64) {
        self.status().known.size = Some(size);
    }

    /// Binds the socket, starts the process, and makes the entry durable.
    ///
    /// # Errors
    /// The failure of a step; then no process runs and no entry is left.
    pub async fn create(&self, services: &Services) -> Result<(), Failure> {
        let Some(entry) = self.entry() else {
            return Ok(());
        };
        let listener = bind(&entry)?;
        let undo = |failure: Failure| {
            services.launcher.clean(&entry.id, &entry.socket);
            failure
        };
        let started = services.launcher.start(&entry, &listener).await;
        let (process, ready) = started.map_err(undo)?;
        let entry = self.serve_with(process, ready);
        if let Err(error) = self.store(entry, services).await {
            self.stopping.store(true, Ordering::Relaxed);
            self.stop_process().await;
            // It may be there if only the directory could not be synced.
            let _ = services.state.remove_entry(&self.id);
            return Err(undo(error.into()));
        }
        services.fd_store.keep(&self.id, &listener);
        *self.listener() = Some(listener);
        self.serves();
        services.events.add(&self.id, Kind::Added, None);
        Ok(())
    }

    /// Records the process that serves the disk from now on. Returns the entry that names it.
    fn serve_with(&self, process: Process, ready: Ready) -> Option<Entry> {
        let mut status = self.status();
        status.known = ready.into();
        if let Some(entry) = &mut status.entry {
            entry.process = Some(process.identity().clone());
        }
        *self.process() = Some(Arc::new(process));
        self.replacing.store(false, Ordering::Relaxed);
        status.entry.clone()
    }

    /// Marks the disk as served.
    fn serves(&self) {
        let mut status = self.status();
        (status.state, status.error) = (State::Listening, None);
    }

    async fn store(&self, entry: Option<Entry>, services: &Services) -> Result<(), Error> {
        match entry {
            Some(entry) => services.state.store(&entry).await,
            None => Ok(()),
        }
    }

    /// Stores the entry of a disk that is served. A disk does not wait for the storage to be served again.
    async fn store_if_possible(&self, entry: Option<Entry>, services: &Services) {
        if let Err(error) = self.store(entry, services).await {
            // As when the storage is full. The next node finds the process by its control socket.
            let (id, reason) = (&self.id, reason(&error));
            ratelimited_log::error(format_args!(
                "disk {id} is served again, but its state entry is that of before: {reason}"
            ));
        }
    }

    /// Starts a process on the listener of the former one, or on a new one. Returns the entry that names it.
    async fn start_again(&self, services: &Services) -> Result<Option<Entry>, Failure> {
        let Some(entry) = self.entry() else {
            return Ok(None);
        };
        let kept = self.listener().take();
        let listener = match kept {
            Some(listener) => listener,
            None => {
                let listener = bind(&entry)?;
                services.fd_store.keep(&self.id, &listener);
                listener
            }
        };
        let started = services.launcher.start(&entry, &listener).await;
        // Kept after a failure too: front-ends wait in its backlog.
        *self.listener() = Some(listener);
        let (process, ready) = started?;
        Ok(self.serve_with(process, ready))
    }

    /// Watches the process, and starts it again when it ends, until the disk is stopped or fails.
    pub async fn watch(self: Arc<Self>, services: Arc<Services>) {
        let mut crashes = Crashes::default();
        // Why the process could not be started, if a limit of the system was reached.
        let mut refused = None;
        loop {
            let Some(process) = self.process().clone() else {
                return;
            };
            process.ended().await;
            if self.stopping.load(Ordering::Relaxed) {
                return;
            }
            self.status().state = State::Starting;
            let asked = self.replacing.swap(false, Ordering::Relaxed);
            if !asked {
                let pause = crashes.add(Instant::now(), refused.is_some());
                let reason = refused.take();
                let reason = reason.unwrap_or_else(|| services.launcher.reason(&self.id));
                let (id, pid) = (&self.id, process.identity().pid);
                ratelimited_log::warn(format_args!("disk {id}: process {pid} ended: {reason}"));
                match pause {
                    Some(pause) => tokio::time::sleep(pause).await,
                    None => return self.fail(&services, reason),
                }
            }
            let _operation = self.operation().await;
            if self.stopping.load(Ordering::Relaxed) {
                return;
            }
            match self.start_again(&services).await {
                Ok(entry) => {
                    let counter = match asked {
                        true => &self.replacements,
                        false => &self.crashes,
                    };
                    counter.fetch_add(1, Ordering::Relaxed);
                    self.serves();
                    services.events.add(&self.id, Kind::Restarted, None);
                    self.store_if_possible(entry, &services).await;
                }
                Err(failure) if failure.code.may_pass() => refused = Some(failure.text),
                Err(failure) => return self.fail(&services, failure.text),
            }
        }
    }

    /// Marks the disk as failed: closes its listener, keeps its entry.
    fn fail(&self, services: &Services, reason: String) {
        ratelimited_log::error(format_args!("disk {} failed: {reason}", self.id));
        *self.process() = None;
        *self.listener() = None;
        services.fd_store.forget(&self.id);
        let mut status = self.status();
        (status.state, status.error) = (State::Failed, Some(reason.clone()));
        drop(status);
        services.events.add(&self.id, Kind::Failed, Some(reason));
    }

    /// Replaces the process by a new one: the old one drains first, and the watcher starts the next. Does nothing while
    /// a process is being started.
    pub async fn restart(&self) {
        let process = self.process().clone();
        if let Some(process) = process
            && self.state() == State::Listening
        {
            self.replacing.store(true, Ordering::Relaxed);
            process.stop(STOP_LIMIT).await;
        }
    }

    /// Stops the process and removes the disk. Files of the writable layer stay.
    ///
    /// # Errors
    /// The state directory cannot be written; the disk stays, and the request can be repeated.
    pub async fn remove(&self, services: &Services) -> Result<(), Error> {
        match services.state.mark(&self.id).await {
            // A removal makes room. A node that is killed before its end finds the disk as it was.
            Err(error) if error.is_full() => ratelimited_log::warn(format_args!(
                "disk {}: removal without a mark: {}",
                self.id,
                reason(&error)
            )),
            marked => marked?,
        }
        self.stopping.store(true, Ordering::Relaxed);
        self.status().state = State::Deleting;
        self.stop_process().await;
        if self.entry().is_none() {
            services.launcher.end_unknown(&self.id).await;
        }
        *self.listener() = None;
        services.fd_store.forget(&self.id);
        services
            .counters
            .retire(&services.launcher.figures(&self.id));
        let socket = match self.entry() {
            Some(entry) => entry.socket,
            None => services.launcher.socket(&self.id),
        };
        services.launcher.clean(&self.id, &socket);
        services.state.remove_entry(&self.id)?;
        services.state.remove_mark(&self.id)?;
        services.events.add(&self.id, Kind::Removed, None);
        Ok(())
    }

    async fn stop_process(&self) {
        let process = self.process().take();
        if let Some(process) = process {
            process.stop(STOP_LIMIT).await;
        }
    }

    fn status(&self) -> MutexGuard<'_, Status> {
        self.status.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn listener(&self) -> MutexGuard<'_, Option<UnixListener>> {
        self.listener.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn process(&self) -> MutexGuard<'_, Option<Arc<Process>>> {
        self.process.lock().unwrap_or_else(PoisonError::into_inner)
    }
}
