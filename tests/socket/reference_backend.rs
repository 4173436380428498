//! The test front-end against a back-end it does not have to trust our daemon for.
//!
//! What fails here is a fault of `tests/common`; what passes here and fails against the daemon is
//! the daemon's.

use std::sync::Arc;

use common::blk;
use common::checks;
use common::content::{Random, difference, tagged};
use common::guest::{Guest, Options};
use common::load::{Load, Shape};
use common::memory::Memory;
use common::queue::Waiting;
use common::reference::Reference;
use common::ring::{Addresses, Ring};
use common::session::{Session, Wanted, feature};

const DISK: usize = (8 << 20) + 512;

fn serve() -> (Reference, Arc<Vec<u8>>) {
    let content = Arc::new(tagged(DISK, 1));
    (Reference::start(Arc::clone(&content)), content)
}

fn without(bits: u64) -> Wanted {
    let mut wanted = Wanted::all();
    wanted.features &= !bits;
    wanted
}

#[test]
fn reads_of_every_layout_are_right_however_answers_are_waited_for() {
    let (reference, content) = serve();
    let ways = [
        (Waiting::Called, Wanted::all()),
        (Waiting::Polling, Wanted::all()),
        (Waiting::Called, without(feature::EVENT_IDX)),
        (Waiting::Polling, without(feature::EVENT_IDX)),
    ];
    for (seed, (waiting, wanted)) in (0..).zip(ways) {
        let options = Options {
            waiting,
            wanted,
            ..Options::default()
        };
        let mut guest = Guest::boot(reference.connect(), options).expect("guest");
        checks::scattered_reads(&mut guest, 0, &content, 200, seed);
    }
}

#[test]
fn loads_at_depth_read_the_whole_disk() {
    let (reference, content) = serve();
    let shapes = [
        Shape {
            depth: 32,
            len: 4096,
            segments: 1,
            indirect: false,
        },
        Shape {
            depth: 128,
            len: 4096,
            segments: 4,
            indirect: true,
        },
        Shape {
            depth: 1,
            len: 512,
            segments: 1,
            indirect: true,
        },
        Shape {
            depth: 7,
            len: 65536,
            segments: 9,
            indirect: false,
        },
    ];
    for (index, shape) in shapes.into_iter().enumerate() {
        let wanted = if index % 2 == 0 {
            Wanted::all()
        } else {
            without(feature::EVENT_IDX)
        };
        let mut session = Session::negotiate(reference.connect(), wanted).expect("session");
        let memory = Memory::typical();
        session.share(&memory).expect("memory");
        let at = Addresses::alloc(&memory, 128, [1, 2, 0]);
        let ring = Ring::new(&memory, at, 128, session.has(feature::EVENT_IDX));
        session.start_queue(1, &ring.vring, 0).expect("queue");
        let mut load = Load::new(ring, &memory, 3, shape);
        let whole = DISK / shape.len as usize * shape.len as usize;
        let disk = checks::whole_disk(&mut load, shape, whole);
        assert_eq!(difference(&disk, &content[..whole]), None, "{shape:?}");
        checks::random_load(&mut load, shape, &content, 3000, &mut Random::new(5));
    }
}

#[test]
fn a_queue_stops_where_its_driver_stands_and_goes_on() {
    let (reference, content) = serve();
    let mut guest = Guest::boot(reference.connect(), Options::default()).expect("guest");
    for round in 1..=300 {
        guest.assert_reads(0, &content);
        let base = guest.session.stop_queue(0).expect("stop");
        assert_eq!(base, round * 3);
        guest.start_queue(0).expect("start");
    }
    guest.reset_queue(0).expect("reset");
    guest.assert_reads(0, &content);
}

#[test]
fn several_queues_and_sessions_one_after_the_other() {
    let (reference, content) = serve();
    for _ in 0..5 {
        let options = Options {
            queues: 4,
            ..Options::default()
        };
        let mut guest = Guest::boot(reference.connect(), options).expect("guest");
        let capacity = guest.session.capacity().expect("config space");
        assert_eq!(capacity, DISK as u64 / blk::SECTOR);
        for queue in 0..4 {
            guest.assert_reads(queue, &content);
        }
    }
}

#[test]
fn requests_that_fail_are_seen_to_fail() {
    let (reference, _) = serve();
    let mut guest = Guest::boot(reference.connect(), Options::default()).expect("guest");
    let past = DISK as u64 / blk::SECTOR;
    for (kind, sector, len, status) in [
        (blk::IN, past, 512, blk::IOERR),
        (blk::IN, 0, 511, blk::IOERR),
        (blk::IN, u64::MAX / blk::SECTOR + 1, 512, blk::IOERR),
        (blk::OUT, 0, 512, blk::IOERR),
        (blk::FLUSH, 0, 0, blk::OK),
        (99, 0, 512, blk::UNSUPP),
    ] {
        let answer = guest.request(0, kind, sector, len);
        assert_eq!(
            (answer.status, answer.len),
            (status, 1),
            "type {kind} at sector {sector}"
        );
    }
    let answer = guest.request(0, blk::GET_ID, 0, 20);
    assert_eq!(answer.data, b"reference\0\0\0\0\0\0\0\0\0\0\0");
}
