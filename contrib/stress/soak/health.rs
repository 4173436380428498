//! What a daemon holds over time: private memory and descriptors.

use std::fmt;

use common::daemon::Daemon;

/// Growth of private memory that is no leak: noise of the allocator.
const SLACK_KIB: u64 = 1024;
const SLACK_FDS: u64 = 2;

/// Samples of one device's daemons, in order.
#[derive(Debug)]
pub struct Health {
    name: &'static str,
    samples: Vec<Sample>,
}

#[derive(Clone, Copy, Debug)]
struct Sample {
    kib: u64,
    fds: u64,
}

impl Health {
    /// No sample yet.
    pub fn new(name: &'static str) -> Self {
        let samples = Vec::new();
        Self { name, samples }
    }

    /// Looks at a daemon that runs.
    pub fn sample(&mut self, daemon: &Daemon) {
        self.samples.push(Sample {
            kib: daemon.private_kib(),
            fds: daemon.count("fd") as u64,
        });
    }

    /// Medians of the first and of the last quarter.
    fn quarters(&self, field: impl Fn(&Sample) -> u64) -> (u64, u64) {
        let quarter = self.samples.len().div_ceil(4);
        let median = |samples: &[Sample]| {
            let mut values: Vec<u64> = samples.iter().map(&field).collect();
            values.sort_unstable();
            values.get(values.len() / 2).copied().unwrap_or(0)
        };
        let last = self.samples.len() - quarter;
        (
            median(&self.samples[..quarter]),
            median(&self.samples[last..]),
        )
    }

    /// Whether the last quarter holds no more than the first.
    pub fn is_flat(&self) -> bool {
        let (kib, fds) = (self.quarters(|s| s.kib), self.quarters(|s| s.fds));
        !self.samples.is_empty()
            && kib.1 <= kib.0 + kib.0 / 10 + SLACK_KIB
            && fds.1 <= fds.0 + SLACK_FDS
    }
}

impl fmt::Display for Health {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let (kib, fds) = (self.quarters(|s| s.kib), self.quarters(|s| s.fds));
        let verdict = if self.is_flat() { "flat" } else { "GROWS" };
        write!(
            f,
            "{:10} private memory {:6} -> {:6} KiB, descriptors {:3} -> {:3}: {verdict}",
            self.name, kib.0, kib.1, fds.0, fds.1
        )
    }
}
