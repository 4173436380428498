//! The in-flight region of one split virtqueue (vhost-user, "Inflight I/O tracking"): a note, in
//! memory the front-end keeps while the daemon is gone, of every request taken and not answered.
//!
//! Layout, little-endian: a header of 16 bytes `{features: u64, version: u16, desc_num: u16,
//! last_batch_head: u16, used_idx: u16}`, then `desc_num` entries of 16 bytes `{inflight: u8,
//! padding: [u8; 5], next: u16, counter: u64}`; each queue's part is padded to 64 bytes.
//!
//! The order of the stores is the protocol: an entry is marked before its request is looked at,
//! and cleared only after the used index that covers it is visible. After a crash between the two,
//! the difference of the ring's used index and the noted one tells how many entries, linked by
//! `next` from `last_batch_head`, were answered and only wait for their mark to be cleared.

use std::fs::File;
use std::sync::atomic::Ordering;

use vm_memory::{Bytes, VolatileSlice};

use crate::io::mapping::{Access, MapError, Mapping};

const HEADER: usize = 16;
const ENTRY: usize = 16;
const ALIGN: usize = 64;
const VERSION: u16 = 1;

/// Bit of `features` in the first queue's part, all of which the protocol leaves at zero: the driver
/// has switched the write cache off. A process that goes on where another ended must know, for the
/// driver flushes no more.
const WRITES_THROUGH: u64 = 1 << 63;

const FEATURES_AT: usize = 0;
const VERSION_AT: usize = 8;
const DESC_NUM_AT: usize = 10;
const LAST_BATCH_HEAD_AT: usize = 12;
const USED_IDX_AT: usize = 14;

const INFLIGHT_AT: usize = 0;
const NEXT_AT: usize = 6;
const COUNTER_AT: usize = 8;

/// Bytes one queue's part takes.
fn queue_bytes(queue_size: u16) -> usize {
    (HEADER + ENTRY * usize::from(queue_size)).next_multiple_of(ALIGN)
}

/// An in-flight area cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum InflightError {
    /// The area is too small for what it must hold.
    #[error("in-flight area of {actual} bytes, {queues} queues of {queue_size} need {needed}")]
    Short {
        /// Bytes there are.
        actual: u64,
        /// Bytes needed.
        needed: u64,
        /// Queues it must hold.
        queues: u16,
        /// Entries of each.
        queue_size: u16,
    },
    /// The file cannot be made.
    #[error("in-flight file cannot be made")]
    Create(#[source] std::io::Error),
    /// The file cannot be mapped.
    #[error("in-flight area")]
    Map(#[from] MapError),
    /// The area was not made for a queue.
    #[error(
        "in-flight area for {queues} queues of {queue_size} does not hold queue {index} of {size}"
    )]
    Queue {
        /// Queues it holds.
        queues: u16,
        /// Entries of each.
        queue_size: u16,
        /// The queue's number.
        index: u16,
        /// Its number of descriptors.
        size: u16,
    },
    /// The area was written for another layout.
    #[error(
        "in-flight area has version {version} and {desc_num} entries, expected {VERSION} and {queue_size}"
    )]
    Layout {
        /// Version found.
        version: u16,
        /// Entries found.
        desc_num: u16,
        /// Entries the queue has.
        queue_size: u16,
    },
}

/// The mapped area of all queues of a device.
#[derive(Debug)]
pub struct InflightArea {
    mapping: Mapping,
    queues: u16,
    queue_size: u16,
}

impl InflightArea {
    /// Makes the file for `queues` queues of `queue_size` entries; returns it and its length.
    pub fn create(queues: u16, queue_size: u16) -> Result<(File, u64), InflightError> {
        let len = (queue_bytes(queue_size) * usize::from(queues)) as u64;
        let flags = rustix::fs::MemfdFlags::CLOEXEC | rustix::fs::MemfdFlags::ALLOW_SEALING;
        let fd = rustix::fs::memfd_create("ovbd-inflight", flags)
            .map_err(|errno| InflightError::Create(errno.into()))?;
        let file = File::from(fd);
        file.set_len(len).map_err(InflightError::Create)?;
        // Nobody may cut it short under the one who maps it.
        let seals = rustix::fs::SealFlags::SHRINK | rustix::fs::SealFlags::GROW;
        rustix::fs::fcntl_add_seals(&file, seals)
            .map_err(|errno| InflightError::Create(errno.into()))?;
        Ok((file, len))
    }

    /// Maps an area of `len` bytes at `offset` of `file`.
    pub fn map(
        file: File,
        offset: u64,
        len: u64,
        queues: u16,
        queue_size: u16,
    ) -> Result<Self, InflightError> {
        let needed = (queue_bytes(queue_size) * usize::from(queues)) as u64;
        if len < needed {
            return Err(InflightError::Short {
                actual: len,
                needed,
                queues,
                queue_size,
            });
        }
        let mapping = Mapping::new(&file, offset, len, Access::ReadWrite)?;
        Ok(Self {
            mapping,
            queues,
            queue_size,
        })
    }

    /// Whether the front-end cut the file under us: what is noted is not seen by anybody.
    pub fn is_lost(&self) -> bool {
        self.mapping.is_lost()
    }

    /// Whether it was noted that the driver has switched the write cache off.
    pub fn writes_through(&self) -> bool {
        let features = self.features();
        features.is_some_and(|(_, features)| features & WRITES_THROUGH != 0)
    }

    /// Notes whether the driver has switched the write cache off.
    pub fn note_writes_through(&self, through: bool) {
        let Some((place, features)) = self.features() else {
            return;
        };
        if (features & WRITES_THROUGH != 0) != through {
            let features = (features ^ WRITES_THROUGH).to_le();
            let stored = place.store(features, FEATURES_AT, Ordering::Release);
            debug_assert!(stored.is_ok());
        }
    }

    /// The first queue's `features`, if there is a queue, and where they are.
    fn features(&self) -> Option<(VolatileSlice<'_>, u64)> {
        let place = self.mapping.slice(0, HEADER).filter(|_| self.queues > 0)?;
        let features = place.load(FEATURES_AT, Ordering::Acquire).unwrap_or(0);
        Some((place, u64::from_le(features)))
    }

    /// The part of queue `index`, which has `size` entries.
    pub fn queue(&self, index: u16, size: u16) -> Result<InflightQueue<'_>, InflightError> {
        let Self {
            queues, queue_size, ..
        } = *self;
        let stride = queue_bytes(queue_size);
        let part = self
            .mapping
            .slice(usize::from(index) * stride, stride)
            .filter(|_| index < queues && size <= queue_size)
            .ok_or(InflightError::Queue {
                queues,
                queue_size,
                index,
                size,
            })?;
        Ok(InflightQueue {
            part,
            size,
            counter: 0,
        })
    }
}

/// One queue's notes.
#[derive(Debug)]
pub struct InflightQueue<'m> {
    part: VolatileSlice<'m>,
    size: u16,
    counter: u64,
}

// Every offset below lies inside the part: `size` entries were checked against its length, and
// heads are checked to be below `size`. The loads and stores thus cannot fail, and a front-end
// that writes nonsense here can only spoil its own recovery.
impl InflightQueue<'_> {
    fn entry(head: u16) -> usize {
        HEADER + ENTRY * usize::from(head)
    }

    fn load_u16(&self, at: usize) -> u16 {
        u16::from_le(self.part.load(at, Ordering::Relaxed).unwrap_or(0))
    }

    fn store_u16(&self, at: usize, value: u16) {
        let stored = self.part.store(value.to_le(), at, Ordering::Release);
        debug_assert!(stored.is_ok());
    }

    fn is_marked(&self, head: u16) -> bool {
        let mark: u8 = self
            .part
            .load(Self::entry(head) + INFLIGHT_AT, Ordering::Relaxed)
            .unwrap_or(0);
        mark != 0
    }

    fn set_mark(&self, head: u16, mark: u8) {
        let stored = self
            .part
            .store(mark, Self::entry(head) + INFLIGHT_AT, Ordering::Release);
        debug_assert!(stored.is_ok());
    }

    /// Takes over what an earlier process left, given the ring's used index: returns the heads
    /// taken and not answered, oldest first. A fresh area is set up and there is nothing to take
    /// over: `None`.
    pub fn recover(&mut self, used_idx: u16) -> Result<Option<Vec<u16>>, InflightError> {
        let (version, desc_num) = (self.load_u16(VERSION_AT), self.load_u16(DESC_NUM_AT));
        if version == 0 {
            self.store_u16(DESC_NUM_AT, self.size);
            self.store_u16(USED_IDX_AT, used_idx);
            self.store_u16(VERSION_AT, VERSION);
            return Ok(None);
        }
        if version != VERSION || desc_num != self.size {
            return Err(InflightError::Layout {
                version,
                desc_num,
                queue_size: self.size,
            });
        }
        // Answered, but the process died before it cleared the marks.
        let answered = used_idx
            .wrapping_sub(self.load_u16(USED_IDX_AT))
            .min(self.size);
        let mut head = self.load_u16(LAST_BATCH_HEAD_AT);
        for _ in 0..answered {
            if head >= self.size {
                break;
            }
            self.set_mark(head, 0);
            head = self.load_u16(Self::entry(head) + NEXT_AT);
        }
        self.store_u16(USED_IDX_AT, used_idx);

        let counter = |head| -> u64 {
            u64::from_le(
                self.part
                    .load(Self::entry(head) + COUNTER_AT, Ordering::Relaxed)
                    .unwrap_or(0),
            )
        };
        let mut open: Vec<(u64, u16)> = (0..self.size)
            .filter(|head| self.is_marked(*head))
            .map(|head| (counter(head), head))
            .collect();
        open.sort_unstable();
        self.counter = open
            .last()
            .map_or(0, |(counter, _)| counter.wrapping_add(1));
        Ok(Some(open.into_iter().map(|(_, head)| head).collect()))
    }

    /// Notes that the request at `head` was taken. Returns whether it was free: a driver that
    /// offers a chain twice breaks the virtqueue's rules.
    #[must_use]
    pub fn mark(&mut self, head: u16) -> bool {
        if self.is_marked(head) {
            return false;
        }
        let at = Self::entry(head) + COUNTER_AT;
        let stored = self.part.store(self.counter.to_le(), at, Ordering::Relaxed);
        debug_assert!(stored.is_ok());
        self.counter = self.counter.wrapping_add(1);
        self.set_mark(head, 1);
        true
    }

    /// Links `head` into the batch that the next used index will cover.
    pub fn link(&self, head: u16) {
        self.store_u16(
            Self::entry(head) + NEXT_AT,
            self.load_u16(LAST_BATCH_HEAD_AT),
        );
        self.store_u16(LAST_BATCH_HEAD_AT, head);
    }

    /// Clears the marks of a batch, once the ring's `used_idx` that covers it is visible.
    pub fn clear(&self, batch: &[u16], used_idx: u16) {
        for head in batch {
            self.set_mark(*head, 0);
        }
        self.store_u16(USED_IDX_AT, used_idx);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn area() -> (File, InflightArea) {
        let (file, len) = InflightArea::create(3, 8).unwrap();
        let again = file.try_clone().unwrap();
        (again, InflightArea::map(file, 0, len, 3, 8).unwrap())
    }

    #[test]
    fn what_was_not_answered_comes_back_in_order() {
        let (_file, area) = area();
        let mut queue = area.queue(1, 8).unwrap();
        assert!(queue.recover(7).unwrap().is_none());
        for head in [5, 2, 7, 0] {
            assert!(queue.mark(head));
        }
        assert!(!queue.mark(2), "a head offered twice");
        queue.link(2);
        queue.clear(&[2], 8);
        let mut next = area.queue(1, 8).unwrap();
        assert_eq!(next.recover(8).unwrap(), Some(vec![5, 7, 0]));
        assert!(next.mark(3));
        assert_eq!(
            area.queue(1, 8).unwrap().recover(8).unwrap(),
            Some(vec![5, 7, 0, 3])
        );
        assert!(
            area.queue(0, 8).unwrap().recover(0).unwrap().is_none(),
            "queues are apart"
        );
    }

    #[test]
    fn a_crash_between_used_index_and_clearing_answers_nothing_twice() {
        let (_file, area) = area();
        let mut queue = area.queue(2, 8).unwrap();
        queue.recover(65534).unwrap();
        for head in [1, 2, 3, 4] {
            assert!(queue.mark(head));
        }
        for head in [3, 1, 4] {
            queue.link(head);
        }
        // The used index went from 65534 to 1, then the process died.
        assert_eq!(area.queue(2, 8).unwrap().recover(1).unwrap(), Some(vec![2]));
        // It died again at once: the same answer.
        assert_eq!(area.queue(2, 8).unwrap().recover(1).unwrap(), Some(vec![2]));
    }

    #[test]
    fn nonsense_from_the_front_end_is_survived() {
        let (file, area) = area();
        let mut queue = area.queue(0, 8).unwrap();
        queue.recover(0).unwrap();
        use std::os::unix::fs::FileExt;
        file.write_all_at(&[0xff; 16 * 8], 16).unwrap();
        file.write_all_at(&[0xff; 2], LAST_BATCH_HEAD_AT as u64)
            .unwrap();
        assert_eq!(
            area.queue(0, 8).unwrap().recover(5).unwrap().unwrap().len(),
            8
        );
        file.write_all_at(&[9, 0], DESC_NUM_AT as u64).unwrap();
        assert!(matches!(
            area.queue(0, 8).unwrap().recover(5),
            Err(InflightError::Layout { .. })
        ));
        assert!(area.queue(3, 8).is_err() && area.queue(0, 9).is_err());
    }

    #[test]
    fn a_write_cache_that_is_off_is_noted_beside_the_requests() {
        let (file, len) = InflightArea::create(2, 8).unwrap();
        let again = file.try_clone().unwrap();
        let area = InflightArea::map(file, 0, len, 2, 8).unwrap();
        assert!(!area.writes_through());
        area.note_writes_through(true);
        let mut queue = area.queue(0, 8).unwrap();
        assert!(
            queue.recover(3).unwrap().is_none(),
            "it is a fresh area still"
        );
        let later = InflightArea::map(again, 0, len, 2, 8).unwrap();
        assert!(later.writes_through());
        later.note_writes_through(false);
        assert!(!area.writes_through());
        let (file, len) = InflightArea::create(0, 8).unwrap();
        if let Ok(none) = InflightArea::map(file, 0, len, 0, 8) {
            none.note_writes_through(true);
            assert!(!none.writes_through());
        }
    }
}
