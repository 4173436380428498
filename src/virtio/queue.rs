//! Device side of a running split virtqueue (virtio 1.2, section 2.7).
//!
//! [`Queue::pop`] takes the next available chain and marks it in the in-flight area. [`Queue::finish`] puts
//! its answer into the used ring. [`Queue::publish`] makes a batch of answers visible, clears their marks, and
//! returns whether to interrupt the driver. No chain is taken without its mark, and no [`Head`] is dropped
//! without an answer.
//!
//! The guest may write the rings while the device reads them. Each field is read once, and indexes are checked
//! against the queue's size. A driver that breaks the rules stops its queue ([`QueueError`]).

use std::sync::atomic::{Ordering, fence};

use virtio_bindings::virtio_ring::{VRING_AVAIL_F_NO_INTERRUPT, VRING_USED_F_NO_NOTIFY};
use virtio_queue::desc::split::Descriptor;
use vm_memory::{Bytes, GuestAddress, VolatileSlice};

use super::inflight::InflightQueue;
use super::memory::Memory;

/// Largest size of a split virtqueue.
pub const MAX_QUEUE_SIZE: u16 = 32768;

const DESCRIPTOR: usize = size_of::<Descriptor>();
const USED_ELEM: usize = 8;
/// Length of `flags` and `idx`, which precede the entries of both rings.
const RING_HEADER: usize = 4;
const IDX_AT: usize = 2;

/// Error that stops a queue or prevents its start.
#[derive(Debug, thiserror::Error, PartialEq, Eq)]
pub enum QueueError {
    /// The size is not a power of two up to 32768.
    #[error("queue size is {0}, expected a power of two up to {MAX_QUEUE_SIZE}")]
    Size(u16),
    /// A ring lies outside guest memory or is misaligned.
    #[error(
        "{ring} at guest address {addr:#x} is misaligned, or not in the shared memory: all guest memory must be shared (share=on)"
    )]
    Ring {
        /// Name of the ring.
        ring: &'static str,
        /// Guest address of the ring.
        addr: u64,
    },
    /// The available index is ahead by more than the queue's size.
    #[error("available index is {available}, expected at most the queue's size past {next}")]
    AvailableIndex {
        /// Available index.
        available: u16,
        /// Index of the next chain to take.
        next: u16,
    },
    /// The available ring names a descriptor that is not in the table.
    #[error("available ring names descriptor {head}; the table has {size}")]
    Head {
        /// Number of the descriptor.
        head: u16,
        /// Size of the queue.
        size: u16,
    },
    /// The available ring names a chain that is not answered yet.
    #[error("available ring names descriptor {head}, which is in flight")]
    InFlight {
        /// Number of the descriptor.
        head: u16,
    },
}

/// A chain taken from the available ring, by its head descriptor. It goes back to the queue exactly once, by
/// [`Queue::finish`], [`Queue::leave`] or [`Queue::put_back`]. Dropping it fails a debug assertion: the driver
/// would wait for ever.
#[derive(Debug)]
#[must_use]
pub struct Head(u16);

impl Head {
    /// Number of the head descriptor, below the queue's size.
    pub fn number(&self) -> u16 {
        self.0
    }

    fn release(self) -> u16 {
        let number = self.0;
        std::mem::forget(self);
        number
    }
}

impl Drop for Head {
    fn drop(&mut self) {
        debug_assert!(
            std::thread::panicking(),
            "chain {} was taken and not answered",
            self.0
        );
    }
}

/// Guest addresses of the three areas of a queue.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct RingAddresses {
    /// Descriptor table.
    pub descriptors: GuestAddress,
    /// Available ring (driver area).
    pub available: GuestAddress,
    /// Used ring (device area).
    pub used: GuestAddress,
    /// Guest address at which writes to the used ring are logged; `None` if they are not.
    pub used_log: Option<GuestAddress>,
}

/// Available index from which [`Queue::start`] starts without a base; `None` if the used ring is not in guest
/// memory. Changes nothing: another process may serve the queue.
pub fn start_index(
    memory: &Memory,
    used: GuestAddress,
    inflight: Option<&InflightQueue<'_>>,
) -> Option<u16> {
    let used_idx = load_u16(&memory.slice(used, RING_HEADER)?, IDX_AT);
    let open = inflight.map_or(0, |inflight| inflight.open(used_idx));
    Some(used_idx.wrapping_add(open))
}

/// A running virtqueue.
#[derive(Debug)]
pub struct Queue<'m> {
    memory: &'m Memory,
    size: u16,
    descriptors: VolatileSlice<'m>,
    available: VolatileSlice<'m>,
    used: VolatileSlice<'m>,
    used_log: Option<GuestAddress>,
    event_idx: bool,
    next_available: u16,
    /// Available index read last. Chains before it are taken without reading it again.
    seen_available: u16,
    next_used: u16,
    published_used: u16,
    inflight: Option<InflightQueue<'m>>,
    /// Heads that an earlier worker took and left open, newest first.
    resubmit: Vec<u16>,
    /// Heads finished since the last [`Queue::publish`].
    batch: Vec<u16>,
}

impl<'m> Queue<'m> {
    /// Starts a queue at available index `base`; without one, at the used index.
    ///
    /// If its in-flight region was in use before, the open requests in it are taken first, and the start
    /// follows from them instead of `base`.
    ///
    /// # Errors
    ///
    /// [`QueueError::Size`], [`QueueError::Ring`], and those of [`InflightQueue::recover`].
    pub fn start(
        memory: &'m Memory,
        size: u16,
        rings: RingAddresses,
        base: Option<u16>,
        event_idx: bool,
        mut inflight: Option<InflightQueue<'m>>,
    ) -> Result<Self, StartError> {
        if !size.is_power_of_two() || size > MAX_QUEUE_SIZE {
            return Err(QueueError::Size(size).into());
        }
        let area = |ring: &'static str, addr: GuestAddress, len: usize, align: usize| {
            memory
                .slice(addr, len)
                .filter(|area| area.ptr_guard().as_ptr().addr().is_multiple_of(align))
                .ok_or(QueueError::Ring { ring, addr: addr.0 })
        };
        let entries = usize::from(size);
        // Both rings end with the event index of the other side.
        let available_len = RING_HEADER + 2 * entries + 2;
        let used_len = RING_HEADER + USED_ELEM * entries + 2;
        let descriptors = area(
            "descriptor table",
            rings.descriptors,
            DESCRIPTOR * entries,
            16,
        )?;
        let available = area("available ring", rings.available, available_len, 2)?;
        let used = area("used ring", rings.used, used_len, 4)?;

        let used_idx = load_u16(&used, IDX_AT);
        let mut resubmit = Vec::new();
        let mut next_available = base.unwrap_or(used_idx);
        if let Some(inflight) = &mut inflight
            && let Some(open) = inflight.recover(used_idx)?
        {
            // Each chain that was taken is answered or open. The base of a front-end may be past chains that
            // were not taken.
            next_available = used_idx.wrapping_add(open.len() as u16);
            resubmit = open;
            resubmit.reverse();
        }
        Ok(Self {
            memory,
            size,
            descriptors,
            available,
            used,
            used_log: rings.used_log,
            event_idx,
            next_available,
            seen_available: next_available,
            next_used: used_idx,
            published_used: used_idx,
            inflight,
            resubmit,
            batch: Vec::with_capacity(entries),
        })
    }

    /// Number of descriptors.
    pub fn size(&self) -> u16 {
        self.size
    }

    /// Descriptor table.
    pub fn descriptors(&self) -> VolatileSlice<'m> {
        self.descriptors
    }

    /// Whether taken chains are marked in an in-flight area.
    pub fn is_tracked(&self) -> bool {
        self.inflight.is_some()
    }

    /// Guest memory of the queue.
    pub fn memory(&self) -> &'m Memory {
        self.memory
    }

    /// Available index to continue from when the queue starts again.
    pub fn next_available(&self) -> u16 {
        self.next_available
    }

    /// Takes the next chain that an earlier worker took and left open.
    pub fn pop_open(&mut self) -> Option<Head> {
        self.resubmit.pop().map(Head)
    }

    /// Takes the next chain.
    ///
    /// # Errors
    ///
    /// [`QueueError`] if the driver broke a rule of the available ring.
    pub fn pop(&mut self) -> Result<Option<Head>, QueueError> {
        if let Some(head) = self.pop_open() {
            return Ok(Some(head));
        }
        if self.next_available == self.seen_available && !self.read_available()? {
            return Ok(None);
        }
        let slot = usize::from(self.next_available % self.size);
        let head = load_u16(&self.available, RING_HEADER + 2 * slot);
        if head >= self.size {
            return Err(QueueError::Head {
                head,
                size: self.size,
            });
        }
        if let Some(inflight) = &mut self.inflight
            && !inflight.mark(head)
        {
            return Err(QueueError::InFlight { head });
        }
        self.next_available = self.next_available.wrapping_add(1);
        Ok(Some(Head(head)))
    }

    /// Returns the number of chains that an earlier worker left open.
    pub fn open_chains(&self) -> usize {
        self.resubmit.len()
    }

    /// Returns the chain taken last, which cannot be answered. A queue that starts again takes it again.
    pub fn put_back(&mut self, head: Head) {
        head.release();
        // With an in-flight area the chain is still marked, and the next start takes it from there.
        if self.inflight.is_none() {
            self.next_available = self.next_available.wrapping_sub(1);
        }
    }

    /// Leaves a chain open: unanswered, and marked in the in-flight area. A queue that starts again takes it
    /// again.
    ///
    /// # Errors
    ///
    /// Returns the head if there is no in-flight area: the chain needs an answer.
    pub fn leave(&mut self, head: Head) -> Result<(), Head> {
        match self.inflight {
            Some(_) => {
                head.release();
                Ok(())
            }
            None => Err(head),
        }
    }

    /// Whether there is a chain to take.
    ///
    /// # Errors
    ///
    /// [`QueueError::AvailableIndex`].
    pub fn has_work(&mut self) -> Result<bool, QueueError> {
        Ok(!self.resubmit.is_empty()
            || self.next_available != self.seen_available
            || self.read_available()?)
    }

    /// Reads the available index; returns whether there is a chain to take.
    fn read_available(&mut self) -> Result<bool, QueueError> {
        let available = load_u16(&self.available, IDX_AT);
        // The entries must be read after the index that covers them.
        fence(Ordering::Acquire);
        if available.wrapping_sub(self.next_available) > self.size {
            return Err(QueueError::AvailableIndex {
                available,
                next: self.next_available,
            });
        }
        self.seen_available = available;
        Ok(available != self.next_available)
    }

    /// Puts the chain at `head`, of which `len` bytes were written, into the used ring. The driver sees it
    /// after [`Queue::publish`].
    pub fn finish(&mut self, head: Head, len: u32) {
        let head = head.release();
        let at = RING_HEADER + USED_ELEM * usize::from(self.next_used % self.size);
        store_u32(&self.used, at, u32::from(head));
        store_u32(&self.used, at + 4, len);
        self.log_used(at, USED_ELEM);
        if let Some(inflight) = &self.inflight {
            inflight.link(head);
            self.batch.push(head);
        }
        self.next_used = self.next_used.wrapping_add(1);
    }

    /// Makes all answers since the last call visible; returns whether to interrupt the driver.
    #[must_use]
    pub fn publish(&mut self) -> bool {
        let (old, new) = (self.published_used, self.next_used);
        if old == new {
            return false;
        }
        fence(Ordering::Release);
        store_u16(&self.used, IDX_AT, new);
        self.log_used(0, RING_HEADER);
        if let Some(inflight) = &self.inflight {
            inflight.clear(&self.batch, new);
            self.batch.clear();
        }
        self.published_used = new;
        // The driver writes its event index and then reads the used index; the device writes the used
        // index and then reads the event index (virtio 1.2, 2.7.7.2). Without a full fence each could
        // miss the other's write.
        fence(Ordering::SeqCst);
        if self.event_idx {
            let event = load_u16(&self.available, RING_HEADER + 2 * usize::from(self.size));
            new.wrapping_sub(event).wrapping_sub(1) < new.wrapping_sub(old)
        } else {
            u32::from(load_u16(&self.available, 0)) & VRING_AVAIL_F_NO_INTERRUPT == 0
        }
    }

    /// Asks the driver not to kick while the worker reads the ring.
    pub fn disable_kicks(&mut self) {
        // With event indexes, the driver kicks only when it passes the event index, which stays behind.
        if !self.event_idx {
            store_u16(&self.used, 0, VRING_USED_F_NO_NOTIFY as u16);
            self.log_used(0, RING_HEADER);
        }
    }

    /// Asks the driver to kick at the next chain; returns whether a chain came meanwhile. The caller may
    /// sleep only if none did.
    ///
    /// # Errors
    ///
    /// [`QueueError::AvailableIndex`].
    pub fn enable_kicks(&mut self) -> Result<bool, QueueError> {
        if self.event_idx {
            let at = RING_HEADER + USED_ELEM * usize::from(self.size);
            store_u16(&self.used, at, self.next_available);
            self.log_used(at, 2);
        } else {
            store_u16(&self.used, 0, 0);
            self.log_used(0, RING_HEADER);
        }
        fence(Ordering::SeqCst);
        self.has_work()
    }

    fn log_used(&self, at: usize, len: usize) {
        if let (Some(base), Some(log)) = (self.used_log, self.memory.log()) {
            log.mark(GuestAddress(base.0.saturating_add(at as u64)), len as u64);
        }
    }
}

/// Error of [`Queue::start`].
#[derive(Debug, thiserror::Error)]
pub enum StartError {
    /// The size or a ring is invalid.
    #[error(transparent)]
    Queue(#[from] QueueError),
    /// The in-flight region has another layout.
    #[error(transparent)]
    Inflight(#[from] super::inflight::InflightError),
}

// These cannot fail: the slices have the length that the queue's size needs, and the start checked their
// alignment.

fn load_u16(ring: &VolatileSlice<'_>, at: usize) -> u16 {
    u16::from_le(ring.load(at, Ordering::Relaxed).unwrap_or(0))
}

fn store_u16(ring: &VolatileSlice<'_>, at: usize, value: u16) {
    let stored = ring.store(value.to_le(), at, Ordering::Relaxed);
    debug_assert!(stored.is_ok());
}

fn store_u32(ring: &VolatileSlice<'_>, at: usize, value: u32) {
    let stored = ring.store(value.to_le(), at, Ordering::Relaxed);
    debug_assert!(stored.is_ok());
}
