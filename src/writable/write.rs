//! Changes of a writable layer: data first, then the mapping that makes it count.

use std::io;
use std::ops::Range;
use std::os::unix::fs::FileExt;
use std::sync::PoisonError;
use std::sync::atomic::Ordering;

use rustix::fs::FallocateFlags;
use rustix::io::Errno;

use super::Error;
use super::allocator::{Allocator, Hold, PAGE};
use super::extent_map::{Extent, Place, mappings_of};
use super::layer::{State, WritableLayer};
use crate::format::lsmt::writable::Kind;
use crate::format::lsmt::{FIRST_DATA, MAX_ENTRIES, MAX_LENGTH, Mapping};
use crate::io::scatter::Cursor;
use crate::io::vectored;
use crate::units::{SECTOR_SIZE, Sector};

/// Most sectors of a mapping of data, as upstream writes them: 4 MiB.
const MAX_DATA: u64 = 8192;

/// A write over what is held in pieces of fewer sectors than this, on average, goes to free sectors
/// as a whole: one write in place of many, and one extent.
const PIECE: u64 = 64;

/// Bytes in one piece that storage begins to take as soon as they are written, rather than at the next
/// flush: what comes in such pieces is seldom written again before.
const STREAM: u64 = 128 << 10;

/// Flushes that a write waits for to find space, at most: others may take what they free.
const MAX_FLUSHES: usize = 3;

/// Sectors to discard or zero in one call, at most: bounds its memory, and the time it takes where
/// the layer is scattered.
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
    /// When it returns, the new content is what everybody reads, also a process after us; it is
    /// durable after the next [`WritableLayer::flush`].
    ///
    /// # Errors
    /// The upper is full, broken or frozen, or the system fails. Then each sector has its old
    /// content or the new one. It is full as well if space was given back, but three flushes did
    /// not free it: requests under way, which may still use it, outlasted them, or others took it.
    pub fn write(&self, start: u64, sectors: u64, data: Cursor<'_, '_>) -> Result<(), Error> {
        for _ in 0..MAX_FLUSHES {
            match self.write_now(start, sectors, data) {
                Err(Error::FlushFirst) => self.flush()?,
                done => return done,
            }
        }
        self.make_room()?;
        self.try_write(start, sectors, data)
    }

    /// As [`WritableLayer::write`], but never waits for storage.
    ///
    /// # Errors
    /// As [`WritableLayer::write`], and [`Error::FlushFirst`] where it would wait. A flush may not be enough
    /// to find space: who tries again bounds how often.
    pub fn write_now(&self, start: u64, sectors: u64, data: Cursor<'_, '_>) -> Result<(), Error> {
        if !self.has_room()? {
            return Err(Error::FlushFirst);
        }
        match self.try_write(start, sectors, data) {
            // What was discarded is free after a flush, once no request uses it.
            Err(Error::Full { .. }) if self.state().space.will_free() => Err(Error::FlushFirst),
            done => done,
        }
    }

    /// Whether a flush would free sectors.
    pub(super) fn has_freed(&self) -> bool {
        self.state().space.has_freed()
    }

    fn try_write(&self, start: u64, sectors: u64, mut data: Cursor<'_, '_>) -> Result<(), Error> {
        let _gate = self.enter()?;
        self.check_len()?;
        let (targets, _hold) = self.targets(start, sectors)?;
        let written = targets.iter().try_for_each(|target| {
            let mut pieces = Vec::new();
            // A request's data is a `usize`.
            let len = (target.len * SECTOR_SIZE) as usize;
            data.take(len, |piece| pieces.push(piece));
            let offset = target.at * SECTOR_SIZE;
            vectored::write_all_at(&self.file, &pieces, offset).map_err(Error::bytes(
                "write",
                &self.paths.data,
                offset,
            ))?;
            if len as u64 >= STREAM {
                vectored::begin_to_store(&self.file, offset, len as u64);
            }
            // It only grows: most writes need no more than a look.
            let end = offset + len as u64;
            if target.fresh && self.len.load(Ordering::Relaxed) < end {
                self.len.fetch_max(end, Ordering::Release);
            }
            Ok(())
        });
        // After the write and before its answer: a sync that began in between does not count.
        self.dirty.store(true, Ordering::Release);
        let fresh = targets.iter().filter(|target| target.fresh);
        let extents = fresh.map(|target| Extent {
            start: target.start,
            len: target.len,
            place: Place::Data(target.at),
        });
        let entered = written.and_then(|()| self.publish(extents.clone()).map(drop));
        // Records that cannot be taken back may count after all, at the next start: until then, what
        // they point at stays out of use.
        let is_gone = || self.waiting().journal.mend().is_ok();
        if entered.is_err() && self.kind != Kind::Sparse && is_gone() {
            let mut state = self.state_mut();
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
        self.make_room()?;
        let freed = {
            let _gate = self.enter()?;
            let zero = |extent: &Extent| extent.place == Place::Zero;
            // What is zero already stays; only what is between gets a mapping.
            let zeros: Vec<_> = {
                let state = self.state();
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
            }))?
        };
        if self.kind == Kind::Sparse {
            self.punch_places(&freed, start, sectors);
        }
        Ok(())
    }

    /// Makes `sectors` sectors from `start` on, [`MAX_STEP`] or fewer, read as zeros, and keeps what
    /// space they have.
    ///
    /// # Errors
    /// As [`WritableLayer::write`].
    pub fn write_zeroes(&self, start: u64, sectors: u64) -> Result<(), Error> {
        let (mapped, _hold): (Vec<_>, Hold) = {
            let _gate = self.enter()?;
            let state = self.state();
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
                self.zero(place, extent.len)?;
            }
            at = extent.end();
        }
        match start + sectors {
            end if at < end => self.discard(at, end - at),
            _ => Ok(()),
        }
    }

    /// Bounds what waits for a flush.
    fn make_room(&self) -> Result<(), Error> {
        match self.has_room()? {
            true => Ok(()),
            false => self.flush(),
        }
    }

    /// Whether more may wait for a flush.
    fn has_room(&self) -> Result<bool, Error> {
        let mut waiting = self.waiting();
        waiting.journal.mend()?;
        Ok(waiting.pending.len() < self.max_pending)
    }

    /// Where the parts of a write go: what is held in place, the rest to free sectors.
    fn targets(&self, start: u64, sectors: u64) -> Result<(Vec<Target>, Hold), Error> {
        let end = start + sectors;
        let mut targets = Vec::new();
        {
            // A disk that is full of data needs no more than a look.
            let state = self.state();
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
        let mut state = self.state_mut();
        let State { map, space } = &mut *state;
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

    /// Finds space for a range; what was found already is given back if there is none.
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
                    path: self.paths.data.clone(),
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

    /// Enters extents in journal and map; returns the data that no longer counts.
    fn publish(&self, extents: impl Iterator<Item = Extent>) -> Result<Vec<Extent>, Error> {
        let mut freed = Vec::new();
        let mut new: Vec<Mapping> = Vec::new();
        let mut published = Vec::new();
        for extent in extents {
            published.push(extent);
            new.extend(split(extent));
        }
        let mut waiting = self.waiting();
        if new.is_empty() {
            // A record of a change that failed meanwhile would count over what was done in place.
            return waiting.journal.mend().map(|()| freed);
        }
        // What is noted once storage has lost something would outlive us.
        self.check()?;
        if !self.has_room_for(&published, new.len()) {
            return Err(Error::Fragmented {
                path: self.paths.data.clone(),
                most: MAX_ENTRIES,
            });
        }
        waiting.room.take(new.len())?;
        waiting
            .journal
            .add(&new)
            .inspect_err(|_| waiting.room.leave(new.len()))?;
        waiting.pending.append(&mut new);
        let mut state = self.state_mut();
        let State { map, space } = &mut *state;
        for extent in published {
            self.touched.set(extent.start, extent.len);
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

    /// Whether these extents, `mappings` in all, leave no more mappings than there may be, or no more
    /// than there are.
    fn has_room_for(&self, extents: &[Extent], mappings: usize) -> bool {
        let map = &self.state().map;
        // Each new one cuts off at most two others.
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
        let pages = self.state_mut().space.begin_punch();
        if pages.is_empty() {
            return;
        }
        for range in &pages {
            self.punch(range.start, range.end - range.start);
        }
        self.state_mut().space.end_punch(pages);
    }

    /// Gives back what `sectors` discarded sectors from `start` on took in a sparse layer, and the pages
    /// at both ends if nothing else lies on them.
    fn punch_places(&self, freed: &[Extent], start: u64, sectors: u64) {
        if freed.is_empty() {
            return;
        }
        for extent in freed {
            if let Place::Data(at) = extent.place {
                self.punch(at, extent.len);
            }
        }
        let (first, last) = (start / PAGE * PAGE, (start + sectors - 1) / PAGE * PAGE);
        let is_cut = |page: u64| page < start || page + PAGE > start + sectors;
        let pages = [first, last].into_iter().filter(|page| is_cut(*page));
        for page in pages {
            // A write to another sector of the page may be under way.
            let frozen = self.gate.write().unwrap_or_else(PoisonError::into_inner);
            let data = |extent: Extent| extent.place != Place::Zero;
            let is_free = !self.state().map.within(page..page + PAGE).any(data);
            if is_free && !*frozen {
                self.punch(FIRST_DATA.0 + page, PAGE);
            }
        }
    }

    /// Makes a hole in the data file.
    fn punch(&self, at: u64, sectors: u64) {
        let flags = FallocateFlags::PUNCH_HOLE | FallocateFlags::KEEP_SIZE;
        let (offset, len) = (at * SECTOR_SIZE, sectors * SECTOR_SIZE);
        // On a file system without holes, free sectors take storage until they are used again.
        let _ = rustix::fs::fallocate(&self.file, flags, offset, len);
    }

    /// Fills sectors of the data file with zeros.
    fn zero(&self, at: u64, sectors: u64) -> Result<(), Error> {
        static ZEROS: [u8; 1 << 16] = [0; 1 << 16];
        self.check_len()?;
        let (mut offset, len) = (at * SECTOR_SIZE, sectors * SECTOR_SIZE);
        let end = offset + len;
        let flags = FallocateFlags::ZERO_RANGE | FallocateFlags::KEEP_SIZE;
        let zeroed = match rustix::fs::fallocate(&self.file, flags, offset, len) {
            Err(Errno::OPNOTSUPP) => loop {
                let part = (end - offset).min(ZEROS.len() as u64);
                let written = self.file.write_all_at(&ZEROS[..part as usize], offset);
                offset += part;
                if written.is_err() || offset == end {
                    break written;
                }
            },
            zeroed => zeroed.map_err(io::Error::from),
        };
        self.dirty.store(true, Ordering::Release);
        zeroed.map_err(Error::bytes("zero", &self.paths.data, at * SECTOR_SIZE))?;
        // As after a write in place.
        self.waiting().journal.mend()
    }
}

/// The mappings of an extent: as many as their length field takes.
pub(super) fn split(extent: Extent) -> impl Iterator<Item = Mapping> {
    let most = u64::from(MAX_LENGTH);
    (0..mappings_of(extent.len)).filter_map(move |part| {
        let done = part * most;
        let (start, len) = (extent.start + done, (extent.len - done).min(most) as u16);
        let (start, first) = (Sector(start), FIRST_DATA);
        match extent.place.moved(done) {
            Place::Zero => Mapping::zeroed(start, len, first),
            Place::Data(at) => Mapping::data(start, len, Sector(at)),
        }
    })
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
        let healthy = upper.waiting().journal.fail().unwrap();
        put(&upper, 8).unwrap_err();
        assert_eq!(upper.used(), 2 * 4096);
        upper.waiting().journal.heal(healthy);
        put(&upper, 16).unwrap();
        assert_eq!(upper.used(), 3 * 4096);
    }

    #[test]
    fn nothing_is_done_in_place_beside_a_record_that_may_count() {
        let folder = tempfile::tempdir().unwrap();
        let upper = upper(folder.path());
        put(&upper, 0).unwrap();
        upper.discard(16, 8).unwrap();
        let healthy = upper.waiting().journal.fail().unwrap();
        put(&upper, 8).unwrap_err();
        put(&upper, 0).unwrap_err();
        upper.write_zeroes(0, 8).unwrap_err();
        upper.waiting().journal.heal(healthy);
        put(&upper, 0).unwrap();
        upper.write_zeroes(0, 8).unwrap();
    }
}
