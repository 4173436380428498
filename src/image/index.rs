//! The merged index: maps a sector to the segment that covers it. Immutable once built.
//!
//! Keys and values of the segments are two arrays in disk order. The keys, sixteen to a node, are the
//! last level of a static search tree; an inner node holds the last key of each of its sixteen
//! children. There are no pointers. A segment takes eight bytes of key, seven of value, and half a
//! byte of inner nodes, so that the inner nodes above a million segments stay in a core's cache, and a
//! look-up reads memory twice: once for the keys, once for the value.
//!
//! The arrays are on the heap, or in a mapped file of image tables (`tables.rs`). A mapped array may
//! hold anything: each number that is used as a position is checked.

use super::search::{Node, Search, Tree, WIDTH};
use super::segment::{Segment, VALUE_BYTES};
use crate::io::section::Section;
use crate::units::Sector;

/// Key of the unused slots of the last node; not less than that of any segment. They have no value.
const FILLER: u64 = u64::MAX;

/// Bytes after the last value: values are read as whole words and masked.
const SLACK: usize = size_of::<u64>() - VALUE_BYTES;

/// An immutable list of segments, ordered and free of overlaps, for look-ups by sector.
#[derive(Debug)]
pub struct Index {
    tree: Tree,
    /// [`VALUE_BYTES`] of each segment, then [`SLACK`] zeros.
    values: Section<u8>,
    search: Search,
    len: usize,
}

impl Index {
    /// Builds the index of segments that are sorted and do not overlap.
    pub fn new(sorted: &[Segment]) -> Self {
        Self {
            tree: build(sorted.iter().map(|segment| segment.key).collect()),
            values: pack(sorted).into(),
            search: Search::best(),
            len: sorted.len(),
        }
    }

    /// Returns the index of `len` segments with the arrays of [`Index::sections`]; `None` if the arrays
    /// have other lengths.
    pub fn from_sections(nodes: Section<Node>, values: Section<u8>, len: usize) -> Option<Self> {
        let (levels, count) = levels(len);
        let values_len = len.checked_mul(VALUE_BYTES)?.checked_add(SLACK)?;
        let fits = nodes.len() == count && values.len() == values_len;
        fits.then(|| Self {
            tree: Tree { nodes, levels },
            values,
            search: Search::best(),
            len,
        })
    }

    /// Nodes of the search tree, and values of the segments with the slack.
    pub fn sections(&self) -> (&[Node], &[u8]) {
        (&self.tree.nodes, &self.values)
    }

    /// Number of segments.
    pub fn len(&self) -> usize {
        self.len
    }

    /// Whether there is no segment.
    pub fn is_empty(&self) -> bool {
        self.len == 0
    }

    /// Returns the first segment that ends after `sector`. It either covers the sector, or starts at
    /// the end of the hole around it.
    #[inline]
    pub fn find(&self, sector: Sector) -> Option<Segment> {
        let target = Segment::key_for(sector);
        let found = self.get(self.search.below(&self.tree, target)?)?;
        // Damaged keys may lead to any segment. One that ends before `sector` would make no progress.
        (found.end() > sector).then_some(found)
    }

    /// Returns the segment with this number.
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

/// Index of the first node of each level above `len` segments, root first, and the number of nodes.
fn levels(len: usize) -> (Vec<usize>, usize) {
    let mut sizes = Vec::new();
    let mut size = len;
    while size > 1 || (size == 1 && sizes.is_empty()) {
        size = size.div_ceil(WIDTH);
        sizes.push(size);
    }
    let mut nodes = 0;
    let mut starts = Vec::new();
    for size in sizes.iter().rev() {
        starts.push(nodes);
        nodes += size;
    }
    (starts, nodes)
}

/// Builds the tree above the keys, from the bottom up.
fn build(mut keys: Vec<u64>) -> Tree {
    let (starts, count) = levels(keys.len());
    let mut levels: Vec<Vec<Node>> = Vec::new();
    for _ in &starts {
        let parts = keys.chunks(WIDTH);
        let above = parts.clone().filter_map(|part| part.last().copied());
        levels.push(parts.map(node).collect());
        keys = above.collect();
    }
    let mut nodes = Vec::with_capacity(count);
    // Level by level: each is one copy.
    levels
        .iter()
        .rev()
        .for_each(|level| nodes.extend_from_slice(level));
    Tree {
        nodes: nodes.into(),
        levels: starts,
    }
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
    use zerocopy::IntoBytes;

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
            for search in Search::ALL
                .into_iter()
                .filter(|search| search.is_supported())
            {
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
        let bytes = size_of_val(&*index.tree.nodes) + index.values.len();
        assert!(bytes < 16 * index.len(), "{bytes}");
    }

    #[test]
    fn an_index_is_made_of_its_sections() {
        for count in [0, 1, 16, 17, 257, 5000] {
            let index = Index::new(&sample(count));
            let (nodes, values) = index.sections();
            let (nodes, values) = (|| nodes.to_vec().into(), || values.to_vec().into());
            let same = Index::from_sections(nodes(), values(), index.len()).unwrap();
            assert!(same.iter().eq(index.iter()));
            assert!(Index::from_sections(nodes(), values(), index.len() + 1).is_none());
            assert!(Index::from_sections(nodes(), values(), usize::MAX).is_none());
        }
    }

    #[test]
    fn damaged_sections_find_no_segment_before_the_sector() {
        let index = Index::new(&sample(5000));
        let (nodes, values) = index.sections();
        for byte in [0, 0xff, 0x5a] {
            let mut damaged = nodes.to_vec();
            damaged.as_mut_bytes()[2048..].fill(byte);
            let mut index =
                Index::from_sections(damaged.into(), vec![byte; values.len()].into(), 5000)
                    .unwrap();
            for search in Search::ALL
                .into_iter()
                .filter(|search| search.is_supported())
            {
                index.search = search;
                for sector in (0..20_000).map(Sector) {
                    let found = index.find(sector);
                    assert!(
                        found.is_none_or(
                            |found| found.end() > sector && found.start() <= found.end()
                        )
                    );
                }
            }
        }
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
