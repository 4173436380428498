//! A fetcher that refuses, lies, delivers damage and holds requests back, at random and in the middle of
//! reads: a read is right, or fails.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;

use common::blk::{IOERR, OK};
use common::content::Random;
use common::memory::Memory;
use common::queue::Queue;

use ovbd_vhost::engine::setup::AfterStop;
use ovbd_vhost::engine::worker::Resume;

use super::machine::{Machine, SIZE, Setup, shared};
use super::remote::{Behavior, Remote};
use super::{Stop, random_reads};

/// Changes what the fetchers of both layers do, until `done`. Only the lower layer has checksums, by which
/// damage is noticed.
fn disturb(remotes: &[Arc<Remote>], random: &mut Random, done: &AtomicBool) {
    while !done.load(Ordering::Relaxed) {
        let number = random.below(2) as usize;
        let behavior = match random.below(8) {
            0 => Behavior::Refuse,
            1 => Behavior::Lie,
            2 if number == 0 => Behavior::Damage(random.within(1..=5) as usize),
            3 => Behavior::AtOnce,
            _ => Behavior::Hold,
        };
        remotes[number].set(behavior);
        for _ in 0..random.below(20) {
            if !remotes[random.below(2) as usize].deliver(random.any()) {
                thread::yield_now();
            }
        }
    }
}

impl Machine {
    /// Submits reads; returns how many were right and how many failed.
    fn read_any(&mut self, reads: &[(u64, u32)]) -> (usize, usize) {
        let placed: Vec<_> = reads
            .iter()
            .map(|(sector, len)| self.read(*sector, *len))
            .collect();
        self.queue.publish();
        for _ in reads {
            self.queue.wait();
        }
        let mut counts = (0, 0);
        for (placed, (sector, _)) in placed.iter().zip(reads) {
            match self.status(placed) {
                OK => {
                    self.assert_read(placed, *sector);
                    counts.0 += 1;
                }
                status => {
                    assert_eq!(status, IOERR, "read at sector {sector}");
                    counts.1 += 1;
                }
            }
        }
        counts
    }

    /// Stops the worker, and starts another one with fresh memory.
    fn renew(&mut self) {
        let worker = self.worker.take().expect("a worker");
        assert!(matches!(worker.stop(AfterStop::Stop), Resume::At(_)));
        self.memory = Memory::typical();
        self.queue = Queue::new(&self.memory, SIZE, true);
        self.context.memory = Arc::new(shared(&self.memory));
        self.base = Some(0);
        self.start_worker();
    }
}

#[test]
fn reads_are_right_or_fail_whatever_the_fetcher_does() {
    for pread in [false, true] {
        let mut random = Random::new(31 + u64::from(pread));
        let mut machine = Machine::start(Setup {
            pread,
            ..Setup::default()
        });
        let mut all = (0, 0);
        for _ in 0..30 {
            // What was damaged is forgotten too.
            machine
                .remotes
                .iter()
                .for_each(|remote| remote.forget(|_| true));
            let reads = random_reads(&mut random, 60);
            let done = AtomicBool::new(false);
            let (remotes, seed) = (machine.remotes.clone(), random.any());
            let counts = thread::scope(|scope| {
                scope.spawn(|| disturb(&remotes, &mut Random::new(seed), &done));
                let stop = Stop(&done);
                let counts = machine.read_any(&reads);
                drop(stop);
                counts
            });
            all = (all.0 + counts.0, all.1 + counts.1);
            machine.renew();
        }
        assert!(all.0 > 100 && all.1 > 10, "{all:?}: both come about");
        // Nothing is left of the faults.
        machine
            .remotes
            .iter()
            .for_each(|remote| remote.forget(|_| true));
        machine.set(Behavior::AtOnce);
        let reads = random_reads(&mut random, 60);
        machine.read_all(&reads);
    }
}
