//! What a hostile driver can write in its rings: one test per case, through the socket.
//!
//! Each case runs on the first queue of two. The device may answer it with an I/O error or with
//! nothing written, or give the queue up and signal its error eventfd; it must not write outside of
//! the chain's writable buffers. Then the second queue must read right, and the first after a reset.

mod common;

use common::blk::{HEADER, IN, IOERR, OK, UNANSWERED};
use common::content::difference;
use common::disk::Disk;
use common::guest::{Guest, Options, Placed};
use common::memory::Memory;
use common::queue::{Event, Layout, Segment, signalled};
use common::ring::{Descriptor, INDIRECT, NEXT, WRITE};
use common::session::{Wanted, feature};

struct Target {
    disk: Disk,
    guest: Guest,
}

fn target_with(wanted: Wanted) -> Target {
    let disk = Disk::serve();
    let guest = disk.guest(Options {
        queues: 2,
        wanted,
        ..Options::default()
    });
    Target { disk, guest }
}

fn target() -> Target {
    target_with(Wanted::all())
}

/// How the device took it.
#[derive(Debug, PartialEq, Eq)]
enum Verdict {
    /// Answered, and not as a success.
    Refused,
    /// Answered as a success.
    Served,
    /// The queue was given up.
    Stopped,
}

impl Target {
    /// Publishes what was offered on the first queue and waits for what becomes of it.
    fn verdict(&mut self, chain: &[Segment], status: Option<u64>) -> Verdict {
        let before = self.guest.scratch.snapshot();
        self.guest.queues[0].publish();
        let event = self.guest.queues[0].wait_event();
        self.guest.scratch.assert_untouched(&before, chain);
        let written = status.map(|address| self.guest.memory.read(address, 1)[0]);
        match event {
            Event::Stopped => Verdict::Stopped,
            Event::Used(used) => match written {
                Some(OK) => {
                    assert!(used.len > 0, "a status without a length");
                    Verdict::Served
                }
                Some(IOERR) => {
                    assert_eq!(used.len, 1, "an I/O error writes the status alone");
                    Verdict::Refused
                }
                None | Some(UNANSWERED) => {
                    // The status may have gone to the last writable byte there was.
                    assert!(used.len <= 1, "{} bytes written of a bad chain", used.len);
                    Verdict::Refused
                }
                Some(other) => panic!("status {other} for a bad chain"),
            },
        }
    }

    /// Asserts that the second queue reads right, and the first: at once if it was not given up,
    /// and after a reset in any case.
    fn assert_well(&mut self, verdict: &Verdict) {
        self.guest.assert_reads(1, &self.disk.content);
        if *verdict != Verdict::Stopped {
            self.guest.assert_reads(0, &self.disk.content);
        }
        self.guest.reset_queue(0).expect("reset");
        self.guest.assert_reads(0, &self.disk.content);
        self.guest.assert_reads(1, &self.disk.content);
        self.disk.daemon.assert_alive();
    }

    /// The chain, laid out as an honest driver would, must not be served.
    fn assert_refused(mut self, placed: Placed, layout: Layout) {
        self.guest.queues[0].submit(&placed.chain, layout);
        let verdict = self.verdict(&placed.chain, Some(placed.status));
        assert_ne!(verdict, Verdict::Served);
        self.assert_well(&verdict);
    }

    /// Descriptors written by hand in the queue's own table, `next` and all, must not be served.
    fn assert_refused_table(mut self, table: &[Descriptor], placed: &Placed) {
        let heads = self.guest.queues[0].reserve(table.len());
        for (&place, &entry) in heads.iter().zip(table) {
            self.guest.queues[0].ring.describe(place, entry);
        }
        self.guest.queues[0].offer(heads, None);
        let verdict = self.verdict(&placed.chain, Some(placed.status));
        assert_ne!(verdict, Verdict::Served);
        self.assert_well(&verdict);
    }

    /// An indirect table written by hand, named by a descriptor of `len` bytes, must not be served.
    fn assert_refused_indirect(
        mut self,
        entries: &[Descriptor],
        head: Descriptor,
        placed: &Placed,
    ) {
        let table = self.guest.queues[0].reserve_table();
        for (index, entry) in (0..).zip(entries) {
            entry.write(&self.guest.memory, table, index);
        }
        let address = table + head.address;
        let heads = self.guest.queues[0].reserve(1);
        self.guest.queues[0]
            .ring
            .describe(heads[0], Descriptor { address, ..head });
        self.guest.queues[0].offer(heads, Some(table));
        let verdict = self.verdict(&placed.chain, Some(placed.status));
        assert_ne!(verdict, Verdict::Served);
        self.assert_well(&verdict);
    }
}

/// The chain of a placed request as descriptors linked one after the other from `first` on.
fn linked(placed: &Placed, first: u16) -> Vec<Descriptor> {
    let last = placed.chain.len() - 1;
    let entry = |(index, segment): (usize, &Segment)| Descriptor {
        address: segment.address,
        len: segment.len,
        flags: if segment.write { WRITE } else { 0 } | if index < last { NEXT } else { 0 },
        next: if index < last {
            first + index as u16 + 1
        } else {
            0
        },
    };
    placed.chain.iter().enumerate().map(entry).collect()
}

#[test]
fn no_status() {
    let mut target = target();
    let mut placed = target.guest.place(IN, 0, 512);
    placed.chain.truncate(1);
    target.assert_refused(placed, Layout::Direct);
}

#[test]
fn status_in_a_descriptor_the_device_may_not_write() {
    for data in [0, 512] {
        let mut target = target();
        let mut placed = target.guest.place(IN, 0, data);
        placed.chain.last_mut().expect("status").write = false;
        target.assert_refused(placed, Layout::Direct);
    }
}

#[test]
fn data_in_a_descriptor_the_device_may_not_write() {
    // Readable data and one writable byte: a read of no bytes, or a fault, but nothing written.
    let mut target = target();
    let mut placed = target.guest.place(IN, 0, 512);
    placed.chain[1].write = false;
    target.guest.queues[0].submit(&placed.chain, Layout::Direct);
    let verdict = target.verdict(&placed.chain, Some(placed.status));
    target.assert_well(&verdict);
}

#[test]
fn readable_descriptor_after_a_writable_one() {
    let mut target = target();
    let mut placed = target.guest.place(IN, 0, 512);
    placed.chain.swap(0, 1);
    target.assert_refused(placed, Layout::Direct);
}

#[test]
fn header_too_short() {
    for len in [1, 15] {
        let mut target = target();
        let mut placed = target.guest.place(IN, 0, 512);
        placed.chain[0].len = len;
        target.assert_refused(placed, Layout::Direct);
    }
}

#[test]
fn no_header_at_all() {
    let mut target = target();
    let mut placed = target.guest.place(IN, 0, 512);
    placed.chain.remove(0);
    target.assert_refused(placed, Layout::Indirect);
}

#[test]
fn zero_length_descriptors_are_skipped_or_refused() {
    for (at, write) in [(0, false), (1, false), (1, true), (2, true), (3, true)] {
        let mut target = target();
        let mut placed = target.guest.place(IN, 5, 512);
        let address = placed.chain[0].address;
        placed.chain.insert(
            at,
            Segment {
                address,
                len: 0,
                write,
            },
        );
        target.guest.queues[0].submit(&placed.chain, Layout::Direct);
        let verdict = target.verdict(&placed.chain, Some(placed.status));
        if verdict == Verdict::Served {
            let data = target.guest.memory.read(placed.data[0].address, 512);
            assert_eq!(difference(&data, target.disk.expected(5, 512)), None);
        }
        target.assert_well(&verdict);
    }
}

#[test]
fn a_descriptor_that_names_itself() {
    let mut target = target();
    let placed = target.guest.place(IN, 0, 512);
    let mut table = linked(&placed, 0);
    table[0].next = 0;
    target.assert_refused_table(&table, &placed);
}

#[test]
fn a_loop_over_the_writable_descriptors() {
    let mut target = target();
    let placed = target.guest.place(IN, 0, 512);
    let mut table = linked(&placed, 0);
    table[2].flags |= NEXT;
    table[2].next = 1;
    target.assert_refused_table(&table, &placed);
}

#[test]
fn a_loop_in_an_indirect_table() {
    let mut target = target();
    let placed = target.guest.place(IN, 0, 512);
    let mut table = linked(&placed, 0);
    table[2].flags |= NEXT;
    table[2].next = 1;
    let head = Descriptor {
        address: 0,
        len: 48,
        flags: INDIRECT,
        next: 0,
    };
    target.assert_refused_indirect(&table, head, &placed);
}

#[test]
fn next_outside_of_the_ring() {
    for next in [128, 129, u16::MAX] {
        let mut target = target();
        let placed = target.guest.place(IN, 0, 512);
        let mut table = linked(&placed, 0);
        table[1].next = next;
        target.assert_refused_table(&table, &placed);
    }
}

#[test]
fn next_outside_of_the_indirect_table() {
    for next in [3, 4, u16::MAX] {
        let mut target = target();
        let placed = target.guest.place(IN, 0, 512);
        let mut table = linked(&placed, 0);
        // What lies behind the table is a good status descriptor, which is none of this chain.
        let behind = table[2];
        table[1].next = next;
        table.push(behind);
        let head = Descriptor {
            address: 0,
            len: 48,
            flags: INDIRECT,
            next: 0,
        };
        target.assert_refused_indirect(&table, head, &placed);
    }
}

#[test]
fn an_indirect_table_that_is_no_multiple_of_sixteen_bytes() {
    for len in [0, 1, 15, 47, 49] {
        let mut target = target();
        let placed = target.guest.place(IN, 0, 512);
        let head = Descriptor {
            address: 0,
            len,
            flags: INDIRECT,
            next: 0,
        };
        target.assert_refused_indirect(&linked(&placed, 0), head, &placed);
    }
}

#[test]
fn an_indirect_table_in_an_indirect_table() {
    let mut target = target();
    let placed = target.guest.place(IN, 0, 512);
    let inner = target.guest.queues[0].reserve_table();
    for (index, entry) in (0..).zip(linked(&placed, 0)) {
        entry.write(&target.guest.memory, inner, index);
    }
    let nested = Descriptor {
        address: inner,
        len: 48,
        flags: INDIRECT,
        next: 0,
    };
    let head = Descriptor {
        address: 0,
        len: 16,
        flags: INDIRECT,
        next: 0,
    };
    target.assert_refused_indirect(&[nested], head, &placed);
}

#[test]
fn an_indirect_descriptor_that_goes_on() {
    let mut target = target();
    let placed = target.guest.place(IN, 0, 512);
    let head = Descriptor {
        address: 0,
        len: 48,
        flags: INDIRECT | NEXT,
        next: 1,
    };
    target.assert_refused_indirect(&linked(&placed, 0), head, &placed);
}

#[test]
fn an_indirect_table_outside_of_memory() {
    for (address, len) in [
        (Memory::HOLE, 48),
        (u64::MAX - 31, 48),
        (0x1_0100_0000 - 16, 48),
    ] {
        let mut target = target();
        let placed = target.guest.place(IN, 0, 512);
        let head = Descriptor {
            address,
            len,
            flags: INDIRECT,
            next: 0,
        };
        target.assert_refused_table(&[head], &placed);
    }
}

#[test]
fn a_huge_indirect_table() {
    // One region full of table: 16 MiB that claim to be 4 GiB, and 1 MiB that is there.
    for len in [0xffff_fff0, 1 << 20] {
        let mut target = target();
        let placed = target.guest.place(IN, 0, 512);
        let table = target.guest.memory.regions[3].alloc(1 << 20, 16);
        let byte = placed.data[0].address;
        for index in 0..1 << 16 {
            let next = (index + 1) as u16;
            let entry = match index {
                0 => Descriptor {
                    address: placed.chain[0].address,
                    len: HEADER,
                    flags: NEXT,
                    next,
                },
                _ => Descriptor {
                    address: byte,
                    len: 1,
                    flags: WRITE | NEXT,
                    next,
                },
            };
            entry.write(&target.guest.memory, table, index);
        }
        let head = Descriptor {
            address: table,
            len,
            flags: INDIRECT,
            next: 0,
        };
        target.assert_refused_table(&[head], &placed);
    }
}

#[test]
fn a_misaligned_indirect_table_is_served_right_or_refused() {
    let mut target = target();
    let placed = target.guest.place(IN, 5, 512);
    let table = target.guest.queues[0].reserve_table() + 7;
    for (index, entry) in (0..).zip(linked(&placed, 0)) {
        let mut bytes = entry.address.to_le_bytes().to_vec();
        bytes.extend(entry.len.to_le_bytes());
        bytes.extend(entry.flags.to_le_bytes());
        bytes.extend(entry.next.to_le_bytes());
        target.guest.memory.write(table + 16 * index, &bytes);
    }
    let heads = target.guest.queues[0].reserve(1);
    let head = Descriptor {
        address: table,
        len: 48,
        flags: INDIRECT,
        next: 0,
    };
    target.guest.queues[0].ring.describe(heads[0], head);
    target.guest.queues[0].offer(heads, None);
    let verdict = target.verdict(&placed.chain, Some(placed.status));
    if verdict == Verdict::Served {
        let data = target.guest.memory.read(placed.data[0].address, 512);
        assert_eq!(difference(&data, target.disk.expected(5, 512)), None);
    }
    target.assert_well(&verdict);
}

#[test]
fn an_indirect_table_that_was_not_negotiated() {
    let mut wanted = Wanted::all();
    wanted.features &= !feature::INDIRECT;
    let mut target = target_with(wanted);
    let placed = target.guest.place(IN, 0, 512);
    target.assert_refused(placed, Layout::Indirect);
}

#[test]
fn data_outside_of_memory() {
    for (address, len) in [
        (Memory::HOLE, 512),
        (0, 512),
        (u64::MAX - 511, 512),
        (u64::MAX - 100, 512),
        // The last region ends in the middle of these.
        (0x1_0100_0000 - 511, 512),
        (0x1_0100_0000 - 512, 1 << 20),
        (0x1_0000_0000, 0xffff_fe00),
    ] {
        let mut target = target();
        let mut placed = target.guest.place(IN, 0, 512);
        placed.chain[1].address = address;
        placed.chain[1].len = len;
        target.assert_refused(placed, Layout::Direct);
    }
}

#[test]
fn header_outside_of_memory() {
    for address in [Memory::HOLE, u64::MAX - 7, 0x1_0100_0000 - 8] {
        let mut target = target();
        let mut placed = target.guest.place(IN, 0, 512);
        placed.chain[0].address = address;
        target.assert_refused(placed, Layout::Direct);
    }
}

#[test]
fn status_outside_of_memory() {
    let mut target = target();
    let mut placed = target.guest.place(IN, 0, 512);
    placed.chain[2].address = Memory::HOLE;
    target.assert_refused(placed, Layout::Direct);
}

#[test]
fn a_head_outside_of_the_ring() {
    for head in [128, 129, u16::MAX] {
        let mut target = target();
        target.guest.queues[0].ring.offer(head);
        target.guest.queues[0].ring.publish();
        // No answer can be given for a head that is none; a queue that goes on may not invent one.
        let next = target.guest.place(IN, 5, 512);
        let submitted = target.guest.queues[0].submit(&next.chain, Layout::Direct);
        target.guest.queues[0].publish();
        let verdict = loop {
            if target.guest.queues[0].ring.vring.err.read().is_ok() {
                break Verdict::Stopped;
            }
            if let Some(used) = target.guest.queues[0].ring.take() {
                assert!(
                    [u32::from(head), submitted.into()].contains(&used.head),
                    "{used:?}"
                );
                if used.head == u32::from(submitted) {
                    break Verdict::Served;
                }
            }
            std::thread::yield_now();
        };
        target.guest.reset_queue(0).expect("reset");
        target.assert_well(&verdict);
    }
}

#[test]
fn an_available_index_that_jumps() {
    for jump in [129, 300, 0x8000, u16::MAX] {
        let mut target = target();
        target.guest.assert_reads(0, &target.disk.content.clone());
        let ring = &mut target.guest.queues[0].ring;
        let index = ring.published().wrapping_add(jump);
        ring.publish_index(index);
        assert!(
            signalled(&[&ring.vring.err]),
            "the error eventfd tells of a jump by {jump}"
        );
        assert_eq!(ring.vring.used_index(), ring.taken(), "nothing is answered");
        target.assert_well(&Verdict::Stopped);
    }
}

#[test]
fn the_same_head_twice() {
    let mut target = target();
    let placed = target.guest.place(IN, 0, 512);
    let head = target.guest.queues[0].submit(&placed.chain, Layout::Direct);
    let ring = &mut target.guest.queues[0].ring;
    for _ in 0..20 {
        ring.offer(head);
    }
    ring.publish();
    let mut answers = 0;
    let verdict = loop {
        if ring.vring.err.read().is_ok() {
            break Verdict::Stopped;
        }
        if let Some(used) = ring.take() {
            assert_eq!(used.head, u32::from(head));
            answers += 1;
        }
        if answers == 21 {
            break Verdict::Served;
        }
        std::thread::yield_now();
    };
    target.guest.reset_queue(0).expect("reset");
    target.assert_well(&verdict);
}

#[test]
fn rings_outside_of_memory() {
    type Break = fn(&mut common::ring::Addresses, u64);
    let breaks: [Break; 3] = [
        |at, to| at.descriptors = to,
        |at, to| at.available = to,
        |at, to| at.used = to,
    ];
    for ring_part in breaks {
        // Nowhere, at the top of the address space, and a ring that runs over a region's end.
        for place in 0..3 {
            let mut target = target();
            target.guest.session.stop_queue(0).expect("stop");
            let region = &target.guest.memory.regions[3];
            let to = match place {
                0 => 0x1000,
                1 => u64::MAX - 0xf,
                _ => region.user_address(region.end() - 16),
            };
            let mut vring = target.guest.queues[0].ring.vring.clone();
            ring_part(&mut vring.at, to);
            // The message may be refused; if it is not, the queue must be given up when it starts.
            let base = target.guest.queues[0].ring.taken();
            if target.guest.session.start_queue(0, &vring, base).is_ok() {
                vring.kick.write(1).expect("kick");
                assert!(signalled(&[&vring.err]), "the queue is given up");
            }
            target.assert_well(&Verdict::Stopped);
        }
    }
}

#[test]
fn a_flood_of_bad_chains_neither_fills_the_log_nor_stops_the_queue() {
    let mut target = target();
    let mut placed = target.guest.place(IN, 0, 512);
    placed.chain[1].address = Memory::HOLE;
    for _ in 0..100 {
        for _ in 0..30 {
            target.guest.queues[0].submit(&placed.chain, Layout::Direct);
        }
        target.guest.queues[0].publish();
        for _ in 0..30 {
            if target.guest.queues[0].wait_event() == Event::Stopped {
                target.guest.reset_queue(0).expect("reset");
                break;
            }
        }
    }
    target.assert_well(&Verdict::Refused);
    let log = target.disk.daemon.log().len();
    assert!(
        log < 64 << 10,
        "3000 bad chains wrote {log} bytes to the log"
    );
}
