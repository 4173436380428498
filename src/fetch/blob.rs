//! An open blob: what the cache has of it, and where the rest comes from.

use std::io;
use std::sync::{Arc, MutexGuard};
use std::time::{Duration, Instant};

use super::ahead::Ahead;
use super::holder::Holder;
use super::locks::{Rank, RankedMutex};
use super::origin::{Failure, Origin};
use super::pace::Pace;
use super::sources::Sources;
use crate::cache::{Cache, Demotion, Entry, Partial};
use crate::format::digest::Digest;
use crate::format::presence::{Identity, State, UnitRange};
use crate::io::ranked_lock::Guard;
use crate::ratelimited_log;
use crate::reason::reason;
use crate::source::FetchErrorKind;

/// Units are made durable after so long.
const SYNC_AFTER: Duration = Duration::from_secs(5);

/// How long a blob that was found to have its digest is not read again to find out.
const INTACT_FOR: Duration = Duration::from_secs(60);

/// How long units are fetched although another process that was stuck may fetch them.
const STUCK_FOR: Duration = Duration::from_secs(60);

/// Number of a blob in the fetcher.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct BlobId(pub(super) u64);

/// A blob that a disk process may ask for.
#[derive(Clone, Debug)]
pub struct Offer {
    /// Its digest.
    pub digest: Digest,
    /// Its length in bytes, if the image says.
    pub len: Option<u64>,
    /// Where it comes from.
    pub origin: Arc<dyn Origin>,
}

/// An open blob. Dropped when no connection and no fetch uses it; then it may be evicted.
#[derive(Debug)]
pub(super) struct Blob {
    id: BlobId,
    identity: Identity,
    stored: RankedMutex<Stored>,
    /// Disk processes that have the descriptors of the entry.
    holders: RankedMutex<Vec<Holder>>,
    sources: RankedMutex<Sources>,
    readers: RankedMutex<Readers>,
    streaming: RankedMutex<()>,
    /// When units were made durable last.
    synced: RankedMutex<Instant>,
}

/// What the cache has of the blob.
#[derive(Debug)]
struct Stored {
    /// Changes when a complete blob turns out damaged.
    entry: Entry,
    /// When all bytes were last found to have the digest, after a reader found some to be damaged.
    found_intact: Option<Instant>,
    /// When another process was last found to be stuck while it fetched units.
    found_stuck: Option<Instant>,
}

#[derive(Debug)]
struct Readers {
    pace: Pace,
    ahead: Ahead,
}

/// Units to fetch besides those that a reader waits for.
#[derive(Debug)]
pub(super) struct Hints {
    /// Units right behind: the reader is near where one just was.
    pub(super) near: UnitRange,
    /// Units ahead of a sequential reader.
    pub(super) ahead: UnitRange,
}

impl Blob {
    pub(super) fn new(
        id: BlobId,
        identity: Identity,
        entry: Entry,
        origin: Arc<dyn Origin>,
        pace: Pace,
    ) -> Self {
        let stored = Stored {
            entry,
            found_intact: None,
            found_stuck: None,
        };
        let ahead = Ahead::default();
        Self {
            id,
            identity,
            stored: RankedMutex::new(Rank::Stored, stored),
            holders: RankedMutex::new(Rank::Holders, Vec::new()),
            sources: RankedMutex::new(Rank::Sources, Sources::new(origin)),
            readers: RankedMutex::new(Rank::Readers, Readers { pace, ahead }),
            streaming: RankedMutex::new(Rank::Streaming, ()),
            synced: RankedMutex::new(Rank::Syncing, Instant::now()),
        }
    }

    pub(super) fn id(&self) -> BlobId {
        self.id
    }

    pub(super) fn identity(&self) -> &Identity {
        &self.identity
    }

    pub(super) fn digest(&self) -> Digest {
        self.identity.digest()
    }

    /// The origins, and what is known of them.
    pub(super) fn sources(&self) -> Guard<MutexGuard<'_, Sources>> {
        self.sources.lock()
    }

    /// What the cache has of the blob.
    pub(super) fn entry(&self) -> Entry {
        self.stored.lock().entry.clone()
    }

    /// Sends the descriptors of the entry to a disk process, and those of the entries that replace it.
    pub(super) fn add_holder(&self, holder: Holder) -> io::Result<()> {
        let mut holders = self.holders.lock();
        holder.send(&self.entry(), &self.identity)?;
        holders.retain(|holder| !holder.is_gone());
        holders.push(holder);
        Ok(())
    }

    /// Replaces the entry by one with other files, and lets all disk processes read those.
    fn replace_entry(&self, entry: Entry) {
        let holders = self.holders.lock();
        self.stored.lock().entry = entry;
        for holder in holders.iter() {
            if let Err(error) = holder.send(&self.entry(), &self.identity) {
                let digest = self.digest();
                ratelimited_log::error(format_args!(
                    "cannot pass on the new file of blob {digest}: {error}; restart its disks"
                ));
            }
        }
    }

    /// The partial entry, unless the blob was complete when it was opened.
    pub(super) fn partial(&self) -> Option<Arc<Partial>> {
        match self.entry() {
            Entry::Complete(_) => None,
            Entry::Partial(partial) => Some(partial),
        }
    }

    /// Notes that another process was stuck while it fetched units.
    pub(super) fn note_stuck(&self) {
        self.stored.lock().found_stuck = Some(Instant::now());
    }

    /// Whether another process was stuck a moment ago.
    pub(super) fn is_stuck_elsewhere(&self) -> bool {
        let found = self.stored.lock().found_stuck;
        found.is_some_and(|at| at.elapsed() < STUCK_FOR)
    }

    /// Whether all bytes were compared with the digest, and nothing can be stored any more.
    pub(super) fn is_final(&self) -> bool {
        let is_final = |partial: Arc<Partial>| {
            let state = partial.map().state();
            state.is_none_or(|state| state == State::Complete)
        };
        self.partial().is_none_or(is_final)
    }

    /// The right to stream the whole blob; `None` if another thread has it.
    pub(super) fn try_streaming(&self) -> Option<Guard<MutexGuard<'_, ()>>> {
        self.streaming.try_lock()
    }

    /// Notes how fast an answer came.
    pub(super) fn observe(&self, first_byte: Duration, bytes: u64, transfer: Duration) {
        self.readers
            .lock()
            .pace
            .observe(first_byte, bytes, transfer);
    }

    /// Units to ask for when a reader waits for one.
    pub(super) fn demand_units(&self) -> u64 {
        self.readers.lock().pace.demand_units()
    }

    /// Notes that a reader waits for `units`, and returns what to fetch besides.
    pub(super) fn note_read(&self, units: UnitRange) -> Hints {
        let all = self.identity.units();
        let mut readers = self.readers.lock();
        let is_near = readers.ahead.is_near(units);
        let window = readers.pace.window_units();
        let ahead = readers.ahead.wanted(units, all, window);
        let end = units.start() + readers.pace.demand_units();
        let near = match is_near {
            true => UnitRange::new(units.end(), end.min(all)),
            false => UnitRange::default(),
        };
        Hints { near, ahead }
    }

    /// Makes units durable if `many` bytes, or old ones, are not.
    pub(super) fn sync(&self, many: u64) {
        let Some(partial) = self.partial() else {
            return;
        };
        let mut synced = self.synced.lock();
        let unsynced = partial.unsynced();
        if unsynced == 0 {
            *synced = Instant::now();
            return;
        }
        if unsynced < many && synced.elapsed() < SYNC_AFTER {
            return;
        }
        if let Err(error) = partial.sync() {
            let digest = self.digest();
            ratelimited_log::error(format_args!(
                "blob {digest}: {}; fetching it again",
                reason(&error)
            ));
        }
        *synced = Instant::now();
    }

    /// Looks whether the bytes of a complete blob still have its digest. If not, makes the blob partial,
    /// without the `damaged` units. Reads all of the blob, unless that was done a moment ago.
    pub(super) fn check_damage(&self, cache: &Cache, damaged: UnitRange) -> Result<(), Failure> {
        let found_intact = self.stored.lock().found_intact;
        if found_intact.is_some_and(|at| at.elapsed() < INTACT_FOR) {
            return Ok(());
        }
        let digest = self.digest();
        match cache.demote(&self.entry(), &self.identity, damaged) {
            Ok(Demotion::Intact) => {
                ratelimited_log::warn(format_args!(
                    "blob {digest} is as its image has it: the image itself is damaged"
                ));
                self.stored.lock().found_intact = Some(Instant::now());
                Ok(())
            }
            Ok(Demotion::Demoted(partial)) => {
                ratelimited_log::error(format_args!(
                    "blob {digest} is damaged on storage; fetching the damaged bytes again"
                ));
                self.stored.lock().entry = Entry::Partial(partial);
                Ok(())
            }
            Ok(Demotion::Removed) => {
                let entry = cache.entry(self.identity);
                let entry = entry
                    .map_err(|error| Failure::passing(FetchErrorKind::System, reason(&error)))?;
                ratelimited_log::error(format_args!(
                    "blob {digest} is damaged, and its file was removed from the cache; fetching it again"
                ));
                self.replace_entry(entry);
                Ok(())
            }
            Err(error) => {
                ratelimited_log::error(format_args!(
                    "blob {digest} is damaged on storage: {}",
                    reason(&error)
                ));
                Err(Failure::definite(FetchErrorKind::System, reason(&error)))
            }
        }
    }
}
