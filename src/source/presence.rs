//! A mapped presence map: disks read it, the fetcher sets its bits.
//!
//! ```text
//! fetcher:  pwrite(data) -> mark(units): release store     reader: is_present: acquire loads -> read
//! ```
//! Reader and writer are different processes that map the same file. A set bit makes the unit's
//! bytes visible, because both go through the page cache. Nothing blocks here, and nothing
//! allocates.

use std::fs::File;
use std::sync::atomic::{AtomicU32, AtomicU64, Ordering};

use uuid::Uuid;
use vm_memory::VolatileMemory;

use crate::format::presence::{self, Header, Identity, State, UnitRange};
use crate::io::bitmap::words;
use crate::io::mapped_file::{Access, MapError, MappedFile};

/// Error of a presence map.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The file cannot be mapped.
    #[error("cannot map the presence map")]
    Map(#[from] MapError),
    /// The file is not the presence map of the blob, or is damaged.
    #[error(transparent)]
    Format(#[from] presence::Error),
    /// The file was truncated, or its storage failed, while it was mapped.
    #[error("the presence map was truncated or cannot be read")]
    Lost,
}

/// One of the two bitmaps of a map.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Bitmap {
    /// Units that are in the page cache or on storage.
    Live,
    /// Units that are on storage.
    Durable,
}

/// The presence map of one blob.
#[derive(Debug)]
pub struct PresenceMap {
    mapping: MappedFile,
    identity: Identity,
}

impl PresenceMap {
    /// Maps `file`, the presence map of `identity`.
    ///
    /// # Errors
    /// [`Error::Format`] if the file is not this map; [`Error::Map`] if it cannot be mapped.
    pub fn open(file: &File, identity: Identity, access: Access) -> Result<Self, Error> {
        let file_len = file.metadata().map_err(MapError::Stat)?.len();
        identity.check_map_len(file_len)?;
        let mapping = MappedFile::new(file, 0, identity.map_len(), access)?;
        let map = Self { mapping, identity };
        map.header()?;
        Ok(map)
    }

    /// The blob that the map describes.
    pub fn identity(&self) -> &Identity {
        &self.identity
    }

    /// Reads the header.
    ///
    /// # Errors
    /// [`Error::Format`] if the header is damaged; [`Error::Lost`] if the file was truncated.
    pub fn header(&self) -> Result<Header, Error> {
        let mut bytes = [0; 128];
        if let Some(slice) = self.mapping.slice(0, bytes.len()) {
            slice.copy_to(&mut bytes[..]);
        }
        if self.mapping.is_lost() {
            return Err(Error::Lost);
        }
        let file_len = self.identity.map_len();
        Ok(Header::decode(&bytes, file_len, &self.identity)?)
    }

    /// Whether all of `len` bytes at `offset` are present. False for a range that ends after the blob, and
    /// for every range after the map was truncated.
    pub fn is_present(&self, offset: u64, len: u64) -> bool {
        let units = self.identity.units_of(offset, len);
        units.is_some_and(|units| self.holds(Bitmap::Live, units))
    }

    /// Whether all of `units` are set in `bitmap`.
    pub fn holds(&self, bitmap: Bitmap, units: UnitRange) -> bool {
        words(units.numbers()).all(|(word, mask)| self.load(bitmap, word) & mask == mask)
    }

    /// Returns the absent units of `units`, as runs.
    pub fn absent(&self, units: UnitRange) -> Vec<UnitRange> {
        let mut runs: Vec<UnitRange> = Vec::new();
        for (word, mask) in words(units.numbers()) {
            let mut absent = !self.load(Bitmap::Live, word) & mask;
            while absent != 0 {
                let unit = word * 64 + u64::from(absent.trailing_zeros());
                absent &= absent - 1;
                match runs.last_mut() {
                    Some(run) if run.end() == unit => *run = UnitRange::new(run.start(), unit + 1),
                    _ => runs.push(UnitRange::one(unit)),
                }
            }
        }
        runs
    }

    /// Number of units that are set in `bitmap`.
    pub fn count(&self, bitmap: Bitmap) -> u64 {
        self.count_in(bitmap, self.identity.all_units())
    }

    /// Number of `units` that are set in `bitmap`.
    pub fn count_in(&self, bitmap: Bitmap, units: UnitRange) -> u64 {
        let inside = words(units.numbers());
        inside
            .map(|(word, mask)| u64::from((self.load(bitmap, word) & mask).count_ones()))
            .sum()
    }

    /// Sets `units` in `bitmap`. Their bytes must have been written before.
    pub fn mark(&self, bitmap: Bitmap, units: UnitRange) {
        for (word, mask) in words(units.numbers()) {
            self.with_word(bitmap, word, |bits| {
                bits.fetch_or(mask.to_le(), Ordering::Release)
            });
        }
    }

    /// Replaces the live bitmap by the durable one: units that were not synced become absent.
    pub fn forget_unsynced(&self) {
        for (word, mask) in words(0..self.identity.units()) {
            let durable = self.load(Bitmap::Durable, word) & mask;
            self.with_word(Bitmap::Live, word, |bits| {
                bits.swap(durable.to_le(), Ordering::Release)
            });
        }
    }

    /// Makes all units absent.
    pub fn clear(&self) {
        for bitmap in [Bitmap::Durable, Bitmap::Live] {
            for (word, _) in words(0..self.identity.units()) {
                self.with_word(bitmap, word, |bits| bits.store(0, Ordering::Release));
            }
        }
    }

    /// Copies the words of the live bitmap.
    pub fn snapshot(&self) -> Vec<u64> {
        let all = words(0..self.identity.units());
        all.map(|(word, mask)| self.load(Bitmap::Live, word) & mask)
            .collect()
    }

    /// Sets the units of a snapshot of the live bitmap in the durable bitmap. They must have been synced.
    pub fn mark_durable(&self, snapshot: &[u64]) {
        for (word, bits) in snapshot.iter().enumerate() {
            self.with_word(Bitmap::Durable, word as u64, |durable| {
                durable.fetch_or(bits.to_le(), Ordering::Release)
            });
        }
    }

    /// State of the blob; `None` if the map was truncated or overwritten.
    pub fn state(&self) -> Option<State> {
        let slice = self.mapping.slice(presence::STATE_OFFSET, 4)?;
        let word = slice.get_atomic_ref::<AtomicU32>(0).ok()?;
        let number = u32::from_le(word.load(Ordering::Acquire));
        let state = State::from_number(number).ok();
        state.filter(|_| !self.mapping.is_lost())
    }

    /// Sets the state.
    pub fn set_state(&self, state: State) {
        if let Some(slice) = self.mapping.slice(presence::STATE_OFFSET, 4)
            && let Ok(word) = slice.get_atomic_ref::<AtomicU32>(0)
        {
            word.store(state.number().to_le(), Ordering::Release);
        }
    }

    /// Sets the boot in which the live bits are valid. Not atomic: the caller holds the lock of the cache.
    pub fn set_boot(&self, boot: Uuid) {
        if let Some(slice) = self.mapping.slice(presence::BOOT_OFFSET, 16) {
            slice.copy_from(&boot.as_bytes()[..]);
        }
    }

    /// Whether the file was truncated, or its storage failed, while it was mapped.
    pub fn is_lost(&self) -> bool {
        self.mapping.is_lost()
    }

    fn load(&self, bitmap: Bitmap, word: u64) -> u64 {
        let bits = self.with_word(bitmap, word, |bits| bits.load(Ordering::Acquire));
        u64::from_le(bits.unwrap_or(0))
    }

    fn with_word<R>(
        &self,
        bitmap: Bitmap,
        word: u64,
        act: impl FnOnce(&AtomicU64) -> R,
    ) -> Option<R> {
        let base = match bitmap {
            Bitmap::Live => presence::HEADER_LEN,
            Bitmap::Durable => presence::HEADER_LEN + self.identity.bitmap_len(),
        };
        let slice = self.mapping.slice((base + word * 8) as usize, 8)?;
        let bits = slice.get_atomic_ref::<AtomicU64>(0).ok()?;
        Some(act(bits))
    }
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::FileExt;

    use super::*;
    use crate::format::digest::Digest;
    use crate::format::presence::UNIT;

    fn map(len: u64) -> (File, PresenceMap) {
        let file = tempfile::tempfile().unwrap();
        let identity = Identity::new(Digest::of(b"blob"), len).unwrap();
        file.write_all_at(&Header::new_map(&identity), 0).unwrap();
        file.set_len(identity.map_len()).unwrap();
        let map = PresenceMap::open(&file, identity, Access::ReadWrite).unwrap();
        (file, map)
    }

    #[test]
    fn what_one_mapping_marks_another_sees() {
        let (file, map) = map(UNIT * 200 - 5);
        let reader = PresenceMap::open(&file, *map.identity(), Access::Read).unwrap();
        let all = map.identity().all_units();
        assert_eq!(reader.absent(all), [UnitRange::new(0, 200)]);
        map.mark(Bitmap::Live, UnitRange::new(60, 70));
        map.mark(Bitmap::Live, UnitRange::one(199));
        assert!(reader.is_present(60 * UNIT, 10 * UNIT));
        assert!(!reader.is_present(60 * UNIT, 10 * UNIT + 1));
        assert!(!reader.is_present(60 * UNIT - 1, 1));
        assert!(reader.is_present(199 * UNIT, UNIT - 5));
        assert!(!reader.is_present(199 * UNIT, UNIT), "past the end");
        assert!(!reader.is_present(u64::MAX, 1));
        let absent = [UnitRange::new(0, 60), UnitRange::new(70, 199)];
        assert_eq!(reader.absent(all), absent);
        assert_eq!(reader.count(Bitmap::Live), 11);
        assert_eq!(reader.count(Bitmap::Durable), 0);
    }

    #[test]
    fn only_durable_units_survive_another_boot() {
        let (_file, map) = map(UNIT * 100);
        map.mark(Bitmap::Live, UnitRange::new(0, 50));
        let snapshot = map.snapshot();
        map.mark(Bitmap::Live, UnitRange::new(50, 60));
        map.mark_durable(&snapshot);
        map.forget_unsynced();
        let absent = map.absent(map.identity().all_units());
        assert_eq!(absent, [UnitRange::new(50, 100)]);
        let boot = Uuid::new_v4();
        map.set_boot(boot);
        map.set_state(State::Restarted);
        let state = State::Restarted;
        assert_eq!(map.header().unwrap(), Header { state, boot });
    }

    #[test]
    fn a_map_that_was_cut_has_nothing() {
        let (file, map) = map(UNIT * 100);
        map.mark(Bitmap::Live, map.identity().all_units());
        file.set_len(4096).unwrap();
        assert!(!map.is_present(0, 1));
        assert!(map.is_lost());
        assert!(matches!(map.header(), Err(Error::Lost)));
        let error = PresenceMap::open(&file, *map.identity(), Access::Read).unwrap_err();
        assert!(matches!(error, Error::Format(_)), "{error}");
    }
}
