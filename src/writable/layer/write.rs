//! Writes to a layer: first the data, then the mapping that makes it visible.

use super::super::Error;
use super::super::allocator::{Allocator, Hold};
use super::super::extent_map::{Extent, Place, sparse_place};
use super::{Placement, WritableLayer};
use crate::format::lsmt::writable::Kind;
use crate::format::lsmt::{MAX_ENTRIES, Mapping};
use crate::io::scatter::Cursor;
use crate::units::{SectorRange, Sectors};

/// Most sectors of a mapping of data, as upstream writes them: 4 MiB.
const MAX_MAPPING: Sectors = Sectors(8192);

/// Average length of extents below which a write over them goes to free sectors as a whole: one system call
/// instead of many, and one extent.
const SCATTERED: u64 = 64;

/// Part of a write.
struct Target {
    /// Sectors of the disk.
    range: SectorRange,
    /// Sectors of the data file, as many.
    data: SectorRange,
    /// Whether the part needs a new mapping; else it overwrites its data in place.
    fresh: bool,
}

impl Target {
    fn extent(&self) -> Extent {
        Extent::new(self.range, Place::Data(self.data.start()))
    }
}

impl WritableLayer {
    /// Writes the next bytes of `data` to the sectors of `range`. Never waits for storage.
    ///
    /// When it returns, every read finds the new content, even in a later process. The content is durable after the
    /// next [`WritableLayer::flush`].
    ///
    /// # Errors
    /// [`Error::PendingFull`] and [`Error::Full`], after which a flush may help
    /// ([`FlushRetries`](super::super::FlushRetries)); [`Error::Fragmented`], [`Error::Broken`],
    /// [`Error::Frozen`], and errors of the storage. After an error, each sector has its old or its new content.
    pub fn write(&self, range: SectorRange, data: Cursor<'_, '_>) -> Result<(), Error> {
        self.check_pending()?;
        self.write_unchecked(range, data)
    }

    /// Writes without a limit on the mappings that wait for a flush.
    fn write_unchecked(&self, range: SectorRange, mut data: Cursor<'_, '_>) -> Result<(), Error> {
        let _gate = self.enter()?;
        self.data.check_len()?;
        let (targets, _hold) = self.targets(range)?;
        let written = targets.iter().try_for_each(|target| {
            let mut pieces = Vec::new();
            // At most the length of the request's data, which is a `usize`.
            let len = target.range.len().bytes() as usize;
            data.take(len, |piece| pieces.push(piece));
            self.data.write(target.data, &pieces, target.fresh)
        });
        let fresh = targets.iter().filter(|target| target.fresh);
        let extents: Vec<_> = fresh.map(Target::extent).collect();
        let entered = written.and_then(|()| self.publish(&extents).map(drop));
        if entered.is_err() {
            self.give_back(&extents);
        }
        entered
    }

    /// Gives back the space of extents that were not entered.
    fn give_back(&self, extents: &[Extent]) {
        // Records of them that cannot be cut off may be valid at the next start: until then, their space stays
        // unused.
        if self.kind == Kind::Sparse || self.pending.lock().journal.mend().is_err() {
            return;
        }
        let mut placement = self.placement.write();
        for data in extents.iter().filter_map(Extent::data) {
            placement.allocator.give_back(data);
        }
    }

    /// Refuses a change while too many mappings wait for a flush.
    pub(super) fn check_pending(&self) -> Result<(), Error> {
        let mut pending = self.pending.lock();
        pending.journal.mend()?;
        match pending.mappings.len() < self.bounds.max_pending {
            true => Ok(()),
            false => Err(Error::PendingFull {
                most: self.bounds.max_pending,
            }),
        }
    }

    /// The parts of a write: data of the layer is overwritten in place, the rest goes to free sectors.
    fn targets(&self, range: SectorRange) -> Result<(Vec<Target>, Hold), Error> {
        if let Some(whole) = self.target_in_place(range) {
            return Ok(whole);
        }
        let mut placement = self.placement.write();
        let Placement { map, allocator } = &mut *placement;
        let mut targets = Vec::new();
        let pieces = map.within(range).count() as u64;
        let is_scattered = pieces > 1 + range.len().0 / SCATTERED;
        // A sparse layer has one place for every sector. If there is no space for the whole, the pieces are
        // written one by one.
        if (is_scattered || self.kind == Kind::Sparse)
            && self.place(allocator, range, &mut targets).is_ok()
        {
            return Ok((targets, allocator.hold()));
        }
        let mut at = range.start();
        for extent in map.within(range) {
            let Some(data) = extent.data() else {
                continue;
            };
            let gap = SectorRange::new(at, extent.start());
            self.place(allocator, gap, &mut targets)?;
            targets.push(Target {
                range: extent.range(),
                data,
                fresh: false,
            });
            at = extent.end();
        }
        self.place(allocator, SectorRange::new(at, range.end()), &mut targets)?;
        Ok((targets, allocator.hold()))
    }

    /// The most common write: all of the range is overwritten in place.
    fn target_in_place(&self, range: SectorRange) -> Option<(Vec<Target>, Hold)> {
        let placement = self.placement.read();
        let extent = placement.map.within(range).next()?;
        let target = Target {
            range,
            data: extent.data()?,
            fresh: false,
        };
        (extent.range() == range).then(|| (vec![target], placement.allocator.hold()))
    }

    /// Allocates space for a range. If there is not enough, gives back the space of all `targets`.
    fn place(
        &self,
        allocator: &mut Allocator,
        range: SectorRange,
        targets: &mut Vec<Target>,
    ) -> Result<(), Error> {
        let mut start = range.start();
        while start < range.end() {
            let end = range.end().min(start + MAX_MAPPING);
            let part = SectorRange::new(start, end);
            let found = match self.kind {
                Kind::Sparse => Some(sparse_place(part)),
                Kind::Append | Kind::Hybrid => allocator.take(part.len()),
            };
            let Some(data) = found else {
                for target in targets.drain(..).filter(|target| target.fresh) {
                    allocator.give_back(target.data);
                }
                return Err(Error::Full {
                    path: self.data.path().to_owned(),
                    limit: self.limit,
                    will_free: allocator.will_free(),
                });
            };
            let end = start + data.len();
            targets.push(Target {
                range: SectorRange::new(start, end),
                data,
                fresh: true,
            });
            start = end;
        }
        Ok(())
    }

    /// Enters extents in the journal and the map. Returns the extents of data that they replace.
    pub(super) fn publish(&self, extents: &[Extent]) -> Result<Vec<Extent>, Error> {
        let mut new: Vec<Mapping> = extents.iter().flat_map(|new| new.mappings()).collect();
        let mut pending = self.pending.lock();
        if new.is_empty() {
            // A leftover record of a failed change would hide what this one wrote in place.
            return pending.journal.mend().map(|()| Vec::new());
        }
        // After storage lost data, no new mapping may outlive this process.
        self.check_not_broken()?;
        if !self.has_room_for(extents, new.len()) {
            return Err(Error::Fragmented {
                path: self.data.path().to_owned(),
                most: MAX_ENTRIES,
            });
        }
        pending.reservation.take(new.len())?;
        let added = pending.journal.add(&new);
        added.inspect_err(|_| pending.reservation.leave(new.len()))?;
        pending.mappings.append(&mut new);
        Ok(self.enter_in_map(extents))
    }

    /// Enters extents in the map. Returns the extents of data that they replace, whose space is freed.
    fn enter_in_map(&self, extents: &[Extent]) -> Vec<Extent> {
        let mut replaced = Vec::new();
        let mut placement = self.placement.write();
        let Placement { map, allocator } = &mut *placement;
        for extent in extents {
            self.coverage.set(extent.range());
            map.insert(*extent, |old| {
                let Some(data) = old.data() else { return };
                // A sparse layer has a place for every sector, used or not.
                if self.kind != Kind::Sparse {
                    allocator.freed(data);
                }
                replaced.push(old);
            });
        }
        replaced
    }

    /// Whether the map stays within its limit with these extents of `mappings` mappings, or does not grow.
    fn has_room_for(&self, extents: &[Extent], mappings: usize) -> bool {
        let map = &self.placement.read().map;
        // Each new mapping splits at most one other.
        if map.mappings() + 2 * mappings as u64 <= MAX_ENTRIES {
            return true;
        }
        let growth: i64 = extents.iter().map(|new| map.growth(new.range())).sum();
        growth <= 0 || map.mappings().saturating_add_signed(growth) <= MAX_ENTRIES
    }
}

#[cfg(test)]
mod tests {
    use std::path::Path;

    use uuid::Uuid;
    use vm_memory::VolatileSlice;

    use super::*;
    use crate::format::lsmt::Header;
    use crate::io::scatter::Scatter;
    use crate::units::Sector;
    use crate::writable::{Options, Paths, create};

    fn layer(folder: &Path) -> WritableLayer {
        let paths = Paths {
            data: folder.join("data"),
            index: folder.join("index"),
        };
        let header = Header::empty(1 << 20, Uuid::new_v4(), Uuid::nil());
        create(&paths, Kind::Hybrid, &header).unwrap();
        WritableLayer::open(&paths, None, &Options::default()).unwrap()
    }

    fn page(start: u64) -> SectorRange {
        SectorRange::new(Sector(start), Sector(start + 8))
    }

    /// Writes a page without checking the journal first, as if the check had been before the journal failed.
    fn put(layer: &WritableLayer, start: u64) -> Result<(), Error> {
        let mut bytes = [7; 4096];
        let mut scatter = Scatter::new();
        scatter.push(VolatileSlice::from(&mut bytes[..]));
        layer.write_unchecked(page(start), scatter.cursor(0))
    }

    #[test]
    fn what_a_failed_record_may_point_at_is_not_used_again() {
        let folder = tempfile::tempdir().unwrap();
        let layer = layer(folder.path());
        put(&layer, 0).unwrap();
        let healthy = layer.pending.lock().journal.fail().unwrap();
        put(&layer, 8).unwrap_err();
        assert_eq!(layer.used(), 2 * 4096);
        layer.pending.lock().journal.heal(healthy);
        put(&layer, 16).unwrap();
        assert_eq!(layer.used(), 3 * 4096);
    }

    #[test]
    fn nothing_is_done_in_place_beside_a_record_that_may_count() {
        let folder = tempfile::tempdir().unwrap();
        let layer = layer(folder.path());
        put(&layer, 0).unwrap();
        layer.discard(page(16)).unwrap();
        let healthy = layer.pending.lock().journal.fail().unwrap();
        put(&layer, 8).unwrap_err();
        put(&layer, 0).unwrap_err();
        layer.write_zeroes(page(0)).unwrap_err();
        layer.pending.lock().journal.heal(healthy);
        put(&layer, 0).unwrap();
        layer.write_zeroes(page(0)).unwrap();
    }
}
