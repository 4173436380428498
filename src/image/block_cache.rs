//! Cache of decoded blocks, shared by all queues of a disk.
//!
//! A read of 4 KiB from a 64 KiB block decodes the whole block. The cache saves decoding a block again. It
//! is bounded by bytes and sharded: a hit takes a shared lock on one shard while it clones a reference.
//! Only reads of a single block use it.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use quick_cache::sync::Cache;
use quick_cache::{DefaultHashBuilder, Lifecycle, Weighter};

/// Identifies a block: id of its container, and number of the block.
pub type BlockId = (u64, u64);

/// A bounded cache of decoded blocks.
#[derive(Debug)]
pub struct BlockCache {
    blocks: Cache<BlockId, Arc<[u8]>, ByBytes, DefaultHashBuilder, Evictions>,
    evictions: Evictions,
}

/// Counts the blocks that make room for others.
#[derive(Clone, Debug, Default)]
struct Evictions(Arc<AtomicU64>);

impl Lifecycle<BlockId, Arc<[u8]>> for Evictions {
    /// The last evicted block, which is freed once the lock of its shard is released.
    type RequestState = Option<Arc<[u8]>>;

    fn on_evict(&self, state: &mut Self::RequestState, _: BlockId, block: Arc<[u8]>) {
        self.0.fetch_add(1, Ordering::Relaxed);
        *state = Some(block);
    }
}

#[derive(Clone, Debug)]
struct ByBytes;

impl Weighter<BlockId, Arc<[u8]>> for ByBytes {
    fn weight(&self, _: &BlockId, block: &Arc<[u8]>) -> u64 {
        block.len() as u64
    }
}

impl BlockCache {
    /// Creates a cache of at most `bytes` bytes of decoded blocks, most of which have `block_size` bytes.
    pub fn new(bytes: u64, block_size: u32) -> Self {
        let items = usize::try_from(bytes / u64::from(block_size.max(1))).unwrap_or(usize::MAX);
        let evictions = Evictions::default();
        let hashes = DefaultHashBuilder::default();
        Self {
            blocks: Cache::with(items, bytes, ByBytes, hashes, evictions.clone()),
            evictions,
        }
    }

    /// Returns a decoded block, if the cache has it.
    pub fn get(&self, id: BlockId) -> Option<Arc<[u8]>> {
        self.blocks.get(&id)
    }

    /// Returns the bytes of all blocks. Locks each shard.
    pub fn bytes(&self) -> u64 {
        self.blocks.weight()
    }

    /// Returns how many blocks were evicted since the last call.
    pub fn take_evictions(&self) -> u64 {
        self.evictions.0.swap(0, Ordering::Relaxed)
    }

    /// Inserts a decoded block, and evicts others if the cache is full.
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
        assert_eq!(cache.bytes(), kept.len() as u64 * 4096);
        assert_eq!(cache.take_evictions(), 10_000 - kept.len() as u64);
        assert_eq!(cache.take_evictions(), 0);
    }
}
