//! One worker per virtqueue: pop, parse, plan, read or write, finish.
//!
//! A [`worker`] is a queue's thread and [`serve`] its loop. It sleeps until a kick, then takes
//! chains in batches ([`task`] holds one each), plans the pieces a read is made of, and serves each
//! from bytes that are in memory, straight into the guest's ([`read`](mod@read)). Pieces whose bytes
//! are not there yet are read by io_uring ([`uring`]) while the worker goes on; their tasks finish
//! later, in any order. Answers are published in batches.
//!
//! A write goes into the page cache there and then. What may wait for storage, to flush, discard or
//! zero, is done by a thread beside the worker ([`background`]).

pub mod background;
pub mod drop_behind;
pub mod polling;
pub mod ratelimited_log;
pub mod read;
pub mod readahead;
pub mod serve;
pub mod setup;
pub mod task;
pub mod uring;
pub mod worker;

use std::sync::Arc;
use std::sync::atomic::AtomicBool;
use std::time::Duration;

use crate::image::block_cache::BlockCache;
use crate::virtio::config::DeviceConfig;
use crate::virtio::request::SERIAL_LEN;
use crate::writable::Volume;
use uring::Rings;

/// What all queues of a device share.
#[derive(Debug)]
pub struct Disk {
    /// The merged layers, and what was written above them.
    pub volume: Volume,
    /// What the guest sees.
    pub config: DeviceConfig,
    /// The field of that name in the configuration space: whether writes may be answered before
    /// they are durable.
    pub writeback: AtomicBool,
    /// The answer to GET_ID, padded with zeros.
    pub serial: [u8; SERIAL_LEN],
    /// Decoded blocks kept for all queues, if any are.
    pub cache: Option<Arc<BlockCache>>,
    /// io_uring rings for its workers. A worker that finds none reads with `pread`.
    pub rings: Rings,
    /// How its workers work.
    pub tuning: Tuning,
}

/// Choices that change speed, never answers.
#[derive(Clone, Debug)]
pub struct Tuning {
    /// How long a worker looks for more work before it sleeps; zero: not at all.
    pub poll: Duration,
    /// Bytes of the disk to read ahead of a guest that reads in order; zero: none.
    pub readahead: u64,
    /// Whether compressed bytes are dropped from the page cache once they are decoded.
    pub drop_cache: bool,
    /// Processors that workers are bound to, one after the other; empty: any.
    pub cpus: Vec<usize>,
}
