//! Writes a sealed layer. Data and zeroed ranges are added in the order of the disk, and the file is
//! written from front to back.
//!
//! Layout: `header | data | index, padded | trailer`, optionally in a ZFile, and that optionally in
//! a tar member (`docs/format.md`).

use std::num::NonZero;
use std::thread::Scope;

use uuid::Uuid;

use super::Error;
use super::appender::Cache;
use super::chunks::{Chunk, ChunkPipeline};
use super::output::NewFile;
use super::zfile_writer::ZFileWriter;
use crate::format::lsmt::{
    ENTRY_GROUP, FIRST_DATA, HEADER_LEN, Header, HeaderKind, MAX_ENTRIES, MAX_LENGTH, Mapping,
    PADDING, padding_after,
};
use crate::format::tar;
use crate::format::zfile::BlockFormat;
use crate::image::made_upon::MadeUpon;
use crate::units::{SECTOR_SIZE, Sector, SectorRange, Sectors};

/// Largest number of index entries, padding included, that the upstream reader accepts in one
/// layer.
pub const UPSTREAM_ENTRIES: u64 = 1_000_000 / ENTRY_GROUP * ENTRY_GROUP;

/// Longest joined mapping in sectors. Upstream joins up to one sector less than an entry can
/// describe.
const MAX_JOINED: u16 = 16382;

/// Sectors of a piece that are joined to the piece before at once: upstream copies so many at a
/// time.
const JOINED_AT_ONCE: u64 = 64;

/// Wrappers and header fields of a layer.
#[derive(Clone, Debug)]
pub struct LayerFormat {
    /// Format of compressed blocks. `None`: no compression.
    pub blocks: Option<BlockFormat>,
    /// Whether it is wrapped in tar.
    pub tar: bool,
    /// Uuid of the layer.
    pub uuid: Uuid,
    /// Uuid of the parent layer, or nil.
    pub parent_uuid: Uuid,
    /// Commit message, of at most 256 bytes ([`message`]).
    pub message: Vec<u8>,
}

/// Returns the commit message with the text of a user and a record of what the layer is made upon.
///
/// # Errors
/// [`Error::MessageIsRecord`] if the text would be read as a record; [`Error::LongMessage`] if both do not fit.
pub fn message(text: &str, record: Option<MadeUpon>) -> Result<Vec<u8>, Error> {
    // The header's field is padded with zeros, which a reader drops.
    let read = text.trim_end_matches('\0').as_bytes();
    if MadeUpon::split(read).1.is_some() {
        return Err(Error::MessageIsRecord);
    }
    let text = text.as_bytes();
    let Some(record) = record else {
        return Ok(text.to_vec());
    };
    record.message(text).ok_or(Error::LongMessage {
        len: text.len(),
        most: record.max_text(),
    })
}

/// Sizes of a finished layer, or of a raw image.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Written {
    /// Size of the file in bytes.
    pub file_len: u64,
    /// Bytes of data in it, before compression.
    pub data_len: u64,
    /// Number of mappings in its index; 0 for a raw image.
    pub mappings: usize,
}

impl Written {
    /// Bytes of [`Written::to_bytes`].
    pub const BYTES: usize = 24;

    /// Encodes the sizes, for another process.
    pub fn to_bytes(self) -> [u8; Self::BYTES] {
        let Self {
            file_len,
            data_len,
            mappings,
        } = self;
        let mut bytes = [0; Self::BYTES];
        let numbers = [file_len, data_len, mappings as u64];
        for (part, number) in bytes.chunks_exact_mut(8).zip(numbers) {
            part.copy_from_slice(&number.to_le_bytes());
        }
        bytes
    }

    /// Decodes [`Written::to_bytes`].
    pub fn from_bytes(bytes: &[u8; Self::BYTES]) -> Self {
        let (numbers, _) = bytes.as_chunks::<8>();
        let [file_len, data_len, mappings] = [0, 1, 2].map(|at| u64::from_le_bytes(numbers[at]));
        Self {
            file_len,
            data_len,
            mappings: mappings as usize,
        }
    }
}

/// A layer in progress.
pub struct LayerWriter {
    file: NewFile,
    body: Body,
    tar: bool,
    header: Header,
    /// Whether the header is written without the size of the disk.
    size_unknown: bool,
    index: Vec<Mapping>,
    /// Sector of the layer for the next data.
    next: Sector,
}

/// Destination of the layer's bytes.
enum Body {
    /// The file, from byte `start` on.
    Plain { start: u64, chunks: ChunkPipeline },
    /// A ZFile.
    CompressedRun(Box<ZFileWriter>),
}

impl LayerWriter {
    /// Starts a layer in `file`, for a disk of `virtual_size` bytes. `None`: the size is known at the
    /// end only, and the written bytes will be moved. `threads` threads compress; each has its own
    /// `fetch`, for [`LayerWriter::fetched`].
    ///
    /// # Errors
    /// The file cannot be written, or no thread can be started.
    pub fn start<'scope, F>(
        scope: &'scope Scope<'scope, '_>,
        threads: NonZero<usize>,
        mut file: NewFile,
        format: LayerFormat,
        virtual_size: Option<u64>,
        fetch: impl Fn() -> F,
    ) -> Result<Self, Error>
    where
        F: FnMut(u64, &mut [u8]) -> Result<(), Error> + Send + 'scope,
    {
        // A header that is written last moves the bytes behind it.
        let cache = match (&format.blocks, virtual_size) {
            (Some(_), None) => Cache::Through,
            _ => Cache::Past,
        };
        file.start_appender(cache)?;
        if format.tar {
            file.skip(tar::PREFIX as u64)?;
        }
        let body = match format.blocks {
            None => Body::Plain {
                start: file.position(),
                chunks: ChunkPipeline::start(scope, threads, fetch, || |_: &mut Chunk| Ok(()))?,
            },
            Some(blocks) => {
                let keep_head = virtual_size.is_none();
                let zfile =
                    ZFileWriter::start(scope, threads, fetch, &mut file, blocks, keep_head)?;
                Body::CompressedRun(Box::new(zfile))
            }
        };
        let mut writer = Self {
            file,
            body,
            tar: format.tar,
            header: Header {
                index_offset: 0,
                index_entries: 0,
                virtual_size: virtual_size.unwrap_or_default(),
                uuid: format.uuid,
                parent_uuid: format.parent_uuid,
                message: format.message,
            },
            size_unknown: virtual_size.is_none(),
            index: Vec::new(),
            next: FIRST_DATA,
        };
        writer.write(&writer.header.encode(HeaderKind::Header))?;
        Ok(writer)
    }

    /// Adds data for the sectors from `offset` on, which lie behind earlier ones: whole sectors, at
    /// most [`MAX_LENGTH`](crate::format::lsmt::MAX_LENGTH).
    ///
    /// # Errors
    /// The file cannot be written, or there are too many mappings.
    pub fn data(&mut self, offset: Sector, bytes: &[u8]) -> Result<(), Error> {
        let sectors = bytes.len() as u64 / SECTOR_SIZE;
        let mapping = u16::try_from(sectors)
            .ok()
            .and_then(|length| Mapping::data(offset, length, self.next));
        self.map(mapping)?;
        self.next.0 += sectors;
        self.write(bytes)
    }

    /// Adds data of any length for the sectors from `offset` on, which `fetch` reads at `from`. The
    /// size of the disk must be known.
    ///
    /// # Errors
    /// The data cannot be fetched, the file cannot be written, or there are too many mappings.
    pub fn fetched(&mut self, offset: Sector, sectors: u64, from: u64) -> Result<(), Error> {
        for done in (0..sectors).step_by(JOINED_AT_ONCE as usize) {
            let length = (sectors - done).min(JOINED_AT_ONCE);
            let start = Sector(offset.0 + done);
            self.map(Mapping::data(start, length as u16, self.next))?;
            self.next.0 += length;
        }
        let len = sectors * SECTOR_SIZE;
        let file = &mut self.file;
        match &mut self.body {
            Body::CompressedRun(zfile) => zfile.fetch(file, len, from),
            Body::Plain { chunks, .. } => {
                chunks.fetch(len, from, |chunk| file.write(chunk.bytes()))
            }
        }
    }

    /// Zeroes `range`, which lies behind earlier ones.
    ///
    /// # Errors
    /// There are too many mappings.
    pub fn zeroed(&mut self, range: SectorRange) -> Result<(), Error> {
        for step in range.steps(Sectors(MAX_LENGTH.into())) {
            let sectors = step.len().0 as u16;
            self.map(Mapping::zeroed(step.start(), sectors, self.next))?;
        }
        Ok(())
    }

    /// Writes index and trailer for a disk of `virtual_size` bytes.
    ///
    /// # Errors
    /// The file cannot be written.
    pub fn finish(mut self, virtual_size: u64) -> Result<Written, Error> {
        let mappings = self.index.len();
        let padding = padding_after(mappings as u64);
        self.header.virtual_size = virtual_size;
        self.header.index_offset = self.next.0 * SECTOR_SIZE;
        self.header.index_entries = mappings as u64 + padding;
        for mapping in std::mem::take(&mut self.index) {
            self.write(&mapping.encode())?;
        }
        for _ in 0..padding {
            self.write(&PADDING)?;
        }
        self.write(&self.header.encode(HeaderKind::Trailer))?;

        let head = self.header.encode(HeaderKind::Header);
        let head = self.size_unknown.then_some(head.as_slice());
        let Self { mut file, body, .. } = self;
        match body {
            Body::Plain { start, mut chunks } => {
                chunks.finish(|chunk| file.write(chunk.bytes()))?;
                if let Some(head) = head {
                    file.write_at(head, start)?;
                }
            }
            Body::CompressedRun(zfile) => zfile.finish(&mut file, head)?,
        }
        if self.tar {
            let len = file.position() - tar::PREFIX as u64;
            file.skip(tar::trailing(len))?;
            file.write_at(&tar::prefix(len), 0)?;
        }
        let written = Written {
            file_len: file.position(),
            data_len: self.header.index_offset - HEADER_LEN as u64,
            mappings,
        };
        file.finish()?;
        Ok(written)
    }

    /// Adds a mapping to the index, joined with the last one if adjacent. `None`: the format cannot
    /// describe the mapping, as on a disk of 2^59 bytes.
    fn map(&mut self, mapping: Option<Mapping>) -> Result<(), Error> {
        let too_many = || Error::TooManyMappings {
            path: self.file.target().to_owned(),
        };
        let mapping = mapping.ok_or_else(too_many)?;
        if let Some(last) = self.index.last_mut()
            && let Some(joined) = join(*last, mapping)
        {
            *last = joined;
            return Ok(());
        }
        if self.index.len() as u64 >= MAX_ENTRIES {
            return Err(too_many());
        }
        self.index.push(mapping);
        Ok(())
    }

    fn write(&mut self, bytes: &[u8]) -> Result<(), Error> {
        let file = &mut self.file;
        match &mut self.body {
            Body::CompressedRun(zfile) => zfile.write(file, bytes),
            Body::Plain { chunks, .. } => chunks.write(bytes, |chunk| file.write(chunk.bytes())),
        }
    }
}

/// Joins two mappings, if the second continues the first on the disk and in the layer.
fn join(first: Mapping, second: Mapping) -> Option<Mapping> {
    let length = first.length() + second.length();
    let zeroed = first.is_zeroed();
    let moved = if zeroed { 0 } else { u64::from(first.length()) };
    let continues = first.end() == second.offset()
        && zeroed == second.is_zeroed()
        && first.moffset().0 + moved == second.moffset().0;
    if !continues || length > MAX_JOINED {
        return None;
    }
    if zeroed {
        Mapping::zeroed(first.offset(), length, first.moffset())
    } else {
        Mapping::data(first.offset(), length, first.moffset())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::image::identity::StackId;

    #[test]
    fn a_text_is_never_read_as_a_record() {
        let record = MadeUpon {
            stack: StackId::EMPTY,
            size: 4096,
        };
        let line = record.message(b"").unwrap();
        let line = String::from_utf8(line).unwrap();
        for text in [line.clone(), format!("text\n{line}"), format!("{line}\0\0")] {
            for record in [None, Some(record)] {
                let refused = message(&text, record);
                assert!(matches!(refused, Err(Error::MessageIsRecord)), "{text:?}");
            }
        }
        for text in [format!("{line}\ntext"), format!("{line}\n")] {
            let stored = message(&text, None).unwrap();
            assert_eq!(MadeUpon::split(&stored), (text.as_bytes(), None));
        }
    }
}
