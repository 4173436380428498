//! Crashes and restarts of the daemon under load: with the in-flight region kept by the front-end,
//! every request is answered, once and right (vhost-user, "Inflight I/O tracking").

mod common;

use std::fs::File;
use std::os::fd::AsRawFd;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;
use std::time::Duration;

use vhost::vhost_user::message::VhostUserInflight;
use vhost::vhost_user::{VhostUserFrontend, VhostUserProtocolFeatures as Protocol};

use common::checks;
use common::content::Random;
use common::disk::Disk;
use common::load::{Load, Shape};
use common::memory::Memory;
use common::ring::{Addresses, Ring, Vring};
use common::session::{Session, Wanted, feature};

const SHAPE: Shape = Shape {
    depth: 64,
    len: 16384,
    segments: 3,
    indirect: true,
};
const QUEUES: usize = 2;
const SIZE: u16 = 128;

fn wanted() -> Wanted {
    let mut wanted = Wanted::all();
    wanted.protocol |= Protocol::INFLIGHT_SHMFD;
    wanted
}

/// The region a front-end keeps across connections.
struct Inflight {
    info: VhostUserInflight,
    file: File,
}

impl Inflight {
    fn new(session: &mut Session) -> Self {
        let wanted = VhostUserInflight::new(0, 0, QUEUES as u16, SIZE);
        let (info, file) = session
            .frontend
            .get_inflight_fd(&wanted)
            .expect("in-flight region");
        Self { info, file }
    }
}

/// Connects, hands over memory and region, and starts the queues. The base is the used index, as
/// QEMU sends it; the region overrules it.
fn connect(
    disk: &Disk,
    memory: &Memory,
    inflight: &mut Option<Inflight>,
    vrings: &[Vring],
) -> Session {
    let mut session = Session::negotiate(disk.daemon.connect(), wanted()).expect("session");
    session.share(memory).expect("memory");
    let region = inflight.get_or_insert_with(|| Inflight::new(&mut session));
    session
        .frontend
        .set_inflight_fd(&region.info, region.file.as_raw_fd())
        .expect("region");
    for (index, vring) in vrings.iter().enumerate() {
        session
            .start_queue(index, vring, vring.used_index())
            .expect("queue");
        vring.kick.write(1).expect("kick");
    }
    session
}

/// Runs loads on both queues while `disturb` is called with the round; it leaves a daemon that
/// listens, and may return the session to keep it open until there is a new one.
fn under_load(rounds: u64, disturb: impl Fn(&mut Disk, Session, u64) -> Option<Session>) {
    let mut disk = Disk::serve();
    let memory = Memory::typical();
    let event_idx = wanted().features & feature::EVENT_IDX != 0;
    let loads: Vec<_> = (0..QUEUES)
        .map(|index| {
            let at = Addresses::alloc(&memory, SIZE, [index; 3]);
            Load::new(
                Ring::new(&memory, at, SIZE, event_idx),
                &memory,
                index,
                SHAPE,
            )
        })
        .collect();
    let vrings: Vec<_> = loads.iter().map(|load| load.ring.vring.clone()).collect();
    let mut inflight = None;
    let mut session = connect(&disk, &memory, &mut inflight, &vrings);

    let done = Arc::new(AtomicBool::new(false));
    let threads: Vec<_> = loads
        .into_iter()
        .map(|mut load| {
            let (done, content) = (Arc::clone(&done), Arc::clone(&disk.content));
            let mut random = Random::new(rounds);
            thread::spawn(move || {
                while !done.load(Ordering::Relaxed) {
                    checks::random_load(&mut load, SHAPE, &content, 1000, &mut random);
                }
            })
        })
        .collect();
    let mut random = Random::new(42);
    for round in 0..rounds {
        thread::sleep(Duration::from_micros(random.below(30_000)));
        let _old = disturb(&mut disk, session, round);
        session = connect(&disk, &memory, &mut inflight, &vrings);
    }
    done.store(true, Ordering::Relaxed);
    for thread in threads {
        thread
            .join()
            .expect("every request is answered once, and right");
    }
    drop(session);
}

#[test]
fn killed_and_started_again() {
    under_load(50, |disk, session, _| {
        disk.daemon.kill();
        disk.daemon.restart();
        Some(session)
    });
}

#[test]
fn asked_to_stop_and_started_again() {
    under_load(20, |disk, session, _| {
        assert_eq!(disk.daemon.terminate().code(), Some(0));
        disk.daemon.restart();
        Some(session)
    });
}

/// Every other time the new connection is made while the old one stands.
#[test]
fn the_connection_is_lost_and_made_again() {
    under_load(100, |_, session, round| (round % 2 == 0).then_some(session));
}
