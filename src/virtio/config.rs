//! What the device offers: feature bits and configuration space (virtio 1.2, sections 5.2.3 and
//! 5.2.4).

use virtio_bindings::virtio_blk::{
    VIRTIO_BLK_F_BLK_SIZE, VIRTIO_BLK_F_MQ, VIRTIO_BLK_F_RO, VIRTIO_BLK_F_SEG_MAX,
    VIRTIO_BLK_F_TOPOLOGY,
};
use virtio_bindings::virtio_config::VIRTIO_F_VERSION_1;
use virtio_bindings::virtio_ring::{VIRTIO_RING_F_EVENT_IDX, VIRTIO_RING_F_INDIRECT_DESC};

use crate::units::{SECTOR_SIZE, Sector};

/// Descriptors next to the data in a chain: header and status.
const OVERHEAD: u16 = 2;

/// Data segments in a request at most. A queue of 128, every front-end's default or less, then
/// holds the longest chain.
const SEG_MAX: u16 = 126;

/// log2 of the 512-byte blocks in the 4096 bytes that are the natural unit of an image.
const PHYSICAL_BLOCK_EXP: u8 = 3;

/// Bytes of the configuration space up to and with the fields of virtio 1.2.
const CONFIG_LEN: usize = 60;

/// A block device as the guest sees it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct DeviceConfig {
    /// Size of the disk.
    pub capacity: Sector,
    /// Number of queues, at least 1.
    pub queues: u16,
    /// Largest queue a front-end may set up.
    pub queue_size: u16,
    /// I/O size that reads best, in bytes: the largest block that is decompressed as a whole.
    pub optimal_io: u32,
}

impl DeviceConfig {
    /// The device's feature bits. They must stay the same for the same device across versions of
    /// the daemon: a front-end that reconnects does not negotiate again.
    pub fn features(&self) -> u64 {
        [
            VIRTIO_F_VERSION_1,
            VIRTIO_BLK_F_SEG_MAX,
            VIRTIO_BLK_F_BLK_SIZE,
            VIRTIO_BLK_F_TOPOLOGY,
            VIRTIO_BLK_F_RO,
            VIRTIO_BLK_F_MQ,
            VIRTIO_RING_F_INDIRECT_DESC,
            VIRTIO_RING_F_EVENT_IDX,
        ]
        .into_iter()
        .fold(0, |bits, bit| bits | 1 << bit)
    }

    /// `struct virtio_blk_config`: the offered fields, zeros elsewhere.
    pub fn space(&self) -> [u8; CONFIG_LEN] {
        let seg_max = SEG_MAX.min(self.queue_size.saturating_sub(OVERHEAD)).max(1);
        let optimal = (u64::from(self.optimal_io) / SECTOR_SIZE) as u32;
        let minimal = 1u16 << PHYSICAL_BLOCK_EXP;
        let fields: [(usize, &[u8]); 7] = [
            (0, &self.capacity.0.to_le_bytes()),
            (12, &u32::from(seg_max).to_le_bytes()),
            (20, &(SECTOR_SIZE as u32).to_le_bytes()),
            (24, &[PHYSICAL_BLOCK_EXP]),
            (26, &minimal.to_le_bytes()),
            (28, &optimal.to_le_bytes()),
            (34, &self.queues.to_le_bytes()),
        ];
        let mut space = [0; CONFIG_LEN];
        for (at, bytes) in fields {
            space[at..at + bytes.len()].copy_from_slice(bytes);
        }
        space
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn fields_stand_where_the_specification_puts_them() {
        let config = DeviceConfig {
            capacity: Sector(0x0102_0304_0506),
            queues: 0x0708,
            queue_size: 64,
            optimal_io: 65536,
        };
        let space = config.space();
        assert_eq!(space[..8], [6, 5, 4, 3, 2, 1, 0, 0]);
        assert_eq!(space[8..12], [0; 4], "no size_max");
        assert_eq!(space[12..16], [62, 0, 0, 0], "seg_max fits a queue of 64");
        assert_eq!(space[20..24], [0, 2, 0, 0]);
        assert_eq!(space[24..32], [3, 0, 8, 0, 128, 0, 0, 0]);
        assert_eq!(space[34..36], [8, 7]);
    }
}
