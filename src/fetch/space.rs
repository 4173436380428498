//! The storage of the cache: what to do when it is full or over its limits.

use std::sync::atomic::{AtomicBool, Ordering};

use super::origin::Failure;
use crate::cache::{Cache, Error, Limits};
use crate::ratelimited_log;
use crate::reason::reason;
use crate::source::FetchErrorKind;

/// Bytes of storage that are freed when a store finds no space.
const MAKE_ROOM: u64 = 64 << 20;

/// The cache and its limits.
#[derive(Debug)]
pub(super) struct Space {
    cache: Cache,
    limits: Limits,
    /// Whether the last store found no space.
    is_full: AtomicBool,
    /// Whether the cache is over a limit, although what is not in use was evicted.
    is_over: AtomicBool,
    /// Whether downloads paused for that when one last asked.
    was_paused: AtomicBool,
}

impl Space {
    pub(super) fn new(cache: Cache, limits: Limits) -> Self {
        // A cache that cannot be measured is no reason not to serve.
        let is_over = cache.is_over(limits).is_ok_and(|is_over| is_over);
        Self {
            cache,
            limits,
            is_full: AtomicBool::new(false),
            is_over: AtomicBool::new(is_over),
            was_paused: AtomicBool::new(false),
        }
    }

    pub(super) fn cache(&self) -> &Cache {
        &self.cache
    }

    /// Repeats `make` once, after making room, if it finds no space.
    pub(super) fn with_room<T>(
        &self,
        make: impl Fn(&Cache) -> Result<T, Error>,
    ) -> Result<T, Error> {
        match make(&self.cache) {
            Err(error) if error.is_full() => {
                // What another process may free as well is tried once.
                let _ = self.cache.free(MAKE_ROOM);
                make(&self.cache)
            }
            made => made,
        }
    }

    /// Calls `store`, which stores a unit, and logs when the storage is full, and when it has space again.
    pub(super) fn store(&self, store: impl Fn() -> Result<(), Error>) -> Result<(), Failure> {
        let failed = |error: &Error| Failure::passing(FetchErrorKind::System, reason(error));
        match store() {
            Err(error) if error.is_full() => self.store_in_freed(store),
            Err(error) => Err(failed(&error)),
            Ok(()) => {
                if self.is_full.swap(false, Ordering::Relaxed) {
                    ratelimited_log::info(format_args!(
                        "the cache has space again; waiting reads continue"
                    ));
                }
                Ok(())
            }
        }
    }

    fn store_in_freed(&self, store: impl Fn() -> Result<(), Error>) -> Result<(), Failure> {
        let freed = self.cache.free(MAKE_ROOM);
        if freed.is_ok_and(|freed| freed.bytes > 0) && store().is_ok() {
            return Ok(());
        }
        if !self.is_full.swap(true, Ordering::Relaxed) {
            let root = self.cache.root().display();
            ratelimited_log::error(format_args!(
                "no space left for the cache at {root}; reads of bytes that are not cached wait"
            ));
        }
        let reason = "no space left in the cache";
        Err(Failure::passing(FetchErrorKind::System, reason))
    }

    /// Evicts what is over the limits.
    pub(super) fn evict(&self) {
        match self.cache.evict(self.limits) {
            Ok(evicted) if evicted.files > 0 => {
                ratelimited_log::info(format_args!(
                    "evicted {} files, {} bytes",
                    evicted.files, evicted.bytes
                ));
            }
            Ok(_) => {}
            Err(error) => ratelimited_log::warn(format_args!(
                "cannot evict blobs from the cache: {}",
                reason(&error)
            )),
        }
        let is_over = self.cache.is_over(self.limits);
        let is_over = is_over.is_ok_and(|is_over| is_over);
        self.is_over.store(is_over, Ordering::Relaxed);
    }

    /// Whether downloads pause because the cache is over a limit. Logs a change.
    pub(super) fn pauses_downloads(&self) -> bool {
        let is_over = self.is_over.load(Ordering::Relaxed);
        let root = self.cache.root().display();
        match (self.was_paused.swap(is_over, Ordering::Relaxed), is_over) {
            (false, true) => ratelimited_log::warn(format_args!(
                "the cache at {root} is over its limit, and all of it is in use: downloads pause"
            )),
            (true, false) => {
                ratelimited_log::info(format_args!(
                    "the cache at {root} is within its limit again: downloads go on"
                ));
            }
            (false, false) | (true, true) => {}
        }
        is_over
    }
}
