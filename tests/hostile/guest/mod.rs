//! What a hostile driver can write in its rings: one test per case, through the socket.
//!
//! Each case runs on the first queue of two. A malformed chain is answered with an I/O error, or with
//! nothing written where it has no status; the queue goes on. A malformed ring stops its queue and
//! signals the error eventfd. Nothing is written outside of the chain's writable buffers. Then the
//! second queue must read right, and the first, at once or after a reset.

mod chains;
mod indirect;
mod racing;
mod rings;

use common::blk::{HEADER, IN, IOERR, OK, UNANSWERED};
use common::content::difference;
use common::disk::Disk;
use common::guest::{Guest, Options, Placed};
use common::memory::Memory;
use common::queue::{Layout, Segment, signalled};
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

/// How the device answered a chain.
#[derive(Debug, PartialEq, Eq)]
enum Answer {
    /// Not as a success.
    Refused,
    /// As a success, with so many bytes written, the status among them.
    Served(u32),
}

impl Target {
    /// Publishes what was offered on the first queue and waits for the answer. The queue must not
    /// stop.
    fn answer(&mut self, placed: &Placed) -> Answer {
        let before = self.guest.scratch.snapshot();
        self.guest.queues[0].publish();
        let used = self.guest.queues[0].wait();
        self.guest.scratch.assert_untouched(&before, &placed.chain);
        match self.guest.memory.read(placed.status, 1)[0] {
            OK => Answer::Served(used.len),
            IOERR => {
                assert_eq!(used.len, 1, "an I/O error writes the status alone");
                Answer::Refused
            }
            UNANSWERED => {
                // The status may have gone to the last writable byte there was.
                assert!(used.len <= 1, "{} bytes written of a bad chain", used.len);
                Answer::Refused
            }
            other => panic!("status {other} for a bad chain"),
        }
    }

    /// Asserts that both queues read right, the first also after a reset.
    fn assert_well(&mut self) {
        self.guest.assert_reads(1, &self.disk.content);
        self.guest.assert_reads(0, &self.disk.content);
        self.assert_well_after_reset();
    }

    /// Asserts that the second queue reads right, and the first, which was stopped, after a reset.
    fn assert_well_after_reset(&mut self) {
        self.guest.assert_reads(1, &self.disk.content);
        self.guest.reset_queue(0).expect("reset");
        self.guest.assert_reads(0, &self.disk.content);
        self.guest.assert_reads(1, &self.disk.content);
        self.disk.daemon.assert_alive();
    }

    /// Asserts that the chain offered last is refused, and that all is well then.
    fn assert_offered_refused(mut self, placed: &Placed) {
        assert_eq!(self.answer(placed), Answer::Refused);
        self.assert_well();
    }

    /// Asserts that a read of sector 5 whose chain was offered last is served right, and that all is
    /// well then.
    fn assert_offered_served(mut self, placed: &Placed) {
        assert_eq!(self.answer(placed), Answer::Served(513));
        let data = self.guest.memory.read(placed.data[0].address, 512);
        assert_eq!(difference(&data, self.disk.expected(5, 512)), None);
        self.assert_well();
    }

    /// The chain, laid out as an honest driver would, is refused.
    fn assert_refused(mut self, placed: &Placed, layout: Layout) {
        self.guest.queues[0].submit(&placed.chain, layout);
        self.assert_offered_refused(placed);
    }

    /// Descriptors written by hand in the queue's own table, `next` and all, are refused.
    fn assert_refused_table(mut self, table: &[Descriptor], placed: &Placed) {
        let heads = self.guest.queues[0].reserve(table.len());
        for (&place, &entry) in heads.iter().zip(table) {
            self.guest.queues[0].ring.describe(place, entry);
        }
        self.guest.queues[0].offer(heads, None);
        self.assert_offered_refused(placed);
    }

    /// An indirect table written by hand, named by a descriptor of `len` bytes, is refused.
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
        self.assert_offered_refused(placed);
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
