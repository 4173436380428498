//! A blob of which the cache has a part: claiming units, writing them, making them durable.

use std::fs::File;
use std::os::unix::fs::FileExt;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, TryLockError};

use super::claim::Claim;
use super::entry::{Files, touch};
use super::layout::Layout;
use super::range_lock::Purpose;
use super::{Error, range_lock};
use crate::format::presence::{Identity, State, UNIT, UnitRange};
use crate::ratelimited_log;
use crate::source::presence::{self, Bitmap, PresenceMap};

/// A partial blob, open for filling.
#[derive(Debug)]
pub struct Partial {
    pub(super) layout: Layout,
    pub(super) data: File,
    map_file: File,
    map: PresenceMap,
    files: Files,
    /// Bytes stored since the last sync began.
    unsynced: AtomicU64,
    /// Held by the one thread that syncs: a failed sync is reported once, and what it lost must
    /// not be taken for synced by another thread.
    syncing: Mutex<()>,
    /// Held by the one thread of this process that writes units, or verifies them all: range locks exclude
    /// only other processes.
    storing: Mutex<()>,
}

impl Partial {
    pub(super) fn new(
        layout: Layout,
        data: File,
        map_file: File,
        map: PresenceMap,
        files: Files,
    ) -> Self {
        Self {
            layout,
            data,
            map_file,
            map,
            files,
            unsynced: AtomicU64::new(0),
            syncing: Mutex::new(()),
            storing: Mutex::new(()),
        }
    }

    /// The blob.
    pub fn identity(&self) -> &Identity {
        self.map.identity()
    }

    /// The presence map.
    pub fn map(&self) -> &PresenceMap {
        &self.map
    }

    /// Descriptors for a process that reads the blob. As long as any of them is open anywhere, the
    /// blob is not evicted.
    pub fn files(&self) -> &Files {
        &self.files
    }

    /// Whether all units are present.
    pub fn is_full(&self) -> bool {
        self.map.holds(Bitmap::Live, self.identity().all_units())
    }

    /// Bytes stored since the last sync began.
    pub fn unsynced(&self) -> u64 {
        self.unsynced.load(Ordering::Relaxed)
    }

    /// Claims `units` for a fetch, and returns `None` if another process fetches one of them. Never waits.
    /// Two claims of one `Partial` do not exclude each other.
    ///
    /// # Errors
    /// [`Error::File`] if the file system has no locks.
    pub fn claim(self: &Arc<Self>, units: UnitRange) -> Result<Option<Claim>, Error> {
        let locked = range_lock::try_lock(&self.map_file, Purpose::Fetch, units);
        let locked = locked.map_err(|error| self.unlockable(error))?;
        Ok(locked.then(|| Claim::new(self, units, true)))
    }

    /// Claims `units` although another process may fetch them: it was stuck for long. Both may store them; the
    /// first to do so wins.
    pub fn claim_anyway(self: &Arc<Self>, units: UnitRange) -> Claim {
        Claim::new(self, units, false)
    }

    /// Ends a claim that locked `units`.
    pub(super) fn unclaim(&self, units: UnitRange) {
        if let Err(error) = range_lock::unlock(&self.map_file, Purpose::Fetch, units) {
            ratelimited_log::warn(format_args!(
                "cannot unlock units of a cached blob: {error}"
            ));
        }
    }

    /// The turn of a thread of this process to write units, or to verify them all. Waits for the one before.
    pub(super) fn turn(&self) -> MutexGuard<'_, ()> {
        self.storing.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// As [`Partial::turn`], but `None` if another thread has its turn.
    pub(super) fn try_turn(&self) -> Option<MutexGuard<'_, ()>> {
        match self.storing.try_lock() {
            Ok(turn) => Some(turn),
            Err(TryLockError::Poisoned(error)) => Some(error.into_inner()),
            Err(TryLockError::WouldBlock) => None,
        }
    }

    /// Calls `act` while no other process writes or verifies `units`. Returns `None` if one does.
    pub(super) fn exclusively<T>(
        &self,
        _turn: &MutexGuard<'_, ()>,
        units: UnitRange,
        act: impl FnOnce() -> Result<T, Error>,
    ) -> Result<Option<T>, Error> {
        let locked = range_lock::try_lock(&self.map_file, Purpose::Store, units);
        if !locked.map_err(|error| self.unlockable(error))? {
            return Ok(None);
        }
        let result = act();
        let unlocked = range_lock::unlock(&self.map_file, Purpose::Store, units);
        unlocked.map_err(|error| self.unlockable(error))?;
        result.map(Some)
    }

    fn unlockable(&self, error: std::io::Error) -> Error {
        Error::file("lock", &self.layout.map(self.identity()))(error)
    }

    /// Writes whole units and marks them present. The caller holds them exclusively.
    pub(super) fn write(&self, units: UnitRange, bytes: &[u8]) -> Result<(), Error> {
        let path = || self.layout.data(self.identity());
        let written = self.data.write_all_at(bytes, units.start() * UNIT);
        written.map_err(|error| Error::file("write", &path())(error))?;
        self.map.mark(Bitmap::Live, units);
        self.unsynced
            .fetch_add(bytes.len() as u64, Ordering::Relaxed);
        match self.map.is_lost() {
            true => Err(self.lost()),
            false => Ok(()),
        }
    }

    /// Makes the present units durable: first the data, then their durable bits.
    ///
    /// # Errors
    /// [`Error::Full`] and [`Error::File`]. After a failed sync the system may have dropped what
    /// was not on storage, so those units become absent.
    pub fn sync(&self) -> Result<(), Error> {
        let _syncing = self.syncing();
        self.unsynced.store(0, Ordering::Relaxed);
        let snapshot = self.map.snapshot();
        let data = self.layout.data(self.identity());
        if let Err(error) = self.data.sync_data() {
            self.map.forget_unsynced();
            return Err(Error::file("sync", &data)(error));
        }
        self.map.mark_durable(&snapshot);
        let map = self.layout.map(self.identity());
        self.map_file.sync_data().map_err(Error::file("sync", &map))
    }

    /// The turn of a thread to sync.
    pub(super) fn syncing(&self) -> MutexGuard<'_, ()> {
        self.syncing.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Makes all units absent, because some have wrong bytes. The files stay: disks have them open. The
    /// caller holds all units exclusively.
    pub(super) fn restart(&self) -> Result<(), Error> {
        // A sync that began before must not mark wrong units durable.
        let _syncing = self.syncing();
        self.map.set_state(State::Restarted);
        self.map.clear();
        let map = self.layout.map(self.identity());
        self.map_file.sync_data().map_err(Error::file("sync", &map))
    }

    /// Whether the blob was full and did not have its digest: then no mirror is trusted for it.
    pub fn is_restarted(&self) -> bool {
        self.map.state() == Some(State::Restarted)
    }

    /// Notes that the blob was used now.
    pub fn touch(&self) {
        touch(&self.data);
    }

    /// Whether the map still takes units.
    pub(super) fn check_open(&self) -> Result<(), Error> {
        match self.map.state() {
            Some(State::Partial | State::Restarted) => Ok(()),
            Some(State::Complete) => Err(Error::Closed {
                digest: self.identity().digest(),
            }),
            None => Err(self.lost()),
        }
    }

    fn lost(&self) -> Error {
        Error::Map {
            path: self.layout.map(self.identity()),
            source: presence::Error::Lost,
        }
    }
}
