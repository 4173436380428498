//! The status of a block request: the byte that ends its writable memory (virtio 1.2, section
//! 5.2.6).

use virtio_bindings::virtio_blk::{VIRTIO_BLK_S_IOERR, VIRTIO_BLK_S_OK, VIRTIO_BLK_S_UNSUPP};
use vm_memory::{GuestAddress, VolatileSlice};

use super::dirty_log::DirtyLog;

/// The answer to a request.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Status {
    /// The request succeeded.
    Ok,
    /// The request failed, or is malformed.
    IoError,
    /// The device does not offer the request.
    Unsupported,
}

impl Status {
    /// The status as the driver reads it.
    pub fn byte(self) -> u8 {
        (match self {
            Status::Ok => VIRTIO_BLK_S_OK,
            Status::IoError => VIRTIO_BLK_S_IOERR,
            Status::Unsupported => VIRTIO_BLK_S_UNSUPP,
        }) as u8
    }
}

/// The place of a request's status in guest memory.
#[derive(Clone, Copy, Debug)]
pub struct StatusByte<'m> {
    byte: VolatileSlice<'m>,
    address: GuestAddress,
}

impl<'m> StatusByte<'m> {
    /// The byte `byte`, which is the guest's byte at `address`.
    pub(super) fn new(byte: VolatileSlice<'m>, address: GuestAddress) -> Self {
        Self { byte, address }
    }

    /// Writes `status`, and records it in `log` while a migration runs.
    pub fn write(&self, status: Status, log: Option<&DirtyLog>) {
        self.byte.copy_from(&[status.byte()]);
        if let Some(log) = log {
            log.mark(self.address, 1);
        }
    }
}
