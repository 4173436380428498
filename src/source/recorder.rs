//! Records the order in which units of blobs are read first, for a prefetch trace.
//!
//! A recorded blob calls [`Presence::is_present`] before each read, which records the units: it is never
//! [`Presence::is_complete`]. A unit that is recorded already costs one atomic load.

use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use super::Blob;
use super::waker::{Presence, Ticket, Waker};
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

    fn note(&self, layer: usize, unit: u64) {
        let mut units = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        units.push(ReadUnit { layer, unit });
    }
}

/// How the reads of one blob are recorded.
#[derive(Clone, Debug)]
pub(super) struct Recording {
    pub(super) recorder: Arc<Recorder>,
    /// Number of the layer, from the bottom.
    pub(super) layer: usize,
    /// The presence of the blob without recording; `None`: all bytes are local.
    pub(super) unrecorded: Option<Arc<dyn Presence>>,
}

/// Presence of a blob whose reads are recorded.
#[derive(Debug)]
pub(super) struct Recorded {
    recording: Recording,
    /// A bit for each unit that was read.
    seen: Box<[AtomicU64]>,
    len: u64,
}

impl Recorded {
    /// Records the reads of a blob of `len` bytes.
    pub(super) fn new(recording: &Recording, len: u64) -> Self {
        let words = len.div_ceil(UNIT).div_ceil(64);
        Self {
            recording: recording.clone(),
            seen: (0..words).map(|_| AtomicU64::new(0)).collect(),
            len,
        }
    }

    fn note(&self, units: UnitRange) {
        for (word, mask) in words(units.numbers()) {
            let Some(seen) = self.seen.get(word as usize) else {
                return;
            };
            if seen.load(Ordering::Relaxed) & mask == mask {
                continue;
            }
            let mut new = mask & !seen.fetch_or(mask, Ordering::Relaxed);
            while new != 0 {
                let Recording {
                    recorder, layer, ..
                } = &self.recording;
                recorder.note(*layer, word * 64 + u64::from(new.trailing_zeros()));
                new &= new - 1;
            }
        }
    }
}

impl Presence for Recorded {
    fn is_present(&self, offset: u64, len: u64) -> bool {
        let end = offset.saturating_add(len).div_ceil(UNIT);
        self.note(UnitRange::new(offset / UNIT, end));
        let inner = self.recording.unrecorded.as_ref();
        inner.is_none_or(|inner| inner.is_present(offset, len))
    }

    fn successor(&self) -> Option<&Blob> {
        self.recording.unrecorded.as_ref()?.successor()
    }

    fn request(&self, offset: u64, len: u64, waker: &Arc<Waker>, ticket: Ticket) {
        match &self.recording.unrecorded {
            Some(inner) => inner.request(offset, len, waker, ticket),
            None => waker.finish(ticket, Ok(())),
        }
    }

    fn fetch_ahead(&self, offset: u64, len: u64) {
        if let Some(inner) = &self.recording.unrecorded {
            inner.fetch_ahead(offset, len);
        }
    }

    fn local_bytes(&self) -> u64 {
        let inner = self.recording.unrecorded.as_ref();
        inner.map_or(self.len, |inner| inner.local_bytes())
    }

    fn replay(&self, offset: u64, len: u64) {
        if let Some(inner) = &self.recording.unrecorded {
            inner.replay(offset, len);
        }
    }

    fn reject(&self, offset: u64, len: u64) -> bool {
        let inner = self.recording.unrecorded.as_ref();
        inner.is_some_and(|inner| inner.reject(offset, len))
    }

    fn distrust(&self) -> bool {
        let inner = self.recording.unrecorded.as_ref();
        inner.is_some_and(|inner| inner.distrust())
    }

    fn trust(&self) {
        if let Some(inner) = &self.recording.unrecorded {
            inner.trust();
        }
    }

    fn patience(&self) -> Duration {
        let inner = self.recording.unrecorded.as_ref();
        inner.map_or(Duration::ZERO, |inner| inner.patience())
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
        let blob = Blob::open(&path).unwrap().recorded(&recorder, 3);
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
    }

    #[test]
    fn a_blob_that_grew_is_recorded_to_its_new_end() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("blob");
        std::fs::write(&path, [1]).unwrap();
        let recorder = Arc::new(Recorder::default());
        let before = Blob::open(&path).unwrap().recorded(&recorder, 1);
        std::fs::write(&path, vec![1; 100 * UNIT as usize]).unwrap();
        let grown = before.measured().unwrap();
        assert_eq!(grown.local_bytes(), 100 * UNIT);
        grown.read_exact_at(&mut [0; 9], 99 * UNIT).unwrap();
        assert_eq!(recorder.units(), [ReadUnit { layer: 1, unit: 99 }]);
    }
}
