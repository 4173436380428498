//! Which sectors of the disk a writable layer covers, and where their data is. Pure, no I/O.
//!
//! Extents are ordered and free of overlaps, and joined with their neighbours where disk and data
//! go on: the map grows with the number of separate pieces, not with the number of writes.

use std::collections::BTreeMap;
use std::ops::Range;

use crate::format::lsmt::{FIRST_DATA, MAX_LENGTH, Mapping};
use crate::units::Sector;

/// Where the content of an extent is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Place {
    /// It reads as zeros, whatever lies below.
    Zero,
    /// From this sector of the data file on.
    Data(u64),
}

impl Place {
    /// The place of what lies `sectors` further on.
    pub fn moved(self, sectors: u64) -> Self {
        match self {
            Place::Zero => Place::Zero,
            Place::Data(at) => Place::Data(at + sectors),
        }
    }
}

/// Sectors of the disk that lie in one piece.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Extent {
    /// First sector of the disk.
    pub start: u64,
    /// Number of sectors, at least 1.
    pub len: u64,
    /// Where they are.
    pub place: Place,
}

impl Extent {
    /// First sector after it.
    pub fn end(&self) -> u64 {
        self.start + self.len
    }

    /// The part inside `start..end`, which it overlaps.
    fn clipped(self, start: u64, end: u64) -> Self {
        let from = self.start.max(start);
        Self {
            start: from,
            len: self.end().min(end) - from,
            place: self.place.moved(from - self.start),
        }
    }

    /// Its index entries: as many as their length field needs.
    pub(super) fn mappings(self) -> impl Iterator<Item = Mapping> {
        let most = u64::from(MAX_LENGTH);
        (0..mappings_of(self.len)).filter_map(move |part| {
            let done = part * most;
            let (start, len) = (self.start + done, (self.len - done).min(most) as u16);
            let (start, first) = (Sector(start), FIRST_DATA);
            match self.place.moved(done) {
                Place::Zero => Mapping::zeroed(start, len, first),
                Place::Data(at) => Mapping::data(start, len, Sector(at)),
            }
        })
    }

    fn goes_on_with(&self, next: &Extent) -> bool {
        self.end() == next.start && self.place.moved(self.len) == next.place
    }
}

/// A map of extents.
#[derive(Clone, Debug, Default)]
pub struct ExtentMap {
    extents: BTreeMap<u64, (u64, Place)>,
    /// Index entries they take.
    mappings: u64,
    /// Whether neighbours stay apart, as they arrived.
    apart: bool,
}

impl ExtentMap {
    /// An empty map.
    pub fn new() -> Self {
        Self::default()
    }

    /// An empty map that does not join neighbours.
    pub fn apart() -> Self {
        Self {
            apart: true,
            ..Self::default()
        }
    }

    /// Number of extents.
    pub fn len(&self) -> usize {
        self.extents.len()
    }

    /// Number of index entries that say the same.
    pub fn mappings(&self) -> u64 {
        self.mappings
    }

    /// Whether nothing is covered.
    pub fn is_empty(&self) -> bool {
        self.extents.is_empty()
    }

    /// All extents, in order.
    pub fn iter(&self) -> impl Iterator<Item = Extent> + '_ {
        self.extents.iter().map(extent)
    }

    /// The parts of extents inside `range`, in order.
    pub fn within(&self, range: Range<u64>) -> impl Iterator<Item = Extent> + '_ {
        let Range { start, end } = range;
        let before = self.extents.range(..start).next_back();
        let reaches = |extent: &Extent| extent.end() > start && end > start;
        let before = before.map(extent).filter(reaches);
        let inside = self.extents.range(start..end.max(start)).map(extent);
        let clip = move |extent: Extent| extent.clipped(start, end);
        before.into_iter().chain(inside).map(clip)
    }

    /// How many more index entries it would take, at most, if `range` were covered anew: fewer than
    /// none, where that takes the place of several.
    pub fn growth(&self, range: Range<u64>) -> i64 {
        let Range { start, end } = range;
        let before = self.extents.range(..start).next_back().map(extent);
        let before = before.filter(|before| before.end() > start);
        let inside = self.extents.range(start..end).map(extent);
        let mut growth = mappings_of(end - start) as i64;
        for old in before.into_iter().chain(inside) {
            let left = mappings_of(start.saturating_sub(old.start));
            let right = mappings_of(old.end().saturating_sub(end));
            growth += (left + right) as i64 - mappings_of(old.len) as i64;
        }
        growth
    }

    /// Covers the sectors of `new`, which counts where others were. Calls `removed` with each part
    /// of an extent that no longer counts.
    pub fn insert(&mut self, new: Extent, mut removed: impl FnMut(Extent)) {
        self.cut(new.start, new.end(), &mut removed);
        let mut joined = new;
        if !self.apart {
            let before = self.extents.range(..new.start).next_back().map(extent);
            if let Some(before) = before.filter(|before| before.goes_on_with(&new)) {
                joined.start = before.start;
                joined.len += before.len;
                joined.place = before.place;
            }
            let after = self.extents.get_key_value(&new.end()).map(extent);
            if let Some(after) = after.filter(|after| new.goes_on_with(after)) {
                self.take(after.start);
                joined.len += after.len;
            }
        }
        self.put(joined);
    }

    /// Takes `start..end` out.
    fn cut(&mut self, start: u64, end: u64, removed: &mut impl FnMut(Extent)) {
        let before = self.extents.range(..start).next_back().map(extent);
        if let Some(before) = before.filter(|before| before.end() > start) {
            removed(before.clipped(start, end));
            self.put(before.clipped(before.start, start));
            if before.end() > end {
                self.put(before.clipped(end, before.end()));
                return;
            }
        }
        while let Some(inside) = self.extents.range(start..end).next().map(extent) {
            self.take(inside.start);
            removed(inside.clipped(start, end));
            if inside.end() > end {
                self.put(inside.clipped(end, inside.end()));
            }
        }
    }

    /// Puts an extent in, in place of one that starts where it does.
    fn put(&mut self, extent: Extent) {
        self.mappings += mappings_of(extent.len);
        let new = (extent.len, extent.place);
        let old = self.extents.insert(extent.start, new);
        self.mappings -= old.map_or(0, |(len, _)| mappings_of(len));
    }

    /// Takes the extent out that starts at `start`.
    fn take(&mut self, start: u64) {
        let old = self.extents.remove(&start);
        self.mappings -= old.map_or(0, |(len, _)| mappings_of(len));
    }
}

/// The index entries that say what a map says.
pub fn mappings(map: &ExtentMap) -> impl Iterator<Item = Mapping> + '_ {
    map.iter().flat_map(Extent::mappings)
}

/// Index entries that `len` sectors in one piece take.
pub fn mappings_of(len: u64) -> u64 {
    len.div_ceil(u64::from(MAX_LENGTH))
}

fn extent((start, (len, place)): (&u64, &(u64, Place))) -> Extent {
    Extent {
        start: *start,
        len: *len,
        place: *place,
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn data(start: u64, len: u64, at: u64) -> Extent {
        Extent {
            start,
            len,
            place: Place::Data(at),
        }
    }

    #[test]
    fn sequential_writes_stay_one_extent() {
        let mut map = ExtentMap::new();
        for n in [0, 2, 1, 3] {
            map.insert(data(n * 8, 8, 100 + n * 8), |_| panic!("nothing was there"));
        }
        assert_eq!(map.iter().collect::<Vec<_>>(), [data(0, 32, 100)]);
        let mut apart = ExtentMap::apart();
        for n in 0..4 {
            apart.insert(data(n * 8, 8, 100 + n * 8), |_| ());
        }
        assert_eq!(apart.len(), 4);
    }

    #[test]
    fn the_middle_of_an_extent_is_replaced() {
        let mut map = ExtentMap::new();
        map.insert(data(0, 100, 1000), |_| ());
        let mut removed = Vec::new();
        map.insert(data(10, 5, 2000), |part| removed.push(part));
        assert_eq!(removed, [data(10, 5, 1010)]);
        let expected = [data(0, 10, 1000), data(10, 5, 2000), data(15, 85, 1015)];
        assert_eq!(map.iter().collect::<Vec<_>>(), expected);
        let within: Vec<_> = map.within(8..12).collect();
        assert_eq!(within, [data(8, 2, 1008), data(10, 2, 2000)]);
    }

    const SIZE: u64 = 64;

    proptest! {
        #[test]
        fn equals_an_array(writes in prop::collection::vec(
            (0..SIZE, 1..20u64, prop::option::of(0..200u64), any::<bool>()), 1..60
        )) {
            let (mut map, mut model) = (ExtentMap::new(), vec![None; SIZE as usize + 20]);
            let mut apart = ExtentMap::apart();
            for (start, len, at, _) in writes {
                let place = at.map_or(Place::Zero, Place::Data);
                let new = Extent { start, len, place };
                let mut expected: Vec<_> = (start..start + len)
                    .filter_map(|sector| model[sector as usize])
                    .collect();
                let mut removed = Vec::new();
                map.insert(new, |part| {
                    removed.extend((0..part.len).map(|n| part.place.moved(n)));
                });
                let (before, growth) = (apart.mappings(), apart.growth(start..start + len));
                apart.insert(new, |_| ());
                prop_assert_eq!(apart.mappings(), before.strict_add_signed(growth));
                prop_assert_eq!(&mut removed, &mut expected);
                for n in 0..len {
                    model[(start + n) as usize] = Some(place.moved(n));
                }
                for map in [&map, &apart] {
                    let mut seen = vec![None; model.len()];
                    let mut end = 0;
                    for extent in map.iter() {
                        prop_assert!(extent.start >= end && extent.len > 0);
                        end = extent.end();
                        for n in 0..extent.len {
                            seen[(extent.start + n) as usize] = Some(extent.place.moved(n));
                        }
                    }
                    prop_assert_eq!(&seen, &model);
                }
                for map in [&map, &apart] {
                    let expected: u64 = map.iter().map(|extent| mappings_of(extent.len)).sum();
                    prop_assert_eq!(map.mappings(), expected);
                }
                let all: Vec<_> = map.iter().collect();
                prop_assert!(all.windows(2).all(|pair| !pair[0].goes_on_with(&pair[1])));
                let window: Vec<_> = map.within(10..30).flat_map(|extent| {
                    (0..extent.len).map(move |n| (extent.start + n, extent.place.moved(n)))
                }).collect();
                let expected: Vec<_> = (10..30u64)
                    .filter_map(|sector| Some((sector, model[sector as usize]?)))
                    .collect();
                prop_assert_eq!(window, expected);
            }
        }
    }
}
