//! Damaged bytes are fetched again: rejected, fetched past mirrors, and decoded anew, a few times.
//!
//! A block whose checksum is wrong, or that cannot be decoded, is rejected ([`Blob::reject`]): its units are
//! absent until they are fetched again. [`Blob::read_decoded`] does all of it for readers that wait. Queue
//! workers reject the range and locate it again. `RejectedUnits` limits how often a unit is fetched again,
//! and [`FetchCount`] how often one read fetches.

use std::collections::HashMap;
use std::sync::atomic::{AtomicBool, AtomicU8, Ordering};
use std::sync::{Mutex, OnceLock, PoisonError};

use super::waker::{FetchError, FetchErrorKind};
use super::{Blob, Error};
use crate::format::presence::UnitRange;
use crate::io::bitmap::AtomicBitmap;

/// How often a damaged unit is fetched again before a request for it fails. The same limit holds for all
/// that opening a layer reads.
const MAX_REFETCHES: u8 = 3;

/// Most fetches of one read in a row after which its range is still absent. The range may be damaged each
/// time: more than `MAX_REFETCHES`, because other reads share its units.
const MAX_IN_A_ROW: u32 = 8;

impl Blob {
    /// Reports that the bytes of a range are damaged. Returns whether the range is absent from now on, to be
    /// fetched again.
    ///
    /// Returns false for a local file, and for a range that was fetched again too often.
    #[cold]
    pub fn reject(&self, offset: u64, len: usize) -> bool {
        let inside = (len as u64).min(self.len().saturating_sub(offset));
        inside > 0 && self.mark_absent(offset, inside)
    }

    /// Fills `stored` with the bytes from `offset` on and decodes it with `decode`. If `decode` fails, the
    /// bytes are damaged: fetches them again and repeats both, as often as [`Blob::reject`] allows.
    ///
    /// # Errors
    /// Those of [`Blob::read_exact_at`], and the last error of `decode`.
    pub fn read_decoded<E: From<Error>>(
        &self,
        stored: &mut [u8],
        offset: u64,
        mut decode: impl FnMut(&[u8]) -> Result<(), E>,
    ) -> Result<(), E> {
        loop {
            self.read_exact_at(stored, offset)?;
            match decode(stored) {
                Err(_) if self.reject(offset, stored.len()) => {}
                decoded => return decoded,
            }
        }
    }
}

/// Number of fetches of one read in a row. A fetched range may be absent again, if it was damaged.
#[derive(Clone, Copy, Debug)]
pub struct FetchCount(u32);

impl FetchCount {
    /// The first fetch.
    pub const FIRST: Self = Self(1);

    /// Counts one more fetch, of a range that is absent after a fetch.
    ///
    /// # Errors
    /// [`FetchErrorKind::Damaged`] after too many fetches.
    pub fn next(self) -> Result<Self, FetchError> {
        if self.0 < MAX_IN_A_ROW {
            return Ok(Self(self.0 + 1));
        }
        let reason = format!("bytes are missing from the cache after {MAX_IN_A_ROW} fetches");
        Err(FetchError::new(FetchErrorKind::Damaged, reason))
    }
}

/// Units that this process found damaged.
#[derive(Debug, Default)]
pub(super) struct RejectedUnits {
    /// One bit per unit, set until the unit is fetched again. Created for the first rejected unit.
    bits: OnceLock<AtomicBitmap>,
    /// Number of times each unit was rejected.
    counts: Mutex<HashMap<u64, u8>>,
    /// How often all units were rejected at once.
    distrusted: AtomicU8,
    /// Whether units are fetched into another file: rejected ones of this file stay rejected.
    is_superseded: AtomicBool,
}

impl RejectedUnits {
    /// Whether one of `units` is damaged.
    pub(super) fn holds_any(&self, units: UnitRange) -> bool {
        self.bits
            .get()
            .is_some_and(|bits| bits.any(units.numbers()))
    }

    /// Marks `units` damaged. Returns false if one of them was damaged too often, and resets their counts,
    /// so that the next request tries again.
    pub(super) fn add(&self, units: UnitRange, all: u64) -> bool {
        let mut counts = self.counts.lock().unwrap_or_else(PoisonError::into_inner);
        let worn = |unit| {
            counts
                .get(&unit)
                .is_some_and(|count| *count >= MAX_REFETCHES)
        };
        if units.numbers().any(worn) {
            units.numbers().for_each(|unit| _ = counts.remove(&unit));
            return false;
        }
        for unit in units.numbers() {
            *counts.entry(unit).or_default() += 1;
        }
        let bits = self.bits.get_or_init(|| AtomicBitmap::new(all));
        bits.set(units.numbers());
        true
    }

    /// Rejects all units, a few times.
    pub(super) fn add_all(&self, all: u64) -> bool {
        if self.distrusted.fetch_add(1, Ordering::Relaxed) >= MAX_REFETCHES {
            self.distrusted.store(MAX_REFETCHES, Ordering::Relaxed);
            return false;
        }
        let bits = self.bits.get_or_init(|| AtomicBitmap::new(all));
        bits.set(0..all);
        true
    }

    /// Marks `units` damaged, without a limit: another file has their bytes.
    pub(super) fn exclude(&self, units: UnitRange, all: u64) {
        let bits = self.bits.get_or_init(|| AtomicBitmap::new(all));
        bits.set(units.numbers());
    }

    /// Notes that units are fetched into another file from now on.
    pub(super) fn supersede(&self) {
        self.is_superseded.store(true, Ordering::Release);
    }

    /// Notes that `units` were fetched again.
    pub(super) fn replaced(&self, units: UnitRange) {
        if self.is_superseded.load(Ordering::Acquire) {
            return;
        }
        if let Some(bits) = self.bits.get() {
            bits.clear(units.numbers());
        }
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;
    use std::sync::atomic::AtomicU32;
    use std::time::Duration;

    use super::*;
    use crate::source::{LayerRef, Presence, Ticket, Waker};

    const UNIT: UnitRange = UnitRange::one(0);

    /// A blob of one unit, which each request fetches.
    #[derive(Debug, Default)]
    struct OneUnit {
        rejected: RejectedUnits,
        fetches: AtomicU32,
        /// Whether the unit is absent again after each fetch.
        is_lost: bool,
    }

    impl Presence for Arc<OneUnit> {
        fn is_present(&self, _: u64, _: u64) -> bool {
            !self.is_lost && !self.rejected.holds_any(UNIT)
        }

        fn request(&self, _: u64, _: u64, waker: &Arc<Waker>, ticket: Ticket) {
            self.fetches.fetch_add(1, Ordering::Relaxed);
            self.rejected.replaced(UNIT);
            waker.finish(ticket, Ok(()));
        }

        fn fetch_ahead(&self, _: u64, _: u64) {}

        fn reject(&self, _: u64, _: u64) -> bool {
            self.rejected.add(UNIT, 1)
        }

        fn patience(&self) -> Duration {
            Duration::from_secs(60)
        }
    }

    /// Reads a blob whose first `damaged` decodings fail; returns the result and the number of fetches.
    fn read(damaged: u32, is_lost: bool) -> (Result<(), Error>, u32) {
        let unit = Arc::new(OneUnit {
            is_lost,
            ..OneUnit::default()
        });
        let file = tempfile::tempfile().unwrap();
        file.set_len(8).unwrap();
        let presence = Arc::new(unit.clone());
        let blob = Blob::partial(
            LayerRef::from(std::path::Path::new("blob")),
            file,
            8,
            presence,
        );
        let mut decodings = 0;
        let read = blob.read_decoded(&mut [1; 8], 0, |stored| {
            assert_eq!(stored, [0; 8]);
            decodings += 1;
            match decodings > damaged {
                true => Ok(()),
                false => Err(blob.short(0, 8, 0)),
            }
        });
        (read, unit.fetches.load(Ordering::Relaxed))
    }

    #[test]
    fn damaged_bytes_are_fetched_again_a_few_times() {
        for damaged in 0..=3 {
            let (read, fetches) = read(damaged, false);
            read.unwrap();
            assert_eq!(fetches, damaged);
        }
        let (read, fetches) = read(u32::MAX, false);
        assert!(matches!(read, Err(Error::Short { .. })), "{read:?}");
        assert_eq!(fetches, 3);
    }

    #[test]
    fn bytes_that_never_arrive_are_fetched_a_few_times() {
        let (read, fetches) = read(0, true);
        let Err(Error::Fetch { source, .. }) = read else {
            panic!("{read:?}")
        };
        assert_eq!(source.kind(), FetchErrorKind::Damaged);
        assert_eq!(fetches, MAX_IN_A_ROW);
    }
}
