//! The pieces in which images are looked at, and where a stack has any.

use crate::image::Image;
use crate::image::segment::SegmentContent;
use crate::units::Sector;

/// Bytes in which images are compared and stored, counted from the start of the disk: the block of
/// most file systems. Data in whole units stays aligned to the compressed blocks it ends up in.
pub const UNIT: usize = 4096;

/// Most bytes of a disk handled at a time, a multiple of [`UNIT`].
pub const CHUNK: usize = 1024 * 1024;

static ZEROS: [u8; UNIT] = [0; UNIT];

/// Whether the bytes of a unit, or part of one, are all zero.
pub fn is_zero(unit: &[u8]) -> bool {
    ZEROS.get(..unit.len()) == Some(unit)
}

/// The first byte from `start` on and before `end` for which a layer of the stack has data, even
/// beyond the size of its disk.
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
