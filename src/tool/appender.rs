//! Appends bytes to a file on a thread of its own, with direct I/O where the file system supports
//! it.
//!
//! Bytes are collected in a few large aligned buffers. The thread writes full buffers, so the
//! producer waits only if storage is slower. Direct I/O copies nothing into the page cache, evicts
//! nothing from it, and is on storage when the write returns.

use std::fs::File;
use std::io;
use std::mem;
use std::num::NonZeroU64;
use std::os::unix::fs::FileExt;
use std::sync::Arc;
use std::sync::mpsc::{Receiver, Sender, SyncSender, channel, sync_channel};
use std::thread::{Builder, JoinHandle};

use rustix::fs::{Advice, OFlags, fadvise, fcntl_setfl};
use rustix::io::Errno;

/// Bytes of a buffer.
const BUFFER: usize = 2 * 1024 * 1024;

/// Number of buffers: one is filled, one is written, one waits.
const BUFFERS: usize = 3;

/// Alignment of direct I/O: offsets, lengths and memory. If storage needs more, writes go through
/// the page cache.
const PAGE: usize = 4096;

/// Use of the page cache.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Cache {
    /// Direct I/O, if the file system supports it.
    Past,
    /// Through the page cache, because the bytes are read again soon.
    Through,
}

/// Appends to a file.
#[derive(Debug)]
pub struct Appender {
    filling: Buffer,
    /// `None` after the last byte.
    full: Option<SyncSender<Buffer>>,
    free: Receiver<Buffer>,
    writer: Option<JoinHandle<io::Result<()>>>,
}

impl Appender {
    /// Starts at the first byte of `file`.
    ///
    /// # Errors
    /// No thread can be started.
    pub fn start(file: Arc<File>, cache: Cache) -> io::Result<Self> {
        let (full, to_store) = sync_channel(BUFFERS);
        let (stored, free) = channel();
        for _ in 1..BUFFERS {
            // The receiver exists.
            let _ = stored.send(Buffer::new());
        }
        let filling = Buffer::new();
        let direct = cache == Cache::Past && fcntl_setfl(&file, OFlags::DIRECT).is_ok();
        let mut store = Store {
            file,
            direct,
            position: 0,
        };
        let writer = Builder::new().spawn(move || store.all(&to_store, &stored))?;
        Ok(Self {
            filling,
            full: Some(full),
            free,
            writer: Some(writer),
        })
    }

    /// Appends bytes.
    ///
    /// # Errors
    /// Earlier bytes could not be written.
    pub fn write(&mut self, mut bytes: &[u8]) -> io::Result<()> {
        while !bytes.is_empty() {
            bytes = self.filling.fill(bytes);
            if self.filling.len == BUFFER {
                self.send()?;
            }
        }
        Ok(())
    }

    /// Writes the remaining bytes, and releases the file for other writes.
    ///
    /// # Errors
    /// Some bytes could not be written.
    pub fn finish(mut self) -> io::Result<()> {
        if self.filling.len > 0 {
            self.send()?;
        }
        self.join()
    }

    fn send(&mut self) -> io::Result<()> {
        let Ok(next) = self.free.recv() else {
            return self.join();
        };
        let filled = mem::replace(&mut self.filling, next);
        match &self.full {
            Some(full) if full.send(filled).is_ok() => Ok(()),
            _ => self.join(),
        }
    }

    /// Result of the thread, after the last byte.
    fn join(&mut self) -> io::Result<()> {
        self.full = None;
        let ended = || io::Error::other("the thread that writes ended early");
        let writer = self.writer.take().ok_or_else(ended)?;
        writer.join().map_err(|_| ended())?
    }
}

impl Drop for Appender {
    fn drop(&mut self) {
        // A caller that needs the error called `finish`.
        let _ = self.join();
    }
}

/// Bytes to write, aligned in memory.
#[derive(Debug)]
struct Buffer {
    /// One page longer than the used part.
    room: Vec<u8>,
    /// First aligned byte.
    start: usize,
    len: usize,
}

impl Buffer {
    fn new() -> Self {
        let room = vec![0; BUFFER + PAGE];
        Self {
            start: room.as_ptr().addr().next_multiple_of(PAGE) - room.as_ptr().addr(),
            room,
            len: 0,
        }
    }

    fn bytes(&self) -> &[u8] {
        &self.room[self.start..][..self.len]
    }

    /// Takes as many bytes as fit; returns the rest.
    fn fill<'b>(&mut self, bytes: &'b [u8]) -> &'b [u8] {
        let (now, later) = bytes.split_at(bytes.len().min(BUFFER - self.len));
        let at = self.start + self.len;
        self.room[at..at + now.len()].copy_from_slice(now);
        self.len += now.len();
        later
    }
}

/// Destination of the bytes.
struct Store {
    file: Arc<File>,
    /// Whether direct I/O is on.
    direct: bool,
    position: u64,
}

impl Store {
    /// Writes buffers until the sender is gone.
    fn all(&mut self, full: &Receiver<Buffer>, stored: &Sender<Buffer>) -> io::Result<()> {
        for mut buffer in full {
            // All buffers but the last are full, so whole pages.
            let (pages, rest) = buffer.bytes().split_at(buffer.len / PAGE * PAGE);
            self.append(pages)?;
            if !rest.is_empty() {
                self.through_cache()?;
                self.append(rest)?;
            }
            buffer.len = 0;
            // At the end, no thread waits for buffers.
            let _ = stored.send(buffer);
        }
        self.through_cache()
    }

    fn append(&mut self, bytes: &[u8]) -> io::Result<()> {
        match self.file.write_all_at(bytes, self.position) {
            // Only the write shows that the file system does not support it, or needs a larger
            // alignment.
            Err(error) if self.direct && Errno::from_io_error(&error) == Some(Errno::INVAL) => {
                self.through_cache()?;
                self.file.write_all_at(bytes, self.position)
            }
            result => result,
        }?;
        if !self.direct {
            // Starts writeback of bytes that must be durable soon, and drops those that are on
            // storage. Both are advice.
            let len = NonZeroU64::new(bytes.len() as u64);
            let _ = fadvise(&self.file, self.position, len, Advice::DontNeed);
        }
        self.position += bytes.len() as u64;
        Ok(())
    }

    fn through_cache(&mut self) -> io::Result<()> {
        self.direct = false;
        Ok(fcntl_setfl(&self.file, OFlags::empty())?)
    }
}

#[cfg(test)]
mod tests {
    use std::fs::{self, OpenOptions};
    use std::path::Path;

    use super::*;

    fn noise(len: usize) -> Vec<u8> {
        let mut state = 1u32;
        let bytes = (0..len).map(|_| {
            state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
            (state >> 24) as u8
        });
        bytes.collect()
    }

    fn new_file(path: &Path) -> Arc<File> {
        let mut options = OpenOptions::new();
        options.read(true).write(true).create(true).truncate(true);
        Arc::new(options.open(path).unwrap())
    }

    #[test]
    fn files_hold_what_was_appended_whatever_its_length() {
        let noise = noise(BUFFERS * BUFFER + 3 * BUFFER / 2 + 77);
        // The usual folder for temporary files, and one in memory.
        for dir in [tempfile::tempdir(), tempfile::tempdir_in("/dev/shm")] {
            let path = dir.as_ref().unwrap().path().join("file");
            for cache in [Cache::Past, Cache::Through] {
                for len in [
                    0,
                    1,
                    PAGE,
                    PAGE + 1,
                    BUFFER - 1,
                    BUFFER,
                    BUFFER + PAGE,
                    2 * BUFFER + 5,
                    noise.len(),
                ] {
                    let file = new_file(&path);
                    let mut appender = Appender::start(Arc::clone(&file), cache).unwrap();
                    for part in noise[..len].chunks(77_777) {
                        appender.write(part).unwrap();
                    }
                    appender.finish().unwrap();
                    assert!(fs::read(&path).unwrap() == noise[..len], "{cache:?} {len}");
                    // In any other way, at any place.
                    file.write_all_at(b"late", 3).unwrap();
                    assert_eq!(&fs::read(&path).unwrap()[3..7], b"late");
                }
            }
        }
    }

    #[test]
    fn what_storage_wants_aligned_otherwise_goes_through_the_page_cache() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("file");
        let file = new_file(&path);
        let mut store = Store {
            direct: fcntl_setfl(&file, OFlags::DIRECT).is_ok(),
            file,
            position: 0,
        };
        // No file system takes such a length past its page cache.
        store.append(b"odd").unwrap();
        store.append(b"ities").unwrap();
        assert_eq!(fs::read(&path).unwrap(), b"oddities");
    }

    #[test]
    fn a_write_that_fails_is_reported_to_who_gives_bytes() {
        for cache in [Cache::Past, Cache::Through] {
            let full = OpenOptions::new().write(true).open("/dev/full").unwrap();
            let mut appender = Appender::start(Arc::new(full), cache).unwrap();
            let bytes = vec![1; BUFFER];
            let written = (0..4 * BUFFERS).try_for_each(|_| appender.write(&bytes));
            let error = written.unwrap_err();
            assert_eq!(error.kind(), io::ErrorKind::StorageFull, "{error}");

            let full = OpenOptions::new().write(true).open("/dev/full").unwrap();
            let mut appender = Appender::start(Arc::new(full), cache).unwrap();
            appender.write(b"few").unwrap();
            let error = appender.finish().unwrap_err();
            assert_eq!(error.kind(), io::ErrorKind::StorageFull, "{error}");
        }
    }
}
