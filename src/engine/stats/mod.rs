//! Statistics page of a disk: its counters and gauges in shared memory.
//!
//! The page is a file of 64-bit cells, mapped by the disk process. The node reads the file for each scrape of its
//! metrics, without a message to the disk process, and also while the process is stuck or restarted. Counters live only
//! in the page: a new process of the disk continues them.
//!
//! ```text
//! block 0: the disk      | magic | number of queue blocks | gauges | counters |
//! block 1: queue 0       | requests by operation and result | bytes | durations | ... |
//! block 2: queue 1 ...
//! ```
//!
//! Only the worker of a queue writes to the block of the queue, so that counting is a plain addition in a cache line of
//! the worker's own. Readers trust no value: see [`figures::Figures`].

pub mod describe;
pub mod exposition;
pub mod figures;
pub mod queue;
pub mod report;

use std::fs::File;
use std::io;
use std::os::unix::fs::{FileExt, OpenOptionsExt};
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{SystemTime, UNIX_EPOCH};

use rustix::fs::{MemfdFlags, memfd_create};

use crate::io::mapped_file::{Access, MapError, MappedFile};
use crate::io::regular::open_regular;

/// Cells of a block.
pub const BLOCK: usize = 128;

/// Queue blocks of a page: as many as vhost-user can address queues.
pub const QUEUES: usize = 256;

/// Bytes of a page. The blocks of queues that never ran take no memory.
pub const PAGE_LEN: u64 = ((1 + QUEUES) * BLOCK * size_of::<u64>()) as u64;

/// First cell: the format of the page and its version.
pub const MAGIC: u64 = u64::from_le_bytes(*b"ovbdst01");

/// Cells of the disk's block.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(usize)]
pub enum DiskCell {
    /// [`MAGIC`].
    Magic = 0,
    /// Number of queue blocks that were ever used.
    QueueBlocks = 1,
    /// Size of the disk in bytes.
    Size = 2,
    /// 1 for a disk with a writable layer.
    Writable = 3,
    /// Bytes in the writable layer.
    UpperUsed = 4,
    /// Limit of them; [`u64::MAX`] without one.
    UpperLimit = 5,
    /// Running queue workers.
    QueuesActive = 6,
    /// 1 while a front-end has the disk.
    Connected = 7,
    /// Process of that front-end; 0 if it is unknown.
    FrontEndPid = 8,
    /// User of that front-end; [`u64::MAX`] if it is unknown.
    FrontEndUid = 9,
    /// When it got the disk, in seconds since 1970.
    FrontEndSince = 10,
    /// Its acknowledged features.
    FrontEndFeatures = 11,
    /// Snapshots that are not sealed yet.
    SnapshotsUnsealed = 12,
    /// Bytes of the tables of the image.
    TableBytes = 13,
    /// Layers of the image.
    Layers = 14,
    /// Bytes in the cache of decompressed blocks.
    BlockCacheBytes = 15,
    /// Limit of them.
    BlockCacheLimit = 16,
    /// Address ranges in which faults are expected.
    WatchedRanges = 17,
    /// Front-ends that connected and sent a message. The first counter; the cells before it are gauges.
    Connections = 32,
    /// Connections that ended with an error.
    FrontEndErrors = 33,
    /// Front-ends that did not get the disk from another.
    TakeoversRefused = 34,
    /// Snapshots that were taken.
    SnapshotsTaken = 35,
    /// Snapshots that failed.
    SnapshotsFailed = 36,
    /// Lines that the rate limit of the log left out.
    LogDropped = 37,
    /// Blocks that made room in the cache of decompressed blocks.
    BlockCacheEvictions = 38,
    /// Faults of accesses to files that were truncated while they were mapped.
    Faults = 39,
}

/// A statistics page cannot be set up.
#[derive(Debug, thiserror::Error)]
pub enum PageError {
    /// The file cannot be opened or made large enough.
    #[error("cannot open the statistics page")]
    File(#[from] io::Error),
    /// The file cannot be mapped.
    #[error("cannot map the statistics page")]
    Map(#[from] MapError),
}

/// The statistics page of this process's disk.
#[derive(Debug)]
pub struct StatsPage {
    file: MappedFile,
}

/// Cells that are counted in if the page has too few of them, which cannot be.
static SPARE: [AtomicU64; BLOCK] = [const { AtomicU64::new(0) }; BLOCK];

impl StatsPage {
    /// Opens the page at `path`, or creates it. Counters of an earlier process of the disk continue; a file of another
    /// format is emptied.
    ///
    /// # Errors
    ///
    /// [`PageError::File`] if the file cannot be opened, or is not a regular file; [`PageError::Map`] if it cannot be
    /// mapped.
    pub fn open(path: &Path) -> Result<Arc<Self>, PageError> {
        let mut options = File::options();
        options.read(true).write(true).create(true).mode(0o600);
        let file = open_regular(path, options)?;
        if !is_page(&file)? {
            // A hole: blocks of queues that never run take neither memory nor storage.
            file.set_len(0)?;
            file.set_len(PAGE_LEN)?;
        }
        let page = Self::map(&file)?;
        page.begin();
        Ok(Arc::new(page))
    }

    /// A page that only this process sees.
    ///
    /// # Errors
    ///
    /// [`PageError::File`] if the kernel has no memory or descriptor left; [`PageError::Map`] if the page cannot be
    /// mapped.
    pub fn anonymous() -> Result<Arc<Self>, PageError> {
        let file = memfd_create("ovbd-stats", MemfdFlags::CLOEXEC).map_err(io::Error::from)?;
        let file = File::from(file);
        file.set_len(PAGE_LEN)?;
        let page = Self::map(&file)?;
        page.begin();
        Ok(Arc::new(page))
    }

    fn map(file: &File) -> Result<Self, PageError> {
        let file = MappedFile::new(file, 0, PAGE_LEN, Access::ReadWrite)?;
        Ok(Self { file })
    }

    /// Resets the gauges: they are those of an earlier process.
    fn begin(&self) {
        let gauges = DiskCell::Size as usize..DiskCell::Connections as usize;
        for gauge in self.cells().iter().take(gauges.end).skip(gauges.start) {
            gauge.store(0, Ordering::Relaxed);
        }
        self.set(DiskCell::UpperLimit, u64::MAX);
        self.set(DiskCell::Magic, MAGIC);
    }

    /// Returns all cells.
    fn cells(&self) -> &[AtomicU64] {
        self.file.cells()
    }

    /// Returns the cells of block `number`.
    fn block(&self, number: usize) -> &[AtomicU64; BLOCK] {
        let blocks = self.cells().as_chunks::<BLOCK>().0;
        blocks.get(number).unwrap_or(&SPARE)
    }

    /// Returns a cell.
    pub fn cell(&self, cell: DiskCell) -> &AtomicU64 {
        let found = self.block(0).get(cell as usize);
        found.unwrap_or(&SPARE[0])
    }

    /// Returns the value of a cell.
    pub fn get(&self, cell: DiskCell) -> u64 {
        self.cell(cell).load(Ordering::Relaxed)
    }

    /// Sets a gauge.
    pub fn set(&self, gauge: DiskCell, value: u64) {
        self.cell(gauge).store(value, Ordering::Relaxed);
    }

    /// Adds `count` to a counter.
    pub fn add(&self, counter: DiskCell, count: u64) {
        self.cell(counter).fetch_add(count, Ordering::Relaxed);
    }

    /// Adds 1 to a counter.
    pub fn count(&self, counter: DiskCell) {
        self.cell(counter).fetch_add(1, Ordering::Relaxed);
    }

    /// Records that a front-end got the disk.
    pub fn set_front_end(&self, pid: Option<u32>, uid: Option<u32>) {
        let since = SystemTime::now().duration_since(UNIX_EPOCH);
        self.set(DiskCell::FrontEndPid, pid.map_or(0, u64::from));
        self.set(DiskCell::FrontEndUid, uid.map_or(u64::MAX, u64::from));
        self.set(
            DiskCell::FrontEndSince,
            since.map_or(0, |since| since.as_secs()),
        );
        self.set(DiskCell::FrontEndFeatures, 0);
        self.set(DiskCell::Connected, 1);
    }

    /// Records that no front-end has the disk.
    pub fn clear_front_end(&self) {
        self.set(DiskCell::Connected, 0);
    }
}

/// Returns whether `file` is a statistics page of this format.
fn is_page(file: &File) -> io::Result<bool> {
    let mut magic = [0; size_of::<u64>()];
    if file.metadata()?.len() != PAGE_LEN {
        return Ok(false);
    }
    file.read_exact_at(&mut magic, 0)?;
    // Cells have the byte order of the processor.
    Ok(u64::from_le_bytes(magic) == MAGIC.to_le())
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::MetadataExt;

    use super::figures::Figures;
    use super::*;

    #[test]
    fn a_new_process_continues_the_counters_and_resets_the_gauges() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("a.stats");
        let page = StatsPage::open(&path).unwrap();
        page.count(DiskCell::Connections);
        page.set_front_end(Some(5), Some(7));
        drop(page);
        let page = StatsPage::open(&path).unwrap();
        page.count(DiskCell::Connections);
        assert_eq!(page.get(DiskCell::Connections), 2);
        assert_eq!(page.get(DiskCell::Connected), 0);
        let read = Figures::read(&path).unwrap();
        assert_eq!(read.disk(DiskCell::Connections), 2);
    }

    #[test]
    fn blocks_of_queues_that_never_ran_take_no_space() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("a.stats");
        let page = StatsPage::open(&path).unwrap();
        let queue = queue::QueueStats::new(&page, 0);
        queue.add(queue::cell::BAD_CHAINS, 1);
        drop(page);
        let page = StatsPage::open(&path).unwrap();
        assert_eq!(Figures::of(&page).queue(queue::cell::BAD_CHAINS), 1);
        let bytes = std::fs::metadata(&path).unwrap().blocks() * 512;
        assert!(bytes < PAGE_LEN / 4, "{bytes}");
    }

    #[test]
    fn a_file_of_another_format_is_emptied() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("a.stats");
        for text in [vec![0xff; 100], vec![0xff; PAGE_LEN as usize]] {
            std::fs::write(&path, text).unwrap();
            let page = StatsPage::open(&path).unwrap();
            assert_eq!(page.get(DiskCell::Connections), 0);
            assert_eq!(page.get(DiskCell::QueueBlocks), 0);
        }
        assert!(StatsPage::open(folder.path()).is_err());
    }
}
