//! The allocator against plain models.

use std::ops::Range;

use super::*;

const UNLIMITED: Sectors = Sectors(u64::MAX);

fn sectors(range: Range<u64>) -> SectorRange {
    SectorRange::new(Sector(range.start), Sector(range.end))
}

/// Pseudo-random numbers below the one that is asked for.
fn numbers(seed: u64) -> impl FnMut(u64) -> u64 {
    let mut state = seed * 88_172_645_463_325_252;
    move |end| {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        state % end
    }
}

/// Whatever sizes a guest writes and discards, the file stays within a few times the disk.
#[test]
fn pieces_of_all_sizes_take_bounded_space() {
    const SECTORS: u64 = 8 << 11;
    for unit in [1, 2, 8] {
        let mut below = numbers(1);
        let mut space = space(u64::MAX);
        let mut disk = vec![None; SECTORS as usize];
        for round in 0..200_000 {
            let len = unit * (1 + below(16));
            let start = below((SECTORS - len) / unit) * unit;
            let part = &mut disk[start as usize..(start + len) as usize];
            // A write goes over what is there; a discard gives it back.
            let is_write = round % 2 == 0;
            for empty in part.chunk_by_mut(|one, other| one.is_some() == other.is_some()) {
                match empty[0] {
                    None if is_write => {
                        let at = space.take(Sectors(empty.len() as u64)).unwrap().start().0;
                        empty
                            .iter_mut()
                            .zip(at..)
                            .for_each(|(sector, at)| *sector = Some(at));
                    }
                    Some(_) if !is_write => {
                        let freed = empty.iter_mut().filter_map(Option::take);
                        freed.for_each(|at| space.freed(sectors(at..at + 1)));
                    }
                    _ => {}
                }
            }
            if below(64) == 0 {
                space.begin_flush();
                space.end_flush();
            }
        }
        assert!(space.end.0 < 3 * SECTORS, "{unit}: {}", space.end);
    }
}

#[test]
fn small_pieces_do_not_hide_a_large_one() {
    let small = (0..40).map(|n| 100 + 20 * n + 1..100 + 20 * n + 9);
    let mut used = Vec::new();
    let mut end = 8;
    for piece in small.chain(std::iter::once(1000..9000)) {
        used.push(sectors(end..piece.start));
        end = piece.end;
    }
    used.push(sectors(end..10_000));
    let mut space = Allocator::new(Sector(8), used, UNLIMITED);
    assert_eq!(space.take(Sectors(8)), Some(sectors(1000..1008)));
}

fn space(limit: u64) -> Allocator {
    Allocator::new(Sector(8), [], Sectors(limit))
}

#[test]
fn gaps_are_found_and_used_again() {
    let mut space = Allocator::new(Sector(8), [8..16, 32..40, 44..48].map(sectors), UNLIMITED);
    assert_eq!(
        space.take(Sectors(1)),
        Some(sectors(40..41)),
        "the smallest that fits"
    );
    assert_eq!(space.take(Sectors(16)), Some(sectors(16..32)));
    assert_eq!(space.take(Sectors(16)), Some(sectors(48..64)));
    assert_eq!(space.take(Sectors(3)), Some(sectors(41..44)));
    assert_eq!(space.used(), Sectors(64));
}

#[test]
fn whole_pages_lie_on_pages() {
    let mut space = space(u64::MAX);
    assert_eq!(space.take(Sectors(3)), Some(sectors(8..11)));
    assert_eq!(space.take(Sectors(8)), Some(sectors(16..24)));
    assert_eq!(
        space.take(Sectors(5)),
        Some(sectors(11..16)),
        "what alignment left is used"
    );
}

#[test]
fn nothing_is_used_again_before_it_is_durable_and_let_go() {
    let mut space = space(8);
    let held = space.hold();
    assert_eq!(space.take(Sectors(8)), Some(sectors(8..16)));
    assert_eq!(space.take(Sectors(1)), None, "the limit");
    assert!(!space.will_free());
    space.freed(sectors(8..16));
    assert_eq!(space.take(Sectors(8)), None);
    space.begin_flush();
    assert_eq!(space.take(Sectors(8)), None);
    let later = space.hold();
    space.end_flush();
    assert_eq!(space.take(Sectors(8)), None, "a request may still read it");
    assert!(space.will_free() && !space.has_freed());
    drop(held);
    assert_eq!(
        space.take(Sectors(8)),
        Some(sectors(8..16)),
        "one that came later does not"
    );
    assert!(!space.will_free());
    drop(later);
}

#[test]
fn a_flush_that_failed_is_made_up_for() {
    let mut space = space(16);
    let held = space.hold();
    assert_eq!(
        (space.take(Sectors(8)), space.take(Sectors(8))),
        (Some(sectors(8..16)), Some(sectors(16..24)))
    );
    space.freed(sectors(8..16));
    space.begin_flush();
    space.freed(sectors(16..24));
    space.begin_flush();
    space.end_flush();
    assert_eq!(space.take(Sectors(8)), None, "held since before the first");
    drop(held);
    assert_eq!(
        (space.take(Sectors(8)), space.take(Sectors(8))),
        (Some(sectors(8..16)), Some(sectors(16..24)))
    );
}

#[test]
fn what_is_given_back_grows_together() {
    let mut space = space(u64::MAX);
    assert_eq!(space.take(Sectors(24)), Some(sectors(8..32)));
    for range in [8..16, 24..32, 16..24] {
        space.give_back(sectors(range));
    }
    assert_eq!(space.take(Sectors(24)), Some(sectors(8..32)));
}

/// Whatever is taken and freed, each page that takes storage has a sector in use.
#[test]
fn free_pages_take_no_storage() {
    for seed in 1..20_u64 {
        let mut below = numbers(seed);
        let mut space = space(u64::MAX);
        let mut stored = BTreeSet::new();
        let mut taken: Vec<SectorRange> = Vec::new();
        for _ in 0..3000 {
            if below(2) == 0 || taken.is_empty() {
                let range = space.take(Sectors(1 + below(30))).unwrap();
                stored.extend(pages_of(range));
                match below(20) {
                    0 => space.give_back(range),
                    _ => taken.push(range),
                }
            } else {
                let range = taken.swap_remove(below(taken.len() as u64) as usize);
                let middle = range.start() + Sectors(below(range.len().0 + 1));
                for (part, keep) in [
                    (SectorRange::new(range.start(), middle), false),
                    (SectorRange::new(middle, range.end()), below(9) == 0),
                ] {
                    match keep {
                        _ if part.is_empty() => {}
                        true => taken.push(part),
                        false => space.freed(part),
                    }
                }
            }
            if below(30) == 0 {
                let held = space.hold();
                space.begin_flush();
                space.end_flush();
                drop(held);
                let pages = space.begin_punch();
                let busy = space.take(Sectors(9)).unwrap();
                assert!(pages.iter().all(|range| !range.overlaps(busy)));
                stored.extend(pages_of(busy));
                taken.push(busy);
                for page in pages.iter().flat_map(|range| pages_of(*range)) {
                    stored.remove(&page);
                }
                space.end_punch(pages);
                let mut used = BTreeSet::new();
                for range in &taken {
                    used.extend(pages_of(*range));
                }
                assert!(stored.is_subset(&used), "seed {seed}");
            }
        }
        let taken: Sectors = taken.iter().map(|range| range.len()).sum();
        assert_eq!(space.used(), Sectors(8) + taken + freed(&space));
    }
}

/// The numbers of the pages that a range lies on.
fn pages_of(range: SectorRange) -> Range<u64> {
    range.start().0 / PAGE.0..range.end().0.div_ceil(PAGE.0)
}

fn freed(space: &Allocator) -> Sectors {
    let waiting = space.freed.iter().chain(&space.flushing);
    let held = space.held.iter().flat_map(|held| &held.ranges);
    waiting.chain(held).map(|range| range.len()).sum()
}

/// A sector kept of every long piece does not make the file longer for ever.
#[test]
fn a_long_file_is_filled_before_it_grows() {
    let mut space = space(u64::MAX);
    for _ in 0..1000 {
        let mut left = 8192;
        while left > 0 {
            let range = space.take(Sectors(left)).unwrap();
            left -= range.len().0;
            let kept = range.start() + Sectors(1);
            space.freed(SectorRange::new(kept, range.end()));
        }
        space.begin_flush();
        space.end_flush();
    }
    assert!(space.end.0 < 2 * LONG.0, "{}", space.end);
}
