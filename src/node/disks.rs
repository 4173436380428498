//! The set of disks, and the operations of requests on it.

mod ask;
mod replace;

use std::collections::BTreeMap;
use std::io;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use serde_json::{Map, Value, json};
use tokio::sync::Mutex as AsyncMutex;

use super::allow::AllowedDirs;
use super::clock;
use super::condition::Condition;
use super::counters::Counters;
use super::disk::{Disk, Services, State};
use super::entry::{Entry, VERSION};
use super::error::{Code, Error, Failure};
use super::events::{Events, Kind};
use super::fd_store::FdStore;
use super::id::DiskId;
use super::launch::Launcher;
use super::shown_label::ShownLabel;
use super::spec::{Content, DiskSpec, Origin, Requested};
use super::state_dir::{StateDir, StoredEntry};
use crate::engine::stats::figures::Figures;
use crate::ratelimited_log;
use crate::tool::ctl::Ask;

/// Longest wait for a front-end to disconnect, and pause between two looks.
const MAX_LEAVE: Duration = Duration::from_secs(60);
const LEAVE_PERIOD: Duration = Duration::from_millis(50);

/// All disks of the node.
#[derive(Debug)]
pub struct Disks {
    services: Arc<Services>,
    allowed: AllowedDirs,
    shown_labels: Vec<ShownLabel>,
    disks: Mutex<BTreeMap<DiskId, Arc<Disk>>>,
    /// Held while all disk processes are replaced.
    reloading: Arc<AsyncMutex<()>>,
}

/// Result of a `PUT`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Put {
    /// A new disk.
    Created,
    /// A disk of the same specification exists.
    Unchanged,
}

impl Disks {
    /// No disks yet.
    pub fn new(
        state: StateDir,
        launcher: Launcher,
        fd_store: FdStore,
        allowed: AllowedDirs,
        shown_labels: Vec<ShownLabel>,
    ) -> Self {
        let events = Events::default();
        Self {
            services: Arc::new(Services {
                state,
                launcher,
                fd_store,
                events,
                counters: Counters::default(),
            }),
            allowed,
            shown_labels,
            disks: Mutex::default(),
            reloading: Arc::default(),
        }
    }

    /// Finds the disks of the state directory: takes over running processes, starts the others, and finishes removals.
    ///
    /// # Errors
    /// [`Error::File`] if the directory cannot be read. A disk that cannot be served fails alone.
    pub async fn recover(self: Arc<Self>) -> Result<(), Error> {
        let found = self.services.state.load()?;
        let known = found.iter().map(|stored| stored.id().clone()).collect();
        let mut processes = self.services.launcher.end_strays(&known).await?;
        self.services.fd_store.close_others(&known);
        for stored in found {
            let left = processes.remove(stored.id()).unwrap_or_default();
            match stored {
                StoredEntry::Damaged(id, reason) => {
                    log::error!("disk {id}: {reason}");
                    self.insert(Arc::new(Disk::damaged(id, reason)));
                }
                StoredEntry::Valid(entry) => {
                    let disk = Arc::new(Disk::new(*entry));
                    self.insert(disk.clone());
                    tokio::spawn(self.clone().recover_one(disk, left));
                }
                StoredEntry::Removing(id, entry) => {
                    let disk = Arc::new(match entry {
                        Some(entry) => Disk::new(*entry),
                        None => Disk::damaged(id, "the disk is being removed".to_owned()),
                    });
                    self.insert(disk.clone());
                    tokio::spawn(self.clone().finish_removal(disk, left));
                }
            }
        }
        Ok(())
    }

    async fn recover_one(self: Arc<Self>, disk: Arc<Disk>, left: Vec<i32>) {
        let operation = disk.operation().await;
        disk.recover(&left, &self.services).await;
        drop(operation);
        if disk.state() == State::Listening {
            tokio::spawn(disk.watch(self.services.clone()));
        }
    }

    /// Removes a disk whose removal an earlier node has begun.
    async fn finish_removal(self: Arc<Self>, disk: Arc<Disk>, left: Vec<i32>) {
        let _operation = disk.operation().await;
        disk.recover_removal(&left, &self.services).await;
        match disk.remove(&self.services).await {
            Ok(()) => drop(self.lock().remove(disk.id())),
            Err(error) => ratelimited_log::error(format_args!(
                "disk {}: cannot complete the removal: {error}",
                disk.id()
            )),
        }
    }

    /// Creates the disk `id`, unless it exists.
    ///
    /// # Errors
    /// [`Code::Conflict`] if another disk has that name; [`Code::Changed`] if `condition` does not hold; those of
    /// [`DiskSpec::check`] and of the start.
    pub async fn put(
        self: &Arc<Self>,
        id: &DiskId,
        spec: DiskSpec,
        condition: &Condition,
    ) -> Result<(Put, Arc<Disk>), Failure> {
        let checked = spec.check(&self.allowed)?;
        if let Some(found) = self.find_when_idle(id).await {
            return compare(found, &spec, condition);
        }
        condition.check(None)?;
        let content = match checked.requested {
            Requested::Files(content) => content,
            Requested::Snapshot(origin) => self.fork(&origin).await?,
        };
        let socket = checked
            .socket
            .unwrap_or_else(|| self.services.launcher.socket(id));
        self.services.launcher.check_paths(id, &socket)?;
        let disk = Arc::new(Disk::new(Entry {
            version: VERSION,
            id: id.clone(),
            generation: 1,
            spec: spec.clone(),
            content,
            upper: checked.upper.clone(),
            socket: socket.clone(),
            process: None,
            created: clock::now(),
        }));
        let operation = disk.operation().await;
        if self
            .claim(&disk, checked.upper.as_ref(), &socket)?
            .is_some()
        {
            // Another request was faster: its result decides.
            return match self.find_when_idle(id).await {
                Some(found) => compare(found, &spec, condition),
                None => Err(Failure::new(
                    Code::Conflict,
                    format!("disk {id} was created and removed by another request; retry"),
                )),
            };
        }
        let made = disk.create(&self.services).await;
        drop(operation);
        match made {
            Ok(()) => {
                tokio::spawn(disk.clone().watch(self.services.clone()));
                Ok((Put::Created, disk))
            }
            Err(failure) => {
                self.lock().remove(id);
                Err(failure)
            }
        }
    }

    /// Performs the checks of [`Disks::put`] and makes nothing.
    ///
    /// # Errors
    /// Those of [`Disks::put`], other than those of the start.
    pub fn validate(
        &self,
        id: &DiskId,
        spec: &DiskSpec,
        condition: &Condition,
    ) -> Result<(), Failure> {
        let checked = spec.check(&self.allowed)?;
        if let Some(found) = self.find(id) {
            return compare(found, spec, condition).map(drop);
        }
        condition.check(None)?;
        if let Requested::Snapshot(origin) = &checked.requested {
            self.get(&origin.disk)?.check_served()?;
        }
        let launcher = &self.services.launcher;
        let socket = checked.socket.unwrap_or_else(|| launcher.socket(id));
        launcher.check_paths(id, &socket)?;
        check_unused(&self.lock(), checked.upper.as_ref(), &socket)
    }

    /// Checks a condition of a request that leaves the generation of the disk `id` as it is.
    ///
    /// # Errors
    /// [`Code::NotFound`]; [`Code::Changed`].
    pub fn check(&self, id: &DiskId, condition: &Condition) -> Result<(), Failure> {
        condition.check(Some(self.get(id)?.generation()))
    }

    /// Adds a new disk under its name. Returns the disk that has the name already.
    fn claim(
        &self,
        disk: &Arc<Disk>,
        upper: Option<&PathBuf>,
        socket: &Path,
    ) -> Result<Option<Arc<Disk>>, Failure> {
        let mut disks = self.lock();
        if let Some(found) = disks.get(disk.id()) {
            return Ok(Some(found.clone()));
        }
        check_unused(&disks, upper, socket)?;
        disks.insert(disk.id().clone(), disk.clone());
        Ok(None)
    }

    /// Removes the disk `id`. Waits up to `patience` for the front-end to disconnect.
    ///
    /// # Errors
    /// [`Code::NotFound`]; [`Code::InUse`] while a front-end is connected, unless `force` is set; [`Code::Changed`] if
    /// `condition` does not hold.
    pub async fn delete(
        &self,
        id: &DiskId,
        force: bool,
        patience: Duration,
        condition: &Condition,
    ) -> Result<(), Failure> {
        let disk = self.get(id)?;
        condition.check(Some(disk.generation()))?;
        let end = Instant::now() + patience.min(MAX_LEAVE);
        while !force && self.in_use(&disk).is_some() && Instant::now() < end {
            tokio::time::sleep(LEAVE_PERIOD).await;
        }
        let _operation = disk.operation().await;
        self.check_current(&disk)?;
        condition.check(Some(disk.generation()))?;
        if !force && let Some(text) = self.in_use(&disk) {
            return Err(Failure::new(Code::InUse, text));
        }
        disk.remove(&self.services).await?;
        self.lock().remove(id);
        Ok(())
    }

    /// Checks that the disk was not removed while an operation waited for another.
    fn check_current(&self, disk: &Arc<Disk>) -> Result<(), Failure> {
        let found = self.find(disk.id());
        match found.is_some_and(|found| Arc::ptr_eq(&found, disk)) {
            true => Ok(()),
            false => Err(not_found(disk.id())),
        }
    }

    /// Returns why the disk cannot be removed: a front-end is connected.
    fn in_use(&self, disk: &Disk) -> Option<String> {
        let figures = self.figures(disk);
        let front_end = match disk.entry() {
            Some(_) => disk.view(&figures)["front_end"].take(),
            // A process that this node does not know may serve the disk.
            None => figures.front_end(),
        };
        let front_end = Some(front_end).filter(|peer| !peer.is_null())?;
        let pid = front_end.get("pid").cloned().unwrap_or_default();
        Some(format!(
            "a front-end (process {pid}) is connected to disk {}; disconnect the front-end, or use ?force=true",
            disk.id()
        ))
    }

    /// Changes limits, labels or the trace of the disk `id` by a merge patch. A changed trace is used at the next start
    /// of the disk's process.
    ///
    /// # Errors
    /// [`Code::NotFound`]; [`Code::Changed`]; those of [`DiskSpec::patched`]; what the disk process reports. The change is durable before
    /// the disk process gets it.
    pub async fn patch(
        &self,
        id: &DiskId,
        patch: Map<String, Value>,
        condition: &Condition,
    ) -> Result<Arc<Disk>, Failure> {
        let disk = self.get(id)?;
        let _operation = disk.operation().await;
        self.check_current(&disk)?;
        condition.check(Some(disk.generation()))?;
        let entry = disk.entry().ok_or_else(|| damaged(id))?;
        let spec = entry.spec.patched(patch)?;
        spec.check(&self.allowed)?;
        if spec == entry.spec {
            return Ok(disk.clone());
        }
        let limits = spec.limits;
        disk.set_spec(spec, &self.services).await?;
        if limits != entry.spec.limits && disk.state() == State::Listening {
            let limits = json!(limits);
            self.ask(&disk, Ask::SetLimits { limits }).await?;
        }
        Ok(disk.clone())
    }

    /// Returns the values of the disk's statistics page.
    pub fn figures(&self, disk: &Disk) -> Figures {
        self.services.launcher.figures(disk.id())
    }

    /// Returns the description of a disk for clients.
    pub fn view(&self, disk: &Disk) -> Value {
        disk.view(&self.figures(disk))
    }

    /// Bounds the log of a disk's process.
    ///
    /// # Errors
    /// Those of the system.
    pub fn bound_log(&self, disk: &Disk) -> io::Result<()> {
        self.services.launcher.bound_log(disk.id())
    }

    /// Returns the labels of disks that the metrics show.
    pub fn shown_labels(&self) -> &[ShownLabel] {
        &self.shown_labels
    }

    /// Returns the counters of the node.
    pub fn counters(&self) -> &Counters {
        &self.services.counters
    }

    /// The disk `id`.
    ///
    /// # Errors
    /// [`Code::NotFound`].
    pub fn get(&self, id: &DiskId) -> Result<Arc<Disk>, Failure> {
        self.find(id).ok_or_else(|| not_found(id))
    }

    /// All disks in the order of their names.
    pub fn all(&self) -> Vec<Arc<Disk>> {
        self.lock().values().cloned().collect()
    }

    /// Returns the events that clients can wait for.
    pub fn events(&self) -> &Events {
        &self.services.events
    }

    /// Returns the names of the disks that failed.
    pub fn failed(&self) -> Value {
        let failed = self
            .all()
            .into_iter()
            .filter(|disk| disk.state() == State::Failed);
        json!(failed.map(|disk| disk.id().clone()).collect::<Vec<_>>())
    }

    /// The disk `id` once the operation under way on it has ended.
    async fn find_when_idle(&self, id: &DiskId) -> Option<Arc<Disk>> {
        drop(self.find(id)?.operation().await);
        self.find(id)
    }

    fn find(&self, id: &DiskId) -> Option<Arc<Disk>> {
        self.lock().get(id).cloned()
    }

    fn insert(&self, disk: Arc<Disk>) {
        self.lock().insert(disk.id().clone(), disk);
    }

    fn lock(&self) -> MutexGuard<'_, BTreeMap<DiskId, Arc<Disk>>> {
        self.disks.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

fn not_found(id: &DiskId) -> Failure {
    Failure::new(Code::NotFound, format!("disk {id} does not exist"))
}

fn damaged(id: &DiskId) -> Failure {
    let text = format!("the state entry of disk {id} is damaged; remove the disk");
    Failure::new(Code::Conflict, text)
}

/// Checks that no other disk uses the directory of the writable layer or the socket of a new disk.
fn check_unused(
    disks: &BTreeMap<DiskId, Arc<Disk>>,
    upper: Option<&PathBuf>,
    socket: &Path,
) -> Result<(), Failure> {
    for other in disks.values() {
        if let Some(what) = other.uses(upper, socket) {
            let text = format!("disk {} uses {what}", other.id());
            return Err(Failure::new(Code::InUse, text));
        }
    }
    Ok(())
}

/// Answers a `PUT` of a name that is taken.
fn compare(
    found: Arc<Disk>,
    spec: &DiskSpec,
    condition: &Condition,
) -> Result<(Put, Arc<Disk>), Failure> {
    condition.check(Some(found.generation()))?;
    let id = found.id();
    let entry = found.entry().ok_or_else(|| damaged(id))?;
    let differences = entry.spec.differences(spec);
    if differences.is_empty() {
        return Ok((Put::Unchanged, found));
    }
    let text = format!(
        "disk {id} exists with other values of {}; remove the disk, or choose another id",
        differences.join(", ")
    );
    Err(Failure::new(Code::Conflict, text))
}
