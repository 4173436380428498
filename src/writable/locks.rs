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
//! A thread takes a lock only if all locks that it holds have a lower rank. Debug builds assert that.
//!
//! A poisoned lock is used like any other: each step leaves the guarded data consistent.

use std::ops::{Deref, DerefMut};
use std::sync::{Mutex, MutexGuard, PoisonError, RwLock, RwLockReadGuard, RwLockWriteGuard};

/// Place of a lock in the order.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
#[repr(u8)]
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

#[cfg(debug_assertions)]
mod held {
    use std::cell::Cell;

    use super::Rank;

    thread_local! {
        /// A bit for each rank of which the thread holds a lock.
        static HELD: Cell<u8> = const { Cell::new(0) };
    }

    /// Marks that the thread holds a lock.
    #[derive(Debug)]
    pub(in super::super) struct Held(Rank);

    impl Held {
        /// Checks and marks a lock that the thread is about to take.
        pub(super) fn new(rank: Rank) -> Self {
            let held = HELD.get();
            assert!(
                held >> rank as u8 == 0,
                "a lock of rank {rank:?} is taken while the locks {held:#b} are held"
            );
            HELD.set(held | 1 << rank as u8);
            Self(rank)
        }
    }

    impl Drop for Held {
        fn drop(&mut self) {
            HELD.set(HELD.get() & !(1 << self.0 as u8));
        }
    }
}

#[cfg(not(debug_assertions))]
mod held {
    use super::Rank;

    /// Replaces the check of debug builds.
    #[derive(Debug)]
    pub(in super::super) struct Held;

    impl Held {
        #[inline]
        pub(super) fn new(_: Rank) -> Self {
            Self
        }
    }
}

use held::Held;

/// A guard of a lock in the order. Fields are dropped in this order: the lock first.
#[derive(Debug)]
pub(super) struct Guard<G> {
    guard: G,
    _held: Held,
}

impl<G: Deref> Deref for Guard<G> {
    type Target = G::Target;

    #[inline]
    fn deref(&self) -> &G::Target {
        &self.guard
    }
}

impl<G: DerefMut> DerefMut for Guard<G> {
    #[inline]
    fn deref_mut(&mut self) -> &mut G::Target {
        &mut self.guard
    }
}

/// A mutex with a rank.
#[derive(Debug)]
pub(super) struct RankedMutex<T> {
    rank: Rank,
    lock: Mutex<T>,
}

impl<T> RankedMutex<T> {
    /// An unlocked mutex.
    pub(super) fn new(rank: Rank, value: T) -> Self {
        let lock = Mutex::new(value);
        Self { rank, lock }
    }

    /// Locks it.
    #[inline]
    pub(super) fn lock(&self) -> Guard<MutexGuard<'_, T>> {
        let _held = Held::new(self.rank);
        let guard = self.lock.lock().unwrap_or_else(PoisonError::into_inner);
        Guard { guard, _held }
    }
}

/// A reader-writer lock with a rank.
#[derive(Debug)]
pub(super) struct RankedRwLock<T> {
    rank: Rank,
    lock: RwLock<T>,
}

impl<T> RankedRwLock<T> {
    /// An unlocked lock.
    pub(super) fn new(rank: Rank, value: T) -> Self {
        let lock = RwLock::new(value);
        Self { rank, lock }
    }

    /// Locks it shared.
    #[inline]
    pub(super) fn read(&self) -> Guard<RwLockReadGuard<'_, T>> {
        let _held = Held::new(self.rank);
        let guard = self.lock.read().unwrap_or_else(PoisonError::into_inner);
        Guard { guard, _held }
    }

    /// Locks it exclusively.
    #[inline]
    pub(super) fn write(&self) -> Guard<RwLockWriteGuard<'_, T>> {
        let _held = Held::new(self.rank);
        let guard = self.lock.write().unwrap_or_else(PoisonError::into_inner);
        Guard { guard, _held }
    }
}

#[cfg(test)]
mod tests {
    use std::panic::{AssertUnwindSafe, catch_unwind};

    use super::*;

    #[test]
    fn locks_are_taken_in_order() {
        let flush = RankedMutex::new(Rank::Flush, 1);
        let map = RankedRwLock::new(Rank::Placement, 2);
        let (one, two) = (flush.lock(), map.read());
        assert_eq!((*one, *two), (1, 2));
        drop(one);
        drop(two);
        drop(map.write());
        drop(flush.lock());
    }

    #[cfg(debug_assertions)]
    #[test]
    fn another_order_panics() {
        let flush = RankedMutex::new(Rank::Flush, 1);
        let map = RankedRwLock::new(Rank::Placement, 2);
        let held = map.read();
        let panics = |what: &dyn Fn()| catch_unwind(AssertUnwindSafe(what)).is_err();
        assert!(panics(&|| drop(flush.lock())));
        assert!(panics(&|| drop(map.read())), "the same rank twice");
        drop(held);
        drop(flush.lock());
    }
}
