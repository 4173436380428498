//! The merged index: which segment covers a sector. Built once, then only read.
//!
//! Keys and values of the segments lie in order, apart from each other. The keys, sixteen to a node,
//! are the last level of a static search tree, whose nodes hold the last key of each of their
//! sixteen children. There are no pointers. A segment takes eight bytes of key, seven of value, and
//! half a byte of tree, so that the tree above a million segments stays in a core's cache, and a
//! look-up goes to memory twice: for the keys and for the value.

use super::search::{Node, Search, Tree, WIDTH};
use super::segment::{Segment, VALUE_BYTES};
use crate::units::Sector;

/// Fills up the last node: it follows all segments there can be.
const FILLER: u64 = u64::MAX;

/// A value is read as a whole word and masked, so the last one needs a byte after it.
const SLACK: usize = size_of::<u64>() - VALUE_BYTES;

/// An immutable list of segments, ordered and free of overlaps, for look-ups by sector.
#[derive(Debug)]
pub struct Index {
    tree: Tree,
    /// [`VALUE_BYTES`] of each segment, and the slack.
    values: Vec<u8>,
    search: Search,
    len: usize,
    /// First sector after the last segment.
    end: Sector,
}

impl Index {
    /// The index of these segments, which are sorted and do not overlap.
    pub fn new(sorted: &[Segment]) -> Self {
        Self {
            tree: build(sorted.iter().map(|segment| segment.key).collect()),
            values: pack(sorted),
            search: Search::best(),
            len: sorted.len(),
            end: sorted.last().map_or(Sector(0), |last| last.end()),
        }
    }

    /// Number of segments.
    pub fn len(&self) -> usize {
        self.len
    }

    /// Whether there is no segment.
    pub fn is_empty(&self) -> bool {
        self.len == 0
    }

    /// Bytes of memory the index takes.
    pub fn memory(&self) -> usize {
        size_of_val(&*self.tree.nodes) + self.values.len()
    }

    /// The first segment that ends after `sector`: it covers the sector or, if it starts later,
    /// tells where the hole around the sector ends.
    #[inline]
    pub fn find(&self, sector: Sector) -> Option<Segment> {
        if sector >= self.end {
            return None;
        }
        let target = Segment::key_for(sector);
        self.get(self.search.below(&self.tree, target)?)
    }

    /// The segment with this number.
    #[inline]
    fn get(&self, number: usize) -> Option<Segment> {
        let leaves = self.tree.levels.last()?;
        let key = self.tree.nodes.get(leaves + number / WIDTH)?.0[number % WIDTH];
        let bytes = self.values.get(number * VALUE_BYTES..)?.first_chunk()?;
        let value = u64::from_le_bytes(*bytes) & (u64::MAX >> (8 * SLACK));
        Some(Segment { key, value })
    }

    /// All segments, in order.
    pub fn iter(&self) -> impl Iterator<Item = Segment> + '_ {
        (0..self.len).map_while(|number| self.get(number))
    }
}

/// Lays the keys out, and the tree above them from the bottom up.
fn build(mut keys: Vec<u64>) -> Tree {
    let mut levels: Vec<Vec<Node>> = Vec::new();
    while !keys.is_empty() {
        let parts = keys.chunks(WIDTH);
        let above = parts.clone().filter_map(|part| part.last().copied());
        levels.push(parts.map(node).collect());
        keys = above.collect();
        if keys.len() == 1 {
            break;
        }
    }
    let mut tree = Tree::default();
    tree.nodes.reserve_exact(levels.iter().map(Vec::len).sum());
    for level in levels.iter().rev() {
        tree.levels.push(tree.nodes.len());
        tree.nodes.extend(level);
    }
    tree
}

fn node(keys: &[u64]) -> Node {
    let mut whole = [FILLER; WIDTH];
    whole[..keys.len()].copy_from_slice(keys);
    Node(whole)
}

fn pack(sorted: &[Segment]) -> Vec<u8> {
    let mut values = Vec::with_capacity(sorted.len() * VALUE_BYTES + SLACK);
    for segment in sorted {
        values.extend_from_slice(&segment.value.to_le_bytes()[..VALUE_BYTES]);
    }
    values.extend_from_slice(&[0; SLACK]);
    values
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::format::lsmt::Mapping;
    use crate::units::Sectors;

    /// Segments of one to five sectors with holes of zero to three between them.
    fn sample(count: u64) -> Vec<Segment> {
        let mut start = 2;
        let segments = (0..count).map(|n| {
            let mapping = Mapping::data(Sector(start), 1 + (n % 5) as u16, Sector(8 + n));
            start += 1 + n % 5 + n % 4;
            Segment::new(mapping.unwrap(), (n % 100) as u16).unwrap()
        });
        segments.collect()
    }

    #[test]
    fn finds_what_a_linear_search_finds() {
        for count in [0, 1, 15, 16, 17, 255, 256, 257, 4095, 4096, 4097, 5000] {
            let segments = sample(count);
            let mut index = Index::new(&segments);
            assert_eq!(index.len(), segments.len());
            assert_eq!(index.iter().collect::<Vec<_>>(), segments);
            let end = segments.last().map_or(Sector(0), |last| last.end());
            for search in Search::available() {
                index.search = search;
                let mut rest = segments.iter().copied().peekable();
                for sector in (0..end.0 + 3).map(Sector) {
                    while rest.next_if(|segment| segment.end() <= sector).is_some() {}
                    let found = index.find(sector);
                    assert_eq!(found, rest.peek().copied(), "{count}, {sector}, {search:?}");
                }
            }
            assert_eq!(index.find(Sector(u64::MAX)), None);
        }
    }

    #[test]
    fn no_segment_takes_more_than_sixteen_bytes() {
        let index = Index::new(&sample(100_000));
        assert!(index.memory() < 16 * index.len(), "{}", index.memory());
    }

    #[test]
    fn the_last_sector_of_the_largest_disk() {
        let last = Mapping::data(Sector((1 << 50) - 16383), 16383, Sector(8)).unwrap();
        let last = Segment::new(last, 4093).unwrap();
        let index = Index::new(&[last]);
        assert_eq!(index.find(Sector(1 << 50) - Sectors(1)), Some(last));
        assert_eq!(index.find(Sector(0)), Some(last));
        assert_eq!(index.find(Sector(1 << 50)), None);
    }
}
