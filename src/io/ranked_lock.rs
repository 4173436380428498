//! Locks with a rank: a thread takes a lock only if all locks that it holds have a lower rank.
//!
//! Each module that needs an order of locks has an enum of its ranks, with a table of what they guard. Debug
//! builds assert the order; ranks of different modules count as one order, so that a thread must not hold
//! locks of two of them.
//!
//! A poisoned lock is used like any other: each step leaves the guarded data consistent.

use std::fmt::Debug;
use std::ops::{Deref, DerefMut};
use std::sync::{
    Condvar, Mutex, MutexGuard, PoisonError, RwLock, RwLockReadGuard, RwLockWriteGuard,
    TryLockError,
};
use std::time::Duration;

/// Place of a lock in an order.
pub trait Rank: Copy + Debug {
    /// Number of the place, below 16.
    fn number(self) -> u8;
}

#[cfg(debug_assertions)]
mod held {
    use std::cell::Cell;

    use super::Rank;

    thread_local! {
        /// A bit for each rank of which the thread holds a lock.
        static HELD: Cell<u16> = const { Cell::new(0) };
    }

    /// Marks that the thread holds a lock.
    #[derive(Debug)]
    pub struct Held(u8);

    impl Held {
        /// Checks and marks a lock that the thread is about to take.
        pub(super) fn new(rank: impl Rank) -> Self {
            let held = HELD.get();
            let number = rank.number();
            assert!(
                held >> number == 0,
                "a lock of rank {rank:?} is taken while the locks {held:#b} are held"
            );
            HELD.set(held | 1 << number);
            Self(number)
        }
    }

    impl Drop for Held {
        fn drop(&mut self) {
            HELD.set(HELD.get() & !(1 << self.0));
        }
    }
}

#[cfg(not(debug_assertions))]
mod held {
    use super::Rank;

    /// Replaces the check of debug builds.
    #[derive(Debug)]
    pub struct Held;

    impl Held {
        #[inline]
        pub(super) fn new(_: impl Rank) -> Self {
            Self
        }
    }
}

use held::Held;

/// A guard of a lock in the order. Fields are dropped in this order: the lock first.
#[derive(Debug)]
pub struct Guard<G> {
    guard: G,
    held: Held,
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

impl<'a, T> Guard<MutexGuard<'a, T>> {
    /// Unlocks the mutex, waits for `condition` for at most `timeout`, and locks the mutex again.
    #[must_use]
    pub fn wait_timeout(self, condition: &Condvar, timeout: Duration) -> Self {
        let Self { guard, held } = self;
        let waited = condition.wait_timeout(guard, timeout);
        let (guard, _) = waited.unwrap_or_else(PoisonError::into_inner);
        Self { guard, held }
    }
}

/// A mutex with a rank.
#[derive(Debug)]
pub struct RankedMutex<R, T> {
    rank: R,
    lock: Mutex<T>,
}

impl<R: Rank, T> RankedMutex<R, T> {
    /// An unlocked mutex.
    pub fn new(rank: R, value: T) -> Self {
        let lock = Mutex::new(value);
        Self { rank, lock }
    }

    /// Locks it.
    #[inline]
    pub fn lock(&self) -> Guard<MutexGuard<'_, T>> {
        let held = Held::new(self.rank);
        let guard = self.lock.lock().unwrap_or_else(PoisonError::into_inner);
        Guard { guard, held }
    }

    /// Locks it, unless another thread holds it.
    pub fn try_lock(&self) -> Option<Guard<MutexGuard<'_, T>>> {
        let held = Held::new(self.rank);
        let guard = match self.lock.try_lock() {
            Ok(guard) => guard,
            Err(TryLockError::Poisoned(poisoned)) => poisoned.into_inner(),
            Err(TryLockError::WouldBlock) => return None,
        };
        Some(Guard { guard, held })
    }
}

/// A reader-writer lock with a rank.
#[derive(Debug)]
pub struct RankedRwLock<R, T> {
    rank: R,
    lock: RwLock<T>,
}

impl<R: Rank, T> RankedRwLock<R, T> {
    /// An unlocked lock.
    pub fn new(rank: R, value: T) -> Self {
        let lock = RwLock::new(value);
        Self { rank, lock }
    }

    /// Locks it shared.
    #[inline]
    pub fn read(&self) -> Guard<RwLockReadGuard<'_, T>> {
        let held = Held::new(self.rank);
        let guard = self.lock.read().unwrap_or_else(PoisonError::into_inner);
        Guard { guard, held }
    }

    /// Locks it exclusively.
    #[inline]
    pub fn write(&self) -> Guard<RwLockWriteGuard<'_, T>> {
        let held = Held::new(self.rank);
        let guard = self.lock.write().unwrap_or_else(PoisonError::into_inner);
        Guard { guard, held }
    }
}

#[cfg(test)]
mod tests {
    use std::panic::{AssertUnwindSafe, catch_unwind};

    use super::*;

    #[derive(Clone, Copy, Debug)]
    enum Place {
        First = 1,
        Second,
    }

    impl Rank for Place {
        fn number(self) -> u8 {
            self as u8
        }
    }

    #[test]
    fn locks_are_taken_in_order() {
        let first = RankedMutex::new(Place::First, 1);
        let second = RankedRwLock::new(Place::Second, 2);
        let (one, two) = (first.lock(), second.read());
        assert_eq!((*one, *two), (1, 2));
        drop(one);
        drop(two);
        drop(second.write());
        let one = first.lock();
        let one = one.wait_timeout(&Condvar::new(), Duration::from_millis(1));
        drop(one);
        drop(first.try_lock().unwrap());
    }

    #[cfg(debug_assertions)]
    #[test]
    fn another_order_panics() {
        let first = RankedMutex::new(Place::First, 1);
        let second = RankedRwLock::new(Place::Second, 2);
        let held = second.read();
        let panics = |what: &dyn Fn()| catch_unwind(AssertUnwindSafe(what)).is_err();
        assert!(panics(&|| drop(first.lock())));
        assert!(panics(&|| drop(first.try_lock())));
        assert!(panics(&|| drop(second.read())), "the same rank twice");
        drop(held);
        drop(first.lock());
    }
}
