//! The file of a blob: opening, mapping, and locating ranges before they are read.

use std::fs::{File, Metadata};
use std::io::{self, Seek, SeekFrom};
use std::num::NonZeroU64;
use std::os::fd::{AsFd, BorrowedFd};
use std::os::unix::fs::{FileTypeExt, OpenOptionsExt};
use std::path::Path;
use std::sync::{Arc, OnceLock};
use std::time::Instant;

use rustix::fs::{Advice, OFlags};
use rustix::io::Errno;

use super::blob_identity::BlobIdentity;
use super::completion::Completion;
use super::range::{AbsentRange, Located, PresentRange};
use super::recorder::{Recorder, Tape};
use super::resident_map::{self, ResidentMap, ResidentMapError};
use super::waker::Presence;
use super::{Error, LayerRef};

use crate::ratelimited_log;

/// The bytes of a layer as stored: a local file, or a file in the cache with bytes that may be absent.
#[derive(Debug)]
pub struct Blob {
    layer: LayerRef,
    file: File,
    len: u64,
    /// Which bytes are local; `None`: all are.
    presence: Option<Arc<dyn Presence>>,
    /// Whether `presence` need not be asked any more, and whether reads are recorded.
    completion: Completion,
    /// The record of the reads, once a recording began.
    tape: OnceLock<Tape>,
    /// The mapped file, unless it cannot be mapped.
    resident_map: OnceLock<ResidentMap>,
}

impl Blob {
    /// Opens a regular file or block device for reading.
    ///
    /// # Errors
    /// [`Error::Open`] if the file cannot be opened, [`Error::NotAFile`] for any other kind of file.
    pub fn open(path: &Path) -> Result<Self, Error> {
        let failed = |source| Error::Open {
            layer: path.into(),
            source,
        };
        let mut file = File::options()
            .read(true)
            .custom_flags(libc::O_NONBLOCK) // do not wait for the writer of a pipe
            .open(path)
            .map_err(failed)?;
        let kind = file.metadata().map_err(failed)?.file_type();
        if !kind.is_file() && !kind.is_block_device() {
            return Err(Error::NotAFile { layer: path.into() });
        }
        rustix::fs::fcntl_setfl(&file, OFlags::empty()).map_err(|errno| failed(errno.into()))?;
        let len = file.seek(SeekFrom::End(0)).map_err(failed)?;
        Ok(Self::new(path.into(), file, len, None))
    }

    /// Creates a blob of a file that grows and changes, such as the data file of a writable layer. The blob
    /// keeps the current length of the file.
    ///
    /// # Errors
    /// [`Error::Open`] if the file cannot be examined.
    pub fn changing(path: &Path, file: File) -> Result<Self, Error> {
        let failed = |source| Error::Open {
            layer: path.into(),
            source,
        };
        let len = file.metadata().map_err(failed)?.len();
        Ok(Self::new(path.into(), file, len, None))
    }

    /// Creates a blob of `len` bytes. `file` has the same length and contains the bytes that are present
    /// according to `presence`.
    pub fn partial(layer: LayerRef, file: File, len: u64, presence: Arc<dyn Presence>) -> Self {
        Self::new(layer, file, len, Some(presence))
    }

    /// Creates a blob of `len` bytes that are all in `file`, and that `presence` fetches again if they turn out
    /// damaged.
    pub fn repairable(layer: LayerRef, file: File, len: u64, presence: Arc<dyn Presence>) -> Self {
        let blob = Self::new(layer, file, len, Some(presence));
        blob.completion.note();
        blob
    }

    fn new(layer: LayerRef, file: File, len: u64, presence: Option<Arc<dyn Presence>>) -> Self {
        let completion = Completion::default();
        if presence.is_none() {
            completion.note();
        }
        Self {
            layer,
            file,
            len,
            presence,
            completion,
            tape: OnceLock::new(),
            resident_map: OnceLock::new(),
        }
    }

    /// Creates a blob of `len` bytes that are all in `file`.
    pub fn complete(layer: LayerRef, file: File, len: u64) -> Self {
        Self::new(layer, file, len, None)
    }

    /// Records the reads of this blob from now on, as reads of the layer with this number. The recorder stays
    /// that of the first recording.
    pub fn start_recording(&self, recorder: &Arc<Recorder>, layer: usize) {
        let tape = self
            .tape
            .get_or_init(|| Tape::new(recorder, layer, self.len));
        tape.clear();
        self.completion.set_recorded(true);
    }

    /// Ends the recording.
    pub fn stop_recording(&self) {
        self.completion.set_recorded(false);
    }

    /// The layer of the blob.
    pub fn layer(&self) -> &LayerRef {
        &self.layer
    }

    /// Metadata of the file.
    ///
    /// # Errors
    /// [`Error::Open`] if the file cannot be examined.
    pub fn metadata(&self) -> Result<Metadata, Error> {
        let metadata = self.file.metadata();
        metadata.map_err(|source| Error::Open {
            layer: self.layer.clone(),
            source,
        })
    }

    /// Identity of the bytes, by which stacks share an open layer. `None` for a block device, whose
    /// bytes may change unnoticed, and for a recorded blob: sharing it would lose its reads, or record
    /// those of another stack.
    ///
    /// # Errors
    /// [`Error::Open`] if the file cannot be examined.
    pub fn identity(&self) -> Result<Option<BlobIdentity>, Error> {
        if self.completion.is_recorded() {
            return Ok(None);
        }
        let metadata = self.metadata()?;
        if !metadata.is_file() {
            return Ok(None);
        }
        Ok(Some(BlobIdentity::new(&self.layer, &metadata, self.len)))
    }

    /// Length of the blob in bytes when it was opened.
    pub fn len(&self) -> u64 {
        self.len
    }

    /// Whether the blob has no byte.
    pub fn is_empty(&self) -> bool {
        self.len == 0
    }

    /// Number of bytes that are local. Scans the presence map of a partial blob.
    pub fn local_bytes(&self) -> u64 {
        let presence = self.lookup();
        presence.map_or(self.len, |presence| presence.local_bytes())
    }

    /// What tells which bytes are local; `None` once all are known to be.
    fn lookup(&self) -> Option<&Arc<dyn Presence>> {
        self.presence
            .as_ref()
            .filter(|_| !self.completion.is_known())
    }

    /// Locates `len` bytes at `offset`: present if all are local. Never waits.
    ///
    /// Bytes past the end of the blob count as present: reading them fails with [`Error::Short`].
    #[inline]
    pub fn locate(&self, offset: u64, len: usize) -> Located<'_> {
        match self.completion.is_known() {
            true => Located::Present(PresentRange::new(self, offset, len)),
            false => self.look_up(offset, len),
        }
    }

    #[inline(never)]
    fn look_up(&self, offset: u64, len: usize) -> Located<'_> {
        let inside = (len as u64).min(self.len.saturating_sub(offset));
        if self.completion.is_recorded()
            && let Some(tape) = self.tape.get()
        {
            tape.note(offset, inside);
        }
        let Some(presence) = &self.presence else {
            return Located::Present(PresentRange::new(self, offset, len));
        };
        if inside == 0 || presence.is_present(offset, inside) {
            if presence.is_complete() {
                self.completion.note();
            }
            return Located::Present(PresentRange::new(self, offset, len));
        }
        let later = presence.successor().map(|blob| blob.locate(offset, len));
        match later {
            Some(present @ Located::Present(_)) => present,
            Some(Located::Absent(_)) | None => {
                Located::Absent(AbsentRange::new(self, presence, offset, inside, len))
            }
        }
    }

    /// Returns the first byte from `offset` on that is not in a hole of the file, or the end of the blob.
    /// Returns `offset` if holes are unknown.
    pub fn data_from(&self, offset: u64) -> u64 {
        if self.lookup().is_some() {
            // Absent bytes are holes of the file, too.
            return offset;
        }
        match rustix::fs::seek(&self.file, rustix::fs::SeekFrom::Data(offset)) {
            Ok(found) => found.min(self.len),
            Err(Errno::NXIO) => self.len,
            Err(_) => offset,
        }
    }

    /// Fills `buffer` with the bytes from `offset` on. Waits for storage, and for absent bytes up to the
    /// [`Presence::patience`] of the blob.
    ///
    /// # Errors
    /// [`Error::Read`] and [`Error::Short`] if reading fails, [`Error::Fetch`] if absent bytes cannot be
    /// fetched in time.
    pub fn read_exact_at(&self, buffer: &mut [u8], offset: u64) -> Result<(), Error> {
        let range = match self.locate(offset, buffer.len()) {
            Located::Present(range) => range,
            Located::Absent(range) => range.wait(Instant::now() + range.patience())?,
        };
        range.read_exact(buffer)
    }

    /// Reports that the headers or the index of the blob are wrong. Returns whether each range that is read
    /// is fetched again from now on, until [`Blob::trust`].
    pub fn distrust(&self) -> bool {
        let presence = self.presence.as_ref();
        self.revoked_if(presence.is_some_and(|presence| presence.distrust()))
    }

    /// Marks `len` bytes at `offset`, which end inside the blob, as absent; returns whether that was done.
    pub(super) fn mark_absent(&self, offset: u64, len: u64) -> bool {
        let presence = self.presence.as_ref();
        self.revoked_if(presence.is_some_and(|presence| presence.reject(offset, len)))
    }

    /// Ends that the blob counts as complete, if `rejected`, and returns `rejected`.
    fn revoked_if(&self, rejected: bool) -> bool {
        if rejected {
            self.completion.revoke();
        }
        rejected
    }

    /// Ends [`Blob::distrust`]: bytes that were not read since then count as right again.
    pub fn trust(&self) {
        if let Some(presence) = &self.presence {
            presence.trust();
            self.completion.reset();
        }
    }

    /// Maps the file, so that pages in memory are copied without a system call. Reads the last bytes of the
    /// file, which are local afterwards.
    ///
    /// If the file cannot be mapped, reads use system calls.
    pub fn map(&self) {
        if self.is_empty() || self.resident_map.get().is_some() {
            return;
        }
        let mut tail = vec![0; self.len.min(resident_map::TAIL) as usize];
        let start = self.len - tail.len() as u64;
        match self.read_exact_at(&mut tail, start) {
            Ok(()) => self.keep_map(ResidentMap::new(&self.file, self.len, &tail)),
            Err(error) => self.not_mapped(&error),
        }
    }

    /// Maps the file as [`Blob::map`] does, and reads nothing of it: the last byte that is not zero is
    /// known, and where it is. While that byte is absent, the file counts as lost and is read.
    pub fn map_ending_in(&self, at: u64, byte: u8) {
        if self.resident_map.get().is_none() {
            self.keep_map(ResidentMap::ending_in(&self.file, self.len, at, byte));
        }
    }

    /// The last byte that is not zero, and where it is, if the file is mapped.
    pub fn last_byte(&self) -> Option<(u64, u8)> {
        self.resident_map().map(ResidentMap::last_byte)
    }

    fn keep_map(&self, map: Result<ResidentMap, ResidentMapError>) {
        match map {
            Ok(map) => _ = self.resident_map.set(map),
            Err(error) => self.not_mapped(&error),
        }
    }

    fn not_mapped(&self, error: &dyn std::error::Error) {
        ratelimited_log::info(format_args!(
            "{}: cannot map the file, reads use system calls: {error}",
            self.layer
        ));
    }

    /// The mapped file.
    #[inline]
    pub(super) fn resident_map(&self) -> Option<&ResidentMap> {
        self.resident_map.get()
    }

    /// The open file, for ranges that are present.
    pub(super) fn file(&self) -> &File {
        &self.file
    }

    /// Whether a mapped page that was accessed was missing from the file.
    pub fn is_lost(&self) -> bool {
        self.resident_map().is_some_and(ResidentMap::is_lost)
    }

    /// Clears the record of which pages are in memory, because some were evicted.
    pub fn forget_resident(&self) {
        if let Some(resident_map) = self.resident_map() {
            resident_map.forget();
        }
    }

    /// Drops the cached pages of a range, which must not have been read through the mapping. The range need
    /// not be present.
    pub fn drop_cached(&self, offset: u64, len: u64) {
        // Rounded to whole pages, so that neighbouring bytes on the first and last page are dropped, too.
        let start = offset / resident_map::PAGE * resident_map::PAGE;
        let end = (offset + len).next_multiple_of(resident_map::PAGE);
        self.advise(start, end - start, Advice::DontNeed);
    }

    pub(super) fn advise(&self, offset: u64, len: u64, advice: Advice) {
        // Only advice: a failure has no effect.
        let _ = rustix::fs::fadvise(&self.file, offset, NonZeroU64::new(len), advice);
    }

    /// Creates a blob of the same file with its current length. Both share a lock.
    ///
    /// # Errors
    /// [`Error::Open`] if the file cannot be examined, or the process has no descriptor left.
    pub fn measured(&self) -> Result<Self, Error> {
        let failed = |source| Error::Open {
            layer: self.layer.clone(),
            source,
        };
        let mut file = self.file.try_clone().map_err(failed)?;
        let len = file.seek(SeekFrom::End(0)).map_err(failed)?;
        let layer = self.layer.clone();
        let measured = Self::new(layer, file, len, self.presence.clone());
        if let Some(tape) = self.tape.get() {
            measured.start_recording(&tape.recorder, tape.layer);
        }
        Ok(measured)
    }

    /// Creates the error of a failed read.
    pub(super) fn failed(&self, offset: u64, expected: usize, source: io::Error) -> Error {
        Error::Read {
            layer: self.layer.clone(),
            offset,
            expected,
            source,
        }
    }

    /// Creates the error of a read that reached the end of the file.
    pub(super) fn short(&self, offset: u64, expected: usize, found: usize) -> Error {
        Error::Short {
            layer: self.layer.clone(),
            offset,
            expected,
            found,
        }
    }

    /// The descriptor, for ranges that are present.
    pub(super) fn descriptor(&self) -> BorrowedFd<'_> {
        self.file.as_fd()
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
