//! In-flight area of split virtqueues (vhost-user, "Inflight I/O tracking"): marks of the requests that were
//! taken and not answered, in memory that the front-end keeps across a restart of the daemon.
//!
//! The area has one region for each queue. Layout of a region, little-endian: a header of 16 bytes
//! `{features: u64, version: u16, desc_num: u16, last_batch_head: u16, used_idx: u16}`, then `desc_num`
//! entries of 16 bytes `{inflight: u8, padding: [u8; 5], next: u16, counter: u64}`, padded to 64 bytes.
//!
//! The order of the stores is the protocol. An entry is marked before its request is read, and cleared after
//! the used index that covers it is visible. After a crash between the two, some answered requests are still
//! marked. Their number is the difference between the used index of the ring and the recorded one; they are
//! linked by `next`, starting at `last_batch_head`.

use std::fs::File;
use std::iter;
use std::sync::atomic::{AtomicBool, Ordering};

use vm_memory::{Bytes, VolatileSlice};

use crate::io::mapped_file::{Access, MapError, MappedFile};

const HEADER: usize = 16;
const ENTRY: usize = 16;
const ALIGN: usize = 64;
const VERSION: u16 = 1;

/// Bit of `features` in the region of the first queue; the protocol leaves all its bits zero. It is set while
/// the driver has the write cache off and sends no flushes. The next process must know.
const WRITES_THROUGH: u64 = 1 << 63;

const FEATURES_AT: usize = 0;
const VERSION_AT: usize = 8;
const DESC_NUM_AT: usize = 10;
const LAST_BATCH_HEAD_AT: usize = 12;
const USED_IDX_AT: usize = 14;

const INFLIGHT_AT: usize = 0;
const NEXT_AT: usize = 6;
const COUNTER_AT: usize = 8;

/// Length of the region of a queue.
fn queue_bytes(queue_size: u16) -> usize {
    (HEADER + ENTRY * usize::from(queue_size)).next_multiple_of(ALIGN)
}

/// Number and size of queues.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Queues {
    /// Number of queues.
    pub count: u16,
    /// Number of descriptors of each.
    pub size: u16,
}

impl Queues {
    /// Length of the regions of all queues.
    fn bytes(self) -> usize {
        queue_bytes(self.size) * usize::from(self.count)
    }

    /// Offset of the region of queue `index`, which has `size` descriptors; `None` if these queues do not
    /// include it.
    fn region(self, index: u16, size: u16) -> Option<usize> {
        let included = index < self.count && size <= self.size;
        included.then(|| usize::from(index) * queue_bytes(self.size))
    }
}

/// Error of creating or mapping an in-flight area.
#[derive(Debug, thiserror::Error)]
pub enum InflightError {
    /// The area is too small for its queues.
    #[error("in-flight area of {actual} bytes: {} queues of {} entries need {needed}", queues.count, queues.size)]
    Short {
        /// Length of the area.
        actual: u64,
        /// Length needed.
        needed: u64,
        /// Queues that the area is for.
        queues: Queues,
    },
    /// The file cannot be created.
    #[error("cannot create the in-flight file")]
    Create(#[source] std::io::Error),
    /// The file cannot be mapped.
    #[error("cannot map the in-flight area")]
    Map(#[from] MapError),
    /// The region of a queue has another layout.
    #[error("in-flight area has version {version}, expected {VERSION}")]
    Version {
        /// Version of the layout.
        version: u16,
    },
}

/// The mapped in-flight area of a device.
///
/// A front-end requests an area before the driver has chosen its queues. With virtio-mmio the driver may
/// choose longer queues than requested, and some front-ends count only the queues that are ready. The area
/// thus has a second section behind the requested one, with a region for each queue of the device in its
/// largest size. Its pages use no memory until a queue uses them. The front-end keeps the area as a whole, and
/// the same device finds its second section again.
#[derive(Debug)]
pub struct InflightArea {
    mapping: MappedFile,
    /// Requested queues.
    asked: Queues,
    /// Queues of the device, if the area has the second section.
    device: Option<Queues>,
    /// A queue without a region was reported.
    reported: AtomicBool,
}

impl InflightArea {
    /// Creates the file of an area for the queues `asked` for and those of the `device`; returns it and its
    /// length.
    ///
    /// # Errors
    ///
    /// [`InflightError::Create`] if `memfd_create(2)`, `ftruncate(2)` or the seals fail.
    pub fn create(asked: Queues, device: Queues) -> Result<(File, u64), InflightError> {
        let len = (asked.bytes() + device.bytes()) as u64;
        let flags = rustix::fs::MemfdFlags::CLOEXEC | rustix::fs::MemfdFlags::ALLOW_SEALING;
        let fd = rustix::fs::memfd_create("ovbd-inflight", flags)
            .map_err(|errno| InflightError::Create(errno.into()))?;
        let file = File::from(fd);
        file.set_len(len).map_err(InflightError::Create)?;
        // No process may truncate the file while another one has it mapped.
        let seals = rustix::fs::SealFlags::SHRINK | rustix::fs::SealFlags::GROW;
        rustix::fs::fcntl_add_seals(&file, seals)
            .map_err(|errno| InflightError::Create(errno.into()))?;
        Ok((file, len))
    }

    /// Maps an area of `len` bytes at `offset` of `file`, which a front-end kept.
    ///
    /// # Errors
    ///
    /// [`InflightError::Short`] if it has no room for the queues `asked` for, [`InflightError::Map`]
    /// if it cannot be mapped.
    pub fn map(
        file: &File,
        offset: u64,
        len: u64,
        asked: Queues,
        device: Queues,
    ) -> Result<Self, InflightError> {
        let needed = asked.bytes() as u64;
        if len < needed {
            return Err(InflightError::Short {
                actual: len,
                needed,
                queues: asked,
            });
        }
        let mapping = MappedFile::new(file, offset, len, Access::ReadWrite)?;
        Ok(Self {
            mapping,
            asked,
            device: (len == needed + device.bytes() as u64).then_some(device),
            reported: AtomicBool::new(false),
        })
    }

    /// Whether the front-end truncated the file: the marks are lost then.
    pub fn is_lost(&self) -> bool {
        self.mapping.is_lost()
    }

    /// Whether the area records that the driver has switched the write cache off.
    pub fn writes_through(&self) -> bool {
        let features = self.features();
        features.is_some_and(|(_, features)| features & WRITES_THROUGH != 0)
    }

    /// Records whether the driver has switched the write cache off.
    pub fn record_writes_through(&self, through: bool) {
        let Some((header, features)) = self.features() else {
            return;
        };
        if (features & WRITES_THROUGH != 0) != through {
            let features = (features ^ WRITES_THROUGH).to_le();
            let stored = header.store(features, FEATURES_AT, Ordering::Release);
            debug_assert!(stored.is_ok());
        }
    }

    /// Header of the first region, if there is one, and its `features`.
    fn features(&self) -> Option<(VolatileSlice<'_>, u64)> {
        let header = self.mapping.slice(0, HEADER)?;
        let features = header.load(FEATURES_AT, Ordering::Acquire).unwrap_or(0);
        Some((header, u64::from_le(features)))
    }

    /// Region of queue `index`, which has `size` descriptors; `None` if the area has none for it.
    pub fn queue(&self, index: u16, size: u16) -> Option<InflightQueue<'_>> {
        let behind = || Some(self.asked.bytes() + self.device?.region(index, size)?);
        let start = self.asked.region(index, size).or_else(behind)?;
        let region = self.mapping.slice(start, queue_bytes(size))?;
        Some(InflightQueue {
            region,
            size,
            counter: 0,
        })
    }

    /// Whether this is the first call: one queue without a region is reported, not all.
    pub fn report_once(&self) -> bool {
        !self.reported.swap(true, Ordering::Relaxed)
    }
}

/// Region of one queue.
#[derive(Debug)]
pub struct InflightQueue<'m> {
    region: VolatileSlice<'m>,
    size: u16,
    counter: u64,
}

// Every offset below lies in the region: its length follows from `size`, and heads are below `size`. The loads
// and stores thus cannot fail. A front-end that writes invalid values damages only its own recovery.
impl InflightQueue<'_> {
    fn entry(head: u16) -> usize {
        HEADER + ENTRY * usize::from(head)
    }

    fn load_u16(&self, at: usize) -> u16 {
        u16::from_le(self.region.load(at, Ordering::Relaxed).unwrap_or(0))
    }

    fn store_u16(&self, at: usize, value: u16) {
        let stored = self.region.store(value.to_le(), at, Ordering::Release);
        debug_assert!(stored.is_ok());
    }

    fn is_marked(&self, head: u16) -> bool {
        let mark: u8 = self
            .region
            .load(Self::entry(head) + INFLIGHT_AT, Ordering::Relaxed)
            .unwrap_or(0);
        mark != 0
    }

    fn set_mark(&self, head: u16, mark: u8) {
        let stored = self
            .region
            .store(mark, Self::entry(head) + INFLIGHT_AT, Ordering::Release);
        debug_assert!(stored.is_ok());
    }

    /// Recovers the open requests of an earlier process, given the used index of the ring: returns the heads
    /// that were taken and not answered, oldest first. `None` for a new region, and for one of a queue of
    /// another size, which the driver has reset since.
    ///
    /// # Errors
    ///
    /// [`InflightError::Version`] if the region has another layout.
    pub fn recover(&mut self, used_idx: u16) -> Result<Option<Vec<u16>>, InflightError> {
        let version = self.load_u16(VERSION_AT);
        if version != 0 && version != VERSION {
            return Err(InflightError::Version { version });
        }
        if !self.is_in_use() {
            (0..self.size).for_each(|head| self.set_mark(head, 0));
            self.store_u16(DESC_NUM_AT, self.size);
            self.store_u16(USED_IDX_AT, used_idx);
            self.store_u16(VERSION_AT, VERSION);
            return Ok(None);
        }
        self.answered(used_idx)
            .for_each(|head| self.set_mark(head, 0));
        self.store_u16(USED_IDX_AT, used_idx);

        let counter = |head| -> u64 {
            u64::from_le(
                self.region
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

    /// Whether an earlier process used the region for a queue of this size.
    fn is_in_use(&self) -> bool {
        self.load_u16(VERSION_AT) != 0 && self.load_u16(DESC_NUM_AT) == self.size
    }

    /// Heads that were answered and may still be marked, given the used index of the ring.
    fn answered(&self, used_idx: u16) -> impl Iterator<Item = u16> {
        let count = used_idx
            .wrapping_sub(self.load_u16(USED_IDX_AT))
            .min(self.size);
        let linked = |at| Some(self.load_u16(at)).filter(|head| *head < self.size);
        let heads = iter::successors(linked(LAST_BATCH_HEAD_AT), move |head| {
            linked(Self::entry(*head) + NEXT_AT)
        });
        heads.take(count.into())
    }

    /// Counts the requests that were taken and not answered, given the used index of the ring. Changes
    /// nothing.
    pub fn open(&self, used_idx: u16) -> u16 {
        if !self.is_in_use() {
            return 0;
        }
        let mut open: Vec<_> = (0..self.size).map(|head| self.is_marked(head)).collect();
        for head in self.answered(used_idx) {
            if let Some(open) = open.get_mut(usize::from(head)) {
                *open = false;
            }
        }
        open.into_iter().map(u16::from).sum()
    }

    /// Marks the request at `head` as taken; returns false if it is marked already. A driver that offers a
    /// chain twice breaks the rules of the virtqueue.
    #[must_use]
    pub fn mark(&mut self, head: u16) -> bool {
        if self.is_marked(head) {
            return false;
        }
        let at = Self::entry(head) + COUNTER_AT;
        let stored = self
            .region
            .store(self.counter.to_le(), at, Ordering::Relaxed);
        debug_assert!(stored.is_ok());
        self.counter = self.counter.wrapping_add(1);
        self.set_mark(head, 1);
        true
    }

    /// Links `head` into the batch that the next used index covers.
    pub fn link(&self, head: u16) {
        self.store_u16(
            Self::entry(head) + NEXT_AT,
            self.load_u16(LAST_BATCH_HEAD_AT),
        );
        self.store_u16(LAST_BATCH_HEAD_AT, head);
    }

    /// Clears the marks of a batch, after the used index `used_idx` that covers it is visible.
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

    const ASKED: Queues = Queues { count: 3, size: 8 };
    const DEVICE: Queues = Queues { count: 5, size: 64 };

    fn area() -> (File, InflightArea) {
        let (file, len) = InflightArea::create(ASKED, DEVICE).unwrap();
        let area = InflightArea::map(&file, 0, len, ASKED, DEVICE).unwrap();
        (file, area)
    }

    #[test]
    fn longer_and_further_queues_have_their_place_behind_those_asked_for() {
        let (file, area) = area();
        let queues = [(0, 8), (2, 4), (0, 64), (2, 16), (3, 8), (4, 64), (4, 1)];
        for (index, size) in queues {
            let mut queue = area.queue(index, size).unwrap();
            queue.recover(9).unwrap();
            assert!(queue.mark(size - 1), "queue {index} of {size}");
        }
        assert!(area.queue(5, 8).is_none() && area.queue(0, 128).is_none());
        // Another process finds them again, one of another device does not.
        let len = file.metadata().unwrap().len();
        let again = InflightArea::map(&file, 0, len, ASKED, DEVICE).unwrap();
        for (index, size) in [(0, 8), (4, 1)] {
            let mut queue = again.queue(index, size).unwrap();
            assert_eq!(queue.recover(9).unwrap(), Some(vec![size - 1]));
        }
        let other = InflightArea::map(&file, 0, len, ASKED, ASKED).unwrap();
        assert!(other.queue(0, 64).is_none() && other.queue(3, 8).is_none());
        assert!(other.report_once() && !other.report_once());
        assert!(InflightArea::map(&file, 0, 100, ASKED, DEVICE).is_err());
    }

    #[test]
    fn a_queue_of_another_size_starts_afresh() {
        let (_file, area) = area();
        let mut queue = area.queue(1, 8).unwrap();
        queue.recover(0).unwrap();
        assert!(queue.mark(3));
        let mut smaller = area.queue(1, 4).unwrap();
        assert_eq!(smaller.recover(7).unwrap(), None);
        assert!(smaller.mark(3));
        assert_eq!(smaller.recover(7).unwrap(), Some(vec![3]));
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
        assert_eq!((queue.open(7), queue.open(8)), (4, 3), "2 is answered at 8");
        assert_eq!(queue.open(8), 3, "nothing changed");
        assert_eq!(area.queue(0, 8).unwrap().open(8), 0, "a fresh region");
        queue.clear(&[2], 8);
        assert_eq!(queue.open(8), 3);
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
        file.write_all_at(&[9, 0], VERSION_AT as u64).unwrap();
        assert!(matches!(
            area.queue(0, 8).unwrap().recover(5),
            Err(InflightError::Version { version: 9 })
        ));
    }

    #[test]
    fn a_write_cache_that_is_off_is_recorded_beside_the_requests() {
        let (file, area) = area();
        let len = file.metadata().unwrap().len();
        assert!(!area.writes_through());
        area.record_writes_through(true);
        let mut queue = area.queue(0, 8).unwrap();
        assert!(
            queue.recover(3).unwrap().is_none(),
            "it is a fresh area still"
        );
        let later = InflightArea::map(&file, 0, len, ASKED, DEVICE).unwrap();
        assert!(later.writes_through());
        later.record_writes_through(false);
        assert!(!area.writes_through());
    }
}
