//! Feature bits and configuration space of the device (virtio 1.2, sections 5.2.3 and 5.2.4).

use virtio_bindings::virtio_blk::{
    VIRTIO_BLK_F_BLK_SIZE, VIRTIO_BLK_F_CONFIG_WCE, VIRTIO_BLK_F_DISCARD, VIRTIO_BLK_F_FLUSH,
    VIRTIO_BLK_F_MQ, VIRTIO_BLK_F_RO, VIRTIO_BLK_F_SEG_MAX, VIRTIO_BLK_F_TOPOLOGY,
    VIRTIO_BLK_F_WRITE_ZEROES,
};
use virtio_bindings::virtio_config::VIRTIO_F_VERSION_1;
use virtio_bindings::virtio_ring::{VIRTIO_RING_F_EVENT_IDX, VIRTIO_RING_F_INDIRECT_DESC};

use super::discard::{MAX_RANGE_SECTORS, MAX_RANGES};
use crate::units::{SECTOR_SIZE, Sector};

/// Descriptors of a chain that hold no data: header and status.
const OVERHEAD: u16 = 2;

/// Most data segments of a request: the longest chain fits a queue of 128, the smallest default of the
/// front-ends.
const SEG_MAX: u16 = 126;

/// log2 of the number of 512-byte sectors in a physical block of 4096 bytes.
const PHYSICAL_BLOCK_EXP: u8 = 3;

/// Length of the configuration space with the fields of virtio 1.2.
const CONFIG_LEN: usize = 60;

/// Offset of `writeback`, the only field that a driver may write. 1: writes are durable once flushed;
/// 0: once answered.
pub const WRITEBACK_AT: u32 = 32;

/// Fixed properties of the virtio-blk device. Its capacity is not among them: it is the size of the disk,
/// which can grow.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct DeviceConfig {
    /// Number of queues, at least 1.
    pub queues: u16,
    /// Largest size of a queue.
    pub queue_size: u16,
    /// Optimal size of a read in bytes: the largest compressed block.
    pub optimal_io: u32,
    /// Whether the disk is writable.
    pub writable: bool,
}

/// Whether writes must be durable before they are answered (virtio 1.2, section 5.2.6.2), given the
/// acknowledged features and the value of the field `writeback`.
pub fn writes_through(acknowledged: u64, writeback: bool) -> bool {
    let has = |bit: u32| acknowledged & 1 << bit != 0;
    if has(VIRTIO_BLK_F_CONFIG_WCE) {
        !writeback
    } else {
        // Without FLUSH, the driver cannot make writes durable later.
        !has(VIRTIO_BLK_F_FLUSH)
    }
}

/// Whether `writeback` starts as 0 for a driver that acknowledged these features: it can switch the write
/// cache off, but not flush it (virtio 1.2, section 5.2.5.2).
pub fn starts_write_through(acknowledged: u64) -> bool {
    let bits = acknowledged & (1 << VIRTIO_BLK_F_CONFIG_WCE | 1 << VIRTIO_BLK_F_FLUSH);
    bits == 1 << VIRTIO_BLK_F_CONFIG_WCE
}

impl DeviceConfig {
    /// Feature bits that the device offers. They must not change between versions of the daemon: a
    /// front-end that reconnects does not negotiate again.
    pub fn features(&self) -> u64 {
        Self::features_of(self.writable)
    }

    /// Feature bits of a disk that is writable or not.
    pub fn features_of(writable: bool) -> u64 {
        const ALWAYS: [u32; 7] = [
            VIRTIO_F_VERSION_1,
            VIRTIO_BLK_F_SEG_MAX,
            VIRTIO_BLK_F_BLK_SIZE,
            VIRTIO_BLK_F_TOPOLOGY,
            VIRTIO_BLK_F_MQ,
            VIRTIO_RING_F_INDIRECT_DESC,
            VIRTIO_RING_F_EVENT_IDX,
        ];
        const READ_ONLY: [u32; 1] = [VIRTIO_BLK_F_RO];
        const WRITABLE: [u32; 4] = [
            VIRTIO_BLK_F_FLUSH,
            VIRTIO_BLK_F_CONFIG_WCE,
            VIRTIO_BLK_F_DISCARD,
            VIRTIO_BLK_F_WRITE_ZEROES,
        ];
        let access = if writable { &WRITABLE[..] } else { &READ_ONLY };
        let bits = ALWAYS.iter().chain(access);
        bits.fold(0, |bits, bit| bits | 1 << bit)
    }

    /// Returns `struct virtio_blk_config` of a disk of `capacity` sectors. Fields of features that are not
    /// offered are zero; only a writable disk offers `writeback`.
    pub fn space(&self, capacity: Sector, writeback: bool) -> [u8; CONFIG_LEN] {
        let seg_max = SEG_MAX.min(self.queue_size.saturating_sub(OVERHEAD)).max(1);
        let optimal = (u64::from(self.optimal_io) / SECTOR_SIZE) as u32;
        let minimal = 1u16 << PHYSICAL_BLOCK_EXP;
        let always: [(usize, &[u8]); 7] = [
            (0, &capacity.0.to_le_bytes()),
            (12, &u32::from(seg_max).to_le_bytes()),
            (20, &(SECTOR_SIZE as u32).to_le_bytes()),
            (24, &[PHYSICAL_BLOCK_EXP]),
            (26, &minimal.to_le_bytes()),
            (28, &optimal.to_le_bytes()),
            (34, &self.queues.to_le_bytes()),
        ];
        let writable: [(usize, &[u8]); 7] = [
            (WRITEBACK_AT as usize, &[u8::from(writeback)]),
            // DISCARD: most sectors, most ranges, alignment. WRITE_ZEROES: most sectors, most ranges,
            // may unmap.
            (36, &MAX_RANGE_SECTORS.to_le_bytes()),
            (40, &MAX_RANGES.to_le_bytes()),
            (44, &u32::from(minimal).to_le_bytes()),
            (48, &MAX_RANGE_SECTORS.to_le_bytes()),
            (52, &MAX_RANGES.to_le_bytes()),
            (56, &[1]),
        ];
        let writable = if self.writable { &writable[..] } else { &[] };
        let mut space = [0; CONFIG_LEN];
        for (at, bytes) in always.iter().chain(writable) {
            let field = space.iter_mut().skip(*at);
            field.zip(*bytes).for_each(|(to, from)| *to = *from);
        }
        space
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const CAPACITY: Sector = Sector(0x0102_0304_0506);
    const READ_ONLY: DeviceConfig = DeviceConfig {
        queues: 0x0708,
        queue_size: 64,
        optimal_io: 65536,
        writable: false,
    };
    const WRITABLE: DeviceConfig = DeviceConfig {
        writable: true,
        ..READ_ONLY
    };

    #[test]
    fn fields_are_at_the_offsets_of_the_specification() {
        for (config, writeback) in [(READ_ONLY, true), (WRITABLE, false), (WRITABLE, true)] {
            let space = config.space(CAPACITY, writeback);
            assert_eq!(space[..8], [6, 5, 4, 3, 2, 1, 0, 0]);
            assert_eq!(space[8..12], [0; 4], "no size_max");
            assert_eq!(space[12..16], [62, 0, 0, 0], "seg_max fits a queue of 64");
            assert_eq!(space[20..24], [0, 2, 0, 0]);
            assert_eq!(space[24..32], [3, 0, 8, 0, 128, 0, 0, 0]);
            assert_eq!(space[34..36], [8, 7]);
        }
        let space = READ_ONLY.space(CAPACITY, true);
        assert_eq!((space[32], &space[36..]), (0, &[0; 24][..]));
        let space = WRITABLE.space(CAPACITY, true);
        assert_eq!(space[32..34], [1, 0]);
        assert_eq!(space[36..48], [0, 0, 64, 0, 32, 0, 0, 0, 8, 0, 0, 0]);
        assert_eq!(space[48..60], [0, 0, 64, 0, 32, 0, 0, 0, 1, 0, 0, 0]);
        assert_eq!(WRITABLE.space(CAPACITY, false)[32], 0);
    }

    /// Front-ends that reconnect to a newer daemon do not negotiate again.
    #[test]
    fn offered_features_never_change() {
        assert_eq!(READ_ONLY.features(), 0x1_3000_1464);
        assert_eq!(WRITABLE.features(), 0x1_3000_7e44);
    }

    #[test]
    fn writes_are_durable_at_once_for_a_driver_that_cannot_flush() {
        let (flush, wce) = (1 << VIRTIO_BLK_F_FLUSH, 1 << VIRTIO_BLK_F_CONFIG_WCE);
        for (features, writeback, through) in [
            (0, true, true),
            (flush, true, false),
            (flush, false, false),
            (wce, true, false),
            (wce, false, true),
            (flush | wce, true, false),
            (flush | wce, false, true),
        ] {
            assert_eq!(
                writes_through(features, writeback),
                through,
                "{features:#x}"
            );
        }
        assert!(starts_write_through(wce));
        assert!(
            ![0, flush, flush | wce]
                .into_iter()
                .any(starts_write_through)
        );
    }
}
