//! Block back-end of a disk: the volume behind its virtqueues, and the settings of the workers that
//! serve them.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use super::full_storage::FullStorage;
use super::rate_limit::{LimitsSpec, RateLimiter};
use super::ring::Rings;
use super::stats::{DiskCell, StatsPage};
use crate::image::block_cache::BlockCache;
use crate::virtio::config::DeviceConfig;
use crate::virtio::request::SERIAL_LEN;
use crate::writable::{self, OnFull, Volume};

/// State that all queue workers of a disk share. One exists per disk, for all front-ends.
#[derive(Debug)]
pub struct BlockBackend {
    volume: Arc<Volume>,
    full_storage: FullStorage,
    config: DeviceConfig,
    /// `writeback` field of the configuration space.
    writeback: AtomicBool,
    serial: [u8; SERIAL_LEN],
    cache: Option<Arc<BlockCache>>,
    rings: Rings,
    tuning: Tuning,
    rate_limiter: RateLimiter,
    stats: Arc<StatsPage>,
}

/// Settings of a block back-end that do not follow from its volume.
#[derive(Clone, Debug)]
pub struct BackendOptions {
    /// Number of virtqueues, at least 1.
    pub queues: u16,
    /// Largest size of a virtqueue.
    pub queue_size: u16,
    /// Answer to GET_ID, padded with zeros.
    pub serial: [u8; SERIAL_LEN],
    /// Bytes of decoded blocks that all queues share; 0 keeps none.
    pub block_cache: u64,
    /// What becomes of writes while the storage of the writable layer is full.
    pub on_full: OnFull,
    /// Settings of the queue workers.
    pub tuning: Tuning,
    /// Rate limits at the start.
    pub limits: LimitsSpec,
    /// Counters and gauges of the disk.
    pub stats: Arc<StatsPage>,
}

/// Settings of queue workers that change speed, never answers.
#[derive(Clone, Debug, Default)]
pub struct Tuning {
    /// Longest time to busy-poll the virtqueue before sleeping; zero disables polling.
    pub poll: Duration,
    /// Bytes of the disk to read ahead of sequential reads; 0 disables readahead.
    pub readahead: u64,
    /// Whether bytes of layers are dropped from the page cache once they are served.
    pub drop_cache: bool,
    /// Processors to pin the workers to, in turn; empty pins none.
    pub cpus: Vec<usize>,
}

impl BlockBackend {
    /// Back-end for `volume`. Workers that find no free ring in `rings` read with `pread`.
    pub fn new(volume: Arc<Volume>, options: BackendOptions, rings: Rings) -> Self {
        let block_size = volume.image().block_size();
        let config = DeviceConfig {
            queues: options.queues,
            queue_size: options.queue_size,
            optimal_io: block_size,
            writable: volume.is_writable(),
        };
        let cache = (options.block_cache > 0)
            .then(|| Arc::new(BlockCache::new(options.block_cache, block_size)));
        Self {
            volume,
            full_storage: FullStorage::new(options.on_full),
            config,
            writeback: AtomicBool::new(true),
            serial: options.serial,
            cache,
            rings,
            tuning: options.tuning,
            rate_limiter: RateLimiter::new(options.limits),
            stats: options.stats,
        }
    }

    /// Layers of the disk: the image and the writable layers above it.
    pub fn volume(&self) -> &Arc<Volume> {
        &self.volume
    }

    /// Writes that wait for space in the storage.
    pub fn full_storage(&self) -> &FullStorage {
        &self.full_storage
    }

    /// Features and fixed fields of the virtio-blk device.
    pub fn config(&self) -> &DeviceConfig {
        &self.config
    }

    /// Serial number, which GET_ID returns.
    pub fn serial(&self) -> &[u8; SERIAL_LEN] {
        &self.serial
    }

    /// Whether writes may be answered before they are durable (virtio 1.2, section 5.2.6.2).
    pub fn writeback(&self) -> bool {
        self.writeback.load(Ordering::Relaxed)
    }

    /// Switches the write cache on or off. Switching it off flushes: the driver sends no more flushes,
    /// and relies on every earlier write.
    ///
    /// # Errors
    ///
    /// Those of [`Volume::flush`]; the cache is off all the same.
    pub fn set_writeback(&self, writeback: bool) -> Result<(), writable::Error> {
        let before = self.writeback.swap(writeback, Ordering::Relaxed);
        match before && !writeback {
            true => self.volume.flush(),
            false => Ok(()),
        }
    }

    /// Cache of decoded blocks, if it is enabled.
    pub fn cache(&self) -> Option<&Arc<BlockCache>> {
        self.cache.as_ref()
    }

    /// io_uring rings for the workers.
    pub fn rings(&self) -> &Rings {
        &self.rings
    }

    /// Records how many bytes the writable layer holds, in the statistics.
    pub fn record_used(&self) {
        if let Some(layer) = self.volume.layers().first() {
            self.stats.set(DiskCell::UpperUsed, layer.used());
        }
    }

    /// Counters and gauges of the disk.
    pub fn stats(&self) -> &Arc<StatsPage> {
        &self.stats
    }

    /// Rate limits of the disk.
    pub fn rate_limiter(&self) -> &RateLimiter {
        &self.rate_limiter
    }

    /// Settings of the workers.
    pub fn tuning(&self) -> &Tuning {
        &self.tuning
    }
}
