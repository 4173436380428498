//! Connections, memory and queues that come and go, under load: nothing is lost, answered twice or
//! wrong.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use vhost::VhostBackend;
use vhost::vhost_user::{VhostUserFrontend, VhostUserProtocolFeatures as Protocol};

use common::PATIENCE;
use common::blk::{self, IN, IOERR, OK, SECTOR};
use common::checks;
use common::content::Random;
use common::daemon::Daemon;
use common::disk::Disk;
use common::guest::Options;
use common::load::{Load, Shape};
use common::memory::{Memory, REGION, Region};
use common::queue::Layout;
use common::ring::{Addresses, Ring, Vring};
use common::session::{Session, Wanted, feature, frontend};

const SHAPE: Shape = Shape {
    depth: 32,
    len: 4096,
    segments: 2,
    indirect: true,
};

/// A ring and its load in region `region` alone, not yet started.
fn load(session: &Session, memory: &Memory, region: usize) -> Load {
    let at = Addresses::alloc(memory, 64, [region; 3]);
    let ring = Ring::new(memory, at, 64, session.has(feature::EVENT_IDX));
    Load::new(ring, memory, region, SHAPE)
}

/// Runs `load` on a thread of its own until `until` is set, and at least 2000 requests.
fn run_until(
    mut load: Load,
    content: &Arc<Vec<u8>>,
    until: &Arc<AtomicBool>,
    seed: u64,
) -> thread::JoinHandle<Load> {
    let (content, until) = (Arc::clone(content), Arc::clone(until));
    thread::spawn(move || {
        let mut random = Random::new(seed);
        loop {
            checks::random_load(&mut load, SHAPE, &content, 2000, &mut random);
            if until.load(Ordering::Relaxed) {
                return load;
            }
        }
    })
}

/// Spelled out on purpose. A front-end that reconnects uses the bits it acknowledged before, so
/// that a version which no longer offers one would lose every running machine: these may change
/// only for a device that is new, never for one that was served before.
const OFFERED: (u64, u64) = (0x1_7400_1464, 0x8_b22b);

#[test]
fn features_are_these_and_no_others() {
    let disk = Disk::serve();
    let mut frontend = frontend(disk.daemon.connect());
    let offered = frontend.get_features().expect("features");
    let expected = feature::VERSION_1
        | feature::SEG_MAX
        | feature::BLK_SIZE
        | feature::TOPOLOGY
        | feature::RO
        | feature::MQ
        | feature::INDIRECT
        | feature::EVENT_IDX
        | feature::PROTOCOL
        | feature::LOG_ALL;
    assert_eq!(offered, expected, "{offered:#x}, expected {expected:#x}");

    let protocol = frontend.get_protocol_features().expect("protocol features");
    let expected = Protocol::MQ
        | Protocol::CONFIG
        | Protocol::REPLY_ACK
        | Protocol::CONFIGURE_MEM_SLOTS
        | Protocol::INFLIGHT_SHMFD
        | Protocol::LOG_SHMFD
        | Protocol::RESET_DEVICE
        | Protocol::BACKEND_REQ
        | Protocol::DEVICE_STATE;
    assert_eq!(protocol, expected);
    assert_eq!((offered, protocol.bits()), OFFERED);
}

#[test]
fn the_config_space_at_either_offset_and_of_any_size() {
    let disk = Disk::serve();
    let (mut session, _memory) = disk.session();
    let whole = session.config(0, 256).expect("config space");
    let field = |at: usize, len: usize| {
        let bytes = &whole[at..at + len];
        bytes
            .iter()
            .rev()
            .fold(0u64, |value, byte| value << 8 | u64::from(*byte))
    };
    assert_eq!(field(0, 8), disk.content.len() as u64 / SECTOR, "capacity");
    assert_eq!(
        field(8, 4),
        0,
        "no size_max: it would cut every segment short"
    );
    assert!(
        (1..=126).contains(&field(12, 4)),
        "seg_max fits queues of 128: {}",
        field(12, 4)
    );
    assert_eq!(field(20, 4), 512, "blk_size");
    assert_eq!(field(24, 1), 3, "physical_block_exp: blocks of 4 KiB");
    assert_eq!(field(26, 2), 8, "min_io_size of 4 KiB");
    assert_eq!(field(28, 4) % 8, 0, "opt_io_size: whole blocks of 4 KiB");
    assert_eq!(
        field(34, 2),
        session.frontend.get_queue_num().expect("queues"),
        "num_queues"
    );
    assert!(
        whole[60..].iter().all(|byte| *byte == 0),
        "zeros behind the last field"
    );
    for offset in [0, 0x100] {
        for len in 1..=256 {
            let bytes = session.config(offset, len).expect("config space");
            assert_eq!(
                bytes,
                whole[..len as usize],
                "{len} bytes at offset {offset:#x}"
            );
        }
    }
}

#[test]
fn front_ends_come_and_go_on_one_listener_and_leave_nothing_behind() {
    let mut disk = Disk::serve();
    disk.guest(Options::default())
        .assert_reads(0, &disk.content);
    let (mut fds, mut tasks) = (0, 0);
    for round in 0..150 {
        if round == 20 {
            (fds, tasks) = settled(&disk.daemon, usize::MAX, usize::MAX);
        }
        match round % 5 {
            // Gone without a word, after a look, and after half of the setup.
            0 => drop(disk.daemon.connect()),
            1 => drop(
                frontend(disk.daemon.connect())
                    .get_features()
                    .expect("features"),
            ),
            2 => drop(disk.session()),
            // In the middle of requests.
            3 => {
                let mut guest = disk.guest(Options {
                    queues: 2,
                    ..Options::default()
                });
                for queue in 0..2 {
                    for _ in 0..20 {
                        let placed = guest.place(IN, round * 8, 65536);
                        guest.queues[queue].submit(&placed.chain, Layout::Indirect);
                    }
                    guest.queues[queue].publish();
                }
            }
            _ => disk
                .guest(Options::default())
                .assert_reads(0, &disk.content),
        }
    }
    settled(&disk.daemon, fds, tasks);
    disk.daemon.assert_alive();
}

/// Waits until the daemon has no more than so many descriptors and threads; those it has then.
fn settled(daemon: &Daemon, fds: usize, tasks: usize) -> (usize, usize) {
    let start = Instant::now();
    let mut before = (0, 0);
    loop {
        let now = (daemon.count("fd"), daemon.count("task"));
        if now == before && now.0 <= fds && now.1 <= tasks {
            return now;
        }
        assert!(
            start.elapsed() < PATIENCE,
            "{now:?} open, {fds} and {tasks} at first"
        );
        before = now;
        thread::sleep(Duration::from_millis(50));
    }
}

#[test]
fn several_queues_at_depth_at_once() {
    let disk = Disk::serve();
    let (mut session, memory) = disk.session();
    let done = Arc::new(AtomicBool::new(true));
    let threads: Vec<_> = (0..4)
        .map(|index| {
            let load = load(&session, &memory, index);
            session
                .start_queue(index, &load.ring.vring, 0)
                .expect("queue");
            run_until(load, &disk.content, &done, index as u64)
        })
        .collect();
    for thread in threads {
        thread.join().expect("every read is right");
    }
}

/// Whenever the worker is about to sleep, a request may come that finds kicks not yet wanted: the
/// worker has to look again before it sleeps. Few requests in flight, each submitted at a random
/// moment, find that gap.
#[test]
fn no_kick_is_missed_by_a_queue_about_to_sleep() {
    let disk = Disk::serve();
    for bits in [0, feature::EVENT_IDX] {
        let mut wanted = Wanted::all();
        wanted.features &= !bits;
        let mut session = Session::negotiate(disk.daemon.connect(), wanted).expect("session");
        let memory = Memory::typical();
        session.share(&memory).expect("memory");
        let at = Addresses::alloc(&memory, 4, [0; 3]);
        let ring = Ring::new(&memory, at, 4, session.has(feature::EVENT_IDX));
        session.start_queue(0, &ring.vring, 0).expect("queue");
        let shape = Shape {
            depth: 2,
            len: 512,
            ..SHAPE
        };
        let mut load = Load::new(ring, &memory, 0, shape);
        load.ring.want_no_call();
        let mut random = Random::new(bits);
        for slot in 0..shape.depth {
            load.submit(slot, 0);
        }
        load.ring.publish();
        let mut last = Instant::now();
        for answered in 0..40_000 {
            let slot = loop {
                if let Some(done) = load.take() {
                    break done.slot;
                }
                assert!(last.elapsed() < PATIENCE, "asleep after {answered} answers");
                std::hint::spin_loop();
            };
            last = Instant::now();
            for _ in 0..random.below(300) {
                std::hint::spin_loop();
            }
            load.submit(slot, random.below(1000));
            load.ring.want_no_call();
            load.ring.publish();
        }
    }
}

#[test]
fn memory_regions_come_and_go_while_requests_run_in_another() {
    let disk = Disk::serve();
    let (mut session, memory) = disk.session();
    let done = Arc::new(AtomicBool::new(false));
    let load = load(&session, &memory, 0);
    session.start_queue(0, &load.ring.vring, 0).expect("queue");
    let thread = run_until(load, &disk.content, &done, 3);

    for round in 0..100 {
        let extra = Region::new(0x2_0000_0000 + (round % 3) * REGION, REGION, 0x2000);
        session.frontend.add_mem_region(&extra.info()).expect("add");
        if round % 4 == 0 {
            let mut other = memory.clone();
            other.regions.truncate(1 + round as usize % 3);
            session.share(&other).expect("another table");
            session.share(&memory).expect("the old table");
        } else {
            session
                .frontend
                .remove_mem_region(&extra.info())
                .expect("remove");
        }
    }
    done.store(true, Ordering::Relaxed);
    thread.join().expect("every read is right");
}

#[test]
fn memory_that_was_added_serves_and_memory_that_was_removed_does_not() {
    let disk = Disk::serve();
    let mut guest = disk.guest(Options::default());
    let extra = Region::new(0x2_0000_0000, REGION, 0x2000);
    let address = extra.alloc(4096, 4096);
    let mut placed = guest.place(IN, 8, 4096);
    placed.chain[1].address = address;
    placed.data.clear();
    for _ in 0..10 {
        let answer = guest.run(0, &placed, Layout::Direct);
        assert_ne!(answer.status, OK, "memory that is not there");
        guest
            .session
            .frontend
            .add_mem_region(&extra.info())
            .expect("add");
        let answer = guest.run(0, &placed, Layout::Direct);
        assert_eq!((answer.status, answer.len), (OK, 4097));
        let mut found = vec![0; 4096];
        extra.slice(address, 4096).copy_to(&mut found);
        assert_eq!(found, disk.content[4096..8192]);
        extra.slice(address, 4096).copy_from(&[0u8; 4096]);
        guest
            .session
            .frontend
            .remove_mem_region(&extra.info())
            .expect("remove");
        guest.memory.write(placed.status, &[blk::UNANSWERED]);
    }
    assert_eq!(guest.request(0, IN, u64::MAX, 512).status, IOERR);
    guest.assert_reads(0, &disk.content);
}

/// While queue `index` is stopped: all that was taken up is answered, and nothing moves.
fn assert_still(vring: &Vring, base: u16) {
    assert_eq!(
        vring.used_index(),
        base,
        "what was taken up was answered before the reply"
    );
    vring.kick.write(1).expect("kick");
    thread::sleep(Duration::from_millis(5));
    assert_eq!(vring.used_index(), base, "a stopped queue answers nothing");
}

#[test]
fn queues_stop_and_go_on_under_load() {
    let disk = Disk::serve();
    let (mut session, memory) = disk.session();
    let done = Arc::new(AtomicBool::new(false));
    let loads = [load(&session, &memory, 0), load(&session, &memory, 3)];
    let vrings: Vec<_> = loads.iter().map(|load| load.ring.vring.clone()).collect();
    for (index, vring) in vrings.iter().enumerate() {
        session.start_queue(index, vring, 0).expect("queue");
    }
    let threads = loads.map(|load| run_until(load, &disk.content, &done, 9));
    for round in 0..60 {
        let index = round % 2;
        let base = session.stop_queue(index).expect("stop");
        assert_still(&vrings[index], base);
        session
            .start_queue(index, &vrings[index], base)
            .expect("start");
        vrings[index].kick.write(1).expect("kick");
    }
    done.store(true, Ordering::Relaxed);
    for (index, thread) in threads.into_iter().enumerate() {
        let load = thread
            .join()
            .expect("every read is right, and answered once");
        assert_eq!(load.in_flight(), 0);
        assert_eq!(
            session.stop_queue(index).expect("stop"),
            load.ring.published()
        );
    }
}

#[test]
fn queues_pause_and_resume_under_load() {
    let disk = Disk::serve();
    let (mut session, memory) = disk.session();
    let done = Arc::new(AtomicBool::new(false));
    let load = load(&session, &memory, 1);
    let vring = load.ring.vring.clone();
    session.start_queue(0, &vring, 0).expect("queue");
    let thread = run_until(load, &disk.content, &done, 11);
    for _ in 0..60 {
        session.enable(0, false).expect("pause");
        let stand = vring.used_index();
        assert_still(&vring, stand);
        // No kick here: what came in meanwhile is there to be found.
        session.enable(0, true).expect("resume");
    }
    done.store(true, Ordering::Relaxed);
    thread
        .join()
        .expect("every read is right, and answered once");
}

#[test]
fn a_queue_changes_its_size_and_place_between_runs() {
    let disk = Disk::serve();
    let (mut session, memory) = disk.session();
    for (round, size) in [256u16, 1, 2, 128, 1024, 64].into_iter().enumerate() {
        let at = Addresses::alloc(&memory, size, [round % 4, (round + 1) % 4, (round + 2) % 4]);
        let ring = Ring::new(&memory, at, size, session.has(feature::EVENT_IDX));
        session.start_queue(0, &ring.vring, 0).expect("queue");
        let shape = Shape {
            depth: size.min(32),
            ..SHAPE
        };
        let mut load = Load::new(ring, &memory, round % 4, shape);
        checks::random_load(&mut load, shape, &disk.content, 500, &mut Random::new(1));
        assert_eq!(session.stop_queue(0).expect("stop"), 500);
    }
}

#[test]
fn reset_device_stops_the_queues_and_leaves_the_session() {
    let disk = Disk::serve();
    let mut wanted = Wanted::all();
    wanted.protocol |= Protocol::RESET_DEVICE;
    let mut guest = disk.guest(Options {
        queues: 2,
        wanted,
        ..Options::default()
    });
    for _ in 0..5 {
        for queue in 0..2 {
            guest.assert_reads(queue, &disk.content);
        }
        guest.session.frontend.reset_device().expect("reset");
        for queue in 0..2 {
            guest.queues[queue].reset();
            guest.start_queue(queue).expect("queue");
        }
    }
}
