//! What a hostile driver can write in its rings: one test per case, through the socket.
//!
//! Each case runs on the first queue of two. A bad chain is answered with an I/O error where the
//! place of its status is known; where it is not, the queue stops and signals its error eventfd.
//! An answer without a status never comes: the driver would find the status of the request before.
//! Nothing is written outside of the chain's writable buffers. Then the second queue must read
//! right, and the first after a reset.

mod chains;
mod indirect;
mod racing;
mod resubmitted;
mod rings;

use common::blk::{HEADER, IN, IOERR, OK, UNANSWERED};
use common::content::difference;
use common::disk::Disk;
use common::guest::{Guest, Options, Placed};
use common::memory::Memory;
use common::queue::{Event, Layout, Segment, signalled};
use common::ring::{Descriptor, INDIRECT, NEXT, WRITE};
use common::session::{Wanted, feature};

use Verdict::{Refused, Served, Stopped};

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

/// What the device did with a chain.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Verdict {
    /// Answered with an I/O error.
    Refused,
    /// Answered as a success.
    Served,
    /// Not answered: the queue stopped.
    Stopped,
}

impl Target {
    /// Publishes what was offered on the first queue and waits for what becomes of it.
    fn verdict(&mut self, chain: &[Segment], status: u64) -> Verdict {
        let before = self.guest.scratch.snapshot();
        self.guest.queues[0].publish();
        let event = self.guest.queues[0].wait_event();
        self.guest.scratch.assert_untouched(&before, chain);
        let written = self.guest.memory.read(status, 1)[0];
        match event {
            Event::Stopped => {
                assert_eq!(written, UNANSWERED, "a queue that stops answers nothing");
                Stopped
            }
            Event::Used(used) if written == OK => {
                assert!(used.len > 0, "a status without a length");
                Served
            }
            Event::Used(used) => {
                assert_eq!(written, IOERR, "the status of a bad chain");
                assert_eq!(used.len, 1, "an I/O error writes the status alone");
                Refused
            }
        }
    }

    /// Asserts that the second queue reads right, and the first: at once if it was not given up,
    /// and after a reset in any case.
    fn assert_well(&mut self, verdict: &Verdict) {
        self.guest.assert_reads(1, &self.disk.content);
        if *verdict != Stopped {
            self.guest.assert_reads(0, &self.disk.content);
        }
        self.guest.reset_queue(0).expect("reset");
        self.guest.assert_reads(0, &self.disk.content);
        self.guest.assert_reads(1, &self.disk.content);
        self.disk.daemon.assert_alive();
    }

    /// Asserts what becomes of a chain that is laid out as an honest driver would.
    fn assert(mut self, expected: Verdict, placed: Placed, layout: Layout) {
        self.guest.queues[0].submit(&placed.chain, layout);
        self.assert_offered(expected, &placed);
    }

    /// Asserts what becomes of descriptors written by hand in the queue's own table, `next` and
    /// all.
    fn assert_table(mut self, expected: Verdict, table: &[Descriptor], placed: &Placed) {
        let heads = self.guest.queues[0].reserve(table.len());
        for (&place, &entry) in heads.iter().zip(table) {
            self.guest.queues[0].ring.describe(place, entry);
        }
        self.guest.queues[0].offer(heads, None);
        self.assert_offered(expected, placed);
    }

    /// Asserts what becomes of an indirect table written by hand, which `head` names.
    fn assert_indirect(
        mut self,
        expected: Verdict,
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
        self.assert_offered(expected, placed);
    }

    fn assert_offered(mut self, expected: Verdict, placed: &Placed) {
        let verdict = self.verdict(&placed.chain, placed.status);
        assert_eq!(verdict, expected);
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
