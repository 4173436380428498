//! Coverage of a disk that can grow.

use std::iter::successors;
use std::sync::OnceLock;

use super::coverage::Coverage;
use crate::units::{Sector, SectorRange};

/// A list of bitmaps: one for the disk as it was opened, and more for the sectors added since.
///
/// Each covers at least as many sectors as all before it, so that the list stays short however often the disk grows.
#[derive(Debug)]
pub(super) struct GrowingCoverage {
    first: RangeCoverage,
}

#[derive(Debug)]
struct RangeCoverage {
    range: SectorRange,
    /// Its sectors are counted from the start of `range`.
    coverage: Coverage,
    next: OnceLock<Box<RangeCoverage>>,
}

impl GrowingCoverage {
    /// Makes a coverage without set bits for a disk that ends at `end`.
    pub fn new(end: Sector) -> Self {
        Self {
            first: RangeCoverage::new(SectorRange::new(Sector(0), end)),
        }
    }

    /// Covers the sectors up to `end`. Called before the disk has its new size.
    pub fn grow(&self, end: Sector) {
        let mut last = &self.first;
        while let Some(next) = last.next.get() {
            last = next;
        }
        let covered = last.range.end();
        if end > covered {
            let end = end.max(Sector(covered.0.saturating_mul(2)));
            let range = SectorRange::new(covered, end);
            last.next
                .get_or_init(|| Box::new(RangeCoverage::new(range)));
        }
    }

    /// Sets the bits of a range.
    pub fn set(&self, range: SectorRange) {
        for part in self.parts() {
            if let Some(inside) = part.inside(range) {
                part.coverage.set(inside);
            }
        }
    }

    /// Returns whether any bit of a range of the disk is set.
    #[inline]
    pub fn any(&self, range: SectorRange) -> bool {
        match range.end() <= self.first.range.end() {
            true => self.first.coverage.any(range),
            false => self.any_beyond(range),
        }
    }

    #[cold]
    fn any_beyond(&self, range: SectorRange) -> bool {
        self.parts().any(|part| {
            let inside = part.inside(range);
            inside.is_some_and(|inside| part.coverage.any(inside))
        })
    }

    fn parts(&self) -> impl Iterator<Item = &RangeCoverage> {
        successors(Some(&self.first), |part| part.next.get().map(Box::as_ref))
    }
}

impl RangeCoverage {
    fn new(range: SectorRange) -> Self {
        Self {
            range,
            coverage: Coverage::new(Sector(0) + range.len()),
            next: OnceLock::new(),
        }
    }

    /// The sectors of a range that lie in the part, counted from the part's start.
    fn inside(&self, range: SectorRange) -> Option<SectorRange> {
        let inside = range.intersection(self.range);
        let start = Sector(0) + inside.start().saturating_since(self.range.start());
        (!inside.is_empty()).then(|| SectorRange::new(start, start + inside.len()))
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
    fn a_disk_that_grows_keeps_its_bits_and_gets_more() {
        let coverage = GrowingCoverage::new(Sector(100));
        coverage.set(sectors(90, 10));
        coverage.grow(Sector(100));
        coverage.grow(Sector(1000));
        assert!(coverage.any(sectors(96, 400)) && !coverage.any(sectors(108, 892)));
        // Over the seam.
        coverage.set(sectors(99, 2));
        assert!(coverage.any(sectors(100, 1)) && !coverage.any(sectors(120, 880)));
        coverage.grow(Sector(1 << 50));
        coverage.set(sectors((1 << 50) - 1, 1));
        assert!(
            coverage.any(sectors((1 << 50) - 1, 1)) && !coverage.any(sectors(1 << 40, 1 << 40))
        );
        assert!(coverage.any(sectors(0, 100)) && coverage.any(sectors(0, 1 << 50)));
    }

    #[test]
    fn a_disk_that_grows_often_has_few_parts() {
        let coverage = GrowingCoverage::new(Sector(1));
        (1..5000).for_each(|end| coverage.grow(Sector(end)));
        assert!(coverage.parts().count() < 15);
        coverage.set(sectors(4998, 1));
        assert!(coverage.any(sectors(4998, 1)) && !coverage.any(sectors(0, 4096)));
    }
}
