//! Table of address ranges that a signal handler can search.
//!
//! A handler must not lock, so [`RangeTable::find`] reads atomics only. It does a binary search in a list
//! of range numbers, sorted by address. There are two lists: a thread that adds or removes a range writes
//! the list that is not in use, then makes it the one in use by incrementing the version. A search that
//! finds the version changed starts again.

use std::sync::atomic::{AtomicBool, AtomicU16, AtomicUsize, Ordering, fence};
use std::sync::{Mutex, MutexGuard, PoisonError};

/// A table of at most `N` ranges that do not overlap.
#[derive(Debug)]
pub(super) struct RangeTable<const N: usize> {
    ranges: [Range; N],
    /// The list with number `version % 2` is in use.
    lists: [Sorted<N>; 2],
    version: AtomicUsize,
    /// Locked by threads that add or remove a range, never by a search.
    numbers: Mutex<Numbers>,
}

/// One range.
#[derive(Debug)]
struct Range {
    start: AtomicUsize,
    len: AtomicUsize,
    marked: AtomicBool,
}

/// Numbers of the ranges in the table, sorted by address.
#[derive(Debug)]
struct Sorted<const N: usize> {
    len: AtomicUsize,
    numbers: [AtomicU16; N],
}

/// Free numbers.
#[derive(Debug)]
struct Numbers {
    /// Numbers that were used before.
    released: Vec<u16>,
    /// The lowest number that was never used.
    unused: u16,
}

impl<const N: usize> RangeTable<N> {
    /// An empty table.
    pub const fn new() -> Self {
        assert!(N < u16::MAX as usize);
        Self {
            ranges: [const {
                Range {
                    start: AtomicUsize::new(0),
                    len: AtomicUsize::new(0),
                    marked: AtomicBool::new(false),
                }
            }; N],
            lists: [const {
                Sorted {
                    len: AtomicUsize::new(0),
                    numbers: [const { AtomicU16::new(0) }; N],
                }
            }; 2],
            version: AtomicUsize::new(0),
            numbers: Mutex::new(Numbers {
                released: Vec::new(),
                unused: 0,
            }),
        }
    }

    /// Adds the range of `len` bytes at `start`, not marked, and returns its number; `None` if the table
    /// is full.
    pub fn add(&self, start: usize, len: usize) -> Option<u16> {
        let mut numbers = self.lock();
        let number = numbers.take(N)?;
        let range = &self.ranges[usize::from(number)];
        self.rewrite(|old, new| {
            // Part of the rewrite, hence after its fence: a search may still read the list of the version
            // in which the number belonged to the range that was removed. If it loads one of these
            // values, it must also see that the version has changed.
            range.marked.store(false, Ordering::Relaxed);
            range.start.store(start, Ordering::Relaxed);
            range.len.store(len, Ordering::Relaxed);
            let at = self.place_of(old, start);
            new.append(old, 0, at);
            new.push(number);
            new.append(old, at, old.len());
        });
        Some(number)
    }

    /// Removes a range.
    pub fn remove(&self, number: u16) {
        let mut numbers = self.lock();
        self.rewrite(|old, new| {
            let at = self.place_of(old, self.start(number));
            new.append(old, 0, at);
            new.append(old, at + 1, old.len());
        });
        numbers.released.push(number);
    }

    /// Number of ranges that can be added.
    pub fn free(&self) -> usize {
        let numbers = self.lock();
        N - usize::from(numbers.unused) + numbers.released.len()
    }

    /// Marks the range with this number.
    pub fn mark(&self, number: u16) {
        self.ranges[usize::from(number)]
            .marked
            .store(true, Ordering::Release);
    }

    /// Returns whether the range was marked.
    #[inline]
    pub fn is_marked(&self, number: u16) -> bool {
        self.ranges[usize::from(number)]
            .marked
            .load(Ordering::Acquire)
    }

    /// Returns number, start and length of the range that contains `address`. Safe in a signal handler:
    /// it neither locks nor allocates, and starts again only if another thread changed the table.
    pub fn find(&self, address: usize) -> Option<(u16, usize, usize)> {
        loop {
            let version = self.version.load(Ordering::Acquire);
            let list = &self.lists[version % 2];
            let below = list.partition_point(|number| self.start(number) <= address);
            let found = below.checked_sub(1).map(|at| {
                let number = list.get(at);
                let len = self.ranges[usize::from(number)].len.load(Ordering::Relaxed);
                (number, self.start(number), len)
            });
            // Pairs with the fence in `rewrite`: if a load above saw a store of a later rewrite, the load
            // below sees another version.
            fence(Ordering::Acquire);
            if self.version.load(Ordering::Relaxed) == version {
                return found.filter(|(_, start, len)| address - start < *len);
            }
        }
    }

    fn lock(&self) -> MutexGuard<'_, Numbers> {
        self.numbers.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn start(&self, number: u16) -> usize {
        self.ranges[usize::from(number)]
            .start
            .load(Ordering::Relaxed)
    }

    /// Number of ranges in `list` that start below `start`.
    fn place_of(&self, list: &Sorted<N>, start: usize) -> usize {
        list.partition_point(|number| self.start(number) < start)
    }

    /// Calls `write` with the list in use and the other one, emptied, then makes the other one the list
    /// in use. The caller holds the lock, and stores to ranges only inside `write`.
    fn rewrite(&self, write: impl FnOnce(&Sorted<N>, &Sorted<N>)) {
        let version = self.version.load(Ordering::Relaxed);
        let (old, new) = (&self.lists[version % 2], &self.lists[(version + 1) % 2]);
        // Pairs with the fence in `find`. A search may still read the list that the previous rewrite put
        // out of use.
        fence(Ordering::Release);
        new.len.store(0, Ordering::Relaxed);
        write(old, new);
        self.version
            .store(version.wrapping_add(1), Ordering::Release);
    }
}

impl<const N: usize> Sorted<N> {
    fn len(&self) -> usize {
        self.len.load(Ordering::Relaxed).min(N)
    }

    fn get(&self, at: usize) -> u16 {
        self.numbers[at].load(Ordering::Relaxed)
    }

    fn push(&self, number: u16) {
        let len = self.len();
        self.numbers[len].store(number, Ordering::Relaxed);
        self.len.store(len + 1, Ordering::Relaxed);
    }

    /// Appends the numbers of `other` from place `from` up to `to`.
    fn append(&self, other: &Self, from: usize, to: usize) {
        (from..to).for_each(|at| self.push(other.get(at)));
    }

    /// Number of leading entries for which `below` holds.
    fn partition_point(&self, below: impl Fn(u16) -> bool) -> usize {
        let (mut low, mut high) = (0, self.len());
        while low < high {
            let middle = low + (high - low) / 2;
            match below(self.get(middle)) {
                true => low = middle + 1,
                false => high = middle,
            }
        }
        low
    }
}

impl Numbers {
    fn take(&mut self, all: usize) -> Option<u16> {
        if let Some(number) = self.released.pop() {
            return Some(number);
        }
        let number = self.unused;
        if usize::from(number) >= all {
            return None;
        }
        self.unused += 1;
        Some(number)
    }
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::AtomicBool;
    use std::thread;

    use super::*;

    #[test]
    fn a_range_is_found_by_each_of_its_addresses() {
        let table = RangeTable::<4>::new();
        assert_eq!((table.find(0), table.free()), (None, 4));
        let high = table.add(300, 50).unwrap();
        let low = table.add(100, 10).unwrap();
        let middle = table.add(200, 100).unwrap();
        for (address, expected) in [
            (99, None),
            (100, Some((low, 100, 10))),
            (109, Some((low, 100, 10))),
            (110, None),
            (299, Some((middle, 200, 100))),
            (300, Some((high, 300, 50))),
            (350, None),
            (usize::MAX, None),
        ] {
            assert_eq!(table.find(address), expected, "{address}");
        }
        table.remove(middle);
        assert_eq!(table.find(250), None);
        assert_eq!(table.find(300), Some((high, 300, 50)));
    }

    #[test]
    fn a_full_table_takes_no_range_until_one_is_removed() {
        let table = RangeTable::<3>::new();
        let numbers: Vec<_> = (1..4).map(|n| table.add(n * 10, 10).unwrap()).collect();
        assert_eq!((table.add(50, 1), table.free()), (None, 0));
        table.mark(numbers[1]);
        table.remove(numbers[1]);
        assert_eq!(table.free(), 1);
        let again = table.add(50, 1).unwrap();
        assert!(!table.is_marked(again));
        assert_eq!(table.find(50), Some((again, 50, 1)));
        assert_eq!(table.find(25), None);
    }

    #[test]
    fn a_search_sees_a_range_while_others_come_and_go() {
        let table = RangeTable::<64>::new();
        let kept = table.add(1000, 10).unwrap();
        let done = AtomicBool::new(false);
        thread::scope(|scope| {
            scope.spawn(|| {
                for round in 0..2000 {
                    let others = (0..40).map(|n| table.add((n + round) % 50 * 30, 5).unwrap());
                    others
                        .collect::<Vec<_>>()
                        .into_iter()
                        .for_each(|n| table.remove(n));
                }
                done.store(true, Ordering::Release);
            });
            while !done.load(Ordering::Acquire) {
                assert_eq!(table.find(1005), Some((kept, 1000, 10)));
            }
        });
    }
}
