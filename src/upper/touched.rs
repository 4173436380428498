//! Where an upper layer may hold something: a bit for each piece of the disk.
//!
//! A read asks it first. Where no bit is set, which is most of a disk, it goes on to the layers
//! below without a lock, as on a read-only device.

use std::sync::atomic::{AtomicU64, Ordering};

/// Least sectors to a bit, as a power of two: 64 KiB.
const MIN_SHIFT: u32 = 7;

/// Most bits: one mebibyte of them.
const MAX_BITS: u64 = 1 << 23;

/// The bits of one disk. None is ever cleared.
#[derive(Debug)]
pub struct Touched {
    words: Vec<AtomicU64>,
    shift: u32,
}

impl Touched {
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
        for bit in start >> self.shift..=(start + sectors - 1) >> self.shift {
            if let Some(word) = self.words.get((bit / 64) as usize) {
                let mask = 1 << (bit % 64);
                // Most are set already: leave the cache line to the other readers.
                if word.load(Ordering::Relaxed) & mask == 0 {
                    word.fetch_or(mask, Ordering::Release);
                }
            }
        }
    }

    /// Whether any bit of a range, at least one sector of the disk, is set.
    #[inline]
    pub fn any(&self, start: u64, sectors: u64) -> bool {
        (start >> self.shift..=(start + sectors - 1) >> self.shift).any(|bit| {
            let word = self.words.get((bit / 64) as usize);
            word.is_some_and(|word| word.load(Ordering::Acquire) >> (bit % 64) & 1 != 0)
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_bit_for_each_64_kib() {
        let touched = Touched::new(1 << 21);
        assert!(!touched.any(0, 1 << 21));
        touched.set(130, 1);
        assert!(!touched.any(0, 128) && touched.any(0, 129) && touched.any(255, 1));
        assert!(!touched.any(256, 1));
        touched.set((1 << 21) - 1, 1);
        assert!(touched.any((1 << 21) - 128, 128));
    }

    #[test]
    fn a_large_disk_takes_no_more_than_a_mebibyte() {
        let touched = Touched::new(1 << 50);
        assert!(touched.words.len() * 8 <= (1 << 20) + 8);
        touched.set((1 << 50) - 1, 1);
        assert!(touched.any((1 << 50) - 1, 1) && !touched.any(0, 1 << 49));
    }
}
