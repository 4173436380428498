//! Storage that fails for a while, then a crash: every short sequence of operations with a fault at
//! each step of it and a crash at each later one, and long sequences at random.
//!
//! What was answered is there after a kill, and what was flushed after a power loss, whatever failed
//! before. Only where storage lost data it had taken, what was not flushed may be gone.

mod expected;
mod session;

use std::path::PathBuf;

use common::content::Random;
use common::recorder::{Failure, Recorder};
use fuser::Errno;
use ovbd_vhost::format::lsmt::writable::Kind;
use ovbd_vhost::image::config::Stack;

use super::disk::{BELOW, below};
use session::{MOST_SECTORS, Operation, SECTORS, Session};

const FAILURES: [(usize, Failure); 4] = [
    (1, Failure::Error(Errno::EIO)),
    (1, Failure::Short),
    (5, Failure::Error(Errno::ENOSPC)),
    // For what is undone after the first failure.
    (2, Failure::Error(Errno::EIO)),
];

/// Every sequence of three operations with a fault at each step, then a few more without one; and a
/// crash at each step from the fault on.
fn every_short_sequence(kind: Kind) {
    let letters = |place: u64| {
        [
            Operation::Write(place * 3, 5),
            Operation::Discard(place * 2, 5),
            Operation::Flush,
            Operation::Restart,
        ]
    };
    let sequences = (0..64).map(|sequence| {
        let letter = |place| letters(place)[sequence >> (2 * place) & 3];
        [0, 1, 2].map(letter)
    });
    // Growing twice: after a failure it is done again.
    let growing = [0, 1, 2, 3].map(|letter| [letters(0)[letter], Operation::Grow, Operation::Grow]);
    // What a snapshot records of a size that could neither be changed nor restored.
    let growing =
        growing
            .into_iter()
            .chain([[Operation::Grow, Operation::Snapshot, Operation::Restart]]);
    let recorder = Recorder::mount();
    let stack = Stack::new([] as [PathBuf; 0]);
    let mut random = Random::new(99);
    let sequences = sequences.map(|sequence| (sequence, &FAILURES[..3]));
    let growing = growing.map(|sequence| (sequence, &FAILURES[..]));
    for (operations, failures) in sequences.chain(growing) {
        for &(steps, failure) in failures {
            for after in 0.. {
                let mut session = Session::begin(&recorder, &stack, kind);
                session.apply(Operation::Write(1, 2));
                recorder.fail_steps(after, steps, failure);
                let from = recorder.position();
                operations.iter().for_each(|step| session.apply(*step));
                if recorder.failures() == 0 {
                    break;
                }
                recorder.heal();
                if failure == Failure::Error(Errno::ENOSPC) {
                    session.repeat_failed();
                }
                for (place, last) in [Operation::Flush, Operation::Write(12, 3), Operation::Flush]
                    .into_iter()
                    .enumerate()
                {
                    session.apply(last);
                    if place == 0 {
                        session.apply(Operation::Write(9, 4));
                    }
                }
                let when =
                    || format!("{kind:?}: {operations:?}, {steps} x {failure:?} after {after}");
                session.crash(from, &mut random, &when, 1);
            }
        }
    }
}

/// Long sequences of everything, with faults now and then.
fn at_random(kind: Kind, seed: u64) {
    let recorder = Recorder::mount();
    let (_folder, stack) = below(SECTORS);
    assert!(BELOW != [0; 512]);
    let mut random = Random::new(seed);
    let mut session = Session::begin(&recorder, &stack, kind);
    let from = recorder.position();
    for _ in 0..100 {
        if random.below(5) == 0 {
            recorder.heal();
            let (steps, failure) = match random.below(4) {
                0 => (1, Failure::Error(Errno::EIO)),
                1 => (2, Failure::Error(Errno::EIO)),
                2 => (1, Failure::Short),
                _ => (8, Failure::Error(Errno::ENOSPC)),
            };
            recorder.fail_steps(random.below(12) as usize, steps, failure);
        }
        let end = session.sectors();
        let start = random.below(end);
        let sectors = (1 + random.below(8)).min(end - start);
        session.apply(match random.below(24) {
            0..=4 => Operation::Flush,
            5..=7 => Operation::Discard(start, sectors),
            8 => Operation::WriteZeroes(start, sectors),
            9 | 10 => Operation::Restart,
            11 => Operation::Snapshot,
            12 => Operation::Seal,
            13 if end < MOST_SECTORS => Operation::Grow,
            _ => Operation::Write(start, sectors),
        });
    }
    let when = || format!("{kind:?}, seed {seed}");
    session.crash(from, &mut random, &when, 2);
}

#[test]
fn sparse() {
    every_short_sequence(Kind::Sparse);
}

#[test]
fn hybrid() {
    every_short_sequence(Kind::Hybrid);
}

#[test]
fn many_operations() {
    for kind in [Kind::Append, Kind::Sparse, Kind::Hybrid] {
        (1..9).for_each(|seed| at_random(kind, seed));
    }
}
