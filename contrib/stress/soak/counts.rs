//! What happened: counted by all threads, read in the end.

use std::fmt;
use std::sync::atomic::{AtomicU64, Ordering};

/// A number that only grows.
#[derive(Debug, Default)]
pub struct Count(AtomicU64);

impl Count {
    /// So many more.
    pub fn add(&self, more: u64) {
        self.0.fetch_add(more, Ordering::Relaxed);
    }

    /// So many.
    pub fn get(&self) -> u64 {
        self.0.load(Ordering::Relaxed)
    }
}

impl fmt::Display for Count {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.get().fmt(f)
    }
}

/// Everything that is counted.
#[derive(Debug, Default)]
pub struct Counts {
    /// Reads whose every byte was right.
    pub verified: Count,
    /// Requests of all kinds to writable devices, each of which did what it should.
    pub changes: Count,
    /// Reads that came back as good and were not.
    pub mismatches: Count,
    /// Reads that failed while a layer was cut.
    pub failed: Count,
    /// Reads that failed without a reason.
    pub unexpected: Count,
    /// The daemon was killed.
    pub kills: Count,
    /// It was asked to stop.
    pub stops: Count,
    /// The connection was made anew.
    pub reconnects: Count,
    /// Memory regions came or went under running queues.
    pub memory_changes: Count,
    /// A layer was cut, and made whole.
    pub layer_cuts: Count,
    /// A front-end cut its memory.
    pub memory_cuts: Count,
}

impl Counts {
    /// Whether all reads were right, and each kind of trouble was made.
    pub fn are_good(&self) -> bool {
        let wrong = [&self.mismatches, &self.unexpected];
        let made = [
            &self.verified,
            &self.changes,
            &self.kills,
            &self.stops,
            &self.reconnects,
            &self.memory_changes,
            &self.layer_cuts,
            &self.memory_cuts,
        ];
        wrong.iter().all(|count| count.get() == 0) && made.iter().all(|count| count.get() > 0)
    }
}

impl fmt::Display for Counts {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self {
            verified,
            changes,
            mismatches,
            failed,
            unexpected,
            ..
        } = self;
        writeln!(
            f,
            "{verified} reads verified, {changes} requests to writable devices, {mismatches} \
             mismatches, {unexpected} unexpected errors, {failed} I/O errors while a layer was cut"
        )?;
        write!(
            f,
            "{} kills, {} planned restarts, {} reconnects, {} memory changes, {} layers cut, {} \
             memory files cut",
            self.kills,
            self.stops,
            self.reconnects,
            self.memory_changes,
            self.layer_cuts,
            self.memory_cuts
        )
    }
}
