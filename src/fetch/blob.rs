//! A blob that clients may request: what the cache has of it, and where the rest comes from.

use std::sync::atomic::{AtomicBool, AtomicU32, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use super::ahead::Ahead;
use super::origin::{Failure, Origin};
use super::pace::Pace;
use crate::cache::{Cache, Demotion, Entry, Partial};
use crate::format::digest::Digest;
use crate::format::presence::{Identity, UnitRange};
use crate::reason::reason;
use crate::source::FetchErrorKind;

/// How long a server is taken for one that serves no ranges.
const WITHOUT_RANGES: Duration = Duration::from_secs(600);

/// How long a blob that was found to have its digest is not read again to find out.
const INTACT_FOR: Duration = Duration::from_secs(60);

/// Longest pause after a failure.
const MAX_PAUSE: Duration = Duration::from_secs(30);

/// Longest pause that a server may ask for.
const MAX_RETRY_AFTER: Duration = Duration::from_secs(300);

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

/// An open blob. Dropped when no connection and no job uses it; then it may be evicted.
#[derive(Debug)]
pub(super) struct Blob {
    pub(super) id: BlobId,
    pub(super) identity: Identity,
    /// Changes when a complete blob turns out damaged.
    entry: Mutex<Entry>,
    /// When all bytes were last found to have the digest, after a reader found some to be damaged.
    found_intact: Mutex<Option<Instant>>,
    /// The repositories that are said to have it; the first is asked.
    origins: Mutex<Vec<Arc<dyn Origin>>>,
    pub(super) pace: Mutex<Pace>,
    pub(super) ahead: Mutex<Ahead>,
    failures: AtomicU32,
    /// Whether the last definite answer was a refusal.
    refused: AtomicBool,
    /// Held while the whole blob is streamed, so that one job streams it.
    pub(super) whole: Mutex<()>,
    /// Until when the server is taken for one that serves no ranges.
    without_ranges: Mutex<Option<Instant>>,
    /// Held while the blob is verified, and while units are overwritten.
    pub(super) publishing: Mutex<()>,
    /// When units were made durable last.
    pub(super) synced: Mutex<Instant>,
}

impl Blob {
    pub(super) fn new(
        id: BlobId,
        identity: Identity,
        entry: Entry,
        origin: Arc<dyn Origin>,
        pace: Pace,
    ) -> Self {
        Self {
            id,
            identity,
            entry: Mutex::new(entry),
            found_intact: Mutex::default(),
            origins: Mutex::new(vec![origin]),
            pace: Mutex::new(pace),
            ahead: Mutex::default(),
            failures: AtomicU32::new(0),
            refused: AtomicBool::new(false),
            whole: Mutex::new(()),
            without_ranges: Mutex::new(None),
            publishing: Mutex::new(()),
            synced: Mutex::new(Instant::now()),
        }
    }

    /// What the cache has of the blob.
    pub(super) fn entry(&self) -> Entry {
        lock(&self.entry).clone()
    }

    /// The partial entry, unless the blob was complete when it was opened.
    pub(super) fn partial(&self) -> Option<Arc<Partial>> {
        match self.entry() {
            Entry::Complete(_) => None,
            Entry::Partial(partial) => Some(partial),
        }
    }

    /// Whether all bytes were compared with the digest, and nothing can be stored any more.
    pub(super) fn is_final(&self) -> bool {
        let is_final = |partial: Arc<Partial>| {
            let state = partial.map().state();
            state.is_none_or(|state| state.is_final())
        };
        self.partial().is_none_or(is_final)
    }

    /// Looks whether the bytes of a complete blob still have its digest. If not, makes the blob partial,
    /// without the `damaged` units. Reads all of the blob, unless that was done a moment ago.
    pub(super) fn check_damage(&self, cache: &Cache, damaged: UnitRange) -> Result<(), Failure> {
        let is_recent = |at: &mut Instant| at.elapsed() < INTACT_FOR;
        if lock(&self.found_intact).as_mut().is_some_and(is_recent) {
            return Ok(());
        }
        let digest = self.identity.digest();
        let _quiet = lock(&self.publishing);
        match cache.demote(&self.entry(), &self.identity, damaged) {
            Ok(Demotion::Intact) => {
                log::warn!("blob {digest} is as its image has it: the image itself is damaged");
                *lock(&self.found_intact) = Some(Instant::now());
                Ok(())
            }
            Ok(Demotion::Demoted(partial)) => {
                log::error!(
                    "blob {digest} is damaged on storage; fetching the damaged bytes again"
                );
                *lock(&self.entry) = Entry::Partial(partial);
                Ok(())
            }
            Ok(Demotion::Removed) => {
                let reason = "the damaged blob was removed from the cache; restart the disk";
                Err(Failure::definite(FetchErrorKind::Damaged, reason))
            }
            Err(error) => {
                log::error!("blob {digest} is damaged on storage: {}", reason(&error));
                Err(Failure::definite(FetchErrorKind::System, reason(&error)))
            }
        }
    }

    /// Adds a place that is said to have the blob.
    pub(super) fn add_origin(&self, origin: &Arc<dyn Origin>) {
        const MAX: usize = 16;
        let mut origins = lock(&self.origins);
        if origins.len() < MAX && !origins.iter().any(|known| Arc::ptr_eq(known, origin)) {
            origins.push(Arc::clone(origin));
        }
    }

    pub(super) fn origin(&self) -> Option<Arc<dyn Origin>> {
        lock(&self.origins).first().cloned()
    }

    /// Notes that bytes came, and returns whether they were refused before.
    pub(super) fn succeeded(&self) -> bool {
        self.failures.store(0, Ordering::Relaxed);
        self.refused.load(Ordering::Relaxed) && self.refused.swap(false, Ordering::Relaxed)
    }

    /// Notes a definite refusal, and returns whether it is the first since bytes came.
    pub(super) fn is_first_refusal(&self) -> bool {
        !self.refused.swap(true, Ordering::Relaxed)
    }

    /// Notes a failure, and returns when to try again. A definite refusal moves the next place to
    /// the front.
    pub(super) fn failed(&self, failure: &Failure) -> Instant {
        let now = Instant::now();
        if failure.definite {
            lock(&self.origins).rotate_left(1);
        }
        if failure.without_ranges {
            // A cold proxy sends everything once, and ranges from then on.
            let mut until = lock(&self.without_ranges);
            let second = until.is_some();
            *until = Some(now + WITHOUT_RANGES);
            let pause = if second { 0 } else { 1000 };
            return now + Duration::from_millis(pause);
        }
        let failures = self.failures.fetch_add(1, Ordering::Relaxed).min(16);
        let most = match failure.definite {
            true => MAX_PAUSE,
            false => MAX_PAUSE.min(Duration::from_millis(100) * (1 << failures)),
        };
        let pause = most.mul_f64(jitter());
        let asked = failure.retry_after.unwrap_or_default();
        now + pause.max(asked.min(MAX_RETRY_AFTER))
    }

    /// Whether the whole blob must be streamed. The first refusal of a range is not counted: the
    /// caller has tried again since.
    pub(super) fn needs_whole(&self) -> bool {
        lock(&self.without_ranges).is_some_and(|until| Instant::now() < until)
    }

    /// Notes that a range was served.
    pub(super) fn serves_ranges(&self) {
        *lock(&self.without_ranges) = None;
    }
}

/// A random number between a half and one.
pub(super) fn jitter() -> f64 {
    use std::hash::{BuildHasher, RandomState};
    let random = RandomState::new().hash_one(0u8);
    0.5 + 0.5 * (random >> 11) as f64 / (1u64 << 53) as f64
}

pub(super) fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}
