//! Several queues at depth, and what a crash in the middle of it leaves.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;
use std::time::Duration;

use ovbd_vhost::format::lsmt::writable::Kind;

use super::assert_disk;
use common::content::Random;
use common::memory::Memory;
use common::mixed::Mixed;
use common::queue::Queue;
use common::returning::Returning;
use common::session::feature;
use common::writable::Writable;

const KINDS: [Kind; 3] = [Kind::Append, Kind::Sparse, Kind::Hybrid];
const QUEUES: usize = 3;
const DEPTH: usize = 16;
const SIZE: u16 = 128;

/// Runs mixed requests on all queues while `disturb` is called `rounds` times; it leaves a daemon
/// that listens. Every request is answered, once and well, and the disk reads as what was written.
fn under_load(kind: Kind, options: &[&str], rounds: u64, disturb: impl Fn(&mut Writable, u64)) {
    let mut disk = Writable::serve_kind(kind, options);
    let memory = Memory::typical();
    let event_idx = Returning::wanted().features & feature::EVENT_IDX != 0;
    let mixed: Vec<_> = (0..QUEUES)
        .map(|index| {
            let queue = Queue::new(&memory, SIZE, event_idx);
            let model = disk.content.to_vec();
            Mixed::new(queue, &memory, model, (index, QUEUES), DEPTH)
        })
        .collect();
    let vrings = mixed.iter().map(|mixed| mixed.queue.ring.vring.clone());
    let mut front_end = Returning::new(memory, vrings.collect());
    let mut session = front_end.connect(disk.daemon.connect());
    let done = Arc::new(AtomicBool::new(false));
    let threads: Vec<_> = mixed
        .into_iter()
        .map(|mut mixed| {
            let done = Arc::clone(&done);
            thread::spawn(move || {
                mixed.run(1500);
                while !done.load(Ordering::Relaxed) {
                    mixed.run(300);
                }
                mixed
            })
        })
        .collect();
    let mut random = Random::new(rounds);
    for round in 0..rounds {
        thread::sleep(Duration::from_micros(random.below(60_000)));
        disturb(&mut disk, round);
        // The old one is kept open until there is a new one, as a front-end does.
        session = front_end.connect(disk.daemon.connect());
    }
    done.store(true, Ordering::Relaxed);
    let mut model = disk.content.to_vec();
    for thread in threads {
        let mixed = thread
            .join()
            .expect("every request is answered once, and right");
        mixed.merge_into(&mut model);
    }
    drop(session);
    assert_disk(&mut disk.plain_guest(), &model);
    disk.crash();
    assert_disk(&mut disk.plain_guest(), &model);
    let mut guest = disk.plain_guest();
    guest.flush(0);
    drop(guest);
    disk.lose_power();
    assert_disk(&mut disk.plain_guest(), &model);
}

#[test]
fn several_queues_read_and_write_at_depth() {
    for kind in KINDS {
        under_load(kind, &[], 0, |_, _| {});
    }
}

#[test]
fn several_queues_without_io_uring() {
    under_load(Kind::Hybrid, &["--io", "pread"], 0, |_, _| {});
}

#[test]
fn killed_and_started_again() {
    for kind in KINDS {
        under_load(kind, &[], 15, |disk, _| disk.crash());
    }
}

#[test]
fn asked_to_stop_and_started_again() {
    under_load(Kind::Hybrid, &[], 10, |disk, _| disk.stop_and_start());
}

#[test]
fn the_connection_is_lost_and_made_again() {
    under_load(Kind::Hybrid, &[], 30, |_, _| {});
}
