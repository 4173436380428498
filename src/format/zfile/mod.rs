//! ZFile: a blob cut into blocks of one size, each compressed by itself.
//!
//! `header | dictionary | blocks | table of stored lengths | trailer`. Header and trailer are the
//! same structure; [`reconcile`] decides which of them tells where the table is, and
//! [`TableReader`] makes the [`BlockTable`] of what is there.

use thiserror::Error;

pub use super::HeaderKind;

mod header;
mod table;

pub use header::{Header, final_header, initial_header, reconcile, trailer};
pub use table::{BlockTable, TableReader, encode_table};

/// Bytes of the header, and of the trailer.
pub const HEADER_LEN: usize = 512;

/// Bytes of the checksum after a block.
pub const CHECKSUM_LEN: usize = 4;

/// Allowed numbers of uncompressed bytes in a block.
pub const BLOCK_SIZES: std::ops::RangeInclusive<u32> = 4096..=65536;

/// Most blocks of one file.
pub const MAX_BLOCKS: u64 = 1_000_000_000;

/// Why bytes are not a valid ZFile.
#[derive(Debug, Error, PartialEq, Eq)]
pub enum Error {
    /// The trailer has no magic.
    #[error("no ZFile magic in the trailer; the file is truncated or incomplete")]
    NoTrailer,
    /// The digest does not match the bytes it covers.
    #[error("{part} digest is {found:#010x}; expected {expected:#010x}")]
    Digest {
        /// Which of the two structures.
        part: HeaderKind,
        /// CRC of the bytes.
        found: u32,
        /// Digest in the structure.
        expected: u32,
    },
    /// The flags do not match the position of the structure.
    #[error("{part} flags {found:#x}; expected {expected}")]
    Flags {
        /// Which of the two structures.
        part: HeaderKind,
        /// Flags found.
        found: u64,
        /// Flags expected.
        expected: &'static str,
    },
    /// The compression algorithm is not supported.
    #[error("{part} names compression algorithm {found}; supported are 1 (LZ4) and 2 (zstd)")]
    Algorithm {
        /// Which of the two structures.
        part: HeaderKind,
        /// Number of the algorithm.
        found: u8,
    },
    /// The format does not allow the block size.
    #[error("{part} block size is {found}; expected a power of two from 4096 to 65536")]
    BlockSize {
        /// Which of the two structures.
        part: HeaderKind,
        /// Block size found.
        found: u32,
    },
    /// The blocks need a dictionary.
    #[error("blocks compressed with a dictionary are not supported")]
    Dictionary,
    /// The block table is compressed.
    #[error("a compressed block table is not supported")]
    CompressedTable,
    /// Header and trailer contradict each other.
    #[error("header and trailer disagree about the {0}")]
    Disagree(&'static str),
    /// The block table is not between header and trailer.
    #[error(
        "block table of {blocks} entries at byte {offset} does not fit before the trailer at byte {trailer}"
    )]
    TableRange {
        /// Start of the table, as declared.
        offset: u64,
        /// Number of its entries, as declared.
        blocks: u64,
        /// Start of the trailer.
        trailer: u64,
    },
    /// The number of blocks exceeds the limit.
    #[error("{0} blocks; at most {MAX_BLOCKS} are supported")]
    TooManyBlocks(u64),
    /// Number of blocks and original size do not match.
    #[error("{blocks} blocks of {block_size} bytes do not match {original_size} bytes of content")]
    BlockCount {
        /// Entries of the table.
        blocks: u64,
        /// Uncompressed bytes in a block.
        block_size: u32,
        /// Uncompressed bytes of all blocks.
        original_size: u64,
    },
    /// A stored length is impossible.
    #[error("block {block} has {stored} stored bytes by the block table; expected {min} to {max}")]
    StoredLength {
        /// Number of the block.
        block: u64,
        /// Stored length found.
        stored: u32,
        /// Smallest length possible.
        min: u32,
        /// Largest length possible.
        max: u32,
    },
    /// The blocks do not end where the table starts.
    #[error(
        "blocks end at byte {end}; the header or trailer places the block table at byte {offset}"
    )]
    BlocksEnd {
        /// End of the last block.
        end: u64,
        /// Start of the table, as declared.
        offset: u64,
    },
    /// The block table's checksum does not match.
    #[error("block table checksum is {found:#010x}; expected {expected:#010x}")]
    TableChecksum {
        /// CRC of the table.
        found: u32,
        /// CRC in the header or trailer.
        expected: u32,
    },
}

/// Compression algorithm of blocks.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Algorithm {
    /// Raw LZ4 blocks without frames.
    Lz4,
    /// One zstd frame per block.
    Zstd,
}

impl Algorithm {
    fn from_id(id: u8) -> Option<Self> {
        match id {
            1 => Some(Self::Lz4),
            2 => Some(Self::Zstd),
            _ => None,
        }
    }

    fn id(self) -> u8 {
        match self {
            Self::Lz4 => 1,
            Self::Zstd => 2,
        }
    }
}

impl std::fmt::Display for Algorithm {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(match self {
            Self::Lz4 => "lz4",
            Self::Zstd => "zstd",
        })
    }
}

/// Format of the blocks of a file, known before the file is written.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct BlockFormat {
    /// Compression algorithm.
    pub algorithm: Algorithm,
    /// Uncompressed bytes of every block but the last; a power of two in [`BLOCK_SIZES`].
    pub block_size: u32,
    /// Whether a checksum of [`CHECKSUM_LEN`] bytes follows each block.
    pub checksum: bool,
    /// Bytes between the header and the first block.
    pub dictionary_len: u32,
}

impl BlockFormat {
    /// Byte at which the first block starts.
    pub fn first_block(&self) -> u64 {
        u64::from(self.dictionary_len).saturating_add(HEADER_LEN as u64)
    }

    /// Least and most bytes of a stored block with its checksum. Codecs stay far below the upper bound:
    /// incompressible bytes grow by less than one in two hundred.
    fn stored_bounds(&self) -> (u32, u32) {
        let checksum = match self.checksum {
            true => CHECKSUM_LEN as u32,
            false => 0,
        };
        let min = checksum.saturating_add(1);
        (min, self.block_size.saturating_mul(2))
    }
}

/// Length of the content, and block table of a file, known when the file is finished.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Totals {
    /// Byte at which the block table starts.
    pub table_offset: u64,
    /// Number of blocks, and of entries in the table.
    pub blocks: u64,
    /// Uncompressed bytes in all blocks.
    pub original_size: u64,
    /// Checksum of the table.
    pub table_crc: u32,
}
