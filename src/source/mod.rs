//! Where a blob's bytes come from.
//!
//! A [`Blob`] is a local file, open and of known length. Readers that wait use
//! [`Blob::read_exact_at`]. Those that must not look whether the bytes are in memory, in the mapped
//! [`resident_map`] first and with a read that does not wait second, and take the descriptor to their
//! ring if they are not.

pub mod presence;
pub mod resident_map;

use std::fs::File;
use std::io::{self, Seek, SeekFrom};
use std::num::NonZeroU64;
use std::os::fd::{AsFd, BorrowedFd};
use std::os::unix::fs::{FileExt, FileTypeExt, OpenOptionsExt};
use std::path::{Path, PathBuf};

use rustix::fs::{Advice, OFlags};
use rustix::io::ReadWriteFlags;
use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};
use thiserror::Error;
use vm_memory::VolatileSlice;

use resident_map::ResidentMap;

/// Why a blob's bytes are not to be had.
#[derive(Debug, Error)]
pub enum Error {
    /// The file cannot be opened.
    #[error("cannot open {}", path.display())]
    Open {
        /// The file.
        path: PathBuf,
        /// What the system said.
        source: io::Error,
    },
    /// The path names something that has no bytes at offsets.
    #[error("{} is neither a regular file nor a block device", path.display())]
    NotAFile {
        /// The file.
        path: PathBuf,
    },
    /// The system failed to read.
    #[error("cannot read {expected} bytes at byte {offset} of {}", path.display())]
    Read {
        /// The file.
        path: PathBuf,
        /// First byte wanted.
        offset: u64,
        /// Number of bytes wanted.
        expected: usize,
        /// What the system said.
        source: io::Error,
    },
    /// The file ends before the bytes wanted do.
    #[error("{} is too short: expected {expected} bytes at byte {offset}, found {found}", path.display())]
    Short {
        /// The file.
        path: PathBuf,
        /// First byte wanted.
        offset: u64,
        /// Number of bytes wanted.
        expected: usize,
        /// Number of bytes there are.
        found: usize,
    },
}

/// A local file of bytes that do not change.
#[derive(Debug)]
pub struct Blob {
    path: PathBuf,
    file: File,
    len: u64,
    /// Where it can be mapped; a file that cannot be is always read.
    resident_map: Option<ResidentMap>,
}

impl Blob {
    /// Opens a regular file or block device for reading.
    ///
    /// # Errors
    /// It cannot be opened, or is something else.
    pub fn open(path: &Path) -> Result<Self, Error> {
        let failed = |source| Error::Open {
            path: path.to_owned(),
            source,
        };
        let mut file = File::options()
            .read(true)
            .custom_flags(libc::O_NONBLOCK) // a pipe nobody writes to must not hold us up
            .open(path)
            .map_err(failed)?;
        let kind = file.metadata().map_err(failed)?.file_type();
        if !kind.is_file() && !kind.is_block_device() {
            return Err(Error::NotAFile {
                path: path.to_owned(),
            });
        }
        rustix::fs::fcntl_setfl(&file, OFlags::empty()).map_err(|errno| failed(errno.into()))?;
        let len = file.seek(SeekFrom::End(0)).map_err(failed)?;
        let resident_map = (len > 0).then(|| ResidentMap::new(&file, len));
        let resident_map = resident_map.and_then(|resident_map| {
            resident_map
                .inspect_err(|error| log::info!("{} is read, not mapped: {error}", path.display()))
                .ok()
        });
        Ok(Self {
            path: path.to_owned(),
            file,
            len,
            resident_map,
        })
    }

    /// A file that grows and changes: it is always read, never mapped, and its length is that of
    /// now.
    pub fn changing(path: &Path, file: File) -> Result<Self, Error> {
        let failed = |source| Error::Open {
            path: path.to_owned(),
            source,
        };
        let len = file.metadata().map_err(failed)?.len();
        Ok(Self {
            path: path.to_owned(),
            file,
            len,
            resident_map: None,
        })
    }

    /// The path it was opened by.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Bytes in the file when it was opened.
    pub fn len(&self) -> u64 {
        self.len
    }

    /// Whether the file has no byte.
    pub fn is_empty(&self) -> bool {
        self.len == 0
    }

    /// Fills `buffer` with the bytes from `offset` on.
    ///
    /// # Errors
    /// The system fails, or the file ends first.
    pub fn read_exact_at(&self, buffer: &mut [u8], offset: u64) -> Result<(), Error> {
        let expected = buffer.len();
        let mut found = 0;
        while found < expected {
            let at = offset.saturating_add(found as u64);
            match self.file.read_at(&mut buffer[found..], at) {
                Ok(0) => return Err(self.short(offset, expected, found)),
                Ok(count) => found += count,
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(source) => return Err(self.failed(offset, expected, source)),
            }
        }
        Ok(())
    }

    /// Fills `buffer` with the bytes from `offset` on if the page cache holds them all, and
    /// returns whether it did. Never waits for storage.
    ///
    /// # Errors
    /// The file ends first.
    pub fn read_cached(&self, offset: u64, buffer: &mut [u8]) -> Result<bool, Error> {
        let expected = buffer.len();
        let mut into = [io::IoSliceMut::new(buffer)];
        match rustix::io::preadv2(&self.file, &mut into, offset, ReadWriteFlags::NOWAIT) {
            Ok(0) if expected > 0 => Err(self.short(offset, expected, 0)),
            Ok(count) => Ok(count == expected),
            // Whatever it is, the read that waits meets it too, and reports it.
            Err(_) => Ok(false),
        }
    }

    /// `len` bytes at `offset`, if they are known to be in memory. Copy them, then ask
    /// [`Blob::is_lost`]: only if it is false were they the file's.
    pub fn resident(&self, offset: u64, len: usize) -> Option<VolatileSlice<'_>> {
        self.resident_map.as_ref()?.resident(offset, len)
    }

    /// Whether the mapped file could not deliver a page that was touched.
    pub fn is_lost(&self) -> bool {
        self.resident_map.as_ref().is_some_and(ResidentMap::is_lost)
    }

    /// Notes that a range was just read, and is in memory.
    pub fn note(&self, offset: u64, len: usize) {
        if let Some(resident_map) = &self.resident_map {
            resident_map.note(offset, len);
        }
    }

    /// Forgets what is in memory: some of it was evicted.
    pub fn forget_resident(&self) {
        if let Some(resident_map) = &self.resident_map {
            resident_map.forget();
        }
    }

    /// Starts to find a range's pages, for [`Blob::prefetch`] to come.
    pub fn prefetch_pages(&self, offset: u64, len: usize) {
        if let Some(resident_map) = &self.resident_map {
            resident_map.prefetch_pages(offset, len);
        }
    }

    /// Starts to bring the first bytes of a range into the processor's cache.
    pub fn prefetch(&self, offset: u64, len: usize) {
        if let Some(resident_map) = &self.resident_map {
            resident_map.prefetch(offset, len);
        }
    }

    /// Asks the system to bring a range into memory, without waiting for it.
    pub fn will_need(&self, offset: u64, len: u64) {
        let known = usize::try_from(len).is_ok_and(|len| self.resident(offset, len).is_some());
        if !known {
            self.advise(offset, len, Advice::WillNeed);
        }
    }

    /// Lets go of the pages of a range, which must not have been seen through the resident_map.
    pub fn drop_cached(&self, offset: u64, len: u64) {
        // Whole pages: the neighbours' bytes on the first and last go as well.
        let start = offset / resident_map::PAGE * resident_map::PAGE;
        let end = (offset + len).next_multiple_of(resident_map::PAGE);
        self.advise(start, end - start, Advice::DontNeed);
    }

    fn advise(&self, offset: u64, len: u64, advice: Advice) {
        // It is advice: a system that does not take it does no harm.
        let _ = rustix::fs::fadvise(&self.file, offset, NonZeroU64::new(len), advice);
    }

    /// The error of a read that failed, for those who read through the descriptor.
    pub fn failed(&self, offset: u64, expected: usize, source: io::Error) -> Error {
        let path = self.path.clone();
        Error::Read {
            path,
            offset,
            expected,
            source,
        }
    }

    /// The error of a read that found the file's end.
    pub fn short(&self, offset: u64, expected: usize, found: usize) -> Error {
        let path = self.path.clone();
        Error::Short {
            path,
            offset,
            expected,
            found,
        }
    }
}

impl AsFd for Blob {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.file.as_fd()
    }
}

/// Makes room for `count` more open files, as far as the hard limit allows, and returns how many
/// there is room for, at most `count`: each layer of a stack is one, and the usual soft limit is
/// 1024. Opening reports what did not fit.
pub fn make_room(count: usize) -> usize {
    /// Files the rest of the process may have open, unless that is more than half of all.
    const OTHERS: u64 = 512;
    let limit = getrlimit(Resource::Nofile);
    let wanted = OTHERS + count as u64;
    let room = |limit: u64| count.min(limit.saturating_sub(OTHERS.min(limit / 2)) as usize);
    let Some(current) = limit.current.filter(|current| *current < wanted) else {
        return count;
    };
    let raised = limit.maximum.map_or(wanted, |maximum| maximum.min(wanted));
    let new = Rlimit {
        current: Some(raised),
        ..limit
    };
    match setrlimit(Resource::Nofile, new) {
        Ok(()) => room(raised),
        Err(error) => {
            log::warn!("cannot raise the limit of open files to {raised}: {error}");
            room(current)
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn reads_and_says_what_is_missing() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("blob");
        std::fs::write(&path, b"0123456789").unwrap();
        let blob = Blob::open(&path).unwrap();
        assert_eq!(blob.len(), 10);
        let mut buffer = [0; 4];
        blob.read_exact_at(&mut buffer, 6).unwrap();
        assert_eq!(&buffer, b"6789");
        let error = blob.read_exact_at(&mut buffer, 8).unwrap_err();
        let text = error.to_string();
        assert!(
            text.contains("expected 4 bytes at byte 8, found 2"),
            "{text}"
        );
        assert!(text.contains("blob"), "{text}");
        assert!(blob.read_exact_at(&mut buffer, u64::MAX).is_err());
    }

    #[test]
    fn only_files_are_opened() {
        let dir = tempfile::tempdir().unwrap();
        let error = Blob::open(dir.path()).unwrap_err();
        assert!(matches!(error, Error::NotAFile { .. }), "{error:?}");
        let error = Blob::open(&dir.path().join("absent")).unwrap_err();
        assert!(matches!(error, Error::Open { .. }), "{error:?}");
        let fifo = dir.path().join("fifo");
        let mode = rustix::fs::Mode::RUSR;
        rustix::fs::mkfifoat(rustix::fs::CWD, &fifo, mode).unwrap();
        let error = Blob::open(&fifo).unwrap_err();
        assert!(matches!(error, Error::NotAFile { .. }), "{error:?}");
    }
}
