//! Block requests (virtio 1.2, section 5.2.6): what a chain asks for, and its answer.
//!
//! The framing is free: the header is the first 16 bytes of what we may read and the status the
//! last byte of what we may write, however the driver cut them.

use virtio_bindings::virtio_blk::{
    VIRTIO_BLK_ID_BYTES, VIRTIO_BLK_S_IOERR, VIRTIO_BLK_S_OK, VIRTIO_BLK_S_UNSUPP,
    VIRTIO_BLK_T_FLUSH, VIRTIO_BLK_T_GET_ID, VIRTIO_BLK_T_IN, VIRTIO_BLK_T_OUT,
};
use vm_memory::VolatileSlice;

use super::chain::Chain;
use crate::units::{SECTOR_SIZE, Sector};

/// Bytes of a request's header: type, reserved, sector.
pub const HEADER: usize = 16;

/// Bytes of a device's serial (VIRTIO_BLK_ID_BYTES).
pub const SERIAL_LEN: usize = VIRTIO_BLK_ID_BYTES as usize;

/// Most data one request may carry, in bytes: bounds what a guest can make a worker do in one go.
/// The largest a Linux guest sends by default is 1.25 MiB.
pub const MAX_DATA: usize = 64 << 20;

/// The answer to a request.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Status {
    /// Done.
    Ok,
    /// Failed, or broke a rule.
    IoError,
    /// Not a request this device knows.
    Unsupported,
}

impl Status {
    /// The byte that stands for it.
    pub fn byte(self) -> u8 {
        (match self {
            Status::Ok => VIRTIO_BLK_S_OK,
            Status::IoError => VIRTIO_BLK_S_IOERR,
            Status::Unsupported => VIRTIO_BLK_S_UNSUPP,
        }) as u8
    }
}

/// What a request asks for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Operation {
    /// Fill all of the data from the disk, starting at this sector.
    Read(Sector),
    /// Give the device's serial.
    GetId,
    /// Make writes durable.
    Flush,
}

/// A chain understood: either an operation whose data is [`Chain::writable`], or the answer.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Request<'m> {
    /// What to do, or the status to answer at once.
    pub operation: Result<Operation, Status>,
    /// Where the answer goes; without it nothing can be said.
    pub status: Option<StatusByte<'m>>,
}

/// The last byte of a request's writable memory.
#[derive(Clone, Copy, Debug)]
pub struct StatusByte<'m>(VolatileSlice<'m>);

impl PartialEq for StatusByte<'_> {
    fn eq(&self, other: &Self) -> bool {
        self.0.ptr_guard().as_ptr() == other.0.ptr_guard().as_ptr()
    }
}

impl Eq for StatusByte<'_> {}

impl StatusByte<'_> {
    /// Writes the answer.
    pub fn write(&self, status: Status) {
        self.0.copy_from(&[status.byte()]);
    }
}

impl<'m> Request<'m> {
    /// Reads the header of `chain`, and takes the status byte off its writable memory.
    ///
    /// `capacity` is the disk's size in sectors. What lies past it, or is no whole number of
    /// sectors, or writes to this read-only disk, is answered with an I/O error; what the device
    /// does not offer, as unsupported (5.2.6.2).
    pub fn parse(chain: &mut Chain<'m>, capacity: Sector) -> Self {
        let status = chain.writable.pieces().last().and_then(|last| {
            let at = last.len().checked_sub(1)?;
            Some(StatusByte(last.subslice(at, 1).ok()?))
        });
        chain.writable.truncate_by(1);
        let operation = Self::operation(chain, capacity);
        Self { operation, status }
    }

    fn operation(chain: &Chain<'m>, capacity: Sector) -> Result<Operation, Status> {
        let mut header = [0u8; HEADER];
        if chain.readable.len() < HEADER {
            return Err(Status::IoError);
        }
        let mut filled = 0;
        chain.readable.cursor(0).take(HEADER, |piece| {
            filled += piece.copy_to(&mut header[filled..]);
        });
        let [t0, t1, t2, t3, _, _, _, _, sector @ ..] = header;
        let sector = Sector(u64::from_le_bytes(sector));
        match u32::from_le_bytes([t0, t1, t2, t3]) {
            VIRTIO_BLK_T_IN => {
                let len = chain.writable.len();
                let sectors = len as u64 / SECTOR_SIZE;
                let whole = (len as u64).is_multiple_of(SECTOR_SIZE);
                let inside = sector
                    .checked_add(sectors)
                    .is_some_and(|end| end <= capacity);
                if whole && inside && len <= MAX_DATA {
                    Ok(Operation::Read(sector))
                } else {
                    Err(Status::IoError)
                }
            }
            VIRTIO_BLK_T_OUT => Err(Status::IoError),
            VIRTIO_BLK_T_FLUSH => Ok(Operation::Flush),
            VIRTIO_BLK_T_GET_ID => Ok(Operation::GetId),
            _ => Err(Status::Unsupported),
        }
    }
}
