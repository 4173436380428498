//! The set of disks, and the operations of requests on it.

mod replace;

use std::collections::BTreeMap;
use std::path::PathBuf;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use serde_json::{Map, Value, json};
use tokio::sync::{Mutex as AsyncMutex, Semaphore, SemaphorePermit};

use super::allow::AllowedDirs;
use super::clock;
use super::counters::Counters;
use super::disk::{Disk, Known, Services, State};
use super::entry::{Entry, VERSION};
use super::error::{Code, Error, Failure};
use super::events::{Events, Kind};
use super::id::DiskId;
use super::launch::Launcher;
use super::spec::{Content, DiskSpec, Origin, Requested};
use super::state_dir::{StateDir, StoredEntry};
use crate::engine::stats::figures::Figures;
use crate::ratelimited_log;
use crate::tool::ctl::{self, Ask};

/// Processes that are started at a time: more would only wait for the processors.
const PARALLEL_STARTS: usize = 8;

/// The same for processes that may wait for a registry, which must not delay others.
const PARALLEL_REMOTE_STARTS: usize = 64;

/// Longest wait for a front-end to disconnect, and pause between two looks.
const MAX_LEAVE: Duration = Duration::from_secs(60);
const LEAVE_PERIOD: Duration = Duration::from_millis(50);

/// All disks of the node.
#[derive(Debug)]
pub struct Disks {
    services: Arc<Services>,
    allowed: AllowedDirs,
    disks: Mutex<BTreeMap<DiskId, Arc<Disk>>>,
    /// Permits to start processes of local layers.
    starts: Semaphore,
    /// Permits to start processes that may wait for a registry.
    remote_starts: Semaphore,
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
    pub fn new(state: StateDir, launcher: Launcher, allowed: AllowedDirs) -> Self {
        let events = Events::default();
        Self {
            services: Arc::new(Services {
                state,
                launcher,
                events,
                counters: Counters::default(),
            }),
            allowed,
            disks: Mutex::default(),
            starts: Semaphore::new(PARALLEL_STARTS),
            remote_starts: Semaphore::new(PARALLEL_REMOTE_STARTS),
            reloading: Arc::default(),
        }
    }

    /// Finds the disks of the state directory: takes over running processes, starts the others, and finishes removals.
    ///
    /// # Errors
    /// [`Error::File`] if the directory cannot be read. A disk that cannot be served fails alone.
    pub async fn recover(self: Arc<Self>) -> Result<(), Error> {
        let found = self.services.state.load()?;
        let known: Vec<_> = found.iter().map(|stored| stored.id().clone()).collect();
        self.services.launcher.end_strays(&known).await?;
        for stored in found {
            match stored {
                StoredEntry::Damaged(id, reason) => {
                    log::error!("disk {id}: {reason}");
                    self.insert(Arc::new(Disk::damaged(id, reason)));
                }
                StoredEntry::Valid(entry) => {
                    let disk = Arc::new(Disk::new(*entry));
                    self.insert(disk.clone());
                    tokio::spawn(self.clone().recover_one(disk));
                }
            }
        }
        Ok(())
    }

    async fn recover_one(self: Arc<Self>, disk: Arc<Disk>) {
        let operation = disk.operation().await;
        if disk.entry().is_some_and(|entry| entry.deleting) {
            disk.recover_removal(&self.services);
            match disk.remove(&self.services).await {
                Ok(()) => drop(self.lock().remove(disk.id())),
                Err(error) => ratelimited_log::error(format_args!(
                    "disk {}: cannot complete the removal: {error}",
                    disk.id()
                )),
            }
            return;
        }
        let _start = self.permit(&disk).await;
        disk.recover(&self.services).await;
        drop(operation);
        self.learn(&disk).await;
        if disk.state() == State::Listening {
            tokio::spawn(disk.watch(self.services.clone()));
        }
    }

    /// Creates the disk `id`, unless it exists.
    ///
    /// # Errors
    /// [`Code::Conflict`] if another disk has that name; those of [`DiskSpec::check`] and of the start.
    pub async fn put(
        self: &Arc<Self>,
        id: &DiskId,
        spec: DiskSpec,
    ) -> Result<(Put, Arc<Disk>), Failure> {
        let checked = spec.check(&self.allowed)?;
        if let Some(found) = self.find_when_idle(id).await {
            return compare(found, &spec);
        }
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
            deleting: false,
            created: clock::now(),
        }));
        let operation = disk.operation().await;
        if self
            .claim(&disk, checked.upper.as_ref(), &socket)?
            .is_some()
        {
            // Another request was faster: its result decides.
            return match self.find_when_idle(id).await {
                Some(found) => compare(found, &spec),
                None => Err(Failure::new(
                    Code::Conflict,
                    format!("disk {id} was created and removed by another request; retry"),
                )),
            };
        }
        let start = self.permit(&disk).await;
        let made = disk.create(&self.services).await;
        drop((start, operation));
        match made {
            Ok(()) => {
                self.learn(&disk).await;
                tokio::spawn(disk.clone().watch(self.services.clone()));
                Ok((Put::Created, disk))
            }
            Err(failure) => {
                self.lock().remove(id);
                Err(failure)
            }
        }
    }

    /// Waits for the permit to start the process of a disk.
    async fn permit(&self, disk: &Disk) -> Option<SemaphorePermit<'_>> {
        let remote = disk
            .entry()
            .is_some_and(|entry| entry.content.may_be_remote());
        let permits = match remote {
            true => &self.remote_starts,
            false => &self.starts,
        };
        // Cannot fail: the semaphore is never closed.
        permits.acquire().await.ok()
    }

    /// Adds a new disk under its name. Returns the disk that has the name already.
    fn claim(
        &self,
        disk: &Arc<Disk>,
        upper: Option<&PathBuf>,
        socket: &PathBuf,
    ) -> Result<Option<Arc<Disk>>, Failure> {
        let mut disks = self.lock();
        if let Some(found) = disks.get(disk.id()) {
            return Ok(Some(found.clone()));
        }
        for other in disks.values() {
            let Some(entry) = other.entry() else { continue };
            let shared = match upper.is_some() && entry.upper.as_ref() == upper {
                true => Some("the writable layer's directory"),
                false => (entry.socket == *socket).then_some("the socket"),
            };
            if let Some(what) = shared {
                let text = format!("disk {} uses {what}", other.id());
                return Err(Failure::new(Code::InUse, text));
            }
        }
        disks.insert(disk.id().clone(), disk.clone());
        Ok(None)
    }

    /// Removes the disk `id`. Waits up to `patience` for the front-end to disconnect.
    ///
    /// # Errors
    /// [`Code::NotFound`]; [`Code::InUse`] while a front-end is connected, unless `force` is set.
    pub async fn delete(
        &self,
        id: &DiskId,
        force: bool,
        patience: Duration,
    ) -> Result<(), Failure> {
        let disk = self.get(id)?;
        let end = Instant::now() + patience.min(MAX_LEAVE);
        while !force && self.in_use(&disk).is_some() && Instant::now() < end {
            tokio::time::sleep(LEAVE_PERIOD).await;
        }
        let _operation = disk.operation().await;
        self.check_current(&disk)?;
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
        let view = disk.view(&self.figures(disk));
        let front_end = view.get("front_end").filter(|peer| !peer.is_null())?;
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
    /// [`Code::NotFound`]; those of [`DiskSpec::patched`]; what the disk process reports. The change is durable before
    /// the disk process gets it.
    pub async fn patch(
        &self,
        id: &DiskId,
        patch: Map<String, Value>,
    ) -> Result<Arc<Disk>, Failure> {
        let disk = self.get(id)?;
        let _operation = disk.operation().await;
        self.check_current(&disk)?;
        let Some(entry) = disk.entry() else {
            let text = format!("the state entry of disk {id} is damaged; remove the disk");
            return Err(Failure::new(Code::Conflict, text));
        };
        let spec = entry.spec.patched(patch)?;
        spec.check(&self.allowed)?;
        if spec == entry.spec {
            return Ok(disk.clone());
        }
        let limits = spec.limits;
        disk.set_spec(spec, &self.services)?;
        if limits != entry.spec.limits && disk.state() == State::Listening {
            let limits = json!(limits);
            self.ask(id, Ask::SetLimits { limits }).await?;
        }
        Ok(disk.clone())
    }

    /// Makes the disk `id` `size` bytes large. A disk of that size stays as it is.
    ///
    /// # Errors
    /// [`Code::NotFound`]; [`Code::Conflict`] if the disk is read-only or larger; what the disk process reports.
    pub async fn resize(&self, id: &DiskId, size: u64) -> Result<Arc<Disk>, Failure> {
        let disk = self.get(id)?;
        let old = disk.size();
        self.ask(id, Ask::Resize { size }).await?;
        disk.set_size(size);
        if old != Some(size) {
            self.services.events.add(id, Kind::Resized, None);
        }
        Ok(disk)
    }

    /// Returns the values of the disk's statistics page.
    pub fn figures(&self, disk: &Disk) -> Figures {
        self.services.launcher.figures(disk.id())
    }

    /// Returns the description of a disk for clients.
    pub fn view(&self, disk: &Disk) -> Value {
        disk.view(&self.figures(disk))
    }

    /// Returns the counters of the node.
    pub fn counters(&self) -> &Counters {
        &self.services.counters
    }

    /// The snapshots of disk `id`, oldest first.
    ///
    /// # Errors
    /// [`Code::NotFound`]; what the disk process reports.
    pub async fn snapshots(&self, id: &DiskId) -> Result<Value, Failure> {
        self.get(id)?;
        self.ask(id, Ask::Snapshots).await
    }

    /// Takes a snapshot of disk `id`; one of the same name is returned as it is.
    ///
    /// # Errors
    /// [`Code::NotFound`]; what the disk process reports.
    pub async fn snapshot(&self, id: &DiskId, name: String, wait: bool) -> Result<Value, Failure> {
        let disk = self.get(id)?;
        let made = self.ask(id, Ask::Snapshot { name, wait }).await?;
        self.services.events.add(disk.id(), Kind::Snapshot, None);
        Ok(made)
    }

    /// The layers of a snapshot of another disk.
    async fn fork(&self, origin: &Origin) -> Result<Content, Failure> {
        let made = self
            .snapshot(&origin.disk, origin.snapshot.clone(), false)
            .await?;
        let layers = made
            .get("layers")
            .and_then(Value::as_array)
            .into_iter()
            .flatten();
        let layers: Vec<_> = layers
            .filter_map(Value::as_str)
            .map(PathBuf::from)
            .collect();
        match layers.is_empty() {
            true => Err(Failure::new(
                Code::Internal,
                format!("disk {} reported no layers for the snapshot", origin.disk),
            )),
            false => Ok(Content::Layers(layers)),
        }
    }

    async fn learn(&self, disk: &Disk) {
        if let Ok(device) = self.ask(disk.id(), Ask::Device).await {
            let serial = device.get("serial").and_then(Value::as_str);
            disk.learn(Known {
                size: device.get("size_bytes").and_then(Value::as_u64),
                serial: serial.map(str::to_owned),
            });
        }
    }

    /// Asks the process of disk `id`.
    async fn ask(&self, id: &DiskId, ask: Ask) -> Result<Value, Failure> {
        let control = self.services.launcher.control(id);
        let asked = tokio::task::spawn_blocking(move || ctl::ask(&control, &ask)).await;
        let answer = asked.map_err(|error| Failure::caused(Code::Internal, &error))?;
        answer.map_err(|error| {
            let code = match &error {
                ctl::Error::Refused { status: 409, .. } => Code::Conflict,
                ctl::Error::Refused { status: 400, .. } => Code::BadRequest,
                ctl::Error::Late { .. } => Code::Timeout,
                _ => Code::Internal,
            };
            Failure::caused(code, &error)
        })
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

/// Answers a `PUT` of a name that is taken.
fn compare(found: Arc<Disk>, spec: &DiskSpec) -> Result<(Put, Arc<Disk>), Failure> {
    let id = found.id();
    let Some(entry) = found.entry() else {
        let text = format!("the state entry of disk {id} is damaged; remove the disk");
        return Err(Failure::new(Code::Conflict, text));
    };
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
