//! Dirty-page log of a live migration (vhost-user, "Migration"): one bit per 4096-byte page of the guest
//! address space, in memory that the front-end shares. The device sets the bit of each page it writes.

use std::fs::File;
use std::sync::atomic::{AtomicU8, Ordering};

use vm_memory::{GuestAddress, VolatileMemory};

use crate::io::mapped_file::{Access, MapError, MappedFile};

/// Bytes of guest memory per bit (VHOST_LOG_PAGE).
const LOG_PAGE: u64 = 4096;

/// A mapped dirty log.
#[derive(Debug)]
pub struct DirtyLog {
    mapping: MappedFile,
}

impl DirtyLog {
    /// Maps `len` bytes at `offset` of the file that the front-end sent with SET_LOG_BASE.
    ///
    /// # Errors
    ///
    /// [`MapError`] if the file does not contain the range, or cannot be mapped.
    pub fn map(file: &File, offset: u64, len: u64) -> Result<Self, MapError> {
        Ok(Self {
            mapping: MappedFile::new(file, offset, len, Access::ReadWrite)?,
        })
    }

    /// Whether the front-end truncated the file: later marks are lost.
    pub fn is_lost(&self) -> bool {
        self.mapping.is_lost()
    }

    /// Marks `[addr, addr + len)` as written. Pages beyond the log are not marked: the front-end sizes the
    /// log for all memory that it migrates.
    pub fn mark(&self, addr: GuestAddress, len: u64) {
        let Some(last) = len.checked_sub(1) else {
            return;
        };
        for page in addr.0 / LOG_PAGE..=addr.0.saturating_add(last) / LOG_PAGE {
            let Ok(byte) = usize::try_from(page / 8) else {
                return;
            };
            let Some(cell) = self.mapping.slice(byte, 1) else {
                return;
            };
            let Ok(bits) = cell.get_atomic_ref::<AtomicU8>(0) else {
                return;
            };
            // The data must be visible no later than its mark.
            bits.fetch_or(1 << (page % 8), Ordering::Release);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::fs::FileExt;

    #[test]
    fn marks_every_page_touched_and_no_other() {
        let file = tempfile::tempfile().unwrap();
        file.set_len(4096 + 16).unwrap();
        let log = DirtyLog::map(&file, 4096, 16).unwrap();
        log.mark(GuestAddress(4095), 2);
        log.mark(GuestAddress(9 * 4096), 4096);
        log.mark(GuestAddress(20 * 4096), 0);
        log.mark(GuestAddress(127 * 4096), u64::MAX);
        let mut bits = [0u8; 16];
        file.read_exact_at(&mut bits, 4096).unwrap();
        assert_eq!(bits[..2], [0b11, 0b10]);
        assert!(bits[2..15].iter().all(|byte| *byte == 0));
        assert_eq!(bits[15], 0x80);
    }

    #[test]
    fn refuses_a_log_the_file_does_not_hold() {
        let file = tempfile::tempfile().unwrap();
        file.set_len(15).unwrap();
        for (offset, len) in [(0, 16), (0, 0), (u64::MAX, 1)] {
            assert!(DirtyLog::map(&file, offset, len).is_err());
        }
    }
}
