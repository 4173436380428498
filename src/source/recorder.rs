//! Records the order in which units of blobs are read first, for a prefetch trace.
//!
//! A recording may begin and end while the blobs are read. Blobs that are not recorded pay nothing for it:
//! `Completion` tells both in one load.

use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};

use crate::format::presence::{UNIT, UnitRange};
use crate::io::bitmap::words;

/// Units of the blobs of a stack, in the order in which they were read first.
#[derive(Debug, Default)]
pub struct Recorder(Mutex<Vec<ReadUnit>>);

/// A unit of a blob.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ReadUnit {
    /// Number of the layer, from the bottom.
    pub layer: usize,
    /// Number of the unit.
    pub unit: u64,
}

impl Recorder {
    /// Returns the units read so far.
    pub fn units(&self) -> Vec<ReadUnit> {
        self.0
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .clone()
    }

    /// Forgets all units.
    pub fn clear(&self) {
        self.0
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .clear();
    }

    fn note(&self, layer: usize, unit: u64) {
        let mut units = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        units.push(ReadUnit { layer, unit });
    }
}

/// The record of the reads of one blob.
#[derive(Debug)]
pub(super) struct Tape {
    pub(super) recorder: Arc<Recorder>,
    /// Number of the layer, from the bottom.
    pub(super) layer: usize,
    /// A bit for each unit that was read.
    seen: Box<[AtomicU64]>,
}

impl Tape {
    /// An empty record for a blob of `len` bytes.
    pub(super) fn new(recorder: &Arc<Recorder>, layer: usize, len: u64) -> Self {
        let words = len.div_ceil(UNIT).div_ceil(64);
        Self {
            recorder: Arc::clone(recorder),
            layer,
            seen: (0..words).map(|_| AtomicU64::new(0)).collect(),
        }
    }

    /// Forgets which units were read.
    pub(super) fn clear(&self) {
        self.seen
            .iter()
            .for_each(|word| word.store(0, Ordering::Relaxed));
    }

    /// Records the units of `len` bytes at `offset`. A unit that is recorded already costs one atomic load.
    pub(super) fn note(&self, offset: u64, len: u64) {
        let end = offset.saturating_add(len).div_ceil(UNIT);
        self.note_units(UnitRange::new(offset / UNIT, end));
    }

    fn note_units(&self, units: UnitRange) {
        for (word, mask) in words(units.numbers()) {
            let Some(seen) = self.seen.get(word as usize) else {
                return;
            };
            if seen.load(Ordering::Relaxed) & mask == mask {
                continue;
            }
            let mut new = mask & !seen.fetch_or(mask, Ordering::Relaxed);
            while new != 0 {
                self.recorder
                    .note(self.layer, word * 64 + u64::from(new.trailing_zeros()));
                new &= new - 1;
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::source::{Blob, Located};

    #[test]
    fn units_are_noted_once_and_in_order() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("blob");
        let bytes: Vec<u8> = (0..200 * UNIT).map(|at| (at / 7) as u8).collect();
        std::fs::write(&path, &bytes).unwrap();
        let recorder = Arc::new(Recorder::default());
        let blob = Blob::open(&path).unwrap();
        blob.read_exact_at(&mut [0; 9], 77 * UNIT).unwrap();
        blob.start_recording(&recorder, 3);
        for (offset, len) in [(150 * UNIT, 10), (UNIT - 1, 2), (0, 100), (150 * UNIT, 10)] {
            let mut found = vec![0; len];
            blob.read_exact_at(&mut found, offset).unwrap();
            assert!(found == bytes[offset as usize..][..len]);
        }
        assert!(matches!(blob.locate(199 * UNIT, 5), Located::Present(_)));
        let units: Vec<_> = recorder.units().iter().map(|read| read.unit).collect();
        assert_eq!(units, [150, 0, 1, 199]);
        assert!(recorder.units().iter().all(|read| read.layer == 3));
        assert!(!blob.reject(0, 1));
        blob.stop_recording();
        blob.read_exact_at(&mut [0; 9], 88 * UNIT).unwrap();
        assert_eq!(recorder.units().len(), 4);
        recorder.clear();
        blob.start_recording(&recorder, 3);
        blob.read_exact_at(&mut [0; 9], 0).unwrap();
        assert_eq!(recorder.units(), [ReadUnit { layer: 3, unit: 0 }]);
    }

    #[test]
    fn a_blob_that_grew_is_recorded_to_its_new_end() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("blob");
        std::fs::write(&path, [1]).unwrap();
        let recorder = Arc::new(Recorder::default());
        let before = Blob::open(&path).unwrap();
        before.start_recording(&recorder, 1);
        std::fs::write(&path, vec![1; 100 * UNIT as usize]).unwrap();
        let grown = before.measured().unwrap();
        assert_eq!(grown.local_bytes(), 100 * UNIT);
        grown.read_exact_at(&mut [0; 9], 99 * UNIT).unwrap();
        assert_eq!(recorder.units(), [ReadUnit { layer: 1, unit: 99 }]);
    }
}
