//! The soak: six devices, each with trouble of every kind, for as long as wanted.

#![allow(clippy::print_stderr)] // What is wrong, when it happens.

mod changes;
mod counts;
mod device;
mod health;
mod images;
mod reads;

use std::fmt;
use std::thread;
use std::time::{Duration, Instant};

use counts::Counts;
use device::Plan;
use health::Health;
use images::{Form, Image};

use common::content::Random;

/// A shorter run says nothing about growth.
const LONG: Duration = Duration::from_secs(5 * 60);

/// The devices: what each is, its layers, and their form.
const DEVICES: [(Plan, u64, Form); 6] = [
    (
        Plan {
            name: "lz4",
            options: &[],
            restarts: true,
            writable: false,
        },
        1,
        Form::Lz4,
    ),
    (
        Plan {
            name: "zstd",
            options: &["--block-cache", "8M", "--poll-us", "20"],
            restarts: true,
            writable: false,
        },
        3,
        Form::Zstd,
    ),
    (
        Plan {
            name: "plain",
            options: &["--io", "pread", "--readahead", "256K"],
            restarts: true,
            writable: false,
        },
        8,
        Form::Plain,
    ),
    (
        Plan {
            name: "255 layers",
            options: &["--drop-cache"],
            restarts: false,
            writable: false,
        },
        255,
        Form::Mixed,
    ),
    (
        Plan {
            name: "writable",
            options: &[],
            restarts: true,
            writable: true,
        },
        3,
        Form::Mixed,
    ),
    (
        Plan {
            name: "left alone",
            options: &["--io", "pread"],
            restarts: false,
            writable: true,
        },
        1,
        Form::Lz4,
    ),
];

/// What came of it.
pub struct Report {
    counts: Counts,
    health: Vec<Health>,
    panics: usize,
    long: bool,
}

/// Runs for so long.
pub fn run(time: Duration, seed: u64) -> Report {
    let folder = tempfile::tempdir().expect("temporary directory");
    let mut random = Random::new(seed);
    let devices: Vec<_> = DEVICES
        .iter()
        .map(|(plan, layers, form)| {
            let image = Image::write(&folder.path().join(plan.name), *layers, *form, &mut random);
            (plan, image)
        })
        .collect();
    let counts = Counts::default();
    let end = Instant::now() + time;
    let ended: Vec<_> = thread::scope(|scope| {
        let (mut threads, counts) = (Vec::new(), &counts);
        for (number, (plan, image)) in (0..).zip(&devices) {
            let seed = seed + 100 * number;
            let upper = folder.path().join(plan.name).join("upper");
            let run = move || device::run(plan, image, &upper, end, seed, counts);
            threads.push(scope.spawn(run));
        }
        threads.into_iter().map(|thread| thread.join()).collect()
    });
    let panics = ended.iter().filter(|result| result.is_err()).count();
    Report {
        counts,
        health: ended.into_iter().flatten().collect(),
        panics,
        long: time >= LONG,
    }
}

impl Report {
    /// Whether nothing was wrong, and, after a long run, nothing grew.
    pub fn is_good(&self) -> bool {
        let flat = !self.long || self.health.iter().all(Health::is_flat);
        self.panics == 0 && self.counts.are_good() && flat
    }
}

impl fmt::Display for Report {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        writeln!(f, "{}", self.counts)?;
        if self.panics > 0 {
            writeln!(f, "{} devices ended early", self.panics)?;
        }
        if self.long {
            for health in &self.health {
                writeln!(f, "{health}")?;
            }
        }
        write!(f, "{}", if self.is_good() { "good" } else { "BAD" })
    }
}
