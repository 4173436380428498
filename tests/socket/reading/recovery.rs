//! Crashes and restarts of the daemon under load: with the in-flight region kept by the front-end,
//! every request is answered, once and right (vhost-user, "Inflight I/O tracking").

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;
use std::time::Duration;

use common::checks;
use common::content::Random;
use common::daemon::Daemon;
use common::disk::{self, Disk};
use common::golden;
use common::guest::{Guest, Options};
use common::load::{Load, Shape};
use common::memory::Memory;
use common::returning::Returning;
use common::ring::{Addresses, Ring};
use common::session::{Session, Wanted, addresses, feature};
use vhost::VhostBackend;

const SHAPE: Shape = Shape {
    depth: 64,
    len: 16384,
    segments: 3,
    indirect: true,
};
const QUEUES: usize = 2;
const SIZE: u16 = 128;

/// Runs loads on both queues while `disturb` is called with the round; it leaves a daemon that
/// listens, and may return the session to keep it open until there is a new one.
fn under_load(
    mut disk: Disk,
    rounds: u64,
    disturb: impl Fn(&mut Disk, Session, u64) -> Option<Session>,
) {
    let memory = Memory::typical();
    let event_idx = Returning::wanted().features & feature::EVENT_IDX != 0;
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
    let vrings = loads.iter().map(|load| load.ring.vring.clone());
    let mut front_end = Returning::new(memory, vrings.collect());
    let mut session = front_end.connect(disk.daemon.connect());

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
        session = front_end.connect(disk.daemon.connect());
    }
    done.store(true, Ordering::Relaxed);
    for thread in threads {
        thread
            .join()
            .expect("every request is answered once, and right");
    }
    drop(session);
}

fn kill(disk: &mut Disk, session: Session, _: u64) -> Option<Session> {
    disk.daemon.kill();
    disk.daemon.restart();
    Some(session)
}

#[test]
fn killed_and_started_again() {
    under_load(Disk::serve(), 50, kill);
}

/// As many layers as there can be are to be open again while a front-end still tries to connect.
#[test]
fn killed_and_started_again_with_255_layers() {
    let case = golden::find("09-255layers");
    let disk = Disk {
        daemon: Daemon::serve(&case.layers),
        content: disk::content(&case).into(),
    };
    assert_eq!(case.layers.len(), 255);
    under_load(disk, 10, kill);
}

#[test]
fn asked_to_stop_and_started_again() {
    under_load(Disk::serve(), 20, |disk, session, _| {
        assert_eq!(disk.daemon.terminate().code(), Some(0));
        disk.daemon.restart();
        Some(session)
    });
}

/// Every other time the new connection is made while the old one stands.
#[test]
fn the_connection_is_lost_and_made_again() {
    under_load(Disk::serve(), 100, |_, session, round| {
        (round % 2 == 0).then_some(session)
    });
}

/// A front-end may set a queue up again without a base, as Dragonball does, and stop it before it is
/// enabled.
#[test]
fn the_base_of_a_queue_that_never_ran_is_where_it_would_start() {
    let disk = Disk::serve();
    let mut guest = disk.guest(Options::default());
    guest.assert_reads(0, &disk.content);
    let Guest {
        session,
        memory,
        queues,
        ..
    } = guest;
    drop(session);
    let ring = &queues[0].ring;
    let session = Session::negotiate(disk.daemon.connect(), Wanted::all()).expect("session");
    assert_eq!(session.stop_queue(0).expect("stop"), 0, "without rings");
    session.share(&memory).expect("memory");
    let (frontend, vring) = (&session.frontend, &ring.vring);
    frontend.set_vring_num(0, vring.size).expect("size");
    frontend
        .set_vring_addr(0, &addresses(vring))
        .expect("addresses");
    frontend.set_vring_kick(0, &vring.kick).expect("kick");
    for _ in 0..2 {
        assert_eq!(session.stop_queue(0).expect("stop"), ring.published());
    }
}
