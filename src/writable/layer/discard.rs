//! Discarding and zeroing, and the storage that they free.

use super::super::Error;
use super::super::allocator::{Hold, PAGE};
use super::super::extent_map::{Extent, Place, sparse_place};
use super::WritableLayer;
use crate::format::lsmt::writable::Kind;
use crate::units::{SectorRange, Sectors};

/// Most sectors of one discard or zeroing: bounds its memory, and its time where the layer is fragmented.
pub const MAX_STEP: Sectors = Sectors(1 << 14);

impl WritableLayer {
    /// Discards the sectors of `range`, at most [`MAX_STEP`]: they read as zeros, and their space is freed.
    ///
    /// # Errors
    /// As [`WritableLayer::write`].
    pub fn discard(&self, range: SectorRange) -> Result<(), Error> {
        self.check_pending()?;
        let freed = {
            let _gate = self.enter()?;
            self.publish(&self.zeros_to_enter(range))?
        };
        if self.kind == Kind::Sparse {
            self.punch_places(&freed, range);
        }
        Ok(())
    }

    /// Returns zero extents for the parts of a range that are not zero extents already.
    fn zeros_to_enter(&self, range: SectorRange) -> Vec<Extent> {
        let placement = self.placement.read();
        let extents = placement.map.within(range);
        let mut at = range.start();
        let mut gaps = Vec::new();
        for zeros in extents.filter(|extent| extent.place() == Place::Zero) {
            gaps.push(SectorRange::new(at, zeros.start()));
            at = zeros.end();
        }
        gaps.push(SectorRange::new(at, range.end()));
        let gaps = gaps.into_iter().filter(|gap| !gap.is_empty());
        gaps.map(|range| Extent::new(range, Place::Zero)).collect()
    }

    /// Makes the sectors of `range`, at most [`MAX_STEP`], read as zeros; they keep their space.
    ///
    /// # Errors
    /// As [`WritableLayer::write`].
    pub fn write_zeroes(&self, range: SectorRange) -> Result<(), Error> {
        let (mapped, _hold): (Vec<_>, Hold) = {
            let _gate = self.enter()?;
            let placement = self.placement.read();
            let mapped = placement.map.within(range).collect();
            (mapped, placement.allocator.hold())
        };
        let mut at = range.start();
        for extent in mapped {
            let Some(data) = extent.data() else {
                continue;
            };
            self.discard_rest(SectorRange::new(at, extent.start()))?;
            {
                let _gate = self.enter()?;
                self.data.check_len()?;
                self.data.zero(data)?;
                // As after a write in place.
                self.pending.lock().journal.mend()?;
            }
            at = extent.end();
        }
        self.discard_rest(SectorRange::new(at, range.end()))
    }

    /// Discards a range without data, which may be empty.
    fn discard_rest(&self, range: SectorRange) -> Result<(), Error> {
        match range.is_empty() {
            true => Ok(()),
            false => self.discard(range),
        }
    }

    /// Frees the storage of free pages of the data file, after a flush. A sparse layer has a place for every
    /// sector; a discard frees its storage.
    pub(super) fn punch_free(&self) {
        if self.kind == Kind::Sparse {
            return;
        }
        let pages = self.placement.write().allocator.begin_punch();
        if pages.is_empty() {
            return;
        }
        pages.iter().for_each(|range| self.data.punch(*range));
        self.placement.write().allocator.end_punch(pages);
    }

    /// Frees the storage of the discarded sectors of `range` in a sparse layer: the data in `freed`, and the pages
    /// at both ends if nothing else lies on them.
    fn punch_places(&self, freed: &[Extent], range: SectorRange) {
        if freed.is_empty() {
            return;
        }
        for data in freed.iter().filter_map(Extent::data) {
            self.data.punch(data);
        }
        let last = range.end() - Sectors(1);
        for sector in [range.start(), last] {
            let start = sector.round_down(PAGE);
            let page = SectorRange::new(start, start + PAGE);
            if page.intersection(range) == page {
                continue;
            }
            // Waits for writes to other sectors of the page.
            let frozen = self.gate.write();
            if !*frozen && !self.has_data(page) {
                self.data.punch(sparse_place(page));
            }
        }
    }

    /// Returns whether the layer has data of a range.
    fn has_data(&self, range: SectorRange) -> bool {
        let placement = self.placement.read();
        let mut extents = placement.map.within(range);
        extents.any(|extent| extent.data().is_some())
    }
}
