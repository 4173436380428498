//! The values of a statistics page, read without trust: the disk process that writes them may be subverted.
#![cfg_attr(not(test), warn(clippy::indexing_slicing))]

use std::fs::File;
use std::io::{self, Read};
use std::path::Path;
use std::sync::atomic::Ordering;

use serde_json::{Value, json};

use super::queue::{BUCKETS, Op, RESULTS, cell};
use super::{BLOCK, DiskCell, MAGIC, QUEUES, StatsPage};
use crate::io::regular::open_to_read;

/// Largest value of a counter that is added to others: sums of many disks stay exact in the 64-bit floating-point
/// numbers of Prometheus.
const LARGEST: u64 = 1 << 52;

/// Bytes of a block.
const BLOCK_LEN: usize = BLOCK * size_of::<u64>();

/// Values of a page: those of the disk, and the sums over its queues.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Figures {
    disk: [u64; BLOCK],
    queues: [u64; BLOCK],
}

impl Default for Figures {
    /// All values 0.
    fn default() -> Self {
        Self {
            disk: [0; BLOCK],
            queues: [0; BLOCK],
        }
    }
}

impl Figures {
    /// Reads the page in the file at `path`. The file is read, not mapped: a process that truncates it does no harm.
    ///
    /// # Errors
    ///
    /// Those of the system; `InvalidData` if the file is not a statistics page.
    pub fn read(path: &Path) -> io::Result<Self> {
        let mut file = open_to_read(path)?;
        let disk = read_block(&mut file)?.ok_or(io::ErrorKind::InvalidData)?;
        let mut figures = Self {
            disk,
            queues: [0; BLOCK],
        };
        if figures.disk(DiskCell::Magic) != MAGIC {
            return Err(io::ErrorKind::InvalidData.into());
        }
        let blocks = figures.disk(DiskCell::QueueBlocks).min(QUEUES as u64);
        for _ in 0..blocks {
            let Some(block) = read_block(&mut file)? else {
                break;
            };
            figures.add_queue(&block);
        }
        Ok(figures)
    }

    /// Returns the values of this process's page.
    pub fn of(page: &StatsPage) -> Self {
        let block = |number: usize| {
            page.block(number)
                .each_ref()
                .map(|c| c.load(Ordering::Relaxed))
        };
        let mut figures = Self {
            disk: block(0),
            queues: [0; BLOCK],
        };
        let blocks = figures.disk(DiskCell::QueueBlocks).min(QUEUES as u64) as usize;
        (1..=blocks).for_each(|number| figures.add_queue(&block(number)));
        figures
    }

    fn add_queue(&mut self, block: &[u64; BLOCK]) {
        for (sum, value) in self.queues.iter_mut().zip(block) {
            *sum = sum.saturating_add((*value).min(LARGEST));
        }
    }

    /// Adds the queue counters of another disk.
    pub fn add(&mut self, other: &Self) {
        self.add_queue(&other.queues);
    }

    /// Returns a value of the disk.
    pub fn disk(&self, cell: DiskCell) -> u64 {
        self.disk.get(cell as usize).copied().unwrap_or(0)
    }

    /// Returns the sum over the queues of a cell.
    pub fn queue(&self, cell: usize) -> u64 {
        self.queues.get(cell).copied().unwrap_or(0)
    }

    fn group<const N: usize>(&self, start: usize) -> [u64; N] {
        std::array::from_fn(|index| self.queue(start + index))
    }

    /// Returns the requests of an operation by result.
    pub fn requests(&self, op: Op) -> [u64; RESULTS.len()] {
        self.group(cell::REQUESTS + op as usize * RESULTS.len())
    }

    /// Returns the requests of an operation by duration; zeros for [`Op::Other`].
    pub fn durations(&self, op: Op) -> [u64; BUCKETS] {
        match op {
            Op::Other => [0; BUCKETS],
            op => self.group(cell::DURATIONS + op as usize * BUCKETS),
        }
    }

    /// Describes the front-end that has the disk; null without one.
    pub fn front_end(&self) -> Value {
        if self.disk(DiskCell::Connected) == 0 {
            return Value::Null;
        }
        let pid = self.disk(DiskCell::FrontEndPid);
        let uid = self.disk(DiskCell::FrontEndUid);
        json!({
            "pid": (pid != 0).then_some(pid),
            "uid": (uid != u64::MAX).then_some(uid),
            "since": self.disk(DiskCell::FrontEndSince),
            "features": self.disk(DiskCell::FrontEndFeatures),
        })
    }
}

/// Reads the next block; `None` at the end of the file.
fn read_block(file: &mut File) -> io::Result<Option<[u64; BLOCK]>> {
    let mut bytes = [0; BLOCK_LEN];
    match file.read_exact(&mut bytes) {
        Err(error) if error.kind() == io::ErrorKind::UnexpectedEof => return Ok(None),
        result => result?,
    }
    let (cells, _) = bytes.as_chunks::<8>();
    let mut cells = cells.iter().map(|cell| u64::from_le_bytes(*cell));
    Ok(Some(std::array::from_fn(|_| cells.next().unwrap_or(0))))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn hostile_pages_are_read_within_bounds() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("a.stats");
        let read = |bytes: &[u8]| {
            std::fs::write(&path, bytes).unwrap();
            Figures::read(&path)
        };
        assert!(read(b"").is_err() && read(&[0; 100]).is_err() && read(&[0; 4096]).is_err());
        let mut page = MAGIC.to_le_bytes().to_vec();
        page.resize(super::super::PAGE_LEN as usize, 0xff);
        for len in [BLOCK_LEN, BLOCK_LEN + 5, 3 * BLOCK_LEN, page.len()] {
            let mut sum = read(&page[..len]).unwrap();
            let blocks = (len / BLOCK_LEN - 1) as u64;
            assert_eq!(sum.queue(0), blocks * LARGEST, "{len} bytes");
            // All disks of a host, all hostile.
            let other = sum.clone();
            (0..5000).for_each(|_| sum.add(&other));
            assert!(sum.front_end().is_object());
        }
        std::fs::remove_file(&path).unwrap();
        std::os::unix::fs::symlink("/dev/zero", &path).unwrap();
        assert!(Figures::read(&path).is_err());
    }
}
