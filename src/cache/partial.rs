//! A blob of which the cache has a part: claiming units, storing them, making them durable.

use std::fs::File;
use std::os::unix::fs::FileExt;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};

use super::entry::{Files, touch};
use super::layout::Layout;
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

    /// Claims the right to fetch `units`, and returns `None` if another process fetches one of
    /// them. Never waits. Two claims of one `Partial` do not exclude each other.
    ///
    /// # Errors
    /// [`Error::File`] if the file system has no locks.
    pub fn claim(self: &Arc<Self>, units: UnitRange) -> Result<Option<Claim>, Error> {
        let path = || self.layout.map(self.identity());
        let locked = range_lock::try_lock(&self.map_file, units);
        let locked = locked.map_err(|error| Error::file("lock", &path())(error))?;
        Ok(locked.then(|| Claim {
            partial: Arc::clone(self),
            units,
        }))
    }

    /// Makes the present units durable: first the data, then their durable bits.
    ///
    /// # Errors
    /// [`Error::Full`] and [`Error::File`]. After a failed sync the system may have dropped what
    /// was not on storage, so those units become absent.
    pub fn sync(&self) -> Result<(), Error> {
        let _syncing = self.syncing.lock().unwrap_or_else(PoisonError::into_inner);
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

    /// Makes all units absent, because some have wrong bytes. The files stay: disks have them open. The
    /// caller has claimed all units.
    pub(super) fn restart(&self) -> Result<(), Error> {
        // A sync that began before must not mark wrong units durable.
        let _syncing = self.syncing.lock().unwrap_or_else(PoisonError::into_inner);
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

/// The right to store some units of a partial blob, until dropped.
#[derive(Debug)]
pub struct Claim {
    partial: Arc<Partial>,
    units: UnitRange,
}

impl Claim {
    /// The blob.
    pub fn partial(&self) -> &Arc<Partial> {
        &self.partial
    }

    /// Writes whole units from `first` on and marks them present. Only the blob's last unit may be
    /// shorter than 64 KiB.
    ///
    /// # Errors
    /// [`Error::NotUnits`] if the bytes are not whole claimed units; [`Error::Closed`] if the blob
    /// is complete; [`Error::Full`] if there is no room; [`Error::File`] if the system
    /// fails; [`Error::Map`] if the map was cut short.
    pub fn store(&self, first: u64, bytes: &[u8]) -> Result<(), Error> {
        let partial = &*self.partial;
        let units = self.whole_units(first, bytes.len())?;
        partial.check_open()?;
        let path = || partial.layout.data(partial.identity());
        let written = partial.data.write_all_at(bytes, first * UNIT);
        written.map_err(|error| Error::file("write", &path())(error))?;
        partial.map.mark(Bitmap::Live, units);
        let len = bytes.len() as u64;
        partial.unsynced.fetch_add(len, Ordering::Relaxed);
        if partial.map.is_lost() {
            return Err(partial.lost());
        }
        Ok(())
    }

    fn whole_units(&self, first: u64, len: usize) -> Result<UnitRange, Error> {
        let identity = self.partial.identity();
        let offset = first.saturating_mul(UNIT);
        let units = identity.units_of(offset, len as u64);
        let whole = units.filter(|units| {
            let bytes = identity.bytes_of(*units);
            self.units.contains(*units) && bytes.end - bytes.start == len as u64
        });
        whole.ok_or(Error::NotUnits {
            digest: identity.digest(),
            offset,
            len,
        })
    }
}

impl Drop for Claim {
    fn drop(&mut self) {
        if let Err(error) = range_lock::unlock(&self.partial.map_file, self.units) {
            ratelimited_log::warn(format_args!(
                "cannot unlock units of a cached blob: {error}"
            ));
        }
    }
}
