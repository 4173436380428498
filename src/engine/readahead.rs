//! Reads ahead for a queue that reads in order.
//!
//! The kernel's own readahead sees the compressed file through many readers at once; this one sees the
//! order of the guest. Present bytes are read ahead by the kernel, absent ones by the fetcher. The
//! worker waits for neither.

use crate::image::Image;
use crate::image::plan::Piece;
use crate::source::Located;
use crate::units::{SECTOR_SIZE, Sector};

/// Requests in a row, each starting where the one before ended, that make a sequence.
const SEQUENCE: u32 = 3;

/// The sequence of reads of one queue.
#[derive(Debug)]
pub struct Readahead {
    /// Sectors to keep ahead of the reader; zero: none.
    window: u64,
    next: Sector,
    in_row: u32,
    /// Read ahead up to here.
    asked: Sector,
}

impl Readahead {
    /// Keeps `bytes` bytes of the disk ahead; zero: none.
    pub fn new(bytes: u64) -> Self {
        Self {
            window: bytes / SECTOR_SIZE,
            next: Sector(0),
            in_row: 0,
            asked: Sector(0),
        }
    }

    /// Notes a read of `sectors` sectors at `start`, which lie on the disk, and reads ahead if it
    /// continues a sequence.
    pub fn note(&mut self, image: &Image, start: Sector, sectors: u64) {
        if self.window == 0 {
            return;
        }
        let end = Sector(start.0 + sectors);
        if start == self.next {
            self.in_row = self.in_row.saturating_add(1);
        } else {
            (self.in_row, self.asked) = (1, end);
        }
        self.next = end;
        // Half a window at a time, so that one system call covers many requests.
        let low = self.asked.0 < end.0 + self.window / 2;
        if self.in_row < SEQUENCE || !low {
            return;
        }
        let from = self.asked.max(end);
        let to = image.sectors().min(Sector(end.0 + self.window));
        for piece in image.pieces(from, to.0.saturating_sub(from.0)) {
            let (layer, offset, len) = match piece {
                Piece::Zero { .. } => continue,
                Piece::Plain { layer, offset, len } => (layer, offset, len),
                Piece::Compressed(packed) => {
                    (packed.layer, packed.offset, u64::from(packed.stored))
                }
            };
            let len = usize::try_from(len).unwrap_or(usize::MAX);
            match image.container(layer).blob().locate(offset, len) {
                Located::Present(range) => range.will_need(),
                Located::Absent(range) => range.fetch_ahead(),
            }
        }
        self.asked = Sector(end.0 + self.window);
    }
}
