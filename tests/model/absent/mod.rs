//! Reads of bytes that are absent: the worker asks for them, goes on, and serves them once they are
//! there. No zeros of a hole are ever served for them.

mod faults;
mod machine;
mod remote;

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;
use std::time::Instant;

use common::PATIENCE;
use common::blk::{self, IOERR};
use common::content::Random;
use common::memory::Memory;
use common::queue::Queue;
use ovbd_vhost::engine::setup::AfterStop;

use machine::{DISK, Machine, SIZE, Setup, shared};
use remote::Behavior;

/// Reads of any place and length, as many as a queue holds.
fn random_reads(random: &mut Random, count: u64) -> Vec<(u64, u32)> {
    let sectors = DISK / 512;
    let read = |_| {
        let most = if random.below(8) == 0 { 256 } else { 16 };
        let len = random.within(1..=most);
        (random.below(sectors - len), len as u32 * 512)
    };
    (0..count).map(read).collect()
}

/// Sectors of 100 reads, more than are fetched at a time, of bytes that are stored and far apart.
fn cold_sectors() -> Vec<u64> {
    (0..100).map(|read| 4200 + read * 39).collect()
}

/// Any presence, any order of arrival: every read is answered, and right.
#[test]
fn reads_are_right_whatever_is_present() {
    let setups = [
        Setup::default(),
        Setup {
            pread: true,
            ..Setup::default()
        },
        Setup {
            readahead: 256 << 10,
            drop_cache: true,
            ..Setup::default()
        },
    ];
    for (seed, setup) in (0..).zip(setups) {
        let mut random = Random::new(seed);
        let mut machine = Machine::start(setup);
        for round in 0..40u64 {
            // Nothing is read while bytes are forgotten: a hole is then a hole for every reader.
            for remote in &machine.remotes {
                let share = [0, 1, 4, 16][random.below(4) as usize];
                remote.forget(|_| random.below(16) < share);
            }
            let behavior = match round % 4 {
                0 => Behavior::AtOnce,
                _ => Behavior::Hold,
            };
            machine.set(behavior);
            let reads = random_reads(&mut random, 60);
            let done = AtomicBool::new(false);
            let (remotes, seed) = (machine.remotes.clone(), random.any());
            thread::scope(|scope| {
                scope.spawn(|| {
                    let mut random = Random::new(seed);
                    while !done.load(Ordering::Relaxed) {
                        let remote = &remotes[random.below(2) as usize];
                        if !remote.deliver(random.any()) {
                            thread::yield_now();
                        }
                    }
                });
                let stop = Stop(&done);
                machine.read_all(&reads);
                drop(stop);
            });
            assert_eq!(machine.waiting(), 0);
            // The memory of the reads is used again.
            machine.memory = Memory::typical();
            machine.stop_worker(AfterStop::Stop);
            machine.queue = Queue::new(&machine.memory, SIZE, true);
            machine.context.memory = Arc::new(shared(&machine.memory));
            machine.base = Some(0);
            machine.start_worker();
        }
    }
}

struct Stop<'f>(&'f AtomicBool);

impl Drop for Stop<'_> {
    fn drop(&mut self) {
        self.0.store(true, Ordering::Relaxed);
    }
}

#[test]
fn reads_of_present_bytes_overtake_those_that_wait() {
    let mut machine = Machine::start(Setup::default());
    machine.read_all(&[(0, 4096)]);
    machine.set(Behavior::Hold);
    let sectors = cold_sectors();
    let cold: Vec<_> = sectors
        .iter()
        .map(|sector| machine.read(*sector, 512))
        .collect();
    machine.queue.publish();
    while machine.waiting() < 64 {
        thread::yield_now();
    }
    for _ in 0..50 {
        let warm = machine.read(3, 2048);
        machine.queue.publish();
        machine.queue.wait();
        machine.assert_read(&warm, 3);
    }
    assert!(
        cold.iter()
            .all(|read| machine.status(read) == blk::UNANSWERED)
    );
    machine.set(Behavior::AtOnce);
    let mut random = Random::new(9);
    machine.deliver_all(&mut random);
    for _ in &cold {
        machine.queue.wait();
    }
    for (read, sector) in cold.iter().zip(sectors) {
        machine.assert_read(read, sector);
    }
}

#[test]
fn a_fetch_that_fails_fails_its_read_alone() {
    let mut machine = Machine::start(Setup::default());
    machine.read_all(&[(0, 4096)]);
    for behavior in [Behavior::Refuse, Behavior::Lie] {
        machine.set(behavior);
        let (cold, warm) = (machine.read(2000, 65536), machine.read(0, 4096));
        machine.queue.publish();
        for _ in 0..2 {
            machine.queue.wait();
        }
        assert_eq!(machine.status(&cold), IOERR, "{behavior:?}");
        machine.assert_read(&warm, 0);
    }
    machine.set(Behavior::AtOnce);
    machine.read_all(&[(2000, 65536)]);
}

#[test]
fn damaged_bytes_are_fetched_again_and_then_fail() {
    let mut machine = Machine::start(Setup::default());
    // A compressed block, which has a checksum.
    machine.set(Behavior::Damage(2));
    machine.read_all(&[(8000, 4096)]);
    machine.set(Behavior::Damage(100));
    let damaged = machine.read(7000, 4096);
    machine.queue.publish();
    machine.queue.wait();
    assert_eq!(machine.status(&damaged), IOERR);
    machine.set(Behavior::AtOnce);
    machine.read_all(&[(8000, 4096)]);
}

#[test]
fn what_comes_next_is_fetched_ahead() {
    let mut machine = Machine::start(Setup {
        readahead: 1 << 20,
        ..Setup::default()
    });
    for read in 0..8 {
        machine.read_all(&[(read * 8, 4096)]);
    }
    let ahead = machine.remotes[0].ahead.load(Ordering::Relaxed);
    assert!(ahead > 0, "a reader in order is fetched ahead for");
}

/// A queue that stops does not wait for the network; what is open then is done by the next worker.
#[test]
fn reads_that_wait_while_the_queue_stops_are_done_by_the_next_worker() {
    let mut machine = Machine::start(Setup {
        inflight: true,
        ..Setup::default()
    });
    machine.read_all(&[(0, 4096)]);
    machine.set(Behavior::Hold);
    let sectors = cold_sectors();
    let cold: Vec<_> = sectors
        .iter()
        .map(|sector| machine.read(*sector, 9 * 512))
        .collect();
    machine.queue.publish();
    while machine.waiting() < 64 {
        thread::yield_now();
    }
    // A front-end may change its eventfds and memory many times meanwhile.
    let start = Instant::now();
    for _ in 0..30 {
        machine.stop_worker(AfterStop::Restart);
        machine.start_worker();
    }
    assert!(start.elapsed() < PATIENCE, "each restart waits");
    machine.stop_worker(AfterStop::Stop);
    assert!(
        cold.iter()
            .all(|read| machine.status(read) == blk::UNANSWERED)
    );
    machine.set(Behavior::AtOnce);
    machine.start_worker();
    for _ in &cold {
        machine.queue.wait();
    }
    for (read, sector) in cold.iter().zip(sectors) {
        machine.assert_read(read, sector);
    }
    // What was asked for in vain wakes a worker that is gone.
    machine.deliver_all(&mut Random::new(1));
    machine.read_all(&[(0, 4096), (3000, 65536)]);
}

#[test]
fn reads_that_wait_while_the_queue_stops_fail_without_an_in_flight_region() {
    let mut machine = Machine::start(Setup::default());
    machine.read_all(&[(0, 4096)]);
    machine.set(Behavior::Hold);
    let cold = machine.read(2000, 65536);
    machine.queue.publish();
    while machine.waiting() == 0 {
        thread::yield_now();
    }
    machine.stop_worker(AfterStop::Stop);
    machine.queue.wait();
    assert_eq!(machine.status(&cold), IOERR);
    machine.set(Behavior::AtOnce);
    machine.start_worker();
    machine.read_all(&[(2000, 65536)]);
}
