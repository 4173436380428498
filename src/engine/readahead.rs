//! Reads ahead for a queue that reads in order.
//!
//! The kernel's own readahead sees the compressed file through many readers at once; this one sees the
//! order of the guest. Present bytes are read ahead by the kernel, absent ones by the fetcher. The
//! worker waits for neither.

use crate::image::pieces::Piece;
use crate::source::Located;
use crate::units::{Sector, SectorRange, Sectors};
use crate::writable::Volume;

/// Requests in a row, each starting where the one before ended, that make a sequence.
const SEQUENCE: u32 = 3;

/// The sequence of reads of one queue.
#[derive(Debug)]
pub struct Readahead {
    /// Sectors to keep ahead of the reader; zero: none.
    window: Sectors,
    /// The end of the read before.
    next: Sector,
    in_row: u32,
    /// The end of what was read ahead.
    asked: Sector,
}

impl Readahead {
    /// Keeps `bytes` bytes of the disk ahead; zero: none.
    pub fn new(bytes: u64) -> Self {
        Self {
            window: Sectors::whole_in(bytes),
            next: Sector(0),
            in_row: 0,
            asked: Sector(0),
        }
    }

    /// Notes a read of a range, which lies on the disk, and reads ahead if it continues a sequence.
    pub fn note(&mut self, volume: &Volume, range: SectorRange) {
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
        // Half a window at a time, so that one system call covers many requests.
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
