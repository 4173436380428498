//! Block requests (virtio 1.2, section 5.2.6): parses the operation of a chain.
//!
//! The header is the first 16 bytes of the readable memory, and the status is the last byte of the writable
//! memory. The driver may split both into descriptors in any way (2.7.4).
#![cfg_attr(
    not(test),
    warn(clippy::indexing_slicing, clippy::arithmetic_side_effects)
)]

use virtio_bindings::virtio_blk::{
    VIRTIO_BLK_ID_BYTES, VIRTIO_BLK_T_DISCARD, VIRTIO_BLK_T_FLUSH, VIRTIO_BLK_T_GET_ID,
    VIRTIO_BLK_T_IN, VIRTIO_BLK_T_OUT, VIRTIO_BLK_T_WRITE_ZEROES,
};

use super::chain::Chain;
use super::config::DeviceConfig;
use super::discard::{self, DiscardRange};
use super::status::Status;
use crate::units::{SECTOR_SIZE, Sector, SectorRange, Sectors};

/// Length of a request header: type, reserved, sector.
pub const HEADER: usize = 16;

/// Length of a serial number (VIRTIO_BLK_ID_BYTES).
pub const SERIAL_LEN: usize = VIRTIO_BLK_ID_BYTES as usize;

/// Most data of one request in bytes, which bounds the work that one request can cause. Linux guests send
/// at most 1.25 MiB by default.
pub const MAX_DATA: usize = 64 << 20;

/// Operation of a request.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Operation {
    /// Fill [`Chain::writable`] with these sectors of the disk.
    Read(SectorRange),
    /// Write [`Chain::readable`], from byte [`HEADER`] on, to these sectors of the disk.
    Write(SectorRange),
    /// Return the serial number.
    GetId,
    /// Make all answered writes durable.
    Flush,
    /// Discard the data of these ranges.
    Discard(Vec<DiscardRange>),
    /// Make these ranges read as zeros.
    WriteZeroes(Vec<DiscardRange>),
}

impl Operation {
    /// Parses the request in `chain`, for a disk of `capacity` sectors.
    ///
    /// # Errors
    ///
    /// The status to answer with (5.2.6.2). [`Status::IoError`] if the request is malformed, exceeds the
    /// disk, is not a whole number of sectors, or writes to a read-only disk. [`Status::Unsupported`] if the
    /// device does not offer the operation.
    pub fn parse(
        chain: &Chain<'_>,
        config: &DeviceConfig,
        capacity: Sector,
    ) -> Result<Self, Status> {
        let (readable, writable) = (chain.readable(), chain.writable());
        let Some(data) = readable.len().checked_sub(HEADER) else {
            return Err(Status::IoError);
        };
        let mut header = [0u8; HEADER];
        let mut cursor = readable.cursor(0);
        cursor.read(&mut header);
        let [t0, t1, t2, t3, _, _, _, _, sector @ ..] = header;
        let sector = Sector(u64::from_le_bytes(sector));
        // Memory of the other direction must be empty: it would be neither read nor written.
        let transfer = |len: usize, other_direction: usize| {
            let whole = (len as u64).is_multiple_of(SECTOR_SIZE);
            if !whole || len > MAX_DATA || other_direction != 0 {
                return Err(Status::IoError);
            }
            let range = SectorRange::checked(sector, Sectors::whole_in(len as u64));
            let inside = range.filter(|range| range.end() <= capacity);
            inside.ok_or(Status::IoError)
        };
        let ranges = |may_unmap| discard::parse(cursor, data, capacity, may_unmap);
        match u32::from_le_bytes([t0, t1, t2, t3]) {
            VIRTIO_BLK_T_IN => transfer(writable.len(), data).map(Operation::Read),
            VIRTIO_BLK_T_OUT if config.writable => {
                transfer(data, writable.len()).map(Operation::Write)
            }
            VIRTIO_BLK_T_OUT => Err(Status::IoError),
            VIRTIO_BLK_T_FLUSH => Ok(Operation::Flush),
            VIRTIO_BLK_T_GET_ID => Ok(Operation::GetId),
            VIRTIO_BLK_T_DISCARD if config.writable => ranges(false).map(Operation::Discard),
            VIRTIO_BLK_T_WRITE_ZEROES if config.writable => {
                ranges(true).map(Operation::WriteZeroes)
            }
            _ => Err(Status::Unsupported),
        }
    }
}
