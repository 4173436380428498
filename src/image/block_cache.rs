//! Cache of decoded blocks, shared by all queues of a disk.
//!
//! A guest that reads 4 KiB of a 64 KiB block pays for decoding all of it; and machines that boot
//! from one image at the same time decode the same blocks. The cache is bounded by bytes, shared by
//! all queues, and sharded, so that a hit takes a shared lock on one shard for as long as a
//! reference is counted. It holds single blocks: long reads go past it.

use std::sync::Arc;

use quick_cache::Weighter;
use quick_cache::sync::Cache;

/// Which block: container and number in it.
pub type BlockId = (u64, u64);

/// A bounded cache of decoded blocks.
#[derive(Debug)]
pub struct BlockCache {
    blocks: Cache<BlockId, Arc<[u8]>, ByBytes>,
}

#[derive(Clone, Debug)]
struct ByBytes;

impl Weighter<BlockId, Arc<[u8]>> for ByBytes {
    fn weight(&self, _: &BlockId, block: &Arc<[u8]>) -> u64 {
        block.len() as u64
    }
}

impl BlockCache {
    /// A cache of at most `bytes` bytes of decoded blocks, whose usual length is `block_size`.
    pub fn new(bytes: u64, block_size: u32) -> Self {
        let items = usize::try_from(bytes / u64::from(block_size.max(1))).unwrap_or(usize::MAX);
        Self {
            blocks: Cache::with_weighter(items, bytes, ByBytes),
        }
    }

    /// The decoded block, if it is kept.
    pub fn get(&self, id: BlockId) -> Option<Arc<[u8]>> {
        self.blocks.get(&id)
    }

    /// Keeps a decoded block; others go if there is no room.
    pub fn insert(&self, id: BlockId, block: Arc<[u8]>) {
        self.blocks.insert(id, block);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn keeps_no_more_than_it_may() {
        let cache = BlockCache::new(1 << 20, 4096);
        for number in 0..10_000u64 {
            cache.insert((7, number), vec![number as u8; 4096].into());
        }
        let kept: Vec<_> = (0..10_000)
            .filter_map(|number| Some((number, cache.get((7, number))?)))
            .collect();
        assert!(
            !kept.is_empty() && kept.len() <= 256,
            "{} blocks",
            kept.len()
        );
        assert!(
            kept.iter()
                .all(|(number, block)| block[..] == [*number as u8; 4096])
        );
        assert!(cache.get((8, kept[0].0)).is_none(), "another container");
    }
}
