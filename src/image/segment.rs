//! Segments, the entries of the merged index, in two words each; merging of two sorted lists of them.

use crate::format::lsmt::{MAX_LENGTH, Mapping};
use crate::units::{Sector, SectorRange, Sectors};

/// Most layers of a stack. The highest layer number means zeros.
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

/// Bytes of a value that are used; the others are zero.
pub(super) const VALUE_BYTES: usize = ((MOFFSET_BITS + LAYER_BITS) / u8::BITS) as usize;

/// A run of sectors of the disk that are contiguous in one layer, or read as zeros.
///
/// `key` has the last sector in its high bits and the length in its low bits. Keys sort in disk order,
/// and the first key not below `sector << 14` belongs to the segment that covers `sector`, if any
/// does. `value` has the layer number in its high bits and the sector of the layer in its low bits.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Segment {
    pub(super) key: u64,
    pub(super) value: u64,
}

/// Location of a segment's content.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum SegmentContent {
    /// Zeros.
    Zeroed,
    /// Contiguous sectors of a layer.
    Data {
        /// Number of the layer, from the bottom.
        layer: u16,
        /// First sector, counted inside the layer's wrappers.
        moffset: Sector,
    },
}

impl Segment {
    /// Returns the segment of one mapping of layer `layer`, which is below [`MAX_LAYERS`]; `None` if
    /// the data starts after [`MAX_MOFFSET`].
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

    /// Returns the least key that a segment which covers or follows `sector` can have.
    #[inline]
    pub(super) fn key_for(sector: Sector) -> u64 {
        sector.0 << LENGTH_BITS
    }

    /// First sector. A damaged segment that is longer than the disk before its end starts at 0.
    #[inline]
    pub fn start(self) -> Sector {
        Sector(self.end().0.saturating_sub(self.length().0))
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

    /// Location of the content.
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

    /// Cuts the segment to `start..end`, which lie inside it in this order.
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

    /// Joins the segment with the `next` one, if they are contiguous on the disk and in the layer.
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

/// Merges two lists: where both cover a sector, the segment of `upper` is kept. Both lists are sorted
/// and free of overlaps, and so is the result.
pub fn merge(lower: impl IntoIterator<Item = Segment>, upper: &[Segment]) -> Vec<Segment> {
    let mut lowers = lower.into_iter().peekable();
    let count = lowers.size_hint().1.unwrap_or(0);
    let mut out = Vec::with_capacity(count + upper.len());
    let mut covered = Sector(0); // sectors below this one are merged
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

/// Appends the part of `segment` from sector `from` on.
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
