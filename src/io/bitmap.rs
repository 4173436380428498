//! Bitmaps: one that threads share without a lock, and iteration over the words of any bitmap.
#![allow(unsafe_code)] // Zeroed memory for atomic words has no safe form

use std::ops::Range;
use std::sync::atomic::{AtomicU64, Ordering};

use super::prefetch;

const WORD_BITS: u64 = u64::BITS as u64;

const _: () = assert!(align_of::<AtomicU64>() == align_of::<u64>());

/// Iterates over the words that contain `bits`: the number of each word, and a mask of its bits in the range.
#[inline]
pub fn words(bits: Range<u64>) -> impl Iterator<Item = (u64, u64)> {
    let Range { start, end } = bits;
    let words = match start < end {
        true => start / WORD_BITS..end.div_ceil(WORD_BITS),
        false => 0..0,
    };
    words.map(move |word| {
        let first = word * WORD_BITS;
        let below = start.saturating_sub(first);
        let above = WORD_BITS - (end - first).min(WORD_BITS);
        (word, (u64::MAX << below) & (u64::MAX >> above))
    })
}

/// A bitmap in memory, changed with atomic operations. Bits beyond its end are never set.
#[derive(Debug)]
pub struct AtomicBitmap {
    words: Box<[AtomicU64]>,
}

impl AtomicBitmap {
    /// Creates a bitmap of `bits` bits, rounded up to whole words, all clear.
    pub fn new(bits: u64) -> Self {
        let count = usize::try_from(bits.div_ceil(WORD_BITS)).unwrap_or(usize::MAX);
        // Zeros of the system: a page of a long bitmap takes memory once one of its bits is set.
        let zeros = Box::into_raw(vec![0u64; count].into_boxed_slice());
        // SAFETY: the pointer came from a box of words, and atomic words have the size, the alignment and
        // the bit patterns of plain ones.
        let words = unsafe { Box::from_raw(zeros as *mut [AtomicU64]) };
        Self { words }
    }

    /// Size in bytes.
    #[cfg(test)]
    pub(crate) fn size(&self) -> usize {
        size_of_val(&*self.words)
    }

    /// As [`words`], for this bitmap; stops at its end.
    #[inline]
    fn words(&self, bits: Range<u64>) -> impl Iterator<Item = (&AtomicU64, u64)> {
        words(bits).map_while(|(word, mask)| Some((self.words.get(word as usize)?, mask)))
    }

    /// Whether any bit in `bits` is set.
    #[inline]
    pub fn any(&self, bits: Range<u64>) -> bool {
        self.words(bits)
            .any(|(word, mask)| word.load(Ordering::Acquire) & mask != 0)
    }

    /// Whether all bits in `bits`, which end inside the bitmap, are set.
    #[inline]
    pub fn all(&self, bits: Range<u64>) -> bool {
        self.words(bits)
            .all(|(word, mask)| word.load(Ordering::Acquire) & mask == mask)
    }

    /// Sets the bits in `bits`.
    #[inline]
    pub fn set(&self, bits: Range<u64>) {
        for (word, mask) in self.words(bits) {
            // A write would invalidate the cache line of other readers.
            if word.load(Ordering::Relaxed) & mask != mask {
                word.fetch_or(mask, Ordering::Release);
            }
        }
    }

    /// Clears the bits in `bits`.
    pub fn clear(&self, bits: Range<u64>) {
        for (word, mask) in self.words(bits) {
            word.fetch_and(!mask, Ordering::Release);
        }
    }

    /// Clears all bits.
    pub fn clear_all(&self) {
        for word in &self.words {
            // A write would take memory for a page of zeros.
            if word.load(Ordering::Relaxed) != 0 {
                word.store(0, Ordering::Relaxed);
            }
        }
    }

    /// Prefetches the word that holds bit `bit`.
    #[inline]
    pub fn prefetch(&self, bit: u64) {
        if let Some(word) = self.words.get((bit / WORD_BITS) as usize) {
            prefetch::value(word);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn words_cover_exactly_the_bits() {
        assert_eq!(words(5..5).count(), 0);
        assert_eq!(words(0..0).count(), 0);
        for (start, end) in [(0, 1), (63, 64), (63, 65), (0, 64), (64, 128), (3, 200)] {
            let mut found = Vec::new();
            for (word, mask) in words(start..end) {
                let bits = (0..64).filter(|bit| mask >> bit & 1 == 1);
                found.extend(bits.map(|bit| word * 64 + bit));
            }
            assert_eq!(found, (start..end).collect::<Vec<_>>());
        }
        let (last, mask) = words(u64::MAX - 1..u64::MAX).next().unwrap();
        assert_eq!((last, mask), (u64::MAX / 64, 1 << 62));
    }

    #[test]
    fn bits_are_set_and_cleared() {
        let bitmap = AtomicBitmap::new(200);
        assert_eq!(bitmap.size(), 32);
        bitmap.set(60..130);
        assert!(bitmap.all(60..130) && bitmap.all(7..7));
        assert!(!bitmap.all(59..130) && !bitmap.all(60..131));
        assert!(!bitmap.any(0..60) && !bitmap.any(130..256) && bitmap.any(129..131));
        bitmap.clear(64..128);
        assert!(bitmap.any(0..64) && !bitmap.any(64..128) && bitmap.any(128..129));
        // Beyond the end, which is that of a word.
        bitmap.set(300..400);
        assert!(!bitmap.any(256..500));
        bitmap.clear_all();
        assert!(!bitmap.any(0..256));
    }
}
