//! What a hostile driver can write in its rings: one test per case, through the socket.
//!
//! Each case runs on the first queue of two. The device may answer it with an I/O error or with
//! nothing written, or give the queue up and signal its error eventfd; it must not write outside of
//! the chain's writable buffers. Then the second queue must read right, and the first after a reset.

mod chains;
mod indirect;
mod racing;
mod rings;

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
