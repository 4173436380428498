//! The merged index: which segment covers a sector. Built once, then only read.
//!
//! Keys lie in a static search tree of nodes of eight, one cache line each, in breadth-first order:
//! the children of node `n` are nodes `9n + 1` to `9n + 9`. No pointers, no space but the padding
//! of the last node; a look-up touches one line per level, five for 50,000 segments.

use super::segment::Segment;

/// Keys in a node.
const WIDTH: usize = 8;

/// One node: a cache line of keys.
#[derive(Clone, Copy, Debug)]
#[repr(align(64))]
struct Node([u64; WIDTH]);

/// Fills up the last node. No segment has this value: a zeroed one has no position.
const NOTHING: u64 = u64::MAX;

/// An immutable list of segments, ordered and free of overlaps, for look-ups by sector.
#[derive(Debug)]
pub struct Index {
    keys: Vec<Node>,
    values: Vec<[u64; WIDTH]>,
    len: usize,
}

impl Index {
    /// The index of these segments, which are sorted and do not overlap.
    pub fn new(sorted: &[Segment]) -> Self {
        let nodes = sorted.len().div_ceil(WIDTH);
        let mut index = Self {
            keys: vec![Node([u64::MAX; WIDTH]); nodes],
            values: vec![[NOTHING; WIDTH]; nodes],
            len: sorted.len(),
        };
        let mut rest = sorted.iter();
        index.fill(0, &mut rest);
        index
    }

    /// Fills the subtree of `node` in order; as deep as the tree, which is ten levels at most.
    fn fill(&mut self, node: usize, rest: &mut std::slice::Iter<'_, Segment>) {
        if node >= self.keys.len() {
            return;
        }
        for slot in 0..WIDTH {
            self.fill(child(node, slot), rest);
            if let Some(segment) = rest.next() {
                self.keys[node].0[slot] = segment.key;
                self.values[node][slot] = segment.value;
            }
        }
        self.fill(child(node, WIDTH), rest);
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
        self.keys.len() * size_of::<Node>() * 2
    }

    /// The first segment that ends after `sector`: it covers the sector or, if it starts later,
    /// tells where the hole around the sector ends.
    #[inline]
    pub fn find(&self, sector: u64) -> Option<Segment> {
        let target = Segment::key_for(sector);
        let mut found = None;
        let mut node = 0;
        while let Some(keys) = self.keys.get(node) {
            let below = count_below(&keys.0, target);
            if below < WIDTH {
                found = Some((node, below));
            }
            node = child(node, below);
        }
        let (node, slot) = found?;
        let (key, value) = (self.keys[node].0[slot], self.values[node][slot]);
        (value != NOTHING).then_some(Segment { key, value })
    }

    /// All segments, in order.
    pub fn iter(&self) -> impl Iterator<Item = Segment> + '_ {
        let mut sector = 0;
        std::iter::from_fn(move || {
            let segment = self.find(sector)?;
            sector = segment.end();
            Some(segment)
        })
    }
}

#[inline]
fn child(node: usize, slot: usize) -> usize {
    node * (WIDTH + 1) + slot + 1
}

/// How many of the sorted keys are below `target`; no branch depends on the keys.
#[inline]
fn count_below(keys: &[u64; WIDTH], target: u64) -> usize {
    keys.iter().map(|key| usize::from(*key < target)).sum()
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
        for count in [0, 1, 7, 8, 9, 71, 72, 73, 80, 81, 657, 5000] {
            let segments = sample(count);
            let index = Index::new(&segments);
            assert_eq!(index.iter().collect::<Vec<_>>(), segments);
            let end = segments.last().map_or(0, |last| last.end());
            let mut expected = segments.iter().copied().peekable();
            for sector in 0..end + 3 {
                while expected
                    .next_if(|segment| segment.end() <= sector)
                    .is_some()
                {}
                assert_eq!(
                    index.find(sector),
                    expected.peek().copied(),
                    "{count} {sector}"
                );
            }
            assert_eq!(index.find((1 << 50) - 1), None);
        }
    }

    #[test]
    fn the_last_sector_of_the_largest_disk() {
        let last = Mapping::data(Sector((1 << 50) - 16383), 16383, Sector(8)).unwrap();
        let last = Segment::new(last, 4093).unwrap();
        let index = Index::new(&[last]);
        assert_eq!(index.find((1 << 50) - 1), Some(last));
        assert_eq!(index.find(0), Some(last));
    }
}
