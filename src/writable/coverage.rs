//! Where a writable layer may hold data: a bit for each piece of the disk.
//!
//! A read looks here first. Where no bit is set, which is most of a disk, the read goes on to the layers
//! below without a lock, as on a read-only device.

use std::sync::atomic::{AtomicU64, Ordering};

/// Least sectors to a bit, as a power of two: 4 KiB, the block of most file systems.
const MIN_SHIFT: u32 = 3;

/// Most bits: one mebibyte of them.
const MAX_BITS: u64 = 1 << 23;

/// The bits of one disk. None is ever cleared.
#[derive(Debug)]
pub struct Coverage {
    words: Vec<AtomicU64>,
    shift: u32,
}

impl Coverage {
    /// No bits set, for a disk of so many sectors.
    pub fn new(sectors: u64) -> Self {
        let mut shift = MIN_SHIFT;
        while sectors >> shift >= MAX_BITS {
            shift += 1;
        }
        let bits = (sectors >> shift) + 1;
        Self {
            words: (0..bits.div_ceil(64)).map(|_| AtomicU64::new(0)).collect(),
            shift,
        }
    }

    /// Sets the bits of `sectors` sectors, at least 1, from `start` on.
    pub fn set(&self, start: u64, sectors: u64) {
        for (word, mask) in self.words(start, sectors) {
            // Most are set already: leave the cache line to the other readers.
            if word.load(Ordering::Relaxed) & mask != mask {
                word.fetch_or(mask, Ordering::Release);
            }
        }
    }

    /// Whether any bit of a range, at least one sector of the disk, is set.
    #[inline]
    pub fn any(&self, start: u64, sectors: u64) -> bool {
        self.words(start, sectors)
            .any(|(word, mask)| word.load(Ordering::Acquire) & mask != 0)
    }

    /// The words that have the bits of a range, and which of theirs those are.
    #[inline]
    fn words(&self, start: u64, sectors: u64) -> impl Iterator<Item = (&AtomicU64, u64)> {
        let (first, last) = (start >> self.shift, (start + sectors - 1) >> self.shift);
        let numbers = first / 64..=last / 64;
        numbers.filter_map(move |number| {
            let from = first.saturating_sub(number * 64);
            let to = (last - number * 64).min(63);
            let mask = u64::MAX << from & u64::MAX >> (63 - to);
            Some((self.words.get(number as usize)?, mask))
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_bit_for_each_4_kib() {
        let touched = Coverage::new(1 << 21);
        assert!(!touched.any(0, 1 << 21));
        touched.set(9, 1);
        assert!(!touched.any(0, 8) && touched.any(0, 9) && touched.any(15, 1));
        assert!(!touched.any(16, 1));
        touched.set((1 << 21) - 1, 1);
        assert!(touched.any((1 << 21) - 8, 8));
    }

    /// Ranges within a word and over several, against a set of sectors.
    #[test]
    fn ranges_of_all_lengths() {
        const SECTORS: u64 = 4096;
        for (start, len) in [
            (0, 1),
            (500, 24),
            (511, 2),
            (512, 512),
            (700, 1500),
            (8, 4000),
        ] {
            let touched = Coverage::new(SECTORS);
            touched.set(start, len);
            let whole = start / 8 * 8..(start + len).next_multiple_of(8);
            for from in 0..SECTORS {
                for sectors in [1, 8, 9, 511, 513] {
                    let expected = from < whole.end && from + sectors > whole.start;
                    let found = touched.any(from, sectors.min(SECTORS - from));
                    assert_eq!(found, expected, "{start} {len}: {from} {sectors}");
                }
            }
        }
    }

    #[test]
    fn a_large_disk_takes_no_more_than_a_mebibyte() {
        let touched = Coverage::new(1 << 50);
        assert!(touched.words.len() * 8 <= (1 << 20) + 8);
        touched.set((1 << 50) - 1, 1);
        assert!(touched.any((1 << 50) - 1, 1) && !touched.any(0, 1 << 49));
    }
}
