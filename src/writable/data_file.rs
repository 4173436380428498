//! The data file of a writable layer in use.

use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};

use rustix::fs::{FallocateFlags, SeekFrom, fallocate, seek};
use rustix::io::Errno;
use vm_memory::VolatileSlice;

use super::{Error, seal};
use crate::format::lsmt::writable::Kind;
use crate::format::lsmt::{Header, Mapping};
use crate::io::vectored;
use crate::source::Blob;
use crate::units::{SECTOR_SIZE, Sector};

/// Bytes in one piece that storage begins to take as soon as they are written, rather than at the next
/// flush: what comes in such pieces is seldom written again before.
const STREAM: u64 = 128 << 10;

/// An open data file. Positions and lengths are sectors of the file.
#[derive(Debug)]
pub(super) struct DataFile {
    path: PathBuf,
    file: File,
    blob: Arc<Blob>,
    /// Bytes that the file has at least, unless another program cut it short.
    len: AtomicU64,
    /// Whether data was written since the last sync began.
    dirty: AtomicBool,
}

impl DataFile {
    /// A file whose data in use ends at sector `end`.
    ///
    /// # Errors
    /// [`Error::File`] if there are no descriptors left.
    pub(super) fn new(path: &Path, file: File, end: Sector) -> Result<Self, Error> {
        let again = file.try_clone().map_err(Error::file("open", path))?;
        Ok(Self {
            path: path.to_owned(),
            blob: Arc::new(Blob::changing(path, again)?),
            file,
            len: AtomicU64::new(end.0 * SECTOR_SIZE),
            // What a process before this one wrote may not be durable yet.
            dirty: AtomicBool::new(true),
        })
    }

    /// The path it was opened by.
    pub(super) fn path(&self) -> &Path {
        &self.path
    }

    /// The file as readers use it.
    pub(super) fn blob(&self) -> &Arc<Blob> {
        &self.blob
    }

    /// Writes pieces of memory, `len` bytes in all, from sector `at` on. `fresh` says that the file may
    /// grow by that.
    ///
    /// # Errors
    /// [`Error::Bytes`] if they cannot be written.
    pub(super) fn write(
        &self,
        at: Sector,
        pieces: &[VolatileSlice<'_>],
        len: u64,
        fresh: bool,
    ) -> Result<(), Error> {
        let offset = at.0 * SECTOR_SIZE;
        let written = vectored::write_all_at(&self.file, pieces, offset);
        // After the write and before its answer: a sync that began in between does not count.
        self.dirty.store(true, Ordering::Release);
        written.map_err(Error::bytes("write", &self.path, offset))?;
        if len >= STREAM {
            vectored::begin_to_store(&self.file, offset, len);
        }
        // The length only grows: most writes need no more than a look.
        let end = offset + len;
        if fresh && self.len.load(Ordering::Relaxed) < end {
            self.len.fetch_max(end, Ordering::Release);
        }
        Ok(())
    }

    /// Fills sectors with zeros; they keep their storage.
    ///
    /// # Errors
    /// [`Error::Bytes`] if they cannot be written.
    pub(super) fn zero(&self, at: Sector, sectors: u64) -> Result<(), Error> {
        let (offset, len) = (at.0 * SECTOR_SIZE, sectors * SECTOR_SIZE);
        let flags = FallocateFlags::ZERO_RANGE | FallocateFlags::KEEP_SIZE;
        let zeroed = match fallocate(&self.file, flags, offset, len) {
            Err(Errno::OPNOTSUPP) => self.write_zeros(offset, len),
            zeroed => zeroed.map_err(io::Error::from),
        };
        self.dirty.store(true, Ordering::Release);
        zeroed.map_err(Error::bytes("zero", &self.path, offset))
    }

    fn write_zeros(&self, offset: u64, len: u64) -> io::Result<()> {
        static ZEROS: [u8; 1 << 16] = [0; 1 << 16];
        (0..len).step_by(ZEROS.len()).try_for_each(|done| {
            let part = (len - done).min(ZEROS.len() as u64);
            self.file
                .write_all_at(&ZEROS[..part as usize], offset + done)
        })
    }

    /// Gives back the storage of sectors, which then read as zeros.
    pub(super) fn punch(&self, at: Sector, sectors: u64) {
        let flags = FallocateFlags::PUNCH_HOLE | FallocateFlags::KEEP_SIZE;
        // On a file system without holes, free sectors keep their storage until they are used again.
        let _ = fallocate(&self.file, flags, at.0 * SECTOR_SIZE, sectors * SECTOR_SIZE);
    }

    /// Whether data was written since the last sync began.
    pub(super) fn is_dirty(&self) -> bool {
        self.dirty.load(Ordering::Acquire)
    }

    /// Makes durable what was written.
    ///
    /// # Errors
    /// The sync fails: data may be lost.
    pub(super) fn sync(&self) -> io::Result<()> {
        match self.dirty.swap(false, Ordering::AcqRel) {
            true => self.file.sync_data(),
            false => Ok(()),
        }
    }

    /// Refuses a file that is shorter than what was written to it: to write behind its end would make
    /// zeros of what is missing. On some file systems this waits for a sync under way, as a write does.
    ///
    /// # Errors
    /// [`Error::CutShort`]; [`Error::File`] if the file cannot be examined.
    pub(super) fn check_len(&self) -> Result<(), Error> {
        // The position has no other use; to ask for all attributes would take a third of a small
        // write's time.
        self.expect_len(|| Ok(seek(&self.file, SeekFrom::End(0))?))
    }

    /// As [`DataFile::check_len`], but does not wait for a sync under way.
    ///
    /// # Errors
    /// As [`DataFile::check_len`].
    pub(super) fn check_len_apart(&self) -> Result<(), Error> {
        self.expect_len(|| Ok(self.file.metadata()?.len()))
    }

    fn expect_len(&self, find: impl FnOnce() -> io::Result<u64>) -> Result<(), Error> {
        // In this order: the file grows meanwhile.
        let expected = self.len.load(Ordering::Acquire);
        let found = find().map_err(Error::file("examine", &self.path))?;
        match found < expected {
            true => Err(Error::CutShort {
                path: self.path.clone(),
                expected,
                found,
            }),
            false => Ok(()),
        }
    }

    /// Seals the file, as [`seal::seal`] does, and lets other processes open it.
    ///
    /// # Errors
    /// As [`seal::seal`]; [`Error::File`] if it cannot be unlocked.
    pub(super) fn seal(
        &self,
        header: &Header,
        kind: Kind,
        mappings: &[Mapping],
    ) -> Result<(), Error> {
        seal::seal(&self.file, &self.path, header, kind, mappings)
    }

    /// Lets other processes open the file.
    ///
    /// # Errors
    /// [`Error::File`] if it cannot be unlocked.
    pub(super) fn unlock(&self) -> Result<(), Error> {
        let unlocked = self.file.unlock();
        unlocked.map_err(Error::file("unlock", &self.path))
    }
}
