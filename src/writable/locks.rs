//! The locks of a writable disk, and the order in which a thread takes them.
//!
//! | rank | lock | guards | held while waiting for storage |
//! |---|---|---|---|
//! | 1 | [`Rank::Seal`] | one seal of frozen layers at a time | yes |
//! | 2 | [`Rank::Manifest`] | the manifest, in memory and as a file | yes |
//! | 3 | [`Rank::ManifestSync`] | held until a new manifest is durable | yes |
//! | 4 | [`Rank::Flush`] | the index file: one flush at a time | yes |
//! | 5 | [`Rank::Gate`] | changes under way (shared) against a freeze (exclusive) | shared: writes of data; exclusive: a rename, a hole |
//! | 6 | [`Rank::Pending`] | the journal and the mappings that wait for a flush | journal writes, `fallocate` of the index file |
//! | 7 | [`Rank::Placement`] | extent map and allocator | no |
//!
//! [`ranked_lock`] holds the code to that.

use crate::io::ranked_lock;

pub(super) use ranked_lock::Guard;

/// Place of a lock in the order.
#[derive(Clone, Copy, Debug)]
pub(super) enum Rank {
    /// Held by [`Snapshots::seal`](super::Snapshots::seal).
    Seal = 1,
    /// In [`Snapshots`](super::Snapshots).
    Manifest,
    /// In [`Volume`](super::Volume).
    ManifestSync,
    /// In a [`WritableLayer`](super::WritableLayer).
    Flush,
    /// In a [`WritableLayer`](super::WritableLayer).
    Gate,
    /// In a [`WritableLayer`](super::WritableLayer).
    Pending,
    /// In a [`WritableLayer`](super::WritableLayer).
    Placement,
}

impl ranked_lock::Rank for Rank {
    fn number(self) -> u8 {
        self as u8
    }
}

/// A mutex with a rank.
pub(super) type RankedMutex<T> = ranked_lock::RankedMutex<Rank, T>;

/// A reader-writer lock with a rank.
pub(super) type RankedRwLock<T> = ranked_lock::RankedRwLock<Rank, T>;

/// What a seal needs exclusively: a mutable reference to it is the proof that no other seal runs.
#[derive(Debug)]
pub(super) struct Sealing(());

impl Sealing {
    /// Returns that of one disk, behind its lock.
    pub fn locked() -> RankedMutex<Self> {
        RankedMutex::new(Rank::Seal, Self(()))
    }
}
