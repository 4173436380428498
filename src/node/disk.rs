//! One disk: its entry, its process, and the operations on it.
//!
//! ```text
//! starting ── listening ⇄ (process ends, started again) ── failed (5 ends within 60 s)
//!                 │                                           │
//!                 └──────────────── deleting ─────────────────┘── gone
//! ```

mod view;

use std::os::unix::net::UnixListener;
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
use super::id::DiskId;
use super::launch::{Launcher, bind};
use super::process::Process;
use super::spec::DiskSpec;
use super::state_dir::StateDir;
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

/// Services of the node that all disks share.
#[derive(Debug)]
pub struct Services {
    /// Where entries are kept.
    pub state: StateDir,
    /// Starts processes.
    pub launcher: Launcher,
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
    /// `None` after a restart of the node, until the process ends.
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
    pub fn set_spec(&self, spec: DiskSpec, services: &Services) -> Result<(), Error> {
        let Some(mut entry) = self.entry() else {
            return Ok(());
        };
        entry.spec = spec;
        entry.generation += 1;
        services.state.store(&entry)?;
        self.status().entry = Some(entry);
        Ok(())
    }

    /// Records the values that its process reported.
    pub fn learn(&self, known: Known) {
        self.status().known = known;
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
        services.launcher.end_stray(&entry.id).await;
        let listener = bind(&entry)?;
        let undo = |failure: Failure| {
            services.launcher.clean(&entry.id, &entry.socket);
            failure
        };
        let process = services
            .launcher
            .start(&entry, &listener)
            .await
            .map_err(undo)?;
        let stored = self.serve_with(process, Some(listener), services);
        if let Err(error) = stored {
            self.stopping.store(true, Ordering::Relaxed);
            self.stop_process().await;
            return Err(undo(error.into()));
        }
        services.events.add(&self.id, Kind::Added, None);
        Ok(())
    }

    /// Takes over the process that a former node started, or starts one.
    pub async fn recover(&self, services: &Services) {
        let Some(entry) = self.entry() else { return };
        let found = entry.process.as_ref();
        let found = match found.and_then(|found| services.launcher.find(found)) {
            Some(process) => Some(process),
            // The entry names an earlier process if it could not be written after a restart of the disk.
            None => services.launcher.serving(&self.id).await,
        };
        if let Some(process) = found {
            *self.process() = Some(Arc::new(process));
            self.status().state = State::Listening;
            services.events.add(&self.id, Kind::Found, None);
            return;
        }
        services.launcher.end_stray(&self.id).await;
        if let Err(failure) = self.start_again(services).await {
            self.fail(services, failure.text);
        }
    }

    /// Finds the process of a disk whose removal a killed node did not finish.
    pub fn recover_removal(&self, services: &Services) {
        let identity = self.entry().and_then(|entry| entry.process);
        *self.process() = identity
            .and_then(|found| services.launcher.find(&found))
            .map(Arc::new);
    }

    /// Records the process that serves the disk from now on, also in the entry.
    fn serve_with(
        &self,
        process: Process,
        listener: Option<UnixListener>,
        services: &Services,
    ) -> Result<(), Error> {
        let mut entry = self.entry();
        if let Some(entry) = &mut entry {
            entry.process = Some(process.identity().clone());
        }
        *self.process() = Some(Arc::new(process));
        self.replacing.store(false, Ordering::Relaxed);
        if listener.is_some() {
            *self.listener.lock().unwrap_or_else(PoisonError::into_inner) = listener;
        }
        let Some(entry) = entry else { return Ok(()) };
        let stored = services.state.store(&entry);
        let mut status = self.status();
        (status.entry, status.state, status.error) = (Some(entry), State::Listening, None);
        stored
    }

    /// Starts a process on the listener of the former one, or on a new one.
    async fn start_again(&self, services: &Services) -> Result<(), Failure> {
        let Some(entry) = self.entry() else {
            return Ok(());
        };
        let kept = self
            .listener
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .take();
        let listener = match kept {
            Some(listener) => listener,
            None => bind(&entry)?,
        };
        let started = services.launcher.start(&entry, &listener).await;
        // Kept after a failure too: front-ends wait in its backlog.
        *self.listener.lock().unwrap_or_else(PoisonError::into_inner) = Some(listener);
        if let Err(error) = self.serve_with(started?, None, services) {
            // As when the storage is full. The next node finds the process by its control socket.
            let (id, reason) = (&self.id, reason(&error));
            ratelimited_log::error(format_args!(
                "disk {id} is served again, but its state entry is that of before: {reason}"
            ));
        }
        Ok(())
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
                Ok(()) => {
                    let counter = match asked {
                        true => &self.replacements,
                        false => &self.crashes,
                    };
                    counter.fetch_add(1, Ordering::Relaxed);
                    services.events.add(&self.id, Kind::Restarted, None);
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
        *self.listener.lock().unwrap_or_else(PoisonError::into_inner) = None;
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
        let mut entry = self.entry();
        if let Some(entry) = &mut entry {
            entry.deleting = true;
            match services.state.store(entry) {
                // A removal makes room. A node that is killed before its end finds the disk as it was.
                Err(error) if error.is_full() => {
                    ratelimited_log::warn(format_args!(
                        "disk {}: removal without a mark: {}",
                        self.id,
                        reason(&error)
                    ));
                }
                stored => stored?,
            }
        }
        self.stopping.store(true, Ordering::Relaxed);
        self.status().state = State::Deleting;
        self.stop_process().await;
        *self.listener.lock().unwrap_or_else(PoisonError::into_inner) = None;
        services
            .counters
            .retire(&services.launcher.figures(&self.id));
        let socket = entry.map_or_else(|| services.launcher.socket(&self.id), |entry| entry.socket);
        services.launcher.clean(&self.id, &socket);
        services.state.remove(&self.id)?;
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

    fn process(&self) -> MutexGuard<'_, Option<Arc<Process>>> {
        self.process.lock().unwrap_or_else(PoisonError::into_inner)
    }
}
