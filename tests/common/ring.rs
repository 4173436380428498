//! The driver's half of one split virtqueue (virtio 1.x, 2.7).
//!
//! Heads are offered in the available ring, become visible with [`Ring::publish`], and come back
//! through the used ring with [`Ring::take`]. Nothing here allocates, waits or keeps books: that is
//! for [`super::queue`] and [`super::load`].

use std::sync::Arc;
use std::sync::atomic::{Ordering, fence};

use vm_memory::Bytes;
use vmm_sys_util::eventfd::{EFD_CLOEXEC, EFD_NONBLOCK, EventFd};

use super::memory::{Memory, Region};

/// Descriptor flag: the chain goes on at `next`.
pub const NEXT: u16 = 1;
/// Descriptor flag: the device writes, else it reads.
pub const WRITE: u16 = 2;
/// Descriptor flag: the buffer is a table of descriptors.
pub const INDIRECT: u16 = 4;
/// Bytes of a descriptor.
pub const DESCRIPTOR: u64 = 16;

/// One entry of a descriptor table.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Descriptor {
    /// Guest address of the buffer.
    pub address: u64,
    /// Bytes of the buffer.
    pub len: u32,
    /// [`NEXT`], [`WRITE`], [`INDIRECT`].
    pub flags: u16,
    /// Index of the next descriptor.
    pub next: u16,
}

impl Descriptor {
    /// Writes the entry to `slice`, which holds at least 16 bytes at `offset`.
    fn store(self, region: &Region, offset: usize) {
        let rest = u64::from(self.len) | u64::from(self.flags) << 32 | u64::from(self.next) << 48;
        let slice = region.all();
        slice
            .write_obj(self.address.to_le(), offset)
            .expect("descriptor table");
        slice
            .write_obj(rest.to_le(), offset + 8)
            .expect("descriptor table");
    }

    /// Writes the entry as number `index` of the table at guest address `table`.
    pub fn write(self, memory: &Memory, table: u64, index: u64) {
        let address = table + index * DESCRIPTOR;
        let region = memory.region(address);
        self.store(region, (address - region.base()) as usize);
    }
}

/// An answer of the device.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Used {
    /// Head of the chain it answers.
    pub head: u32,
    /// Bytes the device says it wrote.
    pub len: u32,
}

/// One of the ring's three parts, at an offset in a region.
#[derive(Clone, Debug)]
struct Part {
    region: Arc<Region>,
    offset: usize,
}

impl Part {
    fn at(memory: &Memory, address: u64) -> Self {
        let region = Arc::clone(memory.region(address));
        let offset = (address - region.base()) as usize;
        Self { region, offset }
    }

    fn load(&self, at: usize, order: Ordering) -> u16 {
        let cell = self.region.all().load::<u16>(self.offset + at, order);
        u16::from_le(cell.expect("ring in memory"))
    }

    fn store(&self, at: usize, value: u16, order: Ordering) {
        let cell = self
            .region
            .all()
            .store(value.to_le(), self.offset + at, order);
        cell.expect("ring in memory");
    }

    fn load32(&self, at: usize) -> u32 {
        let cell = self
            .region
            .all()
            .load::<u32>(self.offset + at, Ordering::Relaxed);
        u32::from_le(cell.expect("ring in memory"))
    }

    fn user_address(&self) -> u64 {
        self.region
            .user_address(self.region.base() + self.offset as u64)
    }
}

/// Where the three parts lie: guest addresses, or user addresses for SET_VRING_ADDR.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Addresses {
    /// Descriptor table.
    pub descriptors: u64,
    /// Available ring.
    pub available: u64,
    /// Used ring.
    pub used: u64,
}

impl Addresses {
    /// Fresh memory for a ring of `size` entries, each part in the region of that number.
    pub fn alloc(memory: &Memory, size: u16, regions: [usize; 3]) -> Self {
        let [descriptors, available, used] = regions.map(|index| &memory.regions[index]);
        let size = u64::from(size);
        Self {
            descriptors: descriptors.alloc(DESCRIPTOR * size, 16),
            available: available.alloc(6 + 2 * size, 2),
            used: used.alloc(6 + 8 * size, 4),
        }
    }
}

/// What the device is told of a ring. Copies go to the thread that starts and stops the queue, while its
/// driver runs on another thread.
#[derive(Debug)]
pub struct Vring {
    /// Entries.
    pub size: u16,
    /// The three parts, at this process's addresses.
    pub at: Addresses,
    /// Signalled to the device when heads were published.
    pub kick: EventFd,
    /// Signalled by the device when heads came back.
    pub call: EventFd,
    /// Signalled by the device when it gives the queue up.
    pub err: EventFd,
    used: Part,
}

impl Vring {
    /// The device's index in the used ring.
    pub fn used_index(&self) -> u16 {
        self.used.load(2, Ordering::Acquire)
    }
}

impl Clone for Vring {
    fn clone(&self) -> Self {
        let clone = |event: &EventFd| event.try_clone().expect("eventfd");
        Self {
            size: self.size,
            at: self.at,
            kick: clone(&self.kick),
            call: clone(&self.call),
            err: clone(&self.err),
            used: self.used.clone(),
        }
    }
}

/// The driver's half of one split virtqueue.
#[derive(Debug)]
pub struct Ring {
    /// What the device is told of it.
    pub vring: Vring,
    descriptors: Part,
    available: Part,
    used: Part,
    size: u16,
    event_idx: bool,
    offered: u16,
    published: u16,
    taken: u16,
}

fn eventfd() -> EventFd {
    EventFd::new(EFD_NONBLOCK | EFD_CLOEXEC).expect("eventfd")
}

impl Ring {
    /// An empty ring of `size` entries, a power of two; `event_idx` as negotiated.
    pub fn new(memory: &Memory, at: Addresses, size: u16, event_idx: bool) -> Self {
        let [descriptors, available, used] =
            [at.descriptors, at.available, at.used].map(|part| Part::at(memory, part));
        let vring = Vring {
            size,
            at: Addresses {
                descriptors: descriptors.user_address(),
                available: available.user_address(),
                used: used.user_address(),
            },
            kick: eventfd(),
            call: eventfd(),
            err: eventfd(),
            used: used.clone(),
        };
        Self {
            vring,
            descriptors,
            available,
            used,
            size,
            event_idx,
            offered: 0,
            published: 0,
            taken: 0,
        }
    }

    /// Empties the ring as a driver does that resets the device: everything back to zero.
    pub fn reset(&mut self) {
        (self.offered, self.published, self.taken) = (0, 0, 0);
        let events = (
            4 + 2 * usize::from(self.size),
            4 + 8 * usize::from(self.size),
        );
        for (available, used) in [(0, 0), (2, 2), events] {
            self.available.store(available, 0, Ordering::Relaxed);
            self.used.store(used, 0, Ordering::Relaxed);
        }
        // A kick that is left is the device's to take: it may be about to.
        for event in [&self.vring.call, &self.vring.err] {
            // Empty is what it should be.
            let _ = event.read();
        }
    }

    /// Entries.
    pub fn size(&self) -> u16 {
        self.size
    }

    /// Heads published so far, modulo 2^16: the index in the available ring.
    pub fn published(&self) -> u16 {
        self.published
    }

    /// Heads that came back and were taken so far, modulo 2^16.
    pub fn taken(&self) -> u16 {
        self.taken
    }

    /// Writes entry `index` of the descriptor table.
    pub fn describe(&self, index: u16, descriptor: Descriptor) {
        let at = self.descriptors.offset + usize::from(index) * DESCRIPTOR as usize;
        descriptor.store(&self.descriptors.region, at);
    }

    /// Puts `head` in the available ring; the device sees it after [`Ring::publish`].
    pub fn offer(&mut self, head: u16) {
        let slot = usize::from(self.offered % self.size);
        self.available.store(4 + 2 * slot, head, Ordering::Relaxed);
        self.offered = self.offered.wrapping_add(1);
    }

    /// Shows the device what was offered, and kicks it if it asks to be. Returns whether it kicked.
    pub fn publish(&mut self) -> bool {
        let kick = self.publish_quietly();
        if kick {
            self.vring.kick.write(1).expect("kick");
        }
        kick
    }

    /// Shows the device what was offered. Returns whether it asks to be kicked.
    pub fn publish_quietly(&mut self) -> bool {
        let (old, new) = (self.published, self.offered);
        self.available.store(2, new, Ordering::Release);
        self.published = new;
        // The device must see the index before its wish to be kicked is read (virtio 2.7.13.4.1).
        fence(Ordering::SeqCst);
        if !self.event_idx {
            const NO_NOTIFY: u16 = 1;
            return self.used.load(0, Ordering::Relaxed) & NO_NOTIFY == 0;
        }
        let event = self
            .used
            .load(4 + 8 * usize::from(self.size), Ordering::Relaxed);
        new.wrapping_sub(event).wrapping_sub(1) < new.wrapping_sub(old)
    }

    /// Lies about the available index, as no honest driver would.
    pub fn publish_index(&mut self, index: u16) {
        self.available.store(2, index, Ordering::Release);
        self.vring.kick.write(1).expect("kick");
    }

    /// The next answer, if there is one.
    pub fn take(&mut self) -> Option<Used> {
        if self.vring.used_index() == self.taken {
            return None;
        }
        let at = 4 + 8 * usize::from(self.taken % self.size);
        self.taken = self.taken.wrapping_add(1);
        Some(Used {
            head: self.used.load32(at),
            len: self.used.load32(at + 4),
        })
    }

    /// Asks for a call with the next answer. Returns whether one is there already.
    pub fn want_call(&self) -> bool {
        if self.event_idx {
            let event = 4 + 2 * usize::from(self.size);
            self.available.store(event, self.taken, Ordering::Relaxed);
        } else {
            self.available.store(0, 0, Ordering::Relaxed);
        }
        // The device must see the wish before this looks for an answer that came meanwhile.
        fence(Ordering::SeqCst);
        self.vring.used_index() != self.taken
    }

    /// Asks for no calls: the driver polls.
    pub fn want_no_call(&self) {
        if self.event_idx {
            // An index just passed is the furthest away.
            let event = 4 + 2 * usize::from(self.size);
            let passed = self.taken.wrapping_sub(1);
            self.available.store(event, passed, Ordering::Relaxed);
        } else {
            const NO_INTERRUPT: u16 = 1;
            self.available.store(0, NO_INTERRUPT, Ordering::Relaxed);
        }
    }
}
