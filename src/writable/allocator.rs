//! Which sectors of a data file hold something, and which can be used again. Pure, no I/O.
//!
//! Sectors that no longer count are not free at once. After a power loss the log may still point
//! at them, until what replaced them is durable; and a request that looked them up may still be
//! reading or writing them. So they pass three stations: *freed*, then *closing* while a flush makes
//! durable what replaced them, then *settled*, waiting for the last request that may know them to
//! let go of its [`Hold`]; and then they are free.

use std::collections::{BTreeMap, BTreeSet, VecDeque};
use std::ops::Range;
use std::sync::Arc;

/// Sectors in the 4096 bytes that page cache and file systems work in.
const PAGE: u64 = 8;

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

    /// Takes `len` sectors, in one piece if there is one and else behind the end; `None` at the
    /// limit.
    pub fn take(&mut self, len: u64) -> Option<u64> {
        // Whole pages stay whole pages, so that to write them again never needs the old ones.
        let unit = if len.is_multiple_of(PAGE) { PAGE } else { 1 };
        self.reclaim();
        let fits = |(free, start): &&(u64, u64)| start.next_multiple_of(unit) + len <= start + free;
        // The next size that fits is near: pieces are cut at pages unless small. One that is longer by
        // a page always fits.
        let near = self.by_len.range((len, 0)..).take(16).find(fits);
        let longer = || self.by_len.range((len + unit - 1, 0)..).next();
        let found = near.or_else(longer).copied();
        if self.used().checked_add(len)? > self.limit {
            return None;
        }
        let (start, end) = match found {
            Some((free, start)) => {
                self.remove(start, free);
                (start, start + free)
            }
            None => {
                let start = self.end;
                self.end = start.checked_next_multiple_of(unit)?.checked_add(len)?;
                (start, self.end)
            }
        };
        let taken = start.next_multiple_of(unit);
        for rest in [start..taken, taken + len..end] {
            if !rest.is_empty() {
                self.give(rest);
            }
        }
        Some(taken)
    }

    /// Gives sectors back that nothing ever pointed at.
    pub fn give(&mut self, range: Range<u64>) {
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

    /// Leaves all that is free below sector `end` to the next flush to free: what is durable may
    /// still point at it.
    pub fn withhold(&mut self, end: u64) {
        if self.end < end {
            self.give(self.end..end);
            self.end = end;
        }
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
        self.has_freed() || self.settled.iter().any(held)
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
        self.settled.push_back(Settled { holds, ranges });
        self.reclaim();
    }

    /// Frees what nobody holds any more, the oldest first: who holds something may know of
    /// anything freed later.
    fn reclaim(&mut self) {
        while let Some(oldest) = self.settled.front()
            && oldest.holds.iter().all(|hold| Arc::strong_count(hold) == 1)
            && let Some(oldest) = self.settled.pop_front()
        {
            oldest.ranges.into_iter().for_each(|range| self.give(range));
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Whatever sizes a guest writes and discards, the file stays within a few times the disk.
    #[test]
    fn pieces_of_all_sizes_take_bounded_space() {
        const SECTORS: u64 = 8 << 11;
        for unit in [1, 2, 8] {
            let mut random = 88_172_645_463_325_252_u64;
            let mut below = |end: u64| {
                random ^= random << 13;
                random ^= random >> 7;
                random ^= random << 17;
                random % end
            };
            let mut space = Allocator::new(8, [], u64::MAX);
            let mut disk = vec![None; SECTORS as usize];
            for round in 0..200_000 {
                let len = unit * (1 + below(16));
                let start = below((SECTORS - len) / unit) * unit;
                let sectors = &mut disk[start as usize..(start + len) as usize];
                // A write goes over what is there; a discard gives it back.
                let is_write = round % 2 == 0;
                for empty in sectors.chunk_by_mut(|one, other| one.is_some() == other.is_some()) {
                    match empty[0] {
                        None if is_write => {
                            let at = space.take(empty.len() as u64).unwrap();
                            empty
                                .iter_mut()
                                .zip(at..)
                                .for_each(|(sector, at)| *sector = Some(at));
                        }
                        Some(_) if !is_write => {
                            let freed = empty.iter_mut().filter_map(Option::take);
                            freed.for_each(|at| space.freed(at..at + 1));
                        }
                        _ => {}
                    }
                }
                if below(64) == 0 {
                    space.begin_flush();
                    space.end_flush();
                }
            }
            assert!(space.end < 3 * SECTORS, "{unit}: {} sectors", space.end);
        }
    }

    #[test]
    fn small_pieces_do_not_hide_a_large_one() {
        let small = (0..40).map(|n| 100 + 20 * n + 1..100 + 20 * n + 9);
        let mut used = Vec::new();
        let mut end = 8;
        for piece in small.chain(std::iter::once(1000..9000)) {
            used.push(end..piece.start);
            end = piece.end;
        }
        used.push(end..10_000);
        let mut space = Allocator::new(8, used, u64::MAX);
        assert_eq!(space.take(8), Some(1000));
    }

    fn space(limit: u64) -> Allocator {
        Allocator::new(8, [], limit)
    }

    #[test]
    fn gaps_are_found_and_used_again() {
        let mut space = Allocator::new(8, [8..16, 32..40, 44..48], u64::MAX);
        assert_eq!(space.take(1), Some(40), "the smallest that fits");
        assert_eq!(space.take(16), Some(16));
        assert_eq!(space.take(16), Some(48));
        assert_eq!(space.take(3), Some(41));
        assert_eq!(space.used(), 64);
    }

    #[test]
    fn whole_pages_lie_on_pages() {
        let mut space = space(u64::MAX);
        assert_eq!(space.take(3), Some(8));
        assert_eq!(space.take(8), Some(16));
        assert_eq!(space.take(5), Some(11), "what alignment left is used");
    }

    #[test]
    fn nothing_is_used_again_before_it_is_durable_and_let_go() {
        let mut space = space(8);
        let held = space.hold();
        assert_eq!(space.take(8), Some(8));
        assert_eq!(space.take(1), None, "the limit");
        assert!(!space.will_free());
        space.freed(8..16);
        assert_eq!(space.take(8), None);
        space.begin_flush();
        assert_eq!(space.take(8), None);
        let later = space.hold();
        space.end_flush();
        assert_eq!(space.take(8), None, "a request may still read it");
        assert!(space.will_free() && !space.has_freed());
        drop(held);
        assert_eq!(space.take(8), Some(8), "one that came later does not");
        assert!(!space.will_free());
        drop(later);
    }

    #[test]
    fn a_flush_that_failed_is_made_up_for() {
        let mut space = space(16);
        let held = space.hold();
        assert_eq!((space.take(8), space.take(8)), (Some(8), Some(16)));
        space.freed(8..16);
        space.begin_flush();
        space.freed(16..24);
        space.begin_flush();
        space.end_flush();
        assert_eq!(space.take(8), None, "held since before the first");
        drop(held);
        assert_eq!((space.take(8), space.take(8)), (Some(8), Some(16)));
    }

    #[test]
    fn what_is_given_back_grows_together() {
        let mut space = space(u64::MAX);
        assert_eq!(space.take(24), Some(8));
        for range in [8..16, 24..32, 16..24] {
            space.give(range);
        }
        assert_eq!(space.take(24), Some(8));
    }
}
