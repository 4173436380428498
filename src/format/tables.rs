//! Image tables: the merged index of a stack and the block tables of its layers, in one file.
//!
//! ```text
//! 0       header, 4096 bytes, of which 88 are used
//! 4096    layers   1152 bytes for each layer, bottom first
//! ...     nodes    128 bytes each: sixteen keys; the search tree of the merged index, root first
//! ...     bases    8 bytes each: a position for each 1024 blocks of a compressed layer
//! ...     starts   4 bytes each: start of each block, and end of the last, relative to its base
//! ...     values   7 bytes for each segment of the merged index, and one byte more
//! ```
//! Numbers are little-endian. Each section starts at a multiple of 128, and the gaps are zeros. The
//! header holds the numbers of items and no offsets: a file cannot make two sections overlap. Nothing
//! in the file is an address, so that every process maps the same bytes.
//!
//! The file is named by its [`key`]: the SHA-256 of the identities of the layers. A layer in a
//! registry is identified by its digest. A local file is identified by device, inode, length and the
//! times of its last change: a file that is replaced or written to makes another key.
//!
//! The header has a checksum, and holds one of all bytes behind it. The header is written last, after
//! the other bytes are on storage: a file without a valid header is incomplete. Both checksums are
//! verified whenever the file is opened. They protect from damage, not from forgery. A forged file
//! is bounded by the checks at each use: it can cause I/O errors, or show other bytes of the layers
//! of the stack that it names. Only the user whose directory the cache is can write one.

mod record;
#[cfg(test)]
mod tests;
use thiserror::Error;
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout, Unaligned, little_endian};

pub use record::{LayerIdentity, LayerRecord, RECORD_LEN};

use super::digest::{Digest, Hasher};
use super::{crc, lsmt, tar, zfile};

/// Bytes of the header.
pub const HEADER_LEN: usize = 4096;

/// Bytes of a node of the search tree.
pub const NODE_LEN: u64 = 128;

/// Bytes of a segment's value.
pub const VALUE_LEN: u64 = 7;

/// Most layers of a stack.
pub const MAX_LAYERS: u32 = 4094;

/// Each section starts at a multiple of this.
pub const ALIGNMENT: u64 = 128;

const MAGIC: [u8; 8] = *b"ovbdtab1";

/// Register that the checksums start with: zeros have a checksum other than zero.
const SEED: u32 = !0;

/// Bytes of the header that its checksum covers, which starts behind the checksum.
const COVERED: std::ops::Range<usize> = 12..size_of::<RawHeader>();

/// A file is not the tables of a stack.
#[derive(Debug, Error, PartialEq, Eq)]
pub enum TablesError {
    /// The file has no header: its writer has not finished.
    #[error("image tables are incomplete: their header is missing")]
    Incomplete,
    /// The header or the bytes behind it are damaged.
    #[error(
        "image tables are damaged: the {part} has checksum {found:#010x}, expected {expected:#010x}"
    )]
    Checksum {
        /// What the checksum is of.
        part: &'static str,
        /// Checksum of the bytes.
        found: u32,
        /// Checksum in the header.
        expected: u32,
    },
    /// The tables are those of another stack.
    #[error("image tables belong to the stack {found}; expected {expected}")]
    OtherStack {
        /// Key in the header.
        found: Digest,
        /// Key of the stack.
        expected: Digest,
    },
    /// The file has not the length that its header says.
    #[error("image tables have {found} bytes; expected {expected}")]
    Length {
        /// Bytes of the file.
        found: u64,
        /// Bytes of all sections.
        expected: u64,
    },
    /// The numbers of items are impossible.
    #[error("image tables have invalid numbers of items: {0:?}")]
    Counts(Counts),
    /// The record of a layer is impossible.
    #[error("image tables have an invalid layer record: {0}")]
    Record(&'static str),
    /// The record of a layer holds an impossible ZFile trailer.
    #[error("image tables have an invalid ZFile trailer")]
    ZFile(#[from] zfile::Error),
    /// The record of a layer holds an impossible LSMT trailer.
    #[error("image tables have an invalid layer trailer")]
    Lsmt(#[from] lsmt::Error),
}

/// Numbers of items in the sections.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Counts {
    /// Layers of the stack.
    pub layers: u32,
    /// Nodes of the search tree.
    pub nodes: u64,
    /// Segments of the merged index.
    pub segments: u64,
    /// Base positions of all block tables.
    pub bases: u64,
    /// Starts of blocks, and ends of last ones, of all block tables.
    pub starts: u64,
}

/// Byte of the file at which each section starts, and its length.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Layout {
    /// Start of the layers' records.
    pub layers: u64,
    /// Start of the nodes.
    pub nodes: u64,
    /// Start of the base positions.
    pub bases: u64,
    /// Start of the starts of blocks.
    pub starts: u64,
    /// Start of the values.
    pub values: u64,
    /// Length of the file.
    pub len: u64,
}

impl Counts {
    /// Where the sections lie; `None` if no stack has these numbers.
    pub fn layout(&self) -> Option<Layout> {
        if self.layers == 0 || self.layers > MAX_LAYERS {
            return None;
        }
        let end = |start: u64, count: u64, len: u64| start.checked_add(count.checked_mul(len)?);
        let next = |end: u64| end.checked_next_multiple_of(ALIGNMENT);
        let layers = HEADER_LEN as u64;
        let nodes = next(end(layers, self.layers.into(), RECORD_LEN as u64)?)?;
        let bases = next(end(nodes, self.nodes, NODE_LEN)?)?;
        let starts = next(end(bases, self.bases, size_of::<u64>() as u64)?)?;
        let values = next(end(starts, self.starts, size_of::<u32>() as u64)?)?;
        let len = end(values, self.segments, VALUE_LEN)?.checked_add(1)?;
        // A file offset is a signed number.
        i64::try_from(len).ok()?;
        Some(Layout {
            layers,
            nodes,
            bases,
            starts,
            values,
            len,
        })
    }
}

/// The header as it lies in the file; zeros follow up to [`HEADER_LEN`].
#[derive(Clone, Copy, FromBytes, IntoBytes, KnownLayout, Immutable, Unaligned)]
#[repr(C)]
struct RawHeader {
    magic: [u8; 8],
    checksum: little_endian::U32,
    content_checksum: little_endian::U32,
    key: [u8; 32],
    layers: little_endian::U32,
    zero: [u8; 4],
    nodes: little_endian::U64,
    segments: little_endian::U64,
    bases: little_endian::U64,
    starts: little_endian::U64,
}

impl RawHeader {
    /// The checksum of the fields behind the checksum.
    fn sum(&self) -> u32 {
        crc::raw(SEED, self.as_bytes().get(COVERED).unwrap_or_default())
    }
}

/// What the header says.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Header {
    /// Key of the stack.
    pub key: Digest,
    /// Numbers of items.
    pub counts: Counts,
    /// Checksum of the bytes behind the header: [`checksum`].
    pub content_checksum: u32,
}

impl Header {
    /// The bytes of the header.
    pub fn encode(&self) -> [u8; HEADER_LEN] {
        let mut raw = RawHeader {
            magic: MAGIC,
            checksum: 0.into(),
            content_checksum: self.content_checksum.into(),
            key: *self.key.as_bytes(),
            layers: self.counts.layers.into(),
            zero: [0; 4],
            nodes: self.counts.nodes.into(),
            segments: self.counts.segments.into(),
            bases: self.counts.bases.into(),
            starts: self.counts.starts.into(),
        };
        raw.checksum = raw.sum().into();
        let mut bytes = [0; HEADER_LEN];
        // A header is longer than its fields.
        let _ = raw.write_to_prefix(&mut bytes);
        bytes
    }

    /// Reads the header of a file of `file_len` bytes.
    ///
    /// # Errors
    /// [`TablesError::Incomplete`], [`TablesError::Checksum`], [`TablesError::Counts`] and
    /// [`TablesError::Length`].
    pub fn decode(bytes: &[u8; HEADER_LEN], file_len: u64) -> Result<(Self, Layout), TablesError> {
        let raw = match RawHeader::ref_from_prefix(bytes) {
            Ok((raw, _)) if raw.magic == MAGIC => raw,
            _ => return Err(TablesError::Incomplete),
        };
        let (found, expected) = (raw.sum(), raw.checksum.get());
        if found != expected {
            return Err(TablesError::Checksum {
                part: "header",
                found,
                expected,
            });
        }
        let counts = Counts {
            layers: raw.layers.get(),
            nodes: raw.nodes.get(),
            segments: raw.segments.get(),
            bases: raw.bases.get(),
            starts: raw.starts.get(),
        };
        let layout = counts.layout().ok_or(TablesError::Counts(counts))?;
        if layout.len != file_len {
            return Err(TablesError::Length {
                found: file_len,
                expected: layout.len,
            });
        }
        let header = Self {
            key: Digest::from_bytes(raw.key),
            counts,
            content_checksum: raw.content_checksum.get(),
        };
        Ok((header, layout))
    }

    /// Compares the key with that of the stack.
    ///
    /// # Errors
    /// [`TablesError::OtherStack`].
    pub fn check_key(&self, expected: &Digest) -> Result<(), TablesError> {
        match self.key == *expected {
            true => Ok(()),
            false => Err(TablesError::OtherStack {
                found: self.key,
                expected: *expected,
            }),
        }
    }

    /// Compares the checksum of the bytes behind the header.
    ///
    /// # Errors
    /// [`TablesError::Checksum`].
    pub fn check_content(&self, found: Checksum) -> Result<(), TablesError> {
        match found.0 == self.content_checksum {
            true => Ok(()),
            false => Err(TablesError::Checksum {
                part: "content",
                found: found.0,
                expected: self.content_checksum,
            }),
        }
    }
}

/// Checksum of bytes that arrive in parts: a CRC-32C.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Checksum(u32);

impl Default for Checksum {
    fn default() -> Self {
        Self(SEED)
    }
}

impl Checksum {
    /// Appends bytes.
    pub fn update(&mut self, bytes: &[u8]) {
        self.0 = crc::raw(self.0, bytes);
    }

    /// The checksum of all bytes appended.
    pub fn value(self) -> u32 {
        self.0
    }
}

/// The key of a stack of these layers, bottom first.
pub fn key<'l>(layers: impl IntoIterator<Item = &'l LayerIdentity>) -> Digest {
    let mut hasher = Hasher::new();
    hasher.update(&MAGIC);
    for layer in layers {
        hasher.update(&layer.encode());
    }
    hasher.finish()
}
