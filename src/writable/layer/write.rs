//! Writing, discarding and zeroing: data first, then the mapping that makes it count.

use std::ops::Range;

use super::super::Error;
use super::super::allocator::{Allocator, Hold, PAGE};
use super::super::extent_map::{Extent, Place};
use super::{Placement, WritableLayer};
use crate::format::lsmt::writable::Kind;
use crate::format::lsmt::{FIRST_DATA, MAX_ENTRIES, Mapping};
use crate::io::scatter::Cursor;
use crate::units::{SECTOR_SIZE, Sector};

/// Most sectors of a mapping of data, as upstream writes them: 4 MiB.
const MAX_DATA: u64 = 8192;

/// A write over extents of fewer sectors than this, on average, goes to free sectors as a whole: one
/// system call in place of many, and one extent.
const PIECE: u64 = 64;

/// Most flushes that a write waits for to find space: other writes may take what they free.
const MAX_FLUSHES: usize = 3;

/// Most sectors to discard or zero in one call: bounds its memory, and its time where the layer is
/// scattered.
pub const MAX_STEP: u64 = 1 << 14;

/// Part of a write: where it goes.
struct Target {
    start: u64,
    len: u64,
    at: u64,
    /// Whether a mapping must be made for it.
    fresh: bool,
}

impl WritableLayer {
    /// Writes `sectors` sectors from `start` on, with what comes next of `data`.
    ///
    /// When it returns, every read finds the new content, also in a process after this one. It is durable
    /// after the next [`WritableLayer::flush`].
    ///
    /// # Errors
    /// [`Error::Full`] at the limit, [`Error::Fragmented`], [`Error::Broken`], [`Error::Frozen`], or those of
    /// the storage. Then each sector has its old content or the new one. The layer is full as well if
    /// sectors were discarded, but three flushes did not free them: requests under way, which may still
    /// use them, outlasted the flushes, or other writes took them.
    pub fn write(&self, start: u64, sectors: u64, data: Cursor<'_, '_>) -> Result<(), Error> {
        self.with_flushes(|| {
            self.check_pending()?;
            self.try_write(start, sectors, data)
        })
    }

    /// As [`WritableLayer::write`], but never waits for storage.
    ///
    /// # Errors
    /// As [`WritableLayer::write`], and [`Error::FlushFirst`] where it would wait. One flush may not be
    /// enough: the caller bounds how often it tries again.
    pub fn write_now(&self, start: u64, sectors: u64, data: Cursor<'_, '_>) -> Result<(), Error> {
        self.check_pending()?;
        match self.try_write(start, sectors, data) {
            Err(Error::Full { .. }) if self.will_free() => Err(Error::FlushFirst),
            done => done,
        }
    }

    /// Calls `attempt` again after each flush that may help it.
    fn with_flushes<T>(&self, attempt: impl Fn() -> Result<T, Error>) -> Result<T, Error> {
        let mut flushes = 0;
        loop {
            match attempt() {
                Err(Error::FlushFirst) => self.flush()?,
                Err(Error::Full { .. }) if flushes < MAX_FLUSHES && self.will_free() => {
                    self.flush()?;
                    flushes += 1;
                }
                done => return done,
            }
        }
    }

    /// Whether a flush, and the end of the requests that may use them, will free sectors.
    fn will_free(&self) -> bool {
        self.placement.read().space.will_free()
    }

    /// Whether a flush would free sectors.
    pub(super) fn has_freed(&self) -> bool {
        self.placement.read().space.has_freed()
    }

    fn try_write(&self, start: u64, sectors: u64, mut data: Cursor<'_, '_>) -> Result<(), Error> {
        let _gate = self.enter()?;
        self.data.check_len()?;
        let (targets, _hold) = self.targets(start, sectors)?;
        let written = targets.iter().try_for_each(|target| {
            let mut pieces = Vec::new();
            // A request's data is a `usize`.
            let len = (target.len * SECTOR_SIZE) as usize;
            data.take(len, |piece| pieces.push(piece));
            self.data
                .write(Sector(target.at), &pieces, len as u64, target.fresh)
        });
        let fresh = targets.iter().filter(|target| target.fresh);
        let extents = fresh.map(|target| Extent {
            start: target.start,
            len: target.len,
            place: Place::Data(target.at),
        });
        let entered = written.and_then(|()| self.publish(extents.clone()).map(drop));
        // Records that cannot be cut off may count at the next start: until then, what they point at
        // stays out of use.
        let is_gone = || self.pending.lock().journal.mend().is_ok();
        if entered.is_err() && self.kind != Kind::Sparse && is_gone() {
            let mut state = self.placement.write();
            for extent in extents {
                if let Place::Data(at) = extent.place {
                    state.space.give_back(at..at + extent.len);
                }
            }
        }
        entered
    }

    /// Makes `sectors` sectors from `start` on, [`MAX_STEP`] or fewer, read as zeros, and gives back
    /// what they took.
    ///
    /// # Errors
    /// As [`WritableLayer::write`].
    pub fn discard(&self, start: u64, sectors: u64) -> Result<(), Error> {
        let freed = self.with_flushes(|| self.try_discard(start, sectors))?;
        if self.kind == Kind::Sparse {
            self.punch_places(&freed, start, sectors);
        }
        Ok(())
    }

    /// Returns the data that no longer counts.
    fn try_discard(&self, start: u64, sectors: u64) -> Result<Vec<Extent>, Error> {
        self.check_pending()?;
        let _gate = self.enter()?;
        let zero = |extent: &Extent| extent.place == Place::Zero;
        // What is zero already stays; only what is between gets a mapping.
        let zeros: Vec<_> = {
            let state = self.placement.read();
            state
                .map
                .within(start..start + sectors)
                .filter(zero)
                .collect()
        };
        let mut gaps = Vec::new();
        let mut at = start;
        for extent in &zeros {
            gaps.push(at..extent.start);
            at = extent.end();
        }
        gaps.push(at..start + sectors);
        let gaps = gaps.into_iter().filter(|gap| !gap.is_empty());
        self.publish(gaps.map(|gap| Extent {
            start: gap.start,
            len: gap.end - gap.start,
            place: Place::Zero,
        }))
    }

    /// Makes `sectors` sectors from `start` on, [`MAX_STEP`] or fewer, read as zeros, and keeps what
    /// space they have.
    ///
    /// # Errors
    /// As [`WritableLayer::write`].
    pub fn write_zeroes(&self, start: u64, sectors: u64) -> Result<(), Error> {
        let (mapped, _hold): (Vec<_>, Hold) = {
            let _gate = self.enter()?;
            let state = self.placement.read();
            let mapped = state.map.within(start..start + sectors).collect();
            (mapped, state.space.hold())
        };
        let mut at = start;
        for extent in mapped {
            let Place::Data(place) = extent.place else {
                continue;
            };
            if at < extent.start {
                self.discard(at, extent.start - at)?;
            }
            {
                let _gate = self.enter()?;
                self.data.check_len()?;
                self.data.zero(Sector(place), extent.len)?;
                // As after a write in place.
                self.pending.lock().journal.mend()?;
            }
            at = extent.end();
        }
        match start + sectors {
            end if at < end => self.discard(at, end - at),
            _ => Ok(()),
        }
    }

    /// Refuses more mappings than may wait for a flush.
    fn check_pending(&self) -> Result<(), Error> {
        let mut pending = self.pending.lock();
        pending.journal.mend()?;
        match pending.mappings.len() < self.max_pending {
            true => Ok(()),
            false => Err(Error::FlushFirst),
        }
    }

    /// Where the parts of a write go: data of the layer is overwritten in place, the rest goes to free
    /// sectors.
    fn targets(&self, start: u64, sectors: u64) -> Result<(Vec<Target>, Hold), Error> {
        let end = start + sectors;
        let mut targets = Vec::new();
        {
            // The most common case: the whole range is overwritten in place.
            let state = self.placement.read();
            if let Some(extent) = state.map.within(start..end).next()
                && let Place::Data(at) = extent.place
                && (extent.start, extent.len) == (start, sectors)
            {
                targets.push(Target {
                    start,
                    len: sectors,
                    at,
                    fresh: false,
                });
                return Ok((targets, state.space.hold()));
            }
        }
        let mut state = self.placement.write();
        let Placement { map, space } = &mut *state;
        let pieces = map.within(start..end).count() as u64;
        let scattered = pieces > 1 + sectors / PIECE;
        // A sparse layer has one place for every sector. Where there is no room for the whole, its
        // pieces are written.
        if (scattered || self.kind == Kind::Sparse)
            && self.place(space, start..end, &mut targets).is_ok()
        {
            return Ok((targets, space.hold()));
        }
        let mut at = start;
        let held = map.within(start..end);
        for extent in held {
            let Place::Data(place) = extent.place else {
                continue;
            };
            self.place(space, at..extent.start, &mut targets)?;
            targets.push(Target {
                start: extent.start,
                len: extent.len,
                at: place,
                fresh: false,
            });
            at = extent.end();
        }
        self.place(space, at..end, &mut targets)?;
        Ok((targets, space.hold()))
    }

    /// Finds space for a range; gives back what it found if that is not enough.
    fn place(
        &self,
        space: &mut Allocator,
        range: Range<u64>,
        targets: &mut Vec<Target>,
    ) -> Result<(), Error> {
        let mut start = range.start;
        while start < range.end {
            let len = (range.end - start).min(MAX_DATA);
            let found = match self.kind {
                Kind::Sparse => Some(FIRST_DATA.0 + start..FIRST_DATA.0 + start + len),
                Kind::Append | Kind::Hybrid => space.take(len),
            };
            let Some(found) = found else {
                for target in targets.drain(..).filter(|target| target.fresh) {
                    space.give_back(target.at..target.at + target.len);
                }
                return Err(Error::Full {
                    path: self.data.path().to_owned(),
                    limit: self.limit,
                });
            };
            let len = found.end - found.start;
            targets.push(Target {
                start,
                len,
                at: found.start,
                fresh: true,
            });
            start += len;
        }
        Ok(())
    }

    /// Enters extents in the journal and the map; returns the data that no longer counts.
    fn publish(&self, extents: impl Iterator<Item = Extent>) -> Result<Vec<Extent>, Error> {
        let mut freed = Vec::new();
        let mut new: Vec<Mapping> = Vec::new();
        let mut published = Vec::new();
        for extent in extents {
            published.push(extent);
            new.extend(extent.mappings());
        }
        let mut pending = self.pending.lock();
        if new.is_empty() {
            // A record of a change that failed meanwhile would count over what was done in place.
            return pending.journal.mend().map(|()| freed);
        }
        // Once storage has lost data, no new mapping may outlive this process.
        self.check()?;
        if !self.has_room_for(&published, new.len()) {
            return Err(Error::Fragmented {
                path: self.data.path().to_owned(),
                most: MAX_ENTRIES,
            });
        }
        pending.reservation.take(new.len())?;
        pending
            .journal
            .add(&new)
            .inspect_err(|_| pending.reservation.leave(new.len()))?;
        pending.mappings.append(&mut new);
        let mut state = self.placement.write();
        let Placement { map, space } = &mut *state;
        for extent in published {
            self.coverage.set(extent.start, extent.len);
            map.insert(extent, |old| {
                if let Place::Data(at) = old.place {
                    // A sparse layer has a place for every sector, used or not.
                    if self.kind != Kind::Sparse {
                        space.freed(at..at + old.len);
                    }
                    freed.push(old);
                }
            });
        }
        Ok(freed)
    }

    /// Whether these extents, `mappings` in all, keep the map within its limit, or do not make it longer.
    fn has_room_for(&self, extents: &[Extent], mappings: usize) -> bool {
        let map = &self.placement.read().map;
        // Each new mapping splits at most one other.
        if map.mappings() + 2 * mappings as u64 <= MAX_ENTRIES {
            return true;
        }
        let growth = extents.iter().map(|new| map.growth(new.start..new.end()));
        let growth: i64 = growth.sum();
        growth <= 0 || map.mappings().saturating_add_signed(growth) <= MAX_ENTRIES
    }

    /// Gives back what free pages of the data file take, after a flush. A sparse layer has a place for
    /// every sector, and gives it back when it is discarded.
    pub(super) fn punch_free(&self) {
        if self.kind == Kind::Sparse {
            return;
        }
        let pages = self.placement.write().space.begin_punch();
        if pages.is_empty() {
            return;
        }
        for range in &pages {
            self.data
                .punch(Sector(range.start), range.end - range.start);
        }
        self.placement.write().space.end_punch(pages);
    }

    /// Gives back what `sectors` discarded sectors from `start` on took in a sparse layer, and the pages
    /// at both ends if nothing else lies on them.
    fn punch_places(&self, freed: &[Extent], start: u64, sectors: u64) {
        if freed.is_empty() {
            return;
        }
        for extent in freed {
            if let Place::Data(at) = extent.place {
                self.data.punch(Sector(at), extent.len);
            }
        }
        let (first, last) = (start / PAGE * PAGE, (start + sectors - 1) / PAGE * PAGE);
        let is_cut = |page: u64| page < start || page + PAGE > start + sectors;
        let pages = [first, last].into_iter().filter(|page| is_cut(*page));
        for page in pages {
            // A write to another sector of the page may be under way.
            let frozen = self.gate.write();
            let data = |extent: Extent| extent.place != Place::Zero;
            let is_free = !self
                .placement
                .read()
                .map
                .within(page..page + PAGE)
                .any(data);
            if is_free && !*frozen {
                self.data.punch(Sector(FIRST_DATA.0 + page), PAGE);
            }
        }
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
    use crate::writable::{Options, Paths, create};

    fn upper(folder: &Path) -> WritableLayer {
        let paths = Paths {
            data: folder.join("data"),
            index: folder.join("index"),
        };
        let header = Header::empty(1 << 20, Uuid::new_v4(), Uuid::nil());
        create(&paths, Kind::Hybrid, &header).unwrap();
        WritableLayer::open(&paths, &Options::default()).unwrap()
    }

    /// Writes without a look at what waits, as if that had been before the journal failed.
    fn put(upper: &WritableLayer, start: u64) -> Result<(), Error> {
        let mut bytes = [7; 4096];
        let mut scatter = Scatter::new();
        scatter.push(VolatileSlice::from(&mut bytes[..]));
        upper.try_write(start, 8, scatter.cursor(0))
    }

    #[test]
    fn what_a_failed_record_may_point_at_is_not_used_again() {
        let folder = tempfile::tempdir().unwrap();
        let upper = upper(folder.path());
        put(&upper, 0).unwrap();
        let healthy = upper.pending.lock().journal.fail().unwrap();
        put(&upper, 8).unwrap_err();
        assert_eq!(upper.used(), 2 * 4096);
        upper.pending.lock().journal.heal(healthy);
        put(&upper, 16).unwrap();
        assert_eq!(upper.used(), 3 * 4096);
    }

    #[test]
    fn nothing_is_done_in_place_beside_a_record_that_may_count() {
        let folder = tempfile::tempdir().unwrap();
        let upper = upper(folder.path());
        put(&upper, 0).unwrap();
        upper.discard(16, 8).unwrap();
        let healthy = upper.pending.lock().journal.fail().unwrap();
        put(&upper, 8).unwrap_err();
        put(&upper, 0).unwrap_err();
        upper.write_zeroes(0, 8).unwrap_err();
        upper.pending.lock().journal.heal(healthy);
        put(&upper, 0).unwrap();
        upper.write_zeroes(0, 8).unwrap();
    }
}
