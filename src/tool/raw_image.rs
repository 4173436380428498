//! A raw disk image, read once from front to back: a file, whose holes are skipped, or a stream.

use std::fs::File;
use std::io::{self, Read, Seek, SeekFrom};
use std::os::fd::AsFd;
use std::os::unix::fs::{FileExt, FileTypeExt};
use std::path::PathBuf;
use std::sync::Arc;

use rustix::fs::{SeekFrom as SeekTo, seek};
use rustix::io::Errno;

use super::Error;
use super::unit::{CHUNK, UNIT};
use crate::format::lsmt::MAX_SECTORS;
use crate::units::SECTOR_SIZE;

/// Where a raw image comes from.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Input {
    /// Standard input.
    Stdin,
    /// This file, block device or named pipe.
    Path(PathBuf),
}

/// The next part of an image. All parts but the last are whole units.
#[derive(Debug)]
pub enum Part {
    /// Bytes from this offset on.
    Data {
        /// Where they stand on the disk.
        offset: u64,
        /// The bytes.
        bytes: Vec<u8>,
        /// Whether the bytes are still to be read, with [`Source::read_at`], by the user of the part.
        unread: bool,
    },
    /// A range known to be zeros without reading it.
    Hole {
        /// Where it starts.
        offset: u64,
        /// How long it is.
        len: u64,
    },
}

/// The file or stream that a raw image is. All threads may read it.
#[derive(Debug)]
pub struct Source {
    /// What messages call it.
    name: String,
    file: File,
}

/// A raw image, open.
#[derive(Debug)]
pub struct RawImage {
    source: Arc<Source>,
    /// Its length; a stream's is known only at its end.
    len: Option<u64>,
    /// How far it was read.
    at: u64,
    /// End of the data around `at`; holes are looked for from there on.
    data_end: u64,
    /// The start of a stream, if it was looked at but not read.
    head: Option<Vec<u8>>,
}

impl RawImage {
    /// Opens an image.
    ///
    /// # Errors
    /// It cannot be opened, or has no bytes that could be a disk.
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
            Ok(Some(len)) if len > MAX_SECTORS * SECTOR_SIZE => {
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

    /// What parts that are not read yet are read from.
    pub fn source(&self) -> Arc<Source> {
        Arc::clone(&self.source)
    }

    /// Length of what was read; of all of it, once [`RawImage::next`] had nothing more.
    pub fn position(&self) -> u64 {
        self.at
    }

    /// The first bytes, up to [`CHUNK`], before anything was read.
    ///
    /// # Errors
    /// They cannot be read.
    pub fn head(&mut self) -> Result<Vec<u8>, Error> {
        let mut bytes = Vec::new();
        match self.len {
            Some(len) => {
                bytes.resize(len.min(CHUNK as u64) as usize, 0);
                self.source.read_at(&mut bytes, 0)?;
            }
            None => {
                self.read_stream(&mut bytes)?;
                self.head = Some(bytes.clone());
            }
        }
        Ok(bytes)
    }

    /// Reads the next part, into `buffer` if it is data. `None`: there is no more.
    ///
    /// # Errors
    /// It cannot be read, or a stream ends before its first byte.
    pub fn next(&mut self, mut buffer: Vec<u8>) -> Result<Option<Part>, Error> {
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
            let part = Part::Data {
                offset,
                bytes: buffer,
                unread: false,
            };
            return Ok((self.at > offset).then_some(part));
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
                return Ok(Some(Part::Hole { offset, len }));
            }
            let end = self.hole_from(offset, len).max(offset + 1);
            self.data_end = end.next_multiple_of(unit).min(len);
        }
        let part = (self.data_end - offset).min(CHUNK as u64);
        buffer.resize(part as usize, 0);
        self.at += part;
        Ok(Some(Part::Data {
            offset,
            bytes: buffer,
            unread: true,
        }))
    }

    /// The first byte of data at or after `offset`, or the end. Where the file system knows nothing
    /// of holes, all is data.
    fn data_from(&self, offset: u64, len: u64) -> u64 {
        match seek(self.file(), SeekTo::Data(offset)) {
            Ok(found) => found.min(len),
            Err(Errno::NXIO) => len,
            Err(_) => offset,
        }
    }

    /// The first hole at or after `offset`, or the end.
    fn hole_from(&self, offset: u64, len: u64) -> u64 {
        seek(self.file(), SeekTo::Hole(offset)).map_or(len, |found| found.min(len))
    }

    /// Fills `buffer` with the next [`CHUNK`] bytes of a stream, fewer only at its end.
    fn read_stream(&self, buffer: &mut Vec<u8>) -> Result<(), Error> {
        buffer.clear();
        let read = self.file().take(CHUNK as u64).read_to_end(buffer);
        read.map_err(|source| self.source.failed(self.at, source))?;
        Ok(())
    }
}

impl Source {
    /// Fills `buffer` with the bytes from `offset` on, of an image that has a length.
    ///
    /// # Errors
    /// They cannot be read, or the file became shorter.
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

/// The file, and whether it has a length and can be read anywhere. `None`: it is no image.
fn open(input: &Input) -> io::Result<Option<(File, bool)>> {
    let path = match input {
        Input::Stdin => {
            let file = File::from(io::stdin().as_fd().try_clone_to_owned()?);
            return Ok(Some((file, false)));
        }
        Input::Path(path) => path,
    };
    let file = File::open(path)?;
    let kind = file.metadata()?.file_type();
    let seekable = kind.is_file() || kind.is_block_device();
    Ok((seekable || kind.is_fifo()).then_some((file, seekable)))
}
