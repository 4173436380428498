//! Room in an index file for entries to come.
//!
//! An entry is written when it is flushed, which is late to find storage full: the guest was told
//! that its write is done. So room is taken before that, some steps ahead and behind the end of the
//! file, whose length stays. A full disk then refuses the write.

use std::fs::File;
use std::path::PathBuf;
use std::sync::Arc;

use rustix::fs::{FallocateFlags, fallocate};
use rustix::io::{Errno, retry_on_intr};

use super::Error;
use super::index_file::IndexFile;
use crate::format::lsmt::ENTRY_LEN;

/// Bytes taken at a time, unless there are fewer.
const STEP: u64 = 64 << 10;

/// What was taken of an index file.
#[derive(Debug)]
pub struct Reservation {
    path: PathBuf,
    file: Arc<File>,
    /// Bytes of the file when all that waits is written.
    needed: u64,
    /// Bytes there is room for.
    taken: u64,
}

impl Reservation {
    /// That of a file for which `waiting` entries wait. They were answered for already: where there
    /// is no room for them, the next that come ask for it again.
    pub fn new(log: &IndexFile, waiting: usize) -> Self {
        let mut room = Self {
            path: log.path().to_owned(),
            file: log.file(),
            needed: log.end() + bytes(waiting),
            taken: log.end(),
        };
        let _ = room.take(0);
        room
    }

    /// Takes room for `entries` more entries.
    ///
    /// # Errors
    /// There is none; those before keep theirs.
    pub fn take(&mut self, entries: usize) -> Result<(), Error> {
        let needed = self.needed + bytes(entries);
        if needed > self.taken {
            let ahead = needed.next_multiple_of(STEP);
            self.taken = match self.reserve(ahead) {
                Err(Errno::NOSPC | Errno::DQUOT) => self.reserve(needed).map(|()| needed),
                reserved => reserved.map(|()| ahead),
            }
            .map_err(|errno| Error::bytes("take room", &self.path, self.taken)(errno.into()))?;
        }
        self.needed = needed;
        Ok(())
    }

    /// As many entries do not come.
    pub fn leave(&mut self, entries: usize) {
        self.needed -= bytes(entries);
    }

    fn reserve(&self, end: u64) -> Result<(), Errno> {
        let len = end - self.taken;
        let flags = FallocateFlags::KEEP_SIZE;
        match retry_on_intr(|| fallocate(&self.file, flags, self.taken, len)) {
            // A file system that cannot says so when the entries are written.
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
        let (log, _) = IndexFile::open(&path, true).unwrap();
        let len = log.end();
        // Each takes 16 bytes.
        Reservation::new(&log, 4096);
        let metadata = std::fs::metadata(&path).unwrap();
        assert_eq!(metadata.len(), len);
        assert!(metadata.blocks() * 512 >= len + 4096 * 16);
    }
}
