//! A piece of the merged index, packed into two words, and how two sorted lists become one.

use crate::format::lsmt::{MAX_LENGTH, Mapping};
use crate::units::{Sector, SectorRange, Sectors};

/// Most layers of a stack; the number above the last one means zeros.
pub const MAX_LAYERS: usize = ZEROED as usize - 1;

/// Most mappings in all layers of a stack together.
pub const MAX_MAPPINGS: u64 = 64_000_000;

/// Highest sector of a layer's file that a segment can point at.
pub const MAX_MOFFSET: Sector = Sector((1 << MOFFSET_BITS) - 1);

const LENGTH_BITS: u32 = 14;
const LENGTH_MASK: u64 = (1 << LENGTH_BITS) - 1;
const MOFFSET_BITS: u32 = 44;
const LAYER_BITS: u32 = 12;
const ZEROED: u64 = (1 << LAYER_BITS) - 1;

/// Bytes of a value that are used; the rest are zero.
pub(super) const VALUE_BYTES: usize = ((MOFFSET_BITS + LAYER_BITS) / u8::BITS) as usize;

/// Sectors of the disk that lie in one piece in one layer, or read as zeros.
///
/// `key` holds the last sector above the length, so that keys sort as the disk does and the first
/// key not below `sector << 14` is that of the segment which covers `sector`, if any does. `value`
/// holds the layer above the sector in it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Segment {
    pub(super) key: u64,
    pub(super) value: u64,
}

/// Where a segment's content is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum SegmentContent {
    /// It reads as zeros.
    Zeroed,
    /// From this sector on of the layer with this number, counted from the bottom.
    Data {
        /// Number of the layer.
        layer: u16,
        /// Sector of the layer, inside its wrappers.
        moffset: Sector,
    },
}

impl Segment {
    /// The segment for one mapping of layer `layer`, which is below [`MAX_LAYERS`]; `None` if the
    /// data lies beyond [`MAX_MOFFSET`].
    pub fn new(mapping: Mapping, layer: u16) -> Option<Self> {
        let last = mapping.end().0 - 1;
        let value = if mapping.is_zeroed() {
            ZEROED << MOFFSET_BITS
        } else {
            let moffset = mapping.moffset();
            if moffset > MAX_MOFFSET {
                return None;
            }
            u64::from(layer) << MOFFSET_BITS | moffset.0
        };
        let key = last << LENGTH_BITS | u64::from(mapping.length());
        Some(Self { key, value })
    }

    /// The least key of a segment that covers or follows `sector`.
    #[inline]
    pub(super) fn key_for(sector: Sector) -> u64 {
        sector.0 << LENGTH_BITS
    }

    /// First sector.
    #[inline]
    pub fn start(self) -> Sector {
        self.end() - self.length()
    }

    /// First sector after it.
    #[inline]
    pub fn end(self) -> Sector {
        Sector((self.key >> LENGTH_BITS) + 1)
    }

    /// Number of sectors.
    #[inline]
    pub fn length(self) -> Sectors {
        Sectors(self.key & LENGTH_MASK)
    }

    /// The sectors of the disk.
    #[inline]
    pub fn range(self) -> SectorRange {
        SectorRange::new(self.start(), self.end())
    }

    /// Where the content is.
    #[inline]
    pub fn content(self) -> SegmentContent {
        match self.value >> MOFFSET_BITS {
            ZEROED => SegmentContent::Zeroed,
            layer => SegmentContent::Data {
                layer: layer as u16,
                moffset: Sector(self.value & MAX_MOFFSET.0),
            },
        }
    }

    /// The part from sector `start` up to `end`, which lie inside it in this order.
    fn part(self, start: Sector, end: Sector) -> Self {
        let moved = match self.content() {
            SegmentContent::Zeroed => Sectors(0),
            SegmentContent::Data { .. } => start - self.start(),
        };
        Self {
            key: (end.0 - 1) << LENGTH_BITS | (end - start).0,
            value: self.value + moved.0,
        }
    }

    /// This segment and the `next` one as one, if they continue on the disk and in the layer.
    #[inline]
    fn joined(self, next: Self) -> Option<Self> {
        if self.end() != next.start() {
            return None;
        }
        let moved = match self.content() {
            SegmentContent::Zeroed => Sectors(0),
            SegmentContent::Data { .. } => self.length(),
        };
        let length = self.length() + next.length();
        let continues = self.value + moved.0 == next.value && length.0 <= u64::from(MAX_LENGTH);
        continues.then(|| Self {
            key: next.key - next.length().0 + length.0,
            value: self.value,
        })
    }
}

/// Lays `upper` over `lower`: where both have a segment, the one of `upper` counts. Both are sorted
/// and free of overlaps, and so is the result.
pub fn merge(lower: impl IntoIterator<Item = Segment>, upper: &[Segment]) -> Vec<Segment> {
    let mut lowers = lower.into_iter().peekable();
    let count = lowers.size_hint().1.unwrap_or(0);
    let mut out = Vec::with_capacity(count + upper.len());
    let mut covered = Sector(0); // the sectors below are merged
    for over in upper {
        while let Some(under) = lowers.next_if(|under| under.end() <= over.start()) {
            push_from(&mut out, under, covered);
        }
        if let Some(under) = lowers.peek().filter(|under| under.start() < over.start()) {
            push_from(&mut out, under.part(under.start(), over.start()), covered);
        }
        push(&mut out, *over);
        covered = over.end();
    }
    for under in lowers {
        push_from(&mut out, under, covered);
    }
    out
}

/// Appends what of `segment` does not lie below sector `from`.
fn push_from(out: &mut Vec<Segment>, segment: Segment, from: Sector) {
    if segment.start() >= from {
        push(out, segment);
    } else if segment.end() > from {
        push(out, segment.part(from, segment.end()));
    }
}

fn push(out: &mut Vec<Segment>, segment: Segment) {
    if let Some(last) = out.last_mut()
        && let Some(joined) = last.joined(segment)
    {
        *last = joined;
    } else {
        out.push(segment);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn data(start: u64, length: u16, layer: u16, moffset: u64) -> Segment {
        let mapping = Mapping::data(Sector(start), length, Sector(moffset)).unwrap();
        Segment::new(mapping, layer).unwrap()
    }

    fn zeroed(start: u64, length: u16) -> Segment {
        let mapping = Mapping::zeroed(Sector(start), length, Sector(77)).unwrap();
        Segment::new(mapping, 3).unwrap()
    }

    #[test]
    fn extremes_fit() {
        let layer = (MAX_LAYERS - 1) as u16;
        let last = data((1 << 50) - 16383, 16383, layer, MAX_MOFFSET.0);
        let (start, end) = (Sector((1 << 50) - 16383), Sector(1 << 50));
        assert_eq!(last.range(), SectorRange::new(start, end));
        let moffset = MAX_MOFFSET;
        assert_eq!(last.content(), SegmentContent::Data { layer, moffset });
        let far = Mapping::data(Sector(0), 1, MAX_MOFFSET + Sectors(1)).unwrap();
        assert_eq!(Segment::new(far, 0), None);
        assert_eq!(zeroed(0, 1).content(), SegmentContent::Zeroed);
    }

    #[test]
    fn upper_hides_lower() {
        let lower = [data(0, 100, 0, 8), data(200, 100, 0, 108)];
        let upper = [data(10, 10, 1, 8), zeroed(30, 10), data(90, 130, 1, 18)];
        let expected = [
            data(0, 10, 0, 8),
            data(10, 10, 1, 8),
            data(20, 10, 0, 28),
            zeroed(30, 10),
            data(40, 50, 0, 48),
            data(90, 130, 1, 18),
            data(220, 80, 0, 128),
        ];
        assert_eq!(merge(lower, &upper), expected);
        assert_eq!(merge(upper, &lower).len(), 3, "the other way round");
        assert_eq!(merge(lower, &[]), lower);
        assert_eq!(merge([], &upper), upper);
    }

    #[test]
    fn one_upper_hides_many_and_one_lower_is_cut_often() {
        let small: Vec<_> = (0..50).map(|n| data(n * 10, 3, 0, 8 + n * 100)).collect();
        let large = [data(2, 480, 1, 1000)];
        let merged = merge(small.clone(), &large);
        assert_eq!(merged[..2], [data(0, 2, 0, 8), large[0]]);
        assert_eq!(
            merged[2..],
            [data(482, 1, 0, 8 + 4802), data(490, 3, 0, 4908)]
        );
        let merged = merge(large, &small);
        assert_eq!(merged.len(), 50 + 48);
        assert!(merged.is_sorted_by(|a, b| a.end() <= b.start()));
    }

    #[test]
    fn neighbours_that_continue_are_joined() {
        let joined = merge([data(0, 10, 0, 8)], &[data(10, 5, 0, 18)]);
        assert_eq!(joined, [data(0, 15, 0, 8)]);
        let zeros = merge([zeroed(0, 10)], &[zeroed(10, 16373)]);
        assert_eq!(zeros, [zeroed(0, 16383)]);
        assert_eq!(
            merge(zeros, &[zeroed(16383, 1)]).len(),
            2,
            "length field is full"
        );
        let moved = merge([data(0, 10, 0, 8)], &[data(10, 5, 0, 19)]);
        assert_eq!(moved.len(), 2);
        let other = merge([data(0, 10, 0, 8)], &[data(10, 5, 1, 18)]);
        assert_eq!(other.len(), 2);
    }
}
