//! A queue's worth of reads, writes, discards and flushes at depth, each checked against a model.
//!
//! Every queue has stripes of the disk of its own, so that what it must read depends on no other
//! queue; requests of one queue that touch the same sectors are never in flight together, as their
//! order is not defined.

use std::sync::Arc;

use super::blk::{self, DISCARD, FLUSH, IN, OUT, SECTOR, WRITE_ZEROES};
use super::content::{Random, difference, tagged};
use super::memory::{Memory, Region};
use super::queue::{Layout, Queue, Segment, Waiting};

/// Sectors of a stripe. An odd number: stripes start in the middle of everything.
const STRIPE: u64 = 153;

/// A request in flight.
#[derive(Clone, Copy, Debug)]
struct Request {
    kind: u32,
    sector: u64,
    sectors: u64,
    seed: u64,
}

impl Request {
    fn overlaps(&self, other: &Request) -> bool {
        self.sector < other.sector + other.sectors && other.sector < self.sector + self.sectors
    }
}

#[derive(Debug)]
struct Slot {
    header: u64,
    data: u64,
    status: u64,
    head: u16,
    request: Option<Request>,
}

/// One queue that does all kinds of requests.
#[derive(Debug)]
pub struct Mixed {
    /// The queue.
    pub queue: Queue,
    region: Arc<Region>,
    slots: Vec<Slot>,
    /// The disk as it must read; only this queue's stripes are kept.
    pub model: Vec<u8>,
    /// What is done next.
    pub random: Random,
    index: u64,
    queues: u64,
}

impl Mixed {
    /// Queue `index` of `queues`, with `depth` requests in flight on a disk that reads as `model`.
    pub fn new(
        queue: Queue,
        memory: &Memory,
        model: Vec<u8>,
        (index, queues): (usize, usize),
        depth: usize,
    ) -> Self {
        let region = Arc::clone(&memory.regions[index % memory.regions.len()]);
        let slot = |_| Slot {
            header: region.alloc(16, 16),
            data: region.alloc(STRIPE * SECTOR, 4096),
            status: region.alloc(1, 1),
            head: 0,
            request: None,
        };
        let slots = (0..depth).map(slot).collect();
        let mut queue = queue;
        queue.waiting = Waiting::Polling;
        Self {
            queue,
            region,
            slots,
            model,
            random: Random::new(index as u64 + 1),
            index: index as u64,
            queues: queues as u64,
        }
    }

    /// A request that touches no sector of one in flight.
    fn next(&mut self) -> Option<Request> {
        let random = &mut self.random;
        let kind = match random.below(16) {
            0..7 => OUT,
            7..12 => IN,
            12 => DISCARD,
            13 | 14 => WRITE_ZEROES,
            _ => FLUSH,
        };
        if kind == FLUSH {
            let (sector, sectors, seed) = (0, 0, 0);
            return Some(Request {
                kind,
                sector,
                sectors,
                seed,
            });
        }
        let stripes = self.model.len() as u64 / SECTOR / STRIPE / self.queues;
        // Few of them, so that they are written to over and over.
        let stripe = random.below(stripes.min(40)) * self.queues + self.index;
        let from = random.below(STRIPE);
        let sectors = match random.coin() {
            true => random.within(1..=STRIPE - from),
            false => random.within(1..=8.min(STRIPE - from)),
        };
        let (sector, seed) = (stripe * STRIPE + from, random.any());
        let request = Request {
            kind,
            sector,
            sectors,
            seed,
        };
        let busy = self.slots.iter().filter_map(|slot| slot.request);
        let free = busy.into_iter().all(|other| !request.overlaps(&other));
        free.then_some(request)
    }

    fn place(&self, slot: usize, request: &Request) -> (Vec<Segment>, Vec<u8>) {
        let Slot {
            header,
            data,
            status,
            ..
        } = self.slots[slot];
        let len = (request.sectors * SECTOR) as usize;
        let bytes = match request.kind {
            OUT => tagged(len, request.seed),
            DISCARD | WRITE_ZEROES => {
                let unmap = request.kind == WRITE_ZEROES && request.seed & 1 == 1;
                blk::range(request.sector, request.sectors as u32, unmap.into())
            }
            _ => vec![],
        };
        let place = |address: u64, bytes: &[u8]| {
            self.region.slice(address, bytes.len()).copy_from(bytes);
        };
        let sector = if request.kind == OUT || request.kind == IN {
            request.sector
        } else {
            0
        };
        place(header, &blk::header(request.kind, sector));
        place(status, &[blk::UNANSWERED]);
        if !bytes.is_empty() {
            place(data, &bytes);
        }
        let mut chain = vec![Segment::readable(header, blk::HEADER)];
        let write = request.kind == IN;
        let mut at = data;
        let mut left = if write { len } else { bytes.len() } as u64;
        while left > 0 {
            // Cut anywhere, in a few pieces.
            let part = if left > 8 {
                left / 2 + request.seed % 5
            } else {
                left
            };
            chain.push(Segment {
                address: at,
                len: part as u32,
                write,
            });
            (at, left) = (at + part, left - part);
            if chain.len() > 4 && left > 0 {
                chain.push(Segment {
                    address: at,
                    len: left as u32,
                    write,
                });
                left = 0;
            }
        }
        chain.push(Segment::writable(status, 1));
        (chain, bytes)
    }

    /// Checks an answered request, and notes what it changed.
    fn settle(&mut self, head: u16, len: u32) {
        let slot = self
            .slots
            .iter_mut()
            .find(|slot| slot.request.is_some() && slot.head == head);
        let slot = slot.expect("a request in flight");
        let request = slot.request.take().expect("a request");
        let status = self.region.slice(slot.status, 1);
        let mut byte = [0];
        status.copy_to(&mut byte);
        assert_eq!(byte, [blk::OK], "{request:?}");
        let bytes = (request.sectors * SECTOR) as usize;
        let start = (request.sector * SECTOR) as usize;
        let model = &mut self.model[start..start + bytes];
        match request.kind {
            IN => {
                assert_eq!(len as usize, bytes + 1, "{request:?}");
                let mut found = vec![0; bytes];
                self.region.slice(slot.data, bytes).copy_to(&mut found);
                assert_eq!(difference(&found, model), None, "{request:?}");
            }
            OUT => model.copy_from_slice(&tagged(bytes, request.seed)),
            FLUSH => {}
            _ => model.fill(0),
        }
        if request.kind != IN {
            assert_eq!(len, 1, "{request:?}: the status");
        }
    }

    /// Does `count` requests, all slots busy, and waits for the last of them.
    pub fn run(&mut self, count: u64) {
        let mut left = count;
        while left > 0 || self.queue.in_flight() > 0 {
            for slot in 0..self.slots.len() {
                if left == 0 || self.slots[slot].request.is_some() {
                    continue;
                }
                let Some(request) = self.next() else { continue };
                let (chain, _) = self.place(slot, &request);
                let layout = match request.seed & 2 {
                    0 => Layout::Direct,
                    _ => Layout::Indirect,
                };
                let head = self.queue.submit(&chain, layout);
                (self.slots[slot].head, self.slots[slot].request) = (head, Some(request));
                left -= 1;
            }
            self.queue.publish();
            if self.queue.in_flight() > 0 {
                let used = self.queue.wait();
                self.settle(used.head as u16, used.len);
                while let Some(used) = self.queue.take() {
                    self.settle(used.head as u16, used.len);
                }
            }
        }
    }

    /// Puts what this queue knows into `whole`.
    pub fn merge_into(&self, whole: &mut [u8]) {
        let bytes = (STRIPE * SECTOR) as usize;
        let mine = |stripe: &usize| *stripe as u64 % self.queues == self.index;
        for stripe in (0..whole.len() / bytes).filter(mine) {
            let range = stripe * bytes..(stripe + 1) * bytes;
            whole[range.clone()].copy_from_slice(&self.model[range]);
        }
    }
}
