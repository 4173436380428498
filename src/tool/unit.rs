//! Units of comparison and storage.

use crate::image::Image;
use crate::image::segment::SegmentContent;
use crate::units::Sector;

/// Bytes that are compared and stored as one, aligned on the disk: the block size of most file
/// systems. Data in whole units stays aligned to compressed blocks.
pub const UNIT: usize = 4096;

/// Most bytes of a disk that are handled at a time, a multiple of [`UNIT`].
pub const CHUNK: usize = 1024 * 1024;

static ZEROS: [u8; UNIT] = [0; UNIT];

/// Whether all bytes are zero.
pub fn is_zero(unit: &[u8]) -> bool {
    ZEROS.get(..unit.len()) == Some(unit)
}

/// First byte from `start` on and before `end` with data in a layer. It may lie beyond the disk.
pub fn data_from(stack: &Image, start: u64, end: u64) -> Option<u64> {
    let mut sector = Sector::containing(start);
    loop {
        let segment = stack.index().find(sector)?;
        let found = segment.start().byte().max(start);
        match segment.content() {
            _ if found >= end => return None,
            SegmentContent::Data { .. } => return Some(found),
            SegmentContent::Zeroed => sector = segment.end(),
        }
    }
}
