//! The statistics of one queue, written by its worker only.
#![cfg_attr(not(test), warn(clippy::indexing_slicing))]

use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Instant;

use super::{BLOCK, DiskCell, StatsPage};
use crate::virtio::status::Status;

/// Operation of a counted request.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u8)]
pub enum Op {
    /// Read.
    Read = 0,
    /// Write.
    Write = 1,
    /// Flush.
    Flush = 2,
    /// Discard.
    Discard = 3,
    /// Write zeroes.
    WriteZeroes = 4,
    /// Serial number.
    GetId = 5,
    /// Malformed, beyond the disk, or of a type that the device does not offer.
    Other = 6,
}

impl Op {
    /// All operations, by their number.
    pub const ALL: [Op; 7] = [
        Op::Read,
        Op::Write,
        Op::Flush,
        Op::Discard,
        Op::WriteZeroes,
        Op::GetId,
        Op::Other,
    ];

    /// The word in metrics.
    pub fn word(self) -> &'static str {
        match self {
            Op::Read => "read",
            Op::Write => "write",
            Op::Flush => "flush",
            Op::Discard => "discard",
            Op::WriteZeroes => "write_zeroes",
            Op::GetId => "get_id",
            Op::Other => "other",
        }
    }
}

/// Results of a request, in the order of their cells.
pub const RESULTS: [&str; 3] = ["ok", "ioerr", "unsupp"];

/// Way of reading the stored bytes of layers.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(usize)]
pub enum ReadSource {
    /// Mapped pages.
    Map = 0,
    /// `io_uring`.
    Uring = 1,
    /// `pread`.
    Pread = 2,
}

/// Names of [`ReadSource`] in metrics, by their numbers.
pub const READ_SOURCES: [&str; 3] = ["map", "uring", "pread"];

/// Algorithms of compressed blocks in metrics, in the order of their cells.
pub const CODECS: [&str; 2] = ["lz4", "zstd"];

/// Upper bounds of the duration buckets in nanoseconds: 10 us, and each four times the one before. The last bucket has
/// no bound.
pub const DURATION_BOUNDS: [u64; 11] = [
    10_000,
    40_000,
    160_000,
    640_000,
    2_560_000,
    10_240_000,
    40_960_000,
    163_840_000,
    655_360_000,
    2_621_440_000,
    10_485_760_000,
];

/// Buckets of durations.
pub const BUCKETS: usize = DURATION_BOUNDS.len() + 1;

/// Cells of a queue's block. Each constant is the first of a group.
pub mod cell {
    use super::{BUCKETS, CODECS, Op, READ_SOURCES, RESULTS};

    /// By operation and result.
    pub const REQUESTS: usize = 0;
    /// Bytes of reads, writes and discards.
    pub const BYTES: usize = REQUESTS + Op::ALL.len() * RESULTS.len();
    /// Bytes of discards, which the offload thread counts.
    pub const DISCARDED_BYTES: usize = BYTES + 2;
    /// Requests that waited for tokens: by bucket, operations and bandwidth.
    pub const THROTTLED_REQUESTS: usize = BYTES + 3;
    /// Nanoseconds that they waited.
    pub const THROTTLED_NANOS: usize = THROTTLED_REQUESTS + 2;
    /// Chains that break a rule.
    pub const BAD_CHAINS: usize = THROTTLED_NANOS + 2;
    /// Requests of an earlier worker that were repeated.
    pub const RESUBMITTED: usize = BAD_CHAINS + 1;
    /// Reads of stored bytes, by source.
    pub const LAYER_READS: usize = RESUBMITTED + 1;
    /// Bytes of them.
    pub const LAYER_READ_BYTES: usize = LAYER_READS + READ_SOURCES.len();
    /// Damaged blocks.
    pub const DAMAGED_BLOCKS: usize = LAYER_READ_BYTES + READ_SOURCES.len();
    /// Nanoseconds of requests, by operation, other than [`Op::Other`].
    pub const DURATION_NANOS: usize = DAMAGED_BLOCKS + 1;
    /// Requests by operation and duration.
    pub const DURATIONS: usize = DURATION_NANOS + Op::Other as usize;
    /// Decompressed blocks, by algorithm.
    pub const BLOCKS_DECODED: usize = DURATIONS + Op::Other as usize * BUCKETS;
    /// Reads that were served from the cache of decompressed blocks.
    pub const CACHE_HITS: usize = BLOCKS_DECODED + CODECS.len();
    /// Reads that this cache could have served and did not.
    pub const CACHE_MISSES: usize = CACHE_HITS + 1;
    /// Reads of layers that waited for a registry.
    pub const FETCHED_READS: usize = CACHE_MISSES + 1;
    /// Bytes of them.
    pub const FETCHED_READ_BYTES: usize = FETCHED_READS + 1;
    /// Cells in use.
    pub const COUNT: usize = FETCHED_READ_BYTES + 1;
}

const _: () = assert!(cell::COUNT <= BLOCK);

/// The statistics of one queue.
#[derive(Clone, Copy, Debug)]
pub struct QueueStats<'a> {
    cells: &'a [AtomicU64; BLOCK],
}

impl<'a> QueueStats<'a> {
    /// The statistics of queue `index` on `page`.
    pub fn new(page: &'a StatsPage, index: u16) -> Self {
        let number = u64::from(index) + 1;
        page.cell(DiskCell::QueueBlocks)
            .fetch_max(number, Ordering::Relaxed);
        Self {
            cells: page.block(usize::from(index) + 1),
        }
    }

    /// Adds `count` to a counter.
    #[inline]
    pub fn add(&self, cell: usize, count: u64) {
        if let Some(cell) = self.cells.get(cell) {
            // No other thread writes to the cell.
            let sum = cell.load(Ordering::Relaxed).wrapping_add(count);
            cell.store(sum, Ordering::Relaxed);
        }
    }
}

/// Reads of stored bytes that are not on the statistics page yet.
#[derive(Debug, Default)]
pub struct LayerReads {
    counts: [u64; READ_SOURCES.len()],
    bytes: [u64; READ_SOURCES.len()],
    decoded: [u64; CODECS.len()],
}

impl LayerReads {
    /// Counts a read of stored bytes.
    #[inline]
    pub fn count(&mut self, source: ReadSource, bytes: usize) {
        let source = source as usize;
        if let (Some(count), Some(sum)) = (self.counts.get_mut(source), self.bytes.get_mut(source))
        {
            *count = count.wrapping_add(1);
            *sum = sum.wrapping_add(bytes as u64);
        }
    }

    /// Counts decompressed blocks; `codec` is an index of [`CODECS`].
    #[inline]
    pub fn count_decoded(&mut self, codec: usize, blocks: u32) {
        if let Some(count) = self.decoded.get_mut(codec) {
            *count = count.wrapping_add(blocks.into());
        }
    }

    /// Moves the counts to the statistics page.
    pub fn publish(&mut self, stats: &QueueStats<'_>) {
        let Self {
            counts,
            bytes,
            decoded,
        } = std::mem::take(self);
        for (codec, count) in decoded.into_iter().enumerate() {
            if count > 0 {
                stats.add(cell::BLOCKS_DECODED + codec, count);
            }
        }
        for (source, (count, bytes)) in counts.into_iter().zip(bytes).enumerate() {
            if count > 0 {
                stats.add(cell::LAYER_READS + source, count);
                stats.add(cell::LAYER_READ_BYTES + source, bytes);
            }
        }
    }
}

/// A running queue, in the number of running queues.
#[derive(Debug)]
pub struct Running<'a>(&'a AtomicU64);

impl<'a> Running<'a> {
    /// Counts a queue that starts.
    pub fn begin(page: &'a StatsPage) -> Self {
        let running = page.cell(DiskCell::QueuesActive);
        running.fetch_add(1, Ordering::Relaxed);
        Self(running)
    }
}

impl Drop for Running<'_> {
    fn drop(&mut self) {
        self.0.fetch_sub(1, Ordering::Relaxed);
    }
}

/// A request, as far as it is counted.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Counted {
    /// Its operation.
    pub op: Op,
    /// Time at which it was taken.
    pub begun: Taken,
}

/// Time at which a request was taken, in nanoseconds of the worker's clock.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Taken(u64);

/// Answered requests of one kind that were taken in one turn, and are not published yet.
#[derive(Debug)]
struct Answered {
    request: Counted,
    status: Status,
    count: u64,
    /// Bytes of their data.
    bytes: u64,
}

/// Counts the requests of a worker. The clock is read once for the requests that are taken in a turn, and once for
/// the answers that are published together. The page is written once for all answers of one kind and one turn: most
/// of a batch.
#[derive(Debug)]
pub struct RequestStats<'a> {
    stats: QueueStats<'a>,
    start: Instant,
    /// Time of the turn; `None` until a request is taken.
    turn: Option<Taken>,
    answered: Vec<Answered>,
    _running: Running<'a>,
}

impl<'a> RequestStats<'a> {
    /// Counts for queue `index`.
    pub fn new(page: &'a StatsPage, index: u16) -> Self {
        Self {
            stats: QueueStats::new(page, index),
            start: Instant::now(),
            turn: None,
            answered: Vec::new(),
            _running: Running::begin(page),
        }
    }

    /// Returns the counters of the queue.
    pub fn counters(&self) -> QueueStats<'a> {
        self.stats
    }

    fn now(&self) -> Taken {
        // 2^64 ns are 584 years.
        Taken(self.start.elapsed().as_nanos() as u64)
    }

    /// Begins a turn: the clock is read again for the next request.
    #[inline]
    pub fn begin_turn(&mut self) {
        self.turn = None;
    }

    /// Returns the time of a request that is taken now.
    #[inline]
    pub fn take(&mut self) -> Taken {
        match self.turn {
            Some(time) => time,
            None => *self.turn.insert(self.now()),
        }
    }

    /// Counts an answered request with `bytes` of data.
    #[inline]
    pub fn answer(&mut self, request: Counted, status: Status, bytes: u64) {
        match self.answered.last_mut() {
            Some(same) if same.request == request && same.status == status => {
                same.count += 1;
                same.bytes = same.bytes.wrapping_add(bytes);
            }
            _ => self.answered.push(Answered {
                request,
                status,
                count: 1,
                bytes,
            }),
        }
    }

    /// Enters the answers, which are published next, in the page: a front-end that has an answer finds it counted.
    #[inline]
    pub fn publish(&mut self) {
        if !self.answered.is_empty() {
            self.enter();
        }
    }

    #[inline(never)]
    fn enter(&mut self) {
        let Taken(now) = self.now();
        for answered in self.answered.drain(..) {
            let Counted { op, begun } = answered.request;
            let (op, count) = (op as usize, answered.count);
            let result = result(answered.status);
            self.stats
                .add(cell::REQUESTS + op * RESULTS.len() + result, count);
            if op <= Op::Write as usize {
                self.stats.add(cell::BYTES + op, answered.bytes);
            }
            if op < Op::Other as usize {
                let took = now.saturating_sub(begun.0);
                let sum = took.wrapping_mul(count);
                self.stats.add(cell::DURATION_NANOS + op, sum);
                let bucket = op * BUCKETS + bucket(took);
                self.stats.add(cell::DURATIONS + bucket, count);
            }
        }
    }
}

/// Number of the bucket of a duration in nanoseconds.
#[inline]
fn bucket(nanos: u64) -> usize {
    let units = nanos.saturating_sub(1) / DURATION_BOUNDS[0];
    match units.checked_ilog2() {
        None => 0,
        Some(power) => (power as usize / 2 + 1).min(BUCKETS - 1),
    }
}

#[inline]
fn result(status: Status) -> usize {
    match status {
        Status::Ok => 0,
        Status::IoError => 1,
        Status::Unsupported => 2,
    }
}

#[cfg(test)]
mod tests {
    use super::super::figures::Figures;
    use super::*;

    #[test]
    fn a_duration_is_in_the_first_bucket_that_bounds_it() {
        for nanos in (0..200_000).chain([1 << 30, 1 << 34, 1 << 35, u64::MAX]) {
            let expected = DURATION_BOUNDS.iter().position(|bound| nanos <= *bound);
            assert_eq!(bucket(nanos), expected.unwrap_or(BUCKETS - 1), "{nanos}");
        }
    }

    #[test]
    fn requests_are_counted_by_queue_and_summed() {
        let page = StatsPage::anonymous().unwrap();
        let mut queues = [0, 255].map(|index| RequestStats::new(&page, index));
        for stats in &mut queues {
            let begun = stats.take();
            let read = Counted {
                op: Op::Read,
                begun,
            };
            stats.answer(read, Status::Ok, 4096);
            stats.answer(read, Status::IoError, 0);
            stats.publish();
        }
        let figures = Figures::of(&page);
        assert_eq!(figures.requests(Op::Read), [2, 2, 0]);
        assert_eq!(figures.queue(cell::BYTES), 8192);
        assert_eq!(figures.durations(Op::Read).iter().sum::<u64>(), 4);
        assert_eq!(page.get(DiskCell::QueuesActive), 2);
        drop(queues);
        assert_eq!(page.get(DiskCell::QueuesActive), 0);
    }
}
