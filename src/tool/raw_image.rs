//! A raw disk image, read once from front to back: a file, without its holes, or a stream.

use std::fs::{self, File};
use std::io::{self, Read, Seek, SeekFrom};
use std::os::fd::AsFd;
use std::os::unix::fs::{FileExt, FileTypeExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::sync::{Arc, mpsc};
use std::thread;
use std::time::Duration;

use rustix::fs::{OFlags, SeekFrom as SeekTo, fcntl_setfl, seek};
use rustix::io::Errno;

use super::Error;
use super::unit::{CHUNK, UNIT};
use crate::format::foreign::{Foreign, LOOKED_AT};
use crate::format::lsmt::MAX_SECTORS;

/// How long a process may take to open a named pipe for writing.
const WRITER_LIMIT: Duration = Duration::from_secs(60);

/// Samples that tell images apart whose first bytes are equal.
const SAMPLES: u64 = 256;

/// Bytes of a sample.
const SAMPLE_LEN: usize = 4096;

/// Source of a raw image.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Input {
    /// Standard input.
    Stdin,
    /// A file, block device or named pipe.
    Path(PathBuf),
}

/// A range of an image: data or a hole. All ranges but the last are whole units.
#[derive(Debug)]
pub enum RawRange {
    /// Bytes from this offset on.
    Data {
        /// Offset on the disk.
        offset: u64,
        /// The bytes.
        bytes: Vec<u8>,
        /// Whether the user of the range must still read the bytes, with [`Source::read_at`].
        unread: bool,
    },
    /// A range of zeros that was not read.
    Hole {
        /// Start of the range.
        offset: u64,
        /// Length of the range.
        len: u64,
    },
}

/// File or stream of a raw image, for all threads.
#[derive(Debug)]
pub struct Source {
    /// Name in messages.
    name: String,
    file: File,
}

/// An open raw image.
#[derive(Debug)]
pub struct RawImage {
    source: Arc<Source>,
    /// Length; `None` for a stream, which is known at its end only.
    len: Option<u64>,
    /// Offset of the next range.
    at: u64,
    /// End of the data around `at`; the next hole or data is searched from there.
    data_end: u64,
    /// Start of a stream, if it was read ahead.
    head: Option<Vec<u8>>,
}

impl RawImage {
    /// Opens an image.
    ///
    /// # Errors
    /// [`Error::Open`], [`Error::NotAnImage`], [`Error::Empty`], [`Error::TooLarge`].
    pub fn open(input: &Input) -> Result<Self, Error> {
        let name = match input {
            Input::Stdin => "standard input".to_owned(),
            Input::Path(path) => path.display().to_string(),
        };
        let (mut file, seekable) = match open(input) {
            Ok(Some(opened)) => opened,
            Ok(None) => return Err(Error::NotAnImage { name }),
            Err(source) => return Err(Error::Open { name, source }),
        };
        let len = match seekable.then(|| file.seek(SeekFrom::End(0))).transpose() {
            Ok(Some(0)) => return Err(Error::Empty { name }),
            Ok(Some(len)) if len > MAX_SECTORS.bytes() => {
                return Err(Error::TooLarge { name });
            }
            Ok(len) => len,
            Err(source) => return Err(Error::Open { name, source }),
        };
        Ok(Self {
            source: Arc::new(Source { name, file }),
            len,
            at: 0,
            data_end: 0,
            head: None,
        })
    }

    /// Size in bytes; `None` for a stream.
    pub fn size(&self) -> Option<u64> {
        self.len
    }

    /// The open file.
    pub fn file(&self) -> &File {
        &self.source.file
    }

    /// The file, for ranges that are not read yet.
    pub fn source(&self) -> Arc<Source> {
        Arc::clone(&self.source)
    }

    /// Number of bytes read; after [`RawImage::next`] returned `None`, the size.
    pub fn position(&self) -> u64 {
        self.at
    }

    /// Returns the first bytes, up to [`CHUNK`]. Call it before [`RawImage::next`].
    ///
    /// # Errors
    /// [`Error::Read`] and [`Error::Shrunk`].
    pub fn head(&mut self) -> Result<Vec<u8>, Error> {
        let mut bytes = Vec::new();
        match self.len {
            Some(len) => {
                bytes.resize(len.min(CHUNK as u64) as usize, 0);
                self.source.read_at(&mut bytes, 0)?;
            }
            None => match &self.head {
                Some(head) => bytes.clone_from(head),
                None => {
                    self.read_stream(&mut bytes)?;
                    self.head = Some(bytes.clone());
                }
            },
        }
        Ok(bytes)
    }

    /// Returns the size of the image and samples from all of it. Of a stream longer than
    /// [`RawImage::head`], whose size is not known, returns no bytes. Call it before [`RawImage::next`].
    ///
    /// # Errors
    /// [`Error::Read`] and [`Error::Shrunk`].
    pub fn spread(&mut self) -> Result<Vec<u8>, Error> {
        let head_len = self.head()?.len() as u64;
        let Some(len) = self.len else {
            return Ok(match head_len < CHUNK as u64 {
                // The stream ended there.
                true => head_len.to_le_bytes().to_vec(),
                false => Vec::new(),
            });
        };
        let mut bytes = len.to_le_bytes().to_vec();
        if len > head_len {
            let mut sample = [0; SAMPLE_LEN];
            for number in 1..=SAMPLES {
                let at = u128::from(len - SAMPLE_LEN as u64) * u128::from(number);
                // At most the image's size.
                let at = (at / u128::from(SAMPLES)) as u64;
                self.source.read_at(&mut sample, at)?;
                bytes.extend(sample);
            }
        }
        Ok(bytes)
    }

    /// Refuses an image that starts or ends like one of another format. Call it before
    /// [`RawImage::next`].
    ///
    /// # Errors
    /// [`Error::Foreign`]; [`Error::Read`] and [`Error::Shrunk`].
    pub fn refuse_foreign(&mut self) -> Result<(), Error> {
        let mut found = Foreign::by_start_of_raw_image(&self.head()?);
        if let Some(at) = self.len.and_then(|len| len.checked_sub(LOOKED_AT as u64)) {
            let mut end = [0; LOOKED_AT];
            self.source.read_at(&mut end, at)?;
            found = found.or(Foreign::by_end(&end));
        }
        match found {
            None => Ok(()),
            Some(kind) => Err(Error::Foreign {
                name: self.source.name.clone(),
                kind,
            }),
        }
    }

    /// Returns the next range; data is read into `buffer`. `None`: the image ends.
    ///
    /// # Errors
    /// [`Error::Read`]; [`Error::Empty`] if a stream has no bytes.
    pub fn next(&mut self, mut buffer: Vec<u8>) -> Result<Option<RawRange>, Error> {
        let offset = self.at;
        let Some(len) = self.len else {
            match self.head.take() {
                Some(head) => buffer = head,
                None => self.read_stream(&mut buffer)?,
            }
            self.at += buffer.len() as u64;
            if self.at == 0 {
                let name = self.source.name.clone();
                return Err(Error::Empty { name });
            }
            let range = RawRange::Data {
                offset,
                bytes: buffer,
                unread: false,
            };
            return Ok((self.at > offset).then_some(range));
        };
        if offset >= len {
            return Ok(None);
        }
        if offset >= self.data_end {
            let unit = UNIT as u64;
            let start = self.data_from(offset, len);
            let start = (start / unit * unit).max(offset);
            if start > offset {
                self.at = start;
                let len = start - offset;
                return Ok(Some(RawRange::Hole { offset, len }));
            }
            let end = self.hole_from(offset, len).max(offset + 1);
            self.data_end = end.next_multiple_of(unit).min(len);
        }
        let part = (self.data_end - offset).min(CHUNK as u64);
        buffer.resize(part as usize, 0);
        self.at += part;
        Ok(Some(RawRange::Data {
            offset,
            bytes: buffer,
            unread: true,
        }))
    }

    /// Offset of the first data at or after `offset`, or the end. On a file system without holes,
    /// all is data.
    fn data_from(&self, offset: u64, len: u64) -> u64 {
        match seek(self.file(), SeekTo::Data(offset)) {
            Ok(found) => found.min(len),
            Err(Errno::NXIO) => len,
            Err(_) => offset,
        }
    }

    /// Offset of the first hole at or after `offset`, or the end.
    fn hole_from(&self, offset: u64, len: u64) -> u64 {
        seek(self.file(), SeekTo::Hole(offset)).map_or(len, |found| found.min(len))
    }

    /// Fills `buffer` with the next [`CHUNK`] bytes of a stream; with fewer at its end.
    fn read_stream(&self, buffer: &mut Vec<u8>) -> Result<(), Error> {
        buffer.clear();
        let read = self.file().take(CHUNK as u64).read_to_end(buffer);
        read.map_err(|source| self.source.failed(self.at, source))?;
        Ok(())
    }
}

impl Source {
    /// Fills `buffer` with the bytes from `offset` on, of an image with a length.
    ///
    /// # Errors
    /// [`Error::Read`]; [`Error::Shrunk`] if the file was truncated.
    pub fn read_at(&self, buffer: &mut [u8], offset: u64) -> Result<(), Error> {
        let read = self.file.read_exact_at(buffer, offset);
        read.map_err(|source| match source.kind() {
            io::ErrorKind::UnexpectedEof => Error::Shrunk {
                name: self.name.clone(),
                offset,
            },
            _ => self.failed(offset, source),
        })
    }

    fn failed(&self, offset: u64, source: io::Error) -> Error {
        let name = self.name.clone();
        Error::Read {
            name,
            offset,
            source,
        }
    }
}

/// Opens an input: the file, and whether it is seekable. `None` for a directory, a socket and the like.
fn open(input: &Input) -> io::Result<Option<(File, bool)>> {
    let path = match input {
        Input::Stdin => {
            let file = File::from(io::stdin().as_fd().try_clone_to_owned()?);
            return Ok(Some((file, false)));
        }
        Input::Path(path) => path,
    };
    if fs::metadata(path)?.file_type().is_fifo() {
        return Ok(Some((open_pipe(path, WRITER_LIMIT)?, false)));
    }
    let file = File::options()
        .read(true)
        .custom_flags(libc::O_NONBLOCK | libc::O_NOCTTY) // it may have become a pipe
        .open(path)?;
    let kind = file.metadata()?.file_type();
    let seekable = kind.is_file() || kind.is_block_device();
    if seekable {
        fcntl_setfl(&file, OFlags::empty())?;
    }
    Ok(seekable.then_some((file, true)))
}

/// Opens a named pipe once a process has it open for writing.
///
/// Only a blocking open shows that, so a thread of its own does it.
///
/// # Errors
/// [`io::ErrorKind::TimedOut`] if there is no such process within `limit`.
fn open_pipe(path: &Path, limit: Duration) -> io::Result<File> {
    let (done, opened) = mpsc::channel();
    let pipe = path.to_owned();
    let opener = thread::Builder::new().spawn(move || done.send(File::open(pipe)))?;
    let Ok(file) = opened.recv_timeout(limit) else {
        let seconds = limit.as_secs();
        let text = format!("no process opened the named pipe for writing within {seconds} s");
        return Err(io::Error::new(io::ErrorKind::TimedOut, text));
    };
    // It has sent the file, and ends; a sandbox is entered with one thread.
    let _ = opener.join();
    file
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_pipe_without_a_writer_is_given_up() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("pipe");
        let mode = rustix::fs::Mode::RWXU;
        rustix::fs::mkfifoat(rustix::fs::CWD, &path, mode).unwrap();
        let error = open_pipe(&path, Duration::from_millis(20)).unwrap_err();
        assert_eq!(error.kind(), io::ErrorKind::TimedOut);
        // The reader that was given up is still there.
        let writer = File::options().write(true).open(&path).unwrap();
        open_pipe(&path, WRITER_LIMIT).unwrap();
        drop(writer);
    }

    #[test]
    fn a_socket_is_no_image_and_is_not_waited_for() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("socket");
        let _socket = std::os::unix::net::UnixListener::bind(&path).unwrap();
        assert!(open(&Input::Path(path)).is_err());
    }
}
