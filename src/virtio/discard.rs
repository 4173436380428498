//! Data of DISCARD and WRITE_ZEROES (virtio 1.2, section 5.2.6): a list of ranges of 16 bytes each,
//! `{sector: u64, num_sectors: u32, flags: u32}`, little-endian.
#![cfg_attr(
    not(test),
    warn(clippy::indexing_slicing, clippy::arithmetic_side_effects)
)]

use virtio_bindings::virtio_blk::VIRTIO_BLK_WRITE_ZEROES_FLAG_UNMAP;

use super::status::Status;
use crate::io::scatter::Cursor;
use crate::units::{Sector, SectorRange, Sectors};

/// Most ranges of one request.
pub const MAX_RANGES: u32 = 32;

/// Most sectors of one range: 2 GiB.
pub const MAX_RANGE_SECTORS: u32 = 4 << 20;

const RANGE: usize = 16;

/// A range to discard or to zero.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct DiscardRange {
    /// Its sectors. [`parse`] returns only ranges of at most [`MAX_RANGE_SECTORS`], all on the disk.
    pub range: SectorRange,
    /// Whether WRITE_ZEROES may free their storage. False for DISCARD, which always may.
    pub unmap: bool,
}

/// Parses the ranges in the `len` bytes at `data`, and reads each byte once. `capacity` is the size of the
/// disk; `may_unmap` allows the flag UNMAP.
///
/// # Errors
///
/// The status to answer with (5.2.6.2). [`Status::IoError`] if the list is empty, too long, or not a whole
/// number of ranges, or if a range is too long or exceeds the disk. [`Status::Unsupported`] if a flag is
/// unknown or not allowed for the request.
#[inline(never)]
pub fn parse(
    mut data: Cursor<'_, '_>,
    len: usize,
    capacity: Sector,
    may_unmap: bool,
) -> Result<Vec<DiscardRange>, Status> {
    let whole = len > 0 && len.is_multiple_of(RANGE) && len / RANGE <= MAX_RANGES as usize;
    if !whole {
        return Err(Status::IoError);
    }
    let flags_known = if may_unmap {
        VIRTIO_BLK_WRITE_ZEROES_FLAG_UNMAP
    } else {
        0
    };
    let mut ranges = Vec::with_capacity(len / RANGE);
    for _ in 0..len / RANGE {
        let mut bytes = [0; RANGE];
        data.read(&mut bytes);
        let [start @ .., n0, n1, n2, n3, f0, f1, f2, f3] = bytes;
        let start = Sector(u64::from_le_bytes(start));
        let sectors = u32::from_le_bytes([n0, n1, n2, n3]);
        let flags = u32::from_le_bytes([f0, f1, f2, f3]);
        if flags & !flags_known != 0 {
            return Err(Status::Unsupported);
        }
        let range = SectorRange::checked(start, Sectors(sectors.into()));
        let Some(range) =
            range.filter(|range| range.end() <= capacity && sectors <= MAX_RANGE_SECTORS)
        else {
            return Err(Status::IoError);
        };
        ranges.push(DiscardRange {
            range,
            unmap: flags & VIRTIO_BLK_WRITE_ZEROES_FLAG_UNMAP != 0,
        });
    }
    Ok(ranges)
}

#[cfg(test)]
mod tests {
    use vm_memory::VolatileSlice;

    use super::*;
    use crate::io::scatter::Scatter;

    const CAPACITY: Sector = Sector(1 << 24);

    fn parse_bytes(bytes: &mut [u8], may_unmap: bool) -> Result<Vec<DiscardRange>, Status> {
        let mut scatter = Scatter::new();
        let len = bytes.len();
        // Pieces that end inside of fields.
        for part in bytes.chunks_mut(7) {
            scatter.push(VolatileSlice::from(part));
        }
        parse(scatter.cursor(0), len, CAPACITY, may_unmap)
    }

    fn range(start: u64, sectors: u32, flags: u32) -> Vec<u8> {
        let mut bytes = start.to_le_bytes().to_vec();
        bytes.extend(sectors.to_le_bytes());
        bytes.extend(flags.to_le_bytes());
        bytes
    }

    #[test]
    fn ranges_are_read_in_order() {
        let mut bytes = [
            range(5, 7, 0),
            range((1 << 24) - 1, 1, 1),
            range(1 << 24, 0, 0),
        ]
        .concat();
        let ranges = parse_bytes(&mut bytes, true).unwrap();
        let expected = [(5, 7, false), ((1 << 24) - 1, 1, true), (1 << 24, 0, false)];
        assert_eq!(
            ranges,
            expected.map(|(start, sectors, unmap)| DiscardRange {
                range: SectorRange::checked(Sector(start), Sectors(sectors)).unwrap(),
                unmap
            })
        );
        assert_eq!(parse_bytes(&mut bytes, false), Err(Status::Unsupported));
    }

    #[test]
    fn malformed_lists_are_refused() {
        let good = range(0, 1, 0);
        for (mut bytes, status) in [
            (vec![], Status::IoError),
            (good[..15].to_vec(), Status::IoError),
            ([&good[..], &[0]].concat(), Status::IoError),
            (good.repeat(33), Status::IoError),
            (range(1 << 24, 1, 0), Status::IoError),
            (range(u64::MAX, 1, 0), Status::IoError),
            (range(0, MAX_RANGE_SECTORS + 1, 0), Status::IoError),
            (range(0, 1, 2), Status::Unsupported),
            (range(0, 1, 1 << 31 | 1), Status::Unsupported),
            ([good.clone(), range(0, 1, 4)].concat(), Status::Unsupported),
        ] {
            assert_eq!(parse_bytes(&mut bytes, true), Err(status), "{bytes:?}");
        }
        assert_eq!(parse_bytes(&mut good.repeat(32), false).unwrap().len(), 32);
        assert!(parse_bytes(&mut range(0, MAX_RANGE_SECTORS, 1), true).is_ok());
    }
}
