//! A prefilled ring kept full to a depth: for checks under load and for measurements.
//!
//! Each slot owns a header, a data buffer, a status byte and the descriptors that name them, written
//! once. A request then costs an eight-byte store for its sector and an entry of the available ring.

use std::sync::Arc;
use std::time::{Duration, Instant};

use vm_memory::{Bytes, VolatileSlice};

use super::PATIENCE;
use super::blk::{self, UNANSWERED};
use super::memory::{Memory, Region};
use super::ring::{Descriptor, INDIRECT, NEXT, Ring, WRITE};

/// Most that one look at the ring counts for in the time an answer may take.
const LONGEST_TURN: Duration = Duration::from_millis(100);

/// The shape of every request of a load.
#[derive(Clone, Copy, Debug)]
pub struct Shape {
    /// Requests in flight.
    pub depth: u16,
    /// Bytes of data of each.
    pub len: u32,
    /// Descriptors the data are split over.
    pub segments: u32,
    /// Whether each chain lies in an indirect table.
    pub indirect: bool,
}

/// A ring with a slot for each request in flight.
#[derive(Debug)]
pub struct Load {
    /// The ring below.
    pub ring: Ring,
    shape: Shape,
    /// Holds every header, data buffer and status byte.
    region: Arc<Region>,
    slots: Vec<Slot>,
    /// Slot of each head, or none.
    by_head: Vec<Option<u16>>,
    in_flight: u16,
}

#[derive(Debug)]
struct Slot {
    head: u16,
    header: u64,
    data: u64,
    status: u64,
    sector: u64,
    busy: bool,
}

/// A request that came back.
#[derive(Debug)]
pub struct Done<'l> {
    /// The slot it used, free again.
    pub slot: u16,
    /// The first sector it read.
    pub sector: u64,
    /// Its status.
    pub status: u8,
    /// Bytes written, the status byte counted.
    pub len: u32,
    /// Its data.
    pub data: VolatileSlice<'l>,
}

impl Load {
    /// Prefills `ring` with reads whose memory comes from region `region`.
    pub fn new(ring: Ring, memory: &Memory, region: usize, shape: Shape) -> Self {
        Self::of_kind(blk::IN, ring, memory, region, shape)
    }

    /// The same with requests of another kind, as writes. They carry what [`Load::data`] holds.
    pub fn of_kind(kind: u32, ring: Ring, memory: &Memory, region: usize, shape: Shape) -> Self {
        let region = Arc::clone(&memory.regions[region]);
        let chain = shape.segments as u16 + 2;
        let per_slot = if shape.indirect { 1 } else { chain };
        assert!(
            shape.depth * per_slot <= ring.size(),
            "the ring is too small for the depth"
        );
        let mut by_head = vec![None; usize::from(ring.size())];
        let slots = (0..shape.depth).map(|index| {
            let head = index * per_slot;
            by_head[usize::from(head)] = Some(index);
            let slot = Slot {
                head,
                header: region.alloc(blk::HEADER.into(), 16),
                data: region.alloc(shape.len.into(), 4096),
                status: region.alloc(1, 1),
                sector: 0,
                busy: false,
            };
            slot.prefill(&ring, memory, &region, shape, kind);
            slot
        });
        let slots = slots.collect();
        Self {
            ring,
            shape,
            region,
            slots,
            by_head,
            in_flight: 0,
        }
    }

    /// The shape of its requests.
    pub fn shape(&self) -> Shape {
        self.shape
    }

    /// Requests in flight.
    pub fn in_flight(&self) -> u16 {
        self.in_flight
    }

    /// The data of a slot.
    pub fn data(&self, slot: u16) -> VolatileSlice<'_> {
        let slot = &self.slots[usize::from(slot)];
        self.region.slice(slot.data, self.shape.len as usize)
    }

    /// Puts a read at `sector` in `slot`, which is free; seen after [`Ring::publish`].
    pub fn submit(&mut self, slot: u16, sector: u64) {
        let slot = &mut self.slots[usize::from(slot)];
        assert!(!slot.busy, "slot {} is in flight", slot.head);
        (slot.busy, slot.sector) = (true, sector);
        let header = self.region.slice(slot.header, 16);
        header.write_obj(sector.to_le(), 8).expect("header");
        let status = self.region.slice(slot.status, 1);
        status.write_obj(UNANSWERED, 0).expect("status");
        self.ring.offer(slot.head);
        self.in_flight += 1;
    }

    /// The next answer, if there is one.
    pub fn take(&mut self) -> Option<Done<'_>> {
        let used = self.ring.take()?;
        let index = self.by_head.get(used.head as usize).copied().flatten();
        let index = index.unwrap_or_else(|| panic!("answer for head {}, no slot's", used.head));
        let slot = &mut self.slots[usize::from(index)];
        assert!(slot.busy, "slot {index} answered twice");
        slot.busy = false;
        self.in_flight -= 1;
        let status = self.region.slice(slot.status, 1);
        Some(Done {
            slot: index,
            sector: slot.sector,
            status: status.read_obj(0).expect("status"),
            len: used.len,
            data: self.region.slice(slot.data, self.shape.len as usize),
        })
    }

    /// Keeps the ring full with the sectors `next` yields until it yields none and all are answered.
    pub fn run(&mut self, mut next: impl FnMut() -> Option<u64>, mut done: impl FnMut(Done)) {
        let mut more = true;
        for slot in 0..self.shape.depth {
            if !self.slots[usize::from(slot)].busy {
                self.refill(slot, &mut next, &mut more);
            }
        }
        self.ring.want_no_call();
        self.ring.publish();
        let (mut seen, mut waited) = (Instant::now(), Duration::ZERO);
        while self.in_flight > 0 {
            let mut any = false;
            while let Some(answer) = self.take() {
                let slot = answer.slot;
                done(answer);
                self.refill(slot, &mut next, &mut more);
                any = true;
            }
            if any {
                self.ring.want_no_call();
                self.ring.publish();
                waited = Duration::ZERO;
            } else {
                std::thread::yield_now();
                // Time in which this process did not run is not the device's fault.
                waited += seen.elapsed().min(LONGEST_TURN);
                assert!(waited < PATIENCE, "no answer: {} in flight", self.in_flight);
            }
            seen = Instant::now();
        }
    }

    fn refill(&mut self, slot: u16, next: &mut impl FnMut() -> Option<u64>, more: &mut bool) {
        if *more {
            match next() {
                Some(sector) => self.submit(slot, sector),
                None => *more = false,
            }
        }
    }
}

impl Slot {
    /// Writes the slot's descriptors and the constant part of its header.
    fn prefill(&self, ring: &Ring, memory: &Memory, region: &Region, shape: Shape, kind: u32) {
        memory.write(self.header, &blk::header(kind, 0));
        let access = if kind == blk::IN { WRITE } else { 0 };
        let table = shape.indirect.then(|| {
            let bytes = (u64::from(shape.segments) + 2) * 16;
            let address = region.alloc(bytes, 16);
            let entry = Descriptor {
                address,
                len: bytes as u32,
                flags: INDIRECT,
                next: 0,
            };
            ring.describe(self.head, entry);
            address
        });
        let first = if shape.indirect { 0 } else { self.head };
        let last = shape.segments as u16 + 1;
        let part = shape.len.checked_div(shape.segments).unwrap_or(0);
        for index in 0..=last {
            let data = self.data + u64::from(index.saturating_sub(1)) * u64::from(part);
            let (address, len, flags) = match index {
                0 => (self.header, blk::HEADER, NEXT),
                _ if index == last => (self.status, 1, WRITE),
                _ if index + 1 == last => {
                    (data, shape.len - part * (shape.segments - 1), access | NEXT)
                }
                _ => (data, part, access | NEXT),
            };
            let entry = Descriptor {
                address,
                len,
                flags,
                next: first + index + 1,
            };
            match table {
                Some(table) => entry.write(memory, table, index.into()),
                None => ring.describe(first + index, entry),
            }
        }
    }
}
