//! Which sectors of a data file hold something, and which can be used again. Pure, no I/O.
//!
//! Sectors that no longer count are not free at once. After a power loss the log may still point
//! at them, until what replaced them is durable; and a request that looked them up may still be
//! reading or writing them. So they pass three stations: *freed*, then *closing* while a flush makes
//! durable what replaced them, then *settled*, waiting for the last request that may know them to
//! let go of its [`Hold`]; and then they are free.
//!
//! A page of the file that is free as a whole takes no storage: it is *punched*. A block of the file
//! system goes back only when nothing is left in it, however small the pieces are that were freed. So
//! the file takes at most a page for each sector in use.

use std::collections::{BTreeMap, BTreeSet, VecDeque};
use std::ops::Range;
use std::sync::Arc;

/// Sectors in the 4096 bytes that page cache and file systems work in.
pub(super) const PAGE: u64 = 8;

/// Sectors of a file that is not long yet, whatever it holds: 64 MiB.
const LONG: u64 = 1 << 17;

/// Keeps what a request looked up from being used for something else.
#[derive(Clone, Debug, Default)]
pub struct Hold(#[expect(dead_code, reason = "counted, not read")] Arc<()>);

/// Sectors that a flush settled, and what was held before it.
#[derive(Debug)]
struct Settled {
    holds: Vec<Arc<()>>,
    ranges: Vec<Range<u64>>,
}

/// The space of a data file. All numbers are sectors.
#[derive(Debug)]
pub struct Allocator {
    /// First sector never used.
    end: u64,
    /// Free sectors before `end`: length by start, and the same the other way round.
    by_start: BTreeMap<u64, u64>,
    by_len: BTreeSet<(u64, u64)>,
    free: u64,
    /// Most sectors that may be in use.
    limit: u64,
    /// What requests that look something up now hold.
    hold: Arc<()>,
    freed: Vec<Range<u64>>,
    closing: Vec<Range<u64>>,
    settled: VecDeque<Settled>,
    /// What requests held before the flush under way, and before those that failed before it.
    closing_holds: Vec<Arc<()>>,
    /// Ranges that became free and may still take storage. Some may be in use again.
    unpunched: Vec<Range<u64>>,
    /// Sectors that are being punched.
    punching: u64,
}

impl Allocator {
    /// The space of a file whose data starts at sector `first`, of which `used` is in use (sorted,
    /// free of overlaps) and at most `limit` sectors may be.
    pub fn new(first: u64, used: impl IntoIterator<Item = Range<u64>>, limit: u64) -> Self {
        let mut space = Self {
            end: first,
            by_start: BTreeMap::new(),
            by_len: BTreeSet::new(),
            free: 0,
            limit: limit.saturating_add(first),
            hold: Arc::default(),
            freed: Vec::new(),
            closing: Vec::new(),
            settled: VecDeque::new(),
            closing_holds: Vec::new(),
            unpunched: Vec::new(),
            punching: 0,
        };
        for range in used {
            let gap = space.end..range.start;
            space.end = range.end;
            if !gap.is_empty() {
                space.give(gap);
            }
        }
        space
    }

    /// Sectors that are neither free nor beyond the end, a file's header among them.
    pub fn used(&self) -> u64 {
        self.end - self.free
    }

    /// Keeps everything looked up by now from being used again.
    pub fn hold(&self) -> Hold {
        Hold(self.hold.clone())
    }

    /// Takes `len` sectors, in one piece if there is one and else behind the end; `None` at the limit.
    /// Where the file is long for what it holds, it may take fewer: whole pages inside it.
    pub fn take(&mut self, len: u64) -> Option<Range<u64>> {
        // Whole pages stay whole pages, so that to write them again never needs the old ones.
        let unit = if len.is_multiple_of(PAGE) { PAGE } else { 1 };
        self.reclaim();
        if self.used().checked_add(len)? > self.limit {
            return None;
        }
        let fits = |(free, start): &&(u64, u64)| start.next_multiple_of(unit) + len <= start + free;
        // The next size that fits is near: pieces are cut at pages unless small. One that is longer by
        // a page always fits.
        let near = self.by_len.range((len, 0)..).take(16).find(fits);
        let longer = || self.by_len.range((len + unit - 1, 0)..).next();
        if let Some((free, start)) = near.or_else(longer).copied() {
            return Some(self.cut(start..start + free, start.next_multiple_of(unit), len));
        }
        if let Some((run, pages)) = self.pages_inside() {
            let len = (pages.end - pages.start).min(len);
            return Some(self.cut(run, pages.start, len));
        }
        let start = self.end;
        let taken = start.checked_next_multiple_of(unit)?;
        self.end = taken.checked_add(len)?;
        if start < taken {
            self.give(start..taken);
        }
        Some(taken..self.end)
    }

    /// Takes `len` sectors from `taken` on out of a free run.
    fn cut(&mut self, run: Range<u64>, taken: u64, len: u64) -> Range<u64> {
        self.remove(run.start, run.end - run.start);
        for rest in [run.start..taken, taken + len..run.end] {
            if !rest.is_empty() {
                self.give(rest);
            }
        }
        taken..taken + len
    }

    /// The longest free run and the whole pages in it, if the file is long for what it holds.
    fn pages_inside(&self) -> Option<(Range<u64>, Range<u64>)> {
        if self.end <= LONG.saturating_add(self.used().saturating_mul(4)) {
            return None;
        }
        let (len, start) = *self.by_len.last()?;
        let run = start..start + len;
        let pages = run.start.next_multiple_of(PAGE)..run.end / PAGE * PAGE;
        (!pages.is_empty()).then_some((run, pages))
    }

    /// Gives sectors back that a write took and did not come to use.
    pub fn give_back(&mut self, range: Range<u64>) {
        self.unpunched.push(range.clone());
        self.give(range);
    }

    /// Makes sectors free.
    fn give(&mut self, range: Range<u64>) {
        let Range { mut start, mut end } = range;
        if let Some((before, len)) = self.by_start.range(..start).next_back()
            && before + len == start
        {
            let (before, len) = (*before, *len);
            self.remove(before, len);
            start = before;
        }
        if let Some(len) = self.by_start.get(&end).copied() {
            self.remove(end, len);
            end += len;
        }
        let len = end - start;
        self.by_start.insert(start, len);
        self.by_len.insert((len, start));
        self.free += len;
    }

    fn remove(&mut self, start: u64, len: u64) {
        self.by_start.remove(&start);
        self.by_len.remove(&(len, start));
        self.free -= len;
    }

    /// Notes that sectors no longer count.
    pub fn freed(&mut self, range: Range<u64>) {
        self.freed.push(range);
    }

    /// The file is longer than what is in use says: it ends at sector `end`.
    pub fn extend(&mut self, end: u64) {
        if self.end < end {
            self.give(self.end..end);
            self.end = end;
        }
    }

    /// Takes it that everything free may take storage.
    pub fn suspect_all(&mut self) {
        let free = self.by_start.iter();
        self.unpunched = free.map(|(start, len)| *start..start + len).collect();
    }

    /// Leaves everything free to the next flush to free: what is durable may still point at it.
    pub fn withhold(&mut self) {
        self.by_len.clear();
        self.free = 0;
        let free = std::mem::take(&mut self.by_start).into_iter();
        self.freed
            .extend(free.map(|(start, len)| start..start + len));
    }

    /// Whether a flush would free sectors, once nobody holds them any more.
    pub fn has_freed(&self) -> bool {
        !self.freed.is_empty() || !self.closing.is_empty()
    }

    /// Whether sectors that no longer count are not free yet: a flush and the end of the requests
    /// that may know them will free them.
    pub fn will_free(&self) -> bool {
        let held = |settled: &Settled| !settled.ranges.is_empty();
        self.has_freed() || self.punching > 0 || self.settled.iter().any(held)
    }

    /// Takes out the free pages around what became free, for them to be punched. Until
    /// [`Allocator::end_punch`] they count as used.
    pub fn begin_punch(&mut self) -> Vec<Range<u64>> {
        self.reclaim();
        // The rest of the last page holds nothing either.
        self.extend(self.end.next_multiple_of(PAGE));
        let mut freed = std::mem::take(&mut self.unpunched);
        freed.sort_unstable_by_key(|range| range.start);
        let mut pages: Vec<Range<u64>> = Vec::new();
        let mut done = 0;
        for range in freed {
            let end = range.end.next_multiple_of(PAGE);
            done = done.max(range.start / PAGE * PAGE);
            while done < end {
                let Some(run) = self.free_run(done..end) else {
                    break;
                };
                let part = run.start.max(done)..run.end.min(end);
                done = part.end;
                if let Some(found) = self.take_pages(run, part) {
                    match pages.last_mut() {
                        Some(last) if last.end == found.start => last.end = found.end,
                        _ => pages.push(found),
                    }
                }
            }
        }
        pages
    }

    /// The first free run that overlaps a range.
    fn free_run(&self, range: Range<u64>) -> Option<Range<u64>> {
        let run = |(start, len): (&u64, &u64)| *start..start + len;
        let before = self.by_start.range(..=range.start).next_back().map(run);
        let before = before.filter(|before| before.end > range.start);
        before.or_else(|| self.by_start.range(range).next().map(run))
    }

    /// Takes the whole pages of a part out of a free run.
    fn take_pages(&mut self, run: Range<u64>, part: Range<u64>) -> Option<Range<u64>> {
        let pages = part.start.next_multiple_of(PAGE)..part.end / PAGE * PAGE;
        if pages.is_empty() {
            return None;
        }
        let len = pages.end - pages.start;
        self.punching += len;
        Some(self.cut(run, pages.start, len))
    }

    /// The pages from [`Allocator::begin_punch`] take no storage any more.
    pub fn end_punch(&mut self, pages: Vec<Range<u64>>) {
        for range in pages {
            self.punching -= range.end - range.start;
            self.give(range);
        }
    }

    /// A flush begins, which makes durable what replaced the sectors freed so far.
    pub fn begin_flush(&mut self) {
        self.closing.append(&mut self.freed);
        self.closing_holds.push(std::mem::take(&mut self.hold));
    }

    /// It succeeded. After one that failed, the next takes over what it began.
    pub fn end_flush(&mut self) {
        let holds = std::mem::take(&mut self.closing_holds);
        let ranges = std::mem::take(&mut self.closing);
        match self.settled.back_mut() {
            // Flushes that free nothing add no more to it than what is still held.
            Some(last) if last.ranges.is_empty() => {
                last.holds.retain(|hold| Arc::strong_count(hold) > 1);
                last.holds.extend(holds);
                last.ranges = ranges;
            }
            _ => self.settled.push_back(Settled { holds, ranges }),
        }
        self.reclaim();
    }

    /// Frees what nobody holds any more, the oldest first: who holds something may know of
    /// anything freed later.
    fn reclaim(&mut self) {
        while let Some(oldest) = self.settled.front()
            && oldest.holds.iter().all(|hold| Arc::strong_count(hold) == 1)
            && let Some(oldest) = self.settled.pop_front()
        {
            for range in oldest.ranges {
                self.give_back(range);
            }
        }
    }
}

#[cfg(test)]
mod tests;
