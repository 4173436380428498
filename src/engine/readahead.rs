//! Readahead for sequential reads of one queue.
//!
//! The kernel's readahead sees the accesses of all queues to a compressed file; this one sees the order in
//! which the guest reads. Present bytes are read ahead by the kernel, absent ones by the fetcher. The worker
//! waits for neither.
#![cfg_attr(not(test), warn(clippy::indexing_slicing))]

use crate::image::pieces::Piece;
use crate::source::Located;
use crate::units::{Sector, SectorRange, Sectors};
use crate::writable::Volume;

/// Number of consecutive requests, each starting where the last one ended, that make a sequence.
const SEQUENCE: u32 = 3;

/// The sequence of reads of one queue.
#[derive(Debug)]
pub struct Readahead {
    /// Sectors to keep ahead of the guest; zero disables readahead.
    window: Sectors,
    /// End of the last read.
    next: Sector,
    in_row: u32,
    /// End of what was read ahead.
    asked: Sector,
}

impl Readahead {
    /// Keeps `bytes` bytes of the disk ahead of the guest; zero disables readahead.
    pub fn new(bytes: u64) -> Self {
        Self {
            window: Sectors::whole_in(bytes),
            next: Sector(0),
            in_row: 0,
            asked: Sector(0),
        }
    }

    /// Records a read of a range, which lies on the disk, and reads ahead if it continues a sequence.
    pub fn record(&mut self, volume: &Volume, range: SectorRange) {
        if self.window.is_zero() {
            return;
        }
        let end = range.end();
        if range.start() == self.next {
            self.in_row = self.in_row.saturating_add(1);
        } else {
            (self.in_row, self.asked) = (1, end);
        }
        self.next = end;
        // At least half a window at a time, so that one system call covers many requests.
        let low = self.asked < end + Sectors(self.window.0 / 2);
        if self.in_row < SEQUENCE || !low {
            return;
        }
        let lower = volume.lower();
        let ahead = SectorRange::new(self.asked.max(end), end + self.window);
        let disk = SectorRange::new(Sector(0), Sector(0) + lower.sectors());
        for piece in lower.pieces(ahead.intersection(disk)) {
            let (layer, offset, len) = match piece {
                Piece::Zero { .. } => continue,
                Piece::Plain { layer, offset, len } => (layer, offset, len),
                Piece::Compressed(run) => (run.layer, run.offset, u64::from(run.stored)),
            };
            let len = usize::try_from(len).unwrap_or(usize::MAX);
            match lower.image().container(layer).blob().locate(offset, len) {
                Located::Present(range) => range.will_need(),
                Located::Absent(range) => range.fetch_ahead(),
            }
        }
        self.asked = end + self.window;
    }
}
