//! Reserved space in an index file for future entries.
//!
//! A flush writes the entries of writes that were answered, which is too late to find the storage full. So each write
//! reserves space behind the end of the file, without changing its length. On a full file system the write then fails,
//! and not the flush.

use std::fs::File;
use std::path::PathBuf;
use std::sync::Arc;

use rustix::fs::{FallocateFlags, fallocate};
use rustix::io::{Errno, retry_on_intr};

use super::Error;
use super::index_file::IndexFile;
use crate::format::lsmt::ENTRY_LEN;

/// Bytes reserved at a time, if there is enough space.
const STEP: u64 = 64 << 10;

/// The reserved space of an index file.
#[derive(Debug)]
pub struct Reservation {
    path: PathBuf,
    file: Arc<File>,
    /// End of the file once all waiting entries are written.
    needed: u64,
    /// End of the reserved space.
    taken: u64,
}

impl Reservation {
    /// Reserves space for `waiting` entries of answered writes. If there is none, the next [`Reservation::take`] tries
    /// again.
    pub fn new(index: &IndexFile, waiting: usize) -> Self {
        let mut reservation = Self {
            path: index.path().to_owned(),
            file: index.file(),
            needed: index.end() + bytes(waiting),
            taken: index.end(),
        };
        let _ = reservation.take(0);
        reservation
    }

    /// Reserves space for `entries` more entries.
    ///
    /// # Errors
    /// [`Error::Bytes`] if there is no space; earlier reservations stay.
    pub fn take(&mut self, entries: usize) -> Result<(), Error> {
        let needed = self.needed + bytes(entries);
        if needed > self.taken {
            let ahead = needed.next_multiple_of(STEP);
            self.taken = match self.reserve(ahead) {
                Err(Errno::NOSPC | Errno::DQUOT) => self.reserve(needed).map(|()| needed),
                reserved => reserved.map(|()| ahead),
            }
            .map_err(|errno| Error::bytes("reserve space", &self.path, self.taken)(errno.into()))?;
        }
        self.needed = needed;
        Ok(())
    }

    /// Releases the reservation of `entries` entries.
    pub fn leave(&mut self, entries: usize) {
        self.needed -= bytes(entries);
    }

    fn reserve(&self, end: u64) -> Result<(), Errno> {
        let len = end - self.taken;
        let flags = FallocateFlags::KEEP_SIZE;
        match retry_on_intr(|| fallocate(&self.file, flags, self.taken, len)) {
            // Without support for reservations, a full file system fails the flush.
            Err(Errno::OPNOTSUPP) => Ok(()),
            reserved => reserved,
        }
    }
}

fn bytes(entries: usize) -> u64 {
    (entries * ENTRY_LEN) as u64
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::MetadataExt;

    use uuid::Uuid;

    use super::*;
    use crate::format::lsmt::Header;

    #[test]
    fn what_waits_has_room_in_a_new_file() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("index");
        let header = Header::empty(1 << 20, Uuid::new_v4(), Uuid::nil());
        IndexFile::create(&path, &header).unwrap();
        let (index, _) = IndexFile::open(&path, true).unwrap();
        let len = index.end();
        // Each takes 16 bytes.
        Reservation::new(&index, 4096);
        let metadata = std::fs::metadata(&path).unwrap();
        assert_eq!(metadata.len(), len);
        assert!(metadata.blocks() * 512 >= len + 4096 * 16);
    }
}
