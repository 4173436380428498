//! Coverage of a writable layer: a bitmap of where on the disk it may have extents.
//!
//! A read tests it first. If no bit of its range is set, as in most of a disk, the read continues in the layers
//! below without a lock, as on a read-only disk.

use std::ops::Range;

use crate::io::bitmap::AtomicBitmap;
use crate::units::{Sector, SectorRange};

/// Least sectors of a bit, as a power of two: 4 KiB, the block size of most file systems.
const MIN_SHIFT: u32 = 3;

/// Most bits: 1 MiB of them.
const MAX_BITS: u64 = 1 << 23;

/// The bitmap of one disk. No bit is ever cleared.
#[derive(Debug)]
pub struct Coverage {
    bits: AtomicBitmap,
    /// Sectors of a bit, as a power of two.
    shift: u32,
}

impl Coverage {
    /// Makes a bitmap without set bits for a disk that ends at `end`.
    pub fn new(end: Sector) -> Self {
        let mut shift = MIN_SHIFT;
        while end.0 >> shift >= MAX_BITS {
            shift += 1;
        }
        Self {
            bits: AtomicBitmap::new((end.0 >> shift) + 1),
            shift,
        }
    }

    /// Sets the bits of a range.
    pub fn set(&self, range: SectorRange) {
        self.bits.set(self.bits_of(range));
    }

    /// Returns whether any bit of a range is set.
    #[inline]
    pub fn any(&self, range: SectorRange) -> bool {
        self.bits.any(self.bits_of(range))
    }

    /// The bits of a range; the sectors of the last one may reach beyond it.
    #[inline]
    fn bits_of(&self, range: SectorRange) -> Range<u64> {
        let last = (1 << self.shift) - 1;
        range.start().0 >> self.shift..(range.end().0 + last) >> self.shift
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::units::Sectors;

    fn sectors(start: u64, len: u64) -> SectorRange {
        SectorRange::checked(Sector(start), Sectors(len)).unwrap()
    }

    #[test]
    fn a_bit_for_each_4_kib() {
        let coverage = Coverage::new(Sector(1 << 21));
        assert!(!coverage.any(sectors(0, 1 << 21)));
        coverage.set(sectors(9, 1));
        assert!(
            !coverage.any(sectors(0, 8))
                && coverage.any(sectors(0, 9))
                && coverage.any(sectors(15, 1))
        );
        assert!(!coverage.any(sectors(16, 1)));
        coverage.set(sectors((1 << 21) - 1, 1));
        assert!(coverage.any(sectors((1 << 21) - 8, 8)));
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
            let coverage = Coverage::new(Sector(SECTORS));
            coverage.set(sectors(start, len));
            let whole = start / 8 * 8..(start + len).next_multiple_of(8);
            for from in 0..SECTORS {
                for len in [1, 8, 9, 511, 513] {
                    let expected = from < whole.end && from + len > whole.start;
                    let found = coverage.any(sectors(from, len.min(SECTORS - from)));
                    assert_eq!(found, expected, "{whole:?}: {from} {len}");
                }
            }
        }
    }

    #[test]
    fn a_large_disk_takes_no_more_than_a_mebibyte() {
        let coverage = Coverage::new(Sector(1 << 50));
        assert!(coverage.bits.size() <= (1 << 20) + 8);
        coverage.set(sectors((1 << 50) - 1, 1));
        assert!(coverage.any(sectors((1 << 50) - 1, 1)) && !coverage.any(sectors(0, 1 << 49)));
    }
}
