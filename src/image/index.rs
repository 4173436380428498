//! The merged index: which segment covers a sector. Built once, then only read.
//!
//! Segments lie in order, sixteen to a leaf. Above them stands a static search tree: a node holds
//! the last key of each of its sixteen children. There are no pointers, and half a byte of tree per
//! segment, so that the tree of a million segments stays in a core's cache and a look-up goes to
//! memory once, for the leaf.

use super::search::{Leaf, Node, Search, Tree, WIDTH};
use super::segment::Segment;

/// Fills up the last leaf: it follows all segments there can be.
const FILLER: Segment = Segment {
    key: u64::MAX,
    value: u64::MAX,
};

/// An immutable list of segments, ordered and free of overlaps, for look-ups by sector.
#[derive(Debug)]
pub struct Index {
    tree: Tree,
    search: Search,
    len: usize,
    /// First sector after the last segment.
    end: u64,
}

impl Index {
    /// The index of these segments, which are sorted and do not overlap.
    pub fn new(sorted: &[Segment]) -> Self {
        Self {
            tree: build(sorted),
            search: Search::best(),
            len: sorted.len(),
            end: sorted.last().map_or(0, |last| last.end()),
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
        size_of_val(&*self.tree.leaves) + size_of_val(&*self.tree.nodes)
    }

    /// The first segment that ends after `sector`: it covers the sector or, if it starts later,
    /// tells where the hole around the sector ends.
    #[inline]
    pub fn find(&self, sector: u64) -> Option<Segment> {
        if sector >= self.end {
            return None;
        }
        self.search.first_from(&self.tree, Segment::key_for(sector))
    }

    /// All segments, in order.
    pub fn iter(&self) -> impl Iterator<Item = Segment> + '_ {
        let segments = self.tree.leaves.iter().flat_map(|leaf| leaf.0);
        segments.take(self.len)
    }
}

/// Lays the segments out, and the tree above them from the bottom up.
fn build(sorted: &[Segment]) -> Tree {
    let parts = sorted.chunks(WIDTH);
    let mut keys: Vec<u64> = parts
        .clone()
        .filter_map(|part| part.last().map(|segment| segment.key))
        .collect();
    let leaves = parts.map(|part| Leaf(filled(part, FILLER))).collect();
    let mut levels = Vec::new();
    while keys.len() > 1 {
        let parts = keys.chunks(WIDTH);
        let above = parts.clone().filter_map(|part| part.last().copied());
        levels.push(parts.map(|part| Node(filled(part, u64::MAX))).collect());
        keys = above.collect();
    }
    let mut tree = Tree {
        leaves,
        ..Tree::default()
    };
    for level in levels.iter().rev() {
        let level: &Vec<Node> = level;
        tree.levels.push(tree.nodes.len());
        tree.nodes.extend(level);
    }
    tree
}

fn filled<T: Copy>(part: &[T], filler: T) -> [T; WIDTH] {
    let mut whole = [filler; WIDTH];
    whole[..part.len()].copy_from_slice(part);
    whole
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::format::lsmt::Mapping;
    use crate::units::Sector;

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
            let end = segments.last().map_or(0, |last| last.end());
            for search in Search::available() {
                index.search = search;
                let mut rest = segments.iter().copied().peekable();
                for sector in 0..end + 3 {
                    while rest.next_if(|segment| segment.end() <= sector).is_some() {}
                    let found = index.find(sector);
                    assert_eq!(found, rest.peek().copied(), "{count} {sector} {search:?}");
                }
            }
            assert_eq!(index.find(u64::MAX), None);
        }
    }

    #[test]
    fn the_last_sector_of_the_largest_disk() {
        let last = Mapping::data(Sector((1 << 50) - 16383), 16383, Sector(8)).unwrap();
        let last = Segment::new(last, 4093).unwrap();
        let index = Index::new(&[last]);
        assert_eq!(index.find((1 << 50) - 1), Some(last));
        assert_eq!(index.find(0), Some(last));
        assert_eq!(index.find(1 << 50), None);
    }

    #[test]
    fn the_tree_takes_little() {
        let index = Index::new(&sample(100_000));
        assert!(index.memory() <= 100_000 * 17, "{}", index.memory());
    }
}
