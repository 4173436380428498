//! The allocator of a writable layer: which sectors of the data file are in use, and which are free. Without
//! I/O.
//!
//! Replaced or discarded sectors are not free at once. Until their replacement is durable, the index may point
//! at them after a power loss; and a request that looked them up may still read or write
//! them. So they pass through these states:
//!
//! | state | until |
//! |---|---|
//! | *freed* | a flush begins |
//! | *flushing* | the flush succeeds: their replacement is durable |
//! | *held* | the last request that may have looked them up drops its [`Hold`] |
//! | free | |
//!
//! Free pages of the file are punched, so that they take no storage. A page can be punched only when all of its
//! sectors are free. So the file takes at most one page for each sector in use.

use std::collections::{BTreeMap, BTreeSet, VecDeque};
use std::sync::Arc;

use crate::units::{Sector, SectorRange, Sectors};

/// Sectors in a page: the 4096 bytes that the page cache and file systems work in.
pub(super) const PAGE: Sectors = Sectors(8);

/// Length up to which a file is never too long for its data: 64 MiB.
const LONG: Sectors = Sectors(1 << 17);

/// Free runs of about the right length that are examined for alignment.
const MAX_CANDIDATES: usize = 16;

/// Keeps the sectors that a request looked up from being used again.
#[derive(Clone, Debug, Default)]
pub struct Hold(#[expect(dead_code, reason = "counted, not read")] Arc<()>);

/// Sectors whose replacement is durable, and the holds that were taken before.
#[derive(Debug)]
struct Held {
    holds: Vec<Arc<()>>,
    ranges: Vec<SectorRange>,
}

/// The allocator of a data file.
#[derive(Debug)]
pub struct Allocator {
    /// First sector that was never used.
    end: Sector,
    /// Free runs before `end`: the end of each, by its start.
    by_start: BTreeMap<Sector, Sector>,
    /// The same runs: length and start.
    by_len: BTreeSet<(Sectors, Sector)>,
    free: Sectors,
    /// Most sectors that may be in use.
    limit: Sectors,
    /// Shared with the holds of requests that look sectors up now.
    hold: Arc<()>,
    freed: Vec<SectorRange>,
    flushing: Vec<SectorRange>,
    /// Holds taken before the current flush began, and before failed flushes since the last success.
    flushing_holds: Vec<Arc<()>>,
    /// Oldest first.
    held: VecDeque<Held>,
    /// Ranges that became free and may still take storage. Some may be in use again.
    unpunched: Vec<SectorRange>,
    /// Sectors that are being punched.
    punching: Sectors,
}

impl Allocator {
    /// Makes the allocator of a file whose data starts at sector `first`. `used` is in use (sorted, without overlaps);
    /// at most `limit` sectors may be in use.
    pub fn new(first: Sector, used: impl IntoIterator<Item = SectorRange>, limit: Sectors) -> Self {
        let mut allocator = Self {
            end: first,
            by_start: BTreeMap::new(),
            by_len: BTreeSet::new(),
            free: Sectors(0),
            limit: Sectors(limit.0.saturating_add(first.0)),
            hold: Arc::default(),
            freed: Vec::new(),
            flushing: Vec::new(),
            flushing_holds: Vec::new(),
            held: VecDeque::new(),
            unpunched: Vec::new(),
            punching: Sectors(0),
        };
        for range in used {
            let gap = SectorRange::new(allocator.end, range.start());
            allocator.end = range.end();
            if !gap.is_empty() {
                allocator.give(gap);
            }
        }
        allocator
    }

    /// Returns the number of sectors that are neither free nor beyond the end, including the header of the file.
    pub fn used(&self) -> Sectors {
        self.end - Sector(0) - self.free
    }

    /// Keeps all sectors that are in use now from being allocated again, until the hold is dropped.
    pub fn hold(&self) -> Hold {
        Hold(self.hold.clone())
    }

    /// Allocates `len` sectors: a free run if there is one, else behind the end; `None` at the limit. In a file
    /// that is much longer than its data, the result may be shorter: whole pages inside the file.
    pub fn take(&mut self, len: Sectors) -> Option<SectorRange> {
        // Whole pages are allocated on page boundaries, so that overwriting them never reads the old ones.
        let is_paged = len.0.is_multiple_of(PAGE.0);
        let unit = if is_paged { PAGE } else { Sectors(1) };
        self.reclaim();
        if self.used().0.checked_add(len.0)? > self.limit.0 {
            return None;
        }
        if let Some((run, start)) = self.best_fit(len, unit) {
            return Some(self.cut(run, SectorRange::new(start, start + len)));
        }
        if let Some((run, pages)) = self.pages_inside() {
            let end = pages.end().min(pages.start() + len);
            return Some(self.cut(run, SectorRange::new(pages.start(), end)));
        }
        let start = Sector(self.end.0.checked_next_multiple_of(unit.0)?);
        let taken = SectorRange::checked(start, len)?;
        let skipped = SectorRange::new(self.end, start);
        self.end = taken.end();
        if !skipped.is_empty() {
            self.give(skipped);
        }
        Some(taken)
    }

    /// The shortest free run that holds `len` sectors from a multiple of `unit` on, and that multiple.
    fn best_fit(&self, len: Sectors, unit: Sectors) -> Option<(SectorRange, Sector)> {
        let fits =
            |(free, start): &&(Sectors, Sector)| start.round_up(unit) + len <= *start + *free;
        let from = |len| self.by_len.range((len, Sector(0))..);
        // Runs are cut at page boundaries unless they are small, so the next longer ones usually fit. A run that
        // is longer by a page always does.
        let near = from(len).take(MAX_CANDIDATES).find(fits);
        let longer = || from(len + unit - Sectors(1)).next();
        let (free, start) = near.or_else(longer).copied()?;
        Some((SectorRange::new(start, start + free), start.round_up(unit)))
    }

    /// Takes `taken` out of the free run `run`.
    fn cut(&mut self, run: SectorRange, taken: SectorRange) -> SectorRange {
        self.remove(run);
        let before = SectorRange::new(run.start(), taken.start());
        let after = SectorRange::new(taken.end(), run.end());
        for rest in [before, after] {
            if !rest.is_empty() {
                self.give(rest);
            }
        }
        taken
    }

    /// The longest free run and the whole pages in it, if the file is much longer than its data.
    fn pages_inside(&self) -> Option<(SectorRange, SectorRange)> {
        if self.end.0 <= LONG.0.saturating_add(self.used().0.saturating_mul(4)) {
            return None;
        }
        let (len, start) = *self.by_len.last()?;
        let run = SectorRange::new(start, start + len);
        let pages = whole_pages(run);
        (!pages.is_empty()).then_some((run, pages))
    }

    /// Gives back sectors that a write allocated and did not use.
    pub fn give_back(&mut self, range: SectorRange) {
        self.unpunched.push(range);
        self.give(range);
    }

    /// Makes sectors free.
    fn give(&mut self, range: SectorRange) {
        let mut joined = range;
        if let Some((start, end)) = self.by_start.range(..range.start()).next_back()
            && *end == range.start()
        {
            let before = SectorRange::new(*start, *end);
            self.remove(before);
            joined = SectorRange::new(before.start(), joined.end());
        }
        if let Some(end) = self.by_start.get(&range.end()).copied() {
            self.remove(SectorRange::new(range.end(), end));
            joined = SectorRange::new(joined.start(), end);
        }
        self.by_start.insert(joined.start(), joined.end());
        self.by_len.insert((joined.len(), joined.start()));
        self.free += joined.len();
    }

    /// Removes a free run from the maps.
    fn remove(&mut self, run: SectorRange) {
        self.by_start.remove(&run.start());
        self.by_len.remove(&(run.len(), run.start()));
        self.free -= run.len();
    }

    /// Marks sectors freed: their content was replaced or discarded.
    pub fn freed(&mut self, range: SectorRange) {
        self.freed.push(range);
    }

    /// Adds the sectors up to `end`, the end of a file that is longer than what is in use.
    pub fn extend(&mut self, end: Sector) {
        if self.end < end {
            self.give(SectorRange::new(self.end, end));
            self.end = end;
        }
    }

    /// The free runs, in order.
    fn runs(&self) -> impl Iterator<Item = SectorRange> + '_ {
        let runs = self.by_start.iter();
        runs.map(|(start, end)| SectorRange::new(*start, *end))
    }

    /// Marks all free sectors as not punched.
    pub fn suspect_all(&mut self) {
        self.unpunched = self.runs().collect();
    }

    /// Marks all free sectors as freed: until the next flush, the durable index may point at them.
    pub fn withhold(&mut self) {
        let mut free: Vec<_> = self.runs().collect();
        self.freed.append(&mut free);
        self.by_start.clear();
        self.by_len.clear();
        self.free = Sectors(0);
    }

    /// Returns whether a flush would free sectors, once the holds on them are dropped.
    pub fn has_freed(&self) -> bool {
        !self.freed.is_empty() || !self.flushing.is_empty()
    }

    /// Returns whether some freed sectors become free later: after a flush, or when requests that may have looked
    /// them up end.
    pub fn will_free(&self) -> bool {
        let has_ranges = |held: &Held| !held.ranges.is_empty();
        self.has_freed() || !self.punching.is_zero() || self.held.iter().any(has_ranges)
    }

    /// Takes out the free pages around the sectors that became free, to be punched. They count as used until
    /// [`Allocator::end_punch`].
    pub fn begin_punch(&mut self) -> Vec<SectorRange> {
        self.reclaim();
        // The rest of the last page is unused too.
        self.extend(self.end.round_up(PAGE));
        let mut freed = std::mem::take(&mut self.unpunched);
        freed.sort_unstable_by_key(|range| range.start());
        let mut pages: Vec<SectorRange> = Vec::new();
        let mut done = Sector(0);
        for range in freed {
            let end = range.end().round_up(PAGE);
            done = done.max(range.start().round_down(PAGE));
            while done < end {
                let rest = SectorRange::new(done, end);
                let Some(run) = self.free_run(rest) else {
                    break;
                };
                let part = run.intersection(rest);
                done = part.end();
                if let Some(found) = self.take_pages(run, part) {
                    push_joined(&mut pages, found);
                }
            }
        }
        pages
    }

    /// The first free run that overlaps a range.
    fn free_run(&self, range: SectorRange) -> Option<SectorRange> {
        let run = |(start, end): (&Sector, &Sector)| SectorRange::new(*start, *end);
        let before = self.by_start.range(..=range.start()).next_back().map(run);
        let before = before.filter(|before| before.end() > range.start());
        let after = || self.by_start.range(range.start()..range.end()).next();
        before.or_else(|| after().map(run))
    }

    /// Takes the whole pages of a part out of a free run.
    fn take_pages(&mut self, run: SectorRange, part: SectorRange) -> Option<SectorRange> {
        let pages = whole_pages(part);
        if pages.is_empty() {
            return None;
        }
        self.punching += pages.len();
        Some(self.cut(run, pages))
    }

    /// Frees the pages from [`Allocator::begin_punch`], which no longer take storage.
    pub fn end_punch(&mut self, pages: Vec<SectorRange>) {
        for range in pages {
            self.punching -= range.len();
            self.give(range);
        }
    }

    /// Begins a flush, which makes the replacement of all freed sectors durable.
    pub fn begin_flush(&mut self) {
        self.flushing.append(&mut self.freed);
        self.flushing_holds.push(std::mem::take(&mut self.hold));
    }

    /// Ends a flush that succeeded. After one that failed, the next flush covers its sectors too.
    pub fn end_flush(&mut self) {
        let holds = std::mem::take(&mut self.flushing_holds);
        let ranges = std::mem::take(&mut self.flushing);
        match self.held.back_mut() {
            // Flushes that free nothing add only the holds that still exist.
            Some(last) if last.ranges.is_empty() => {
                last.holds.retain(|hold| Arc::strong_count(hold) > 1);
                last.holds.extend(holds);
                last.ranges = ranges;
            }
            _ => self.held.push_back(Held { holds, ranges }),
        }
        self.reclaim();
    }

    /// Frees the sectors whose holds were dropped, the oldest first: a request may have looked up anything that
    /// was freed after it took its hold.
    fn reclaim(&mut self) {
        while let Some(oldest) = self.held.front()
            && oldest.holds.iter().all(|hold| Arc::strong_count(hold) == 1)
            && let Some(oldest) = self.held.pop_front()
        {
            for range in oldest.ranges {
                self.give_back(range);
            }
        }
    }
}

/// The whole pages in a range; an empty range if there are none.
fn whole_pages(range: SectorRange) -> SectorRange {
    SectorRange::new(range.start().round_up(PAGE), range.end().round_down(PAGE))
}

/// Appends a range, or extends the last one, which it may continue.
fn push_joined(ranges: &mut Vec<SectorRange>, next: SectorRange) {
    match ranges.last_mut() {
        Some(last) if last.end() == next.start() => {
            *last = SectorRange::new(last.start(), next.end());
        }
        _ => ranges.push(next),
    }
}

#[cfg(test)]
mod tests;
