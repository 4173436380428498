//! Status of a block request: the last byte of its writable memory (virtio 1.2, section 5.2.6).

use virtio_bindings::virtio_blk::{VIRTIO_BLK_S_IOERR, VIRTIO_BLK_S_OK, VIRTIO_BLK_S_UNSUPP};
use vm_memory::{GuestAddress, VolatileMemory, VolatileSlice};

use super::dirty_log::DirtyLog;

/// Status of an answered request.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Status {
    /// The request succeeded.
    Ok,
    /// The request failed, or is malformed.
    IoError,
    /// The device does not offer the operation.
    Unsupported,
}

impl Status {
    /// Value of the status byte.
    pub fn byte(self) -> u8 {
        (match self {
            Status::Ok => VIRTIO_BLK_S_OK,
            Status::IoError => VIRTIO_BLK_S_IOERR,
            Status::Unsupported => VIRTIO_BLK_S_UNSUPP,
        }) as u8
    }
}

/// Status byte of a request in guest memory.
#[derive(Clone, Copy, Debug)]
pub struct StatusByte<'m> {
    byte: VolatileSlice<'m>,
    address: GuestAddress,
}

impl<'m> StatusByte<'m> {
    /// Status byte `byte`, which lies at guest address `address`.
    pub(super) fn new(byte: VolatileSlice<'m>, address: GuestAddress) -> Self {
        Self { byte, address }
    }

    /// Writes `status`, and marks the byte as written in `log`.
    pub fn write(&self, status: Status, log: Option<&DirtyLog>) {
        if let Ok(byte) = self.byte.get_ref::<u8>(0) {
            byte.store(status.byte());
        }
        if let Some(log) = log {
            log.mark(self.address, 1);
        }
    }
}
