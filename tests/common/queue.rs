//! Descriptor chains of any shape over a ring, with books that show each answered exactly once.

use std::collections::BTreeMap;
use std::io::ErrorKind;
use std::os::fd::AsRawFd;
use std::time::Instant;

use vmm_sys_util::epoll::{ControlOperation, Epoll, EpollEvent, EventSet};
use vmm_sys_util::eventfd::EventFd;

use super::PATIENCE;
use super::memory::Memory;
use super::ring::{Addresses, DESCRIPTOR, Descriptor, INDIRECT, NEXT, Ring, Used, WRITE};

/// One buffer of a chain.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Segment {
    /// Guest address.
    pub address: u64,
    /// Bytes.
    pub len: u32,
    /// Whether the device writes it.
    pub write: bool,
}

impl Segment {
    /// A buffer the device reads.
    pub fn readable(address: u64, len: u32) -> Self {
        Self {
            address,
            len,
            write: false,
        }
    }

    /// A buffer the device writes.
    pub fn writable(address: u64, len: u32) -> Self {
        Self {
            address,
            len,
            write: true,
        }
    }

    fn flags(self) -> u16 {
        if self.write { WRITE } else { 0 }
    }
}

/// How a chain lies in descriptor tables.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Layout {
    /// All in the ring's own table.
    Direct,
    /// All in one indirect table.
    Indirect,
    /// So many in the ring's own table, the rest in one indirect table at its end
    /// (virtio 1.x, 2.7.5.3.2: a device must handle it).
    Mixed(usize),
}

/// How the driver learns of answers.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Waiting {
    /// By looking at the used ring; it asks for no calls.
    Polling,
    /// By the call eventfd alone.
    Called,
}

/// What came of waiting.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Event {
    /// An answer.
    Used(Used),
    /// The device signalled that it gave the queue up.
    Stopped,
}

/// Entries of one indirect table.
const TABLE_LEN: usize = 1024;

/// One virtqueue, driven.
#[derive(Debug)]
pub struct Queue {
    /// The ring below, for tests that break its rules.
    pub ring: Ring,
    /// How answers are waited for.
    pub waiting: Waiting,
    memory: Memory,
    table: u64,
    free: Vec<u16>,
    free_tables: Vec<u64>,
    in_flight: BTreeMap<u16, Chain>,
}

/// What a chain in flight holds.
#[derive(Debug, Default)]
struct Chain {
    descriptors: Vec<u16>,
    table: Option<u64>,
}

impl Queue {
    /// An empty queue in fresh memory, its three parts in three regions.
    pub fn new(memory: &Memory, size: u16, event_idx: bool) -> Self {
        let at = Addresses::alloc(memory, size, [0, 1, 3]);
        Self {
            ring: Ring::new(memory, at, size, event_idx),
            waiting: Waiting::Called,
            memory: memory.clone(),
            table: at.descriptors,
            free: (0..size).rev().collect(),
            free_tables: Vec::new(),
            in_flight: BTreeMap::new(),
        }
    }

    /// Forgets everything in flight and starts anew, as a driver does that resets the device.
    pub fn reset(&mut self) {
        for (_, chain) in std::mem::take(&mut self.in_flight) {
            self.release(chain);
        }
        self.ring.reset();
    }

    /// Chains submitted and not answered.
    pub fn in_flight(&self) -> usize {
        self.in_flight.len()
    }

    /// Guest address of the descriptor table.
    pub fn table(&self) -> u64 {
        self.table
    }

    fn release(&mut self, chain: Chain) {
        self.free.extend(chain.descriptors);
        self.free_tables.extend(chain.table);
    }

    /// Takes free descriptors of the ring's own table, for chains written by hand.
    pub fn reserve(&mut self, count: usize) -> Vec<u16> {
        let start = self
            .free
            .len()
            .checked_sub(count)
            .expect("free descriptors");
        let mut taken = self.free.split_off(start);
        taken.reverse();
        taken
    }

    /// A free indirect table of 1024 entries, for chains written by hand.
    pub fn reserve_table(&mut self) -> u64 {
        let bytes = TABLE_LEN as u64 * DESCRIPTOR;
        self.free_tables
            .pop()
            .unwrap_or_else(|| self.memory.regions[2].alloc(bytes, 16))
    }

    /// Links `entries` at the given places of the ring's own table.
    fn describe_chain(&self, places: &[u16], entries: &[Descriptor]) {
        for (index, (&place, &entry)) in places.iter().zip(entries).enumerate() {
            let next = places.get(index + 1);
            let (flags, next) = (entry.flags | next.map_or(0, |_| NEXT), next.copied());
            let next = next.unwrap_or(0);
            self.ring.describe(
                place,
                Descriptor {
                    flags,
                    next,
                    ..entry
                },
            );
        }
    }

    /// Lays `chain` out and offers it; the device sees it after [`Queue::publish`].
    pub fn submit(&mut self, chain: &[Segment], layout: Layout) -> u16 {
        let direct = match layout {
            Layout::Direct => chain.len(),
            Layout::Indirect => 0,
            Layout::Mixed(direct) => direct,
        };
        let (own, other) = chain.split_at(direct);
        let plain = |segment: &Segment| Descriptor {
            address: segment.address,
            len: segment.len,
            flags: segment.flags(),
            next: 0,
        };
        let mut entries: Vec<Descriptor> = own.iter().map(plain).collect();
        let table = (layout != Layout::Direct).then(|| self.reserve_table());
        if let Some(table) = table {
            // Backwards, so that a device that ignores `next` and walks in order fails.
            let count = other.len() as u64;
            let place = |index: u64| if index == 0 { 0 } else { count - index };
            for (index, segment) in (0..).zip(other) {
                let last = index + 1 == count;
                let mut entry = plain(segment);
                if !last {
                    entry.flags |= NEXT;
                    entry.next = place(index + 1) as u16;
                }
                entry.write(&self.memory, table, place(index));
            }
            let len = (count * DESCRIPTOR) as u32;
            entries.push(Descriptor {
                address: table,
                len,
                flags: INDIRECT,
                next: 0,
            });
        }
        let descriptors = self.reserve(entries.len());
        self.describe_chain(&descriptors, &entries);
        self.offer(descriptors, table)
    }

    /// Offers a chain whose descriptors were written by hand; `descriptors[0]` is its head.
    pub fn offer(&mut self, descriptors: Vec<u16>, table: Option<u64>) -> u16 {
        let head = descriptors[0];
        let chain = Chain { descriptors, table };
        assert!(
            self.in_flight.insert(head, chain).is_none(),
            "head {head} is in flight"
        );
        self.ring.offer(head);
        head
    }

    /// Shows the device what was submitted.
    pub fn publish(&mut self) {
        self.ring.publish();
    }

    /// The next answer, if there is one.
    pub fn take(&mut self) -> Option<Used> {
        let used = self.ring.take()?;
        let head = u16::try_from(used.head).expect("head index of 16 bits");
        let chain = self.in_flight.remove(&head);
        self.release(chain.unwrap_or_else(|| panic!("head {head} answered but not in flight")));
        Some(used)
    }

    /// Waits for the next answer.
    pub fn wait(&mut self) -> Used {
        match self.wait_event() {
            Event::Used(used) => used,
            Event::Stopped => panic!("the device gave the queue up"),
        }
    }

    /// Waits for the next answer, or for the device to give the queue up.
    pub fn wait_event(&mut self) -> Event {
        let start = Instant::now();
        loop {
            if let Some(used) = self.take() {
                return Event::Used(used);
            }
            if self.ring.vring.err.read().is_ok() {
                return Event::Stopped;
            }
            match self.waiting {
                Waiting::Polling => {
                    self.ring.want_no_call();
                    std::thread::yield_now();
                }
                Waiting::Called if self.ring.want_call() => continue,
                Waiting::Called => {
                    if !signalled(&[&self.ring.vring.call, &self.ring.vring.err]) {
                        let there = self.ring.vring.used_index() != self.ring.taken();
                        assert!(!there, "an answer came without the call that was asked for");
                    }
                    // Spent, whether it was this or the other that was signalled.
                    let _ = self.ring.vring.call.read();
                }
            }
            assert!(
                start.elapsed() < PATIENCE,
                "no answer: {} in flight",
                self.in_flight()
            );
        }
    }

    /// Submits one chain and waits for its answer; nothing else may be in flight.
    pub fn run(&mut self, chain: &[Segment], layout: Layout) -> Used {
        let head = self.submit(chain, layout);
        self.publish();
        let used = self.wait();
        assert_eq!(used.head, u32::from(head), "the only chain in flight");
        used
    }
}

/// Waits until one of `events` is signalled; `false` after [`PATIENCE`].
pub fn signalled(events: &[&EventFd]) -> bool {
    let epoll = Epoll::new().expect("epoll");
    for event in events {
        let fd = event.as_raw_fd();
        let wanted = EpollEvent::new(EventSet::IN, 0);
        epoll.ctl(ControlOperation::Add, fd, wanted).expect("epoll");
    }
    let limit = PATIENCE.as_millis() as i32;
    loop {
        match epoll.wait(limit, &mut [EpollEvent::default()]) {
            Err(error) if error.kind() == ErrorKind::Interrupted => {}
            result => return result.expect("epoll") > 0,
        }
    }
}
