//! Writes that no honest driver sends: refused or served, and nothing else changes.

use super::{assert_beginning, part};
use common::blk::{self, DISCARD, HEADER, IN, IOERR, OK, OUT, WRITE_ZEROES, range};
use common::content::{Random, tagged};
use common::guest::{Guest, Options, Placed};
use common::memory::{Memory, REGION};
use common::queue::{Event, Layout, Segment};
use common::writable::Writable;

/// Two queues: one for the chain, one to see whether all is well.
fn serve() -> (Writable, Guest) {
    let disk = Writable::serve();
    let guest = disk.guest(Options {
        queues: 2,
        ..Options::default()
    });
    (disk, guest)
}

/// Runs a chain on the first queue; returns whether it was answered as a success.
fn is_served(guest: &mut Guest, placed: &Placed) -> bool {
    guest.queues[0].submit(&placed.chain, Layout::Direct);
    guest.queues[0].publish();
    match guest.queues[0].wait_event() {
        Event::Stopped => false,
        Event::Used(used) => {
            assert_eq!(used.len, 1, "a write writes nothing but a status");
            let status = guest.memory.read(placed.status, 1)[0];
            assert!([OK, IOERR].contains(&status), "status {status}");
            status == OK
        }
    }
}

fn assert_refused(mut guest: Guest, mut disk: Writable, placed: &Placed) {
    assert!(!is_served(&mut guest, placed));
    guest.reset_queue(0).expect("reset");
    assert_beginning(&mut guest, &disk.content);
    disk.daemon.assert_alive();
}

#[test]
fn data_outside_of_memory() {
    for (address, len) in [
        (Memory::HOLE, 512),
        (u64::MAX - 511, 512),
        (0x4000_0000 + 2 * REGION - 512, 1024),
        (0x4000_0000, u32::MAX - 511),
    ] {
        for kind in [OUT, DISCARD, WRITE_ZEROES] {
            let (disk, mut guest) = serve();
            let mut placed = guest.place(kind, 0, 512);
            placed.chain[1] = Segment::readable(address, len);
            assert_refused(guest, disk, &placed);
        }
    }
}

#[test]
fn data_in_descriptors_the_device_may_write() {
    for kind in [OUT, DISCARD, WRITE_ZEROES] {
        let (disk, mut guest) = serve();
        let mut placed = guest.place_data(kind, 0, &range(0, 8, 0));
        placed.chain[1].write = true;
        let before = guest.scratch.snapshot();
        let served = is_served(&mut guest, &placed);
        assert!(!served, "type {kind}");
        let status = [Segment::writable(placed.status, 1)];
        guest.scratch.assert_untouched(&before, &status);
        assert_beginning(&mut guest, &disk.content);
    }
}

#[test]
fn a_write_without_a_status() {
    let (disk, mut guest) = serve();
    let mut placed = guest.place_data(OUT, 0, &[9; 512]);
    placed.chain.pop();
    assert_refused(guest, disk, &placed);
}

#[test]
fn a_header_that_ends_early() {
    let (disk, mut guest) = serve();
    let mut placed = guest.place_data(OUT, 0, &[9; 512]);
    placed.chain.remove(1);
    placed.chain[0].len = HEADER - 1;
    assert_refused(guest, disk, &placed);
}

#[test]
fn more_data_than_a_request_may_carry() {
    let (disk, mut guest) = serve();
    let mut placed = guest.place(OUT, 0, 512);
    // The same 8 MiB over and over: 72 MiB.
    let part = Segment::readable(guest.memory.regions[2].base(), 8 << 20);
    placed.chain.splice(1..2, [part; 9]);
    assert_refused(guest, disk, &placed);
}

#[test]
fn data_that_overlaps_itself_and_the_status() {
    let (disk, mut guest) = serve();
    let data = tagged(1024, 4);
    let mut placed = guest.place_data(OUT, 6, &data);
    let at = placed.data[0].address;
    let twice = [
        Segment::readable(at, 1024),
        Segment::readable(at + 512, 512),
    ];
    placed.chain.splice(1..2, twice);
    // The status lies in the data that was written by then.
    placed.status = at;
    *placed.chain.last_mut().expect("status") = Segment::writable(at, 1);
    assert!(is_served(&mut guest, &placed));
    let mut model = disk.content.to_vec();
    part(&mut model, 6, 2).copy_from_slice(&data);
    part(&mut model, 8, 1).copy_from_slice(&data[512..]);
    assert_beginning(&mut guest, &model);
}

/// Chains of any kind with anything in them: the daemon lives, the other queue works, and what is
/// out of reach of the requests that were served stays.
#[test]
fn chains_of_any_kind() {
    let (mut disk, mut guest) = serve();
    let mut random = Random::new(5);
    let fence = disk.content.len() as u64 / 512 / 2;
    for round in 0..600 {
        guest.scratch.clear();
        let kind = [OUT, DISCARD, WRITE_ZEROES, IN][random.below(4) as usize];
        let sector = match random.below(4) {
            0 => random.any(),
            _ => random.below(fence - 4096),
        };
        let header = guest.scratch.put(0, &blk::header(kind, sector), 0);
        let mut chain = vec![Segment::readable(
            header,
            HEADER - random.below(20) as u32 / 19,
        )];
        for _ in 0..random.below(6) {
            let ranges = range(
                random.below(fence - 4096),
                random.below(4096) as u32,
                random.below(6) as u32 / 4,
            );
            let data = guest.scratch.put(1, &ranges, random.below(4));
            let len = match random.below(5) {
                0 => random.below(40) as u32,
                1 => 512,
                _ => 16,
            };
            let address = if random.below(30) == 0 {
                Memory::HOLE
            } else {
                data
            };
            chain.push(Segment {
                address,
                len,
                write: kind == IN,
            });
        }
        let status = guest.scratch.put(3, &[blk::UNANSWERED], 0);
        if random.below(20) > 0 {
            chain.push(Segment::writable(status, 1));
        }
        let placed = Placed {
            chain,
            data: vec![],
            status,
        };
        guest.queues[0].submit(&placed.chain, Layout::Direct);
        guest.queues[0].publish();
        if guest.queues[0].wait_event() == Event::Stopped {
            guest
                .reset_queue(0)
                .unwrap_or_else(|error| panic!("round {round}: {error}"));
        }
    }
    disk.daemon.assert_alive();
    let beyond = &disk.content[(fence * 512) as usize..];
    let found = guest.read(1, fence, 256 << 10);
    assert_eq!(found, beyond[..256 << 10]);
    guest.write(1, 0, &[1; 512]);
    assert_eq!(guest.read(1, 0, 512), [1; 512]);
}
