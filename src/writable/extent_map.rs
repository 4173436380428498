//! The extent map of a writable layer: which sectors of the disk it covers, and where their data is. Without
//! I/O.
//!
//! Extents are sorted and do not overlap. Neighbours that are adjacent on the disk and in the data file
//! are joined, so that the map grows with the number of separate extents, not with the number of writes.

use std::collections::BTreeMap;

use crate::format::lsmt::{FIRST_DATA, MAX_LENGTH, Mapping};
use crate::units::{Sector, SectorRange, Sectors};

/// Place of the content of an extent.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Place {
    /// It reads as zeros and hides what lies below.
    Zero,
    /// From this sector of the data file on.
    Data(Sector),
}

impl Place {
    /// Returns the place of the content `sectors` further on.
    pub fn moved(self, sectors: Sectors) -> Self {
        match self {
            Place::Zero => Place::Zero,
            Place::Data(at) => Place::Data(at + sectors),
        }
    }
}

/// A run of sectors of the disk whose content is in one place.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Extent {
    /// At least one sector of the disk.
    range: SectorRange,
    place: Place,
}

impl Extent {
    /// Describes the sectors of `range`, at least one, whose content is at `place`.
    pub fn new(range: SectorRange, place: Place) -> Self {
        debug_assert!(!range.is_empty());
        Self { range, place }
    }

    /// Returns the sectors of the disk.
    pub fn range(&self) -> SectorRange {
        self.range
    }

    /// Returns where their content is.
    pub fn place(&self) -> Place {
        self.place
    }

    /// Returns the first sector of the disk.
    pub fn start(&self) -> Sector {
        self.range.start()
    }

    /// Returns the first sector after the extent.
    pub fn end(&self) -> Sector {
        self.range.end()
    }

    /// Returns the number of sectors.
    pub fn len(&self) -> Sectors {
        self.range.len()
    }

    /// Returns the sectors of the data file that hold the content; `None` if it reads as zeros.
    pub fn data(&self) -> Option<SectorRange> {
        match self.place {
            Place::Zero => None,
            Place::Data(at) => Some(SectorRange::new(at, at + self.len())),
        }
    }

    /// The part inside `range`, which the extent overlaps.
    fn clipped(self, range: SectorRange) -> Self {
        let clipped = self.range.intersection(range);
        Self {
            range: clipped,
            place: self.place.moved(clipped.start() - self.start()),
        }
    }

    /// Its index entries: as many as their length field requires.
    pub(super) fn mappings(self) -> impl Iterator<Item = Mapping> {
        let steps = self.range.steps(Sectors(MAX_LENGTH.into()));
        steps.filter_map(move |step| {
            let (start, len) = (step.start(), step.len().0 as u16);
            match self.place.moved(start - self.start()) {
                Place::Zero => Mapping::zeroed(start, len, FIRST_DATA),
                Place::Data(at) => Mapping::data(start, len, at),
            }
        })
    }

    /// Returns both extents as one, if `next` continues this one on the disk and in the data file.
    pub fn joined(&self, next: &Extent) -> Option<Self> {
        let continues = self.end() == next.start() && self.place.moved(self.len()) == next.place;
        continues.then(|| Self {
            range: SectorRange::new(self.start(), next.end()),
            place: self.place,
        })
    }
}

/// A map of extents.
#[derive(Clone, Debug, Default)]
pub struct ExtentMap {
    /// End and place of each extent, by its first sector.
    extents: BTreeMap<Sector, (Sector, Place)>,
    /// Number of index entries that describe the map.
    mappings: u64,
    /// Whether neighbours are not joined.
    apart: bool,
}

impl ExtentMap {
    /// Makes an empty map.
    pub fn new() -> Self {
        Self::default()
    }

    /// Makes an empty map that does not join neighbours.
    pub fn apart() -> Self {
        Self {
            apart: true,
            ..Self::default()
        }
    }

    /// Returns the number of extents.
    pub fn len(&self) -> usize {
        self.extents.len()
    }

    /// Returns the number of index entries that describe the map.
    pub fn mappings(&self) -> u64 {
        self.mappings
    }

    /// Returns whether no sector is covered.
    pub fn is_empty(&self) -> bool {
        self.extents.is_empty()
    }

    /// Returns the end of the last extent; the start of the disk if there is none.
    pub fn end(&self) -> Sector {
        self.extents
            .values()
            .next_back()
            .map_or(Sector(0), |(end, _)| *end)
    }

    /// Returns all extents, in order.
    pub fn iter(&self) -> impl Iterator<Item = Extent> + '_ {
        self.extents.iter().map(extent)
    }

    /// Returns the parts of extents inside `range`, in order.
    pub fn within(&self, range: SectorRange) -> impl Iterator<Item = Extent> + '_ {
        self.overlapping(range)
            .map(move |extent| extent.clipped(range))
    }

    /// The extents that overlap `range`, in order.
    fn overlapping(&self, range: SectorRange) -> impl Iterator<Item = Extent> + '_ {
        let before = self.extents.range(..range.start()).next_back().map(extent);
        let before = before.filter(move |before| before.range.overlaps(range));
        let inside = self.extents.range(range.start()..range.end()).map(extent);
        before.into_iter().chain(inside)
    }

    /// Returns the most index entries that the map gains if a new extent covers `range`; negative if it replaces
    /// several.
    pub fn growth(&self, range: SectorRange) -> i64 {
        let mut growth = mapping_count(range.len()) as i64;
        for old in self.overlapping(range) {
            let left = mapping_count(range.start().saturating_since(old.start()));
            let right = mapping_count(old.end().saturating_since(range.end()));
            growth += (left + right) as i64 - mapping_count(old.len()) as i64;
        }
        growth
    }

    /// Inserts `new`, which replaces what covered its sectors. Calls `removed` with each replaced part.
    pub fn insert(&mut self, new: Extent, mut removed: impl FnMut(Extent)) {
        self.cut(new.range, &mut removed);
        let mut joined = new;
        if !self.apart {
            let before = self.extents.range(..new.start()).next_back().map(extent);
            if let Some(both) = before.and_then(|before| before.joined(&new)) {
                joined = both;
            }
            let after = self.extents.get_key_value(&new.end()).map(extent);
            if let Some(after) = after
                && let Some(both) = joined.joined(&after)
            {
                self.take(after);
                joined = both;
            }
        }
        self.put(joined);
    }

    /// Removes what covers `range`.
    fn cut(&mut self, range: SectorRange, removed: &mut impl FnMut(Extent)) {
        loop {
            let Some(old) = self.overlapping(range).next() else {
                return;
            };
            self.take(old);
            removed(old.clipped(range));
            let left = SectorRange::new(old.start(), range.start());
            let right = SectorRange::new(range.end(), old.end());
            for rest in [left, right] {
                if !rest.is_empty() {
                    self.put(old.clipped(rest));
                }
            }
        }
    }

    /// Puts an extent in, in place of one with the same start.
    fn put(&mut self, extent: Extent) {
        self.mappings += mapping_count(extent.len());
        let new = (extent.end(), extent.place);
        let old = self.extents.insert(extent.start(), new);
        self.mappings -= old.map_or(0, |(end, _)| mapping_count(end - extent.start()));
    }

    /// Takes an extent out.
    fn take(&mut self, extent: Extent) {
        if self.extents.remove(&extent.start()).is_some() {
            self.mappings -= mapping_count(extent.len());
        }
    }
}

/// Returns the index entries that describe a map.
pub fn mappings(map: &ExtentMap) -> impl Iterator<Item = Mapping> + '_ {
    map.iter().flat_map(Extent::mappings)
}

/// Returns the number of index entries for an extent of `len` sectors.
pub fn mapping_count(len: Sectors) -> u64 {
    len.0.div_ceil(u64::from(MAX_LENGTH))
}

fn extent((start, (end, place)): (&Sector, &(Sector, Place))) -> Extent {
    Extent {
        range: SectorRange::new(*start, *end),
        place: *place,
    }
}

/// The sectors of a sparse data file that hold a range of the disk.
pub(super) fn sparse_place(range: SectorRange) -> SectorRange {
    let moved = |sector: Sector| FIRST_DATA + (sector - Sector(0));
    SectorRange::new(moved(range.start()), moved(range.end()))
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn sectors(start: u64, len: u64) -> SectorRange {
        SectorRange::checked(Sector(start), Sectors(len)).unwrap()
    }

    fn data(start: u64, len: u64, at: u64) -> Extent {
        Extent {
            range: sectors(start, len),
            place: Place::Data(Sector(at)),
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
        let within: Vec<_> = map.within(sectors(8, 4)).collect();
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
                let place = at.map_or(Place::Zero, |at| Place::Data(Sector(at)));
                let range = sectors(start, len);
                let new = Extent { range, place };
                let mut expected: Vec<_> = (start..start + len)
                    .filter_map(|sector| model[sector as usize])
                    .collect();
                let mut removed = Vec::new();
                map.insert(new, |part| {
                    removed.extend((0..part.len().0).map(|n| part.place.moved(Sectors(n))));
                });
                let (before, growth) = (apart.mappings(), apart.growth(range));
                apart.insert(new, |_| ());
                prop_assert_eq!(apart.mappings(), before.strict_add_signed(growth));
                prop_assert_eq!(&mut removed, &mut expected);
                for n in 0..len {
                    model[(start + n) as usize] = Some(place.moved(Sectors(n)));
                }
                for map in [&map, &apart] {
                    let mut seen = vec![None; model.len()];
                    let mut end = Sector(0);
                    for extent in map.iter() {
                        prop_assert!(extent.start() >= end && !extent.range.is_empty());
                        end = extent.end();
                        for n in 0..extent.len().0 {
                            let place = extent.place.moved(Sectors(n));
                            seen[(extent.start().0 + n) as usize] = Some(place);
                        }
                    }
                    prop_assert_eq!(map.end(), end);
                    prop_assert_eq!(&seen, &model);
                }
                for map in [&map, &apart] {
                    let expected: u64 = map.iter().map(|extent| mapping_count(extent.len())).sum();
                    prop_assert_eq!(map.mappings(), expected);
                }
                let all: Vec<_> = map.iter().collect();
                prop_assert!(all.windows(2).all(|pair| pair[0].joined(&pair[1]).is_none()));
                let window: Vec<_> = map.within(sectors(10, 20)).flat_map(|extent| {
                    let start = extent.start().0;
                    (0..extent.len().0)
                        .map(move |n| (start + n, extent.place.moved(Sectors(n))))
                }).collect();
                let expected: Vec<_> = (10..30u64)
                    .filter_map(|sector| Some((sector, model[sector as usize]?)))
                    .collect();
                prop_assert_eq!(window, expected);
            }
        }
    }
}
