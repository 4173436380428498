//! Block requests (virtio 1.2, section 5.2.6): what a chain asks for, and its answer.
//!
//! The framing is free: the header is the first 16 bytes of what we may read and the status the
//! last byte of what we may write, however the driver cut them.

use virtio_bindings::virtio_blk::{
    VIRTIO_BLK_ID_BYTES, VIRTIO_BLK_S_IOERR, VIRTIO_BLK_S_OK, VIRTIO_BLK_S_UNSUPP,
    VIRTIO_BLK_T_DISCARD, VIRTIO_BLK_T_FLUSH, VIRTIO_BLK_T_GET_ID, VIRTIO_BLK_T_IN,
    VIRTIO_BLK_T_OUT, VIRTIO_BLK_T_WRITE_ZEROES,
};
use vm_memory::VolatileSlice;

use super::chain::Chain;
use super::config::DeviceConfig;
use super::discard::{self, Range};
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
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Operation {
    /// Fill all of [`Chain::writable`] from the disk, starting at this sector.
    Read(Sector),
    /// Put [`Chain::readable`], from byte [`HEADER`] on, on the disk, starting at this sector.
    Write(Sector),
    /// Give the device's serial.
    GetId,
    /// Make writes durable.
    Flush,
    /// Forget what these ranges hold.
    Discard(Vec<Range>),
    /// Make these ranges read as zeros.
    WriteZeroes(Vec<Range>),
}

/// A chain understood: either an operation, or the answer.
#[derive(Clone, Debug, PartialEq, Eq)]
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
    /// What lies past the disk's end, or is no whole number of sectors, or writes to a read-only
    /// disk, is answered with an I/O error; what the device does not offer, as unsupported (5.2.6.2).
    pub fn parse(chain: &mut Chain<'m>, config: &DeviceConfig) -> Self {
        let status = chain.writable.pieces().last().and_then(|last| {
            let at = last.len().checked_sub(1)?;
            Some(StatusByte(last.subslice(at, 1).ok()?))
        });
        chain.writable.truncate_by(1);
        let operation = Self::operation(chain, config);
        Self { operation, status }
    }

    fn operation(chain: &Chain<'m>, config: &DeviceConfig) -> Result<Operation, Status> {
        let Some(data) = chain.readable.len().checked_sub(HEADER) else {
            return Err(Status::IoError);
        };
        let mut header = [0u8; HEADER];
        let mut cursor = chain.readable.cursor(0);
        cursor.read(&mut header);
        let [t0, t1, t2, t3, _, _, _, _, sector @ ..] = header;
        let sector = Sector(u64::from_le_bytes(sector));
        let transfer = |len: usize| {
            let sectors = len as u64 / SECTOR_SIZE;
            let whole = (len as u64).is_multiple_of(SECTOR_SIZE);
            let end = sector.checked_add(sectors);
            let inside = end.is_some_and(|end| end <= config.capacity);
            whole && inside && len <= MAX_DATA
        };
        let ranges = |may_unmap| discard::parse(cursor, data, config.capacity, may_unmap);
        match u32::from_le_bytes([t0, t1, t2, t3]) {
            VIRTIO_BLK_T_IN if transfer(chain.writable.len()) => Ok(Operation::Read(sector)),
            VIRTIO_BLK_T_OUT if config.writable && transfer(data) => Ok(Operation::Write(sector)),
            VIRTIO_BLK_T_IN | VIRTIO_BLK_T_OUT => Err(Status::IoError),
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
