//! Reads and writes of the configuration space by a front-end.
#![cfg_attr(
    not(test),
    warn(clippy::indexing_slicing, clippy::arithmetic_side_effects)
)]

use super::{Handler, Standing};
use crate::vhost::refusal::{CONFIG_SPACE, Refusal};
use crate::virtio::config;

/// Some front-ends ask for the configuration space at the offset it has in virtio-mmio.
const MMIO_CONFIG_OFFSET: u32 = 0x100;

impl Handler {
    /// Returns `size` bytes of the configuration space at `offset`.
    pub fn config(&self, offset: u32, size: u32) -> Result<Vec<u8>, Refusal> {
        let start = config_offset(offset) as usize;
        let capacity = match (start, size) {
            (0, 8..) => self.size.read(),
            _ => self.backend.volume().sectors(),
        };
        let mut space = self
            .backend
            .config()
            .space(capacity, self.writeback())
            .to_vec();
        space.resize(CONFIG_SPACE, 0);
        let end = start.checked_add(size as usize);
        let bytes = end.and_then(|end| space.get(start..end));
        bytes
            .map(<[u8]>::to_vec)
            .ok_or(Refusal::Config { offset, size })
    }

    /// Writes to the configuration space. The front-end forwards every write of the driver; those to
    /// fields other than `writeback` are ignored.
    pub fn set_config(&mut self, offset: u32, bytes: &[u8]) -> Result<(), Refusal> {
        let writable = self.backend.config().writable;
        let at = config::WRITEBACK_AT.checked_sub(config_offset(offset));
        match at.and_then(|at| bytes.get(at as usize)) {
            Some(byte) if writable => self.set_writeback(*byte != 0),
            _ => Ok(()),
        }
    }

    /// Sets whether writes may be answered before they are durable: now, or once the front-end owns the
    /// disk.
    pub(super) fn set_writeback(&mut self, writeback: bool) -> Result<(), Refusal> {
        log::debug!("the driver sets writeback to {writeback}");
        if let Some(area) = &self.inflight {
            area.record_writes_through(!writeback);
        }
        if self.standing == Standing::Serving {
            return self.apply_writeback(writeback);
        }
        self.writeback = Some(writeback);
        Ok(())
    }

    pub(super) fn apply_writeback(&self, writeback: bool) -> Result<(), Refusal> {
        let switched = self.backend.set_writeback(writeback);
        switched.map_err(Refusal::Flush)
    }

    pub(super) fn writeback(&self) -> bool {
        self.writeback.unwrap_or_else(|| self.backend.writeback())
    }
}

/// Offset in `struct virtio_blk_config` for an offset that a front-end sent.
fn config_offset(offset: u32) -> u32 {
    offset.checked_sub(MMIO_CONFIG_OFFSET).unwrap_or(offset)
}
