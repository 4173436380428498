//! LSMT layer: header, data, index of mappings, trailer.
//!
//! The index of a sealed layer is sorted and free of overlaps. [`IndexReader`] decodes it to [`Mapping`]s and
//! verifies each entry, so that later code can rely on these rules.

use thiserror::Error;
use uuid::Uuid;
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout, little_endian};

pub use super::HeaderKind;
use crate::units::{Sector, Sectors};

mod index;
pub mod writable;

pub use index::{
    ENTRY_GROUP, ENTRY_LEN, FIRST_DATA, IndexReader, MAX_LENGTH, Mapping, PADDING, padding_after,
};

/// Bytes of the header, and of the trailer.
pub const HEADER_LEN: usize = 4096;

/// Most sectors of a disk: the offset of a mapping has 50 bits.
pub const MAX_SECTORS: Sectors = Sectors(1 << 50);

/// Most index entries of one layer, padding included.
pub const MAX_ENTRIES: u64 = 16_000_000;

const MAGIC: [u8; 24] = [
    0x4C, 0x53, 0x4D, 0x54, 0x00, 0x01, 0x02, 0x00, 0x65, 0x7E, 0x63, 0xD2, 0x94, 0x44, 0x08, 0x4C,
    0xA2, 0xD2, 0xC8, 0xEC, 0x4F, 0xCF, 0xAE, 0x8A,
];
const STRUCT_LEN: u32 = 390;
const VERSION: u8 = 1;
const SUB_VERSION: u8 = 1;

const FLAG_HEADER: u32 = 1 << 0;
const FLAG_DATA: u32 = 1 << 1;
const FLAG_SEALED: u32 = 1 << 2;

/// Why bytes are not a valid sealed layer.
#[derive(Debug, Error, PartialEq, Eq)]
pub enum Error {
    /// The structure has no LSMT magic.
    #[error("no LSMT magic in the {0}; the file is not an OverlayBD layer, or is truncated")]
    Magic(HeaderKind),
    /// The flags do not match the position of the structure.
    #[error("{part} flags {found:#x}; expected {expected}")]
    Flags {
        /// Which of the two structures.
        part: HeaderKind,
        /// Flags found.
        found: u32,
        /// Flags expected.
        expected: &'static str,
    },
    /// The version is not supported.
    #[error("LSMT version {0}.{1}; supported is {VERSION}.{SUB_VERSION}")]
    Version(u8, u8),
    /// The disk is larger than the index can address.
    #[error("virtual size is {0} bytes; at most 2^59 are supported")]
    VirtualSize(u64),
    /// The index is not between header and trailer.
    #[error(
        "index of {entries} entries at byte {offset} does not fit before the trailer at byte {trailer}"
    )]
    IndexRange {
        /// Start of the index, as declared.
        offset: u64,
        /// Number of its entries, as declared.
        entries: u64,
        /// Start of the trailer.
        trailer: u64,
    },
    /// The number of entries exceeds the limit.
    #[error("index has {0} entries; at most {MAX_ENTRIES} are supported")]
    TooManyEntries(u64),
    /// An entry covers no sector and is not padding.
    #[error("index entry {entry} covers no sector")]
    EmptyEntry {
        /// Number of the entry.
        entry: u64,
    },
    /// An entry starts before the previous one ends.
    #[error("index entry {entry} starts at {offset}; the previous entry ends at {end}")]
    Unsorted {
        /// Number of the entry.
        entry: u64,
        /// Start of the entry on the disk.
        offset: Sector,
        /// End of the previous entry.
        end: Sector,
    },
    /// An entry ends past the largest disk.
    #[error("index entry {entry} ends at {end}; a disk has at most 2^50 sectors")]
    BeyondDisk {
        /// Number of the entry.
        entry: u64,
        /// End of the entry.
        end: Sector,
    },
    /// The data of an entry is not in the data area.
    #[error(
        "index entry {entry} has {length} sectors of data at {moffset} of the layer; the data \
         area is sectors 8 to {}", end.0
    )]
    DataRange {
        /// Number of the entry.
        entry: u64,
        /// Start of its data, as declared.
        moffset: Sector,
        /// Sectors of data.
        length: u16,
        /// First sector after the data area.
        end: Sector,
    },
}

/// The structure on disk; zeros follow up to [`HEADER_LEN`].
#[derive(FromBytes, IntoBytes, KnownLayout, Immutable, zerocopy::Unaligned)]
#[repr(C)]
struct Raw {
    magic: [u8; 24],
    struct_len: little_endian::U32,
    flags: little_endian::U32,
    index_offset: little_endian::U64,
    index_entries: little_endian::U64,
    virtual_size: little_endian::U64,
    uuid: [u8; 37],
    parent_uuid: [u8; 37],
    reserved: [u8; 2],
    version: u8,
    sub_version: u8,
    message: [u8; 256],
}

/// A decoded header or trailer of a layer.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Header {
    /// Byte at which the index starts; 0 in the header of a committed layer.
    pub index_offset: u64,
    /// Entries of the index, padding included; 0 in the header of a committed layer.
    pub index_entries: u64,
    /// Size of the disk in bytes.
    pub virtual_size: u64,
    /// Uuid of the layer; nil if unset or malformed.
    pub uuid: Uuid,
    /// Uuid of the parent, the layer below; nil if unset or malformed.
    pub parent_uuid: Uuid,
    /// Commit message of at most 256 bytes.
    pub message: Vec<u8>,
}

impl Header {
    /// Creates the header of an empty layer for a disk of `virtual_size` bytes.
    pub fn empty(virtual_size: u64, uuid: Uuid, parent_uuid: Uuid) -> Self {
        Self {
            index_offset: 0,
            index_entries: 0,
            virtual_size,
            uuid,
            parent_uuid,
            message: Vec::new(),
        }
    }

    /// Whether `bytes` start with the magic of an LSMT structure.
    pub fn has_magic(bytes: &[u8]) -> bool {
        bytes.starts_with(&MAGIC)
    }

    /// Decodes the header or the trailer of a layer.
    ///
    /// Only the trailer needs the flag "sealed": sealing in place does not update the header.
    ///
    /// # Errors
    /// [`Error::Magic`], [`Error::Flags`], [`Error::Version`] and [`Error::VirtualSize`].
    pub fn decode(bytes: &[u8; HEADER_LEN], part: HeaderKind) -> Result<Self, Error> {
        let raw = match Raw::ref_from_prefix(bytes) {
            Ok((raw, _)) if raw.magic == MAGIC => raw,
            _ => return Err(Error::Magic(part)),
        };
        let found = raw.flags.get();
        let wrong = |expected| Error::Flags {
            part,
            found,
            expected,
        };
        if (found & FLAG_HEADER != 0) != (part == HeaderKind::Header) {
            return Err(wrong("bit 0 set in the header and clear in the trailer"));
        }
        if found & FLAG_DATA == 0 {
            return Err(wrong(
                "a data file (bit 1); this is the index of a writable layer",
            ));
        }
        if part == HeaderKind::Trailer && found & FLAG_SEALED == 0 {
            return Err(wrong(
                "a sealed layer (bit 2); commit the writable layer first",
            ));
        }
        if (raw.version, raw.sub_version) != (VERSION, SUB_VERSION) {
            return Err(Error::Version(raw.version, raw.sub_version));
        }
        let virtual_size = raw.virtual_size.get();
        if Sectors::to_hold(virtual_size) > MAX_SECTORS {
            return Err(Error::VirtualSize(virtual_size));
        }
        let message = raw.message.split(|byte| *byte == 0).next();
        Ok(Self {
            index_offset: raw.index_offset.get(),
            index_entries: raw.index_entries.get(),
            virtual_size,
            uuid: decode_uuid(&raw.uuid),
            parent_uuid: decode_uuid(&raw.parent_uuid),
            message: message.unwrap_or_default().to_vec(),
        })
    }

    /// Encodes the structure as header or trailer of a committed layer. Truncates the message to 256 bytes.
    ///
    /// The header has no index fields, because it is written before the index is known.
    pub fn encode(&self, part: HeaderKind) -> [u8; HEADER_LEN] {
        match part {
            HeaderKind::Header => self.bytes(FLAG_HEADER | FLAG_DATA | FLAG_SEALED, 0, 0),
            HeaderKind::Trailer => self.bytes(
                FLAG_DATA | FLAG_SEALED,
                self.index_offset,
                self.index_entries,
            ),
        }
    }

    /// Encodes the structure with these flags and index fields.
    fn bytes(&self, flags: u32, index_offset: u64, index_entries: u64) -> [u8; HEADER_LEN] {
        let mut message = [0; 256];
        for (to, from) in message.iter_mut().zip(&self.message) {
            *to = *from;
        }
        let raw = Raw {
            magic: MAGIC,
            struct_len: STRUCT_LEN.into(),
            flags: flags.into(),
            index_offset: index_offset.into(),
            index_entries: index_entries.into(),
            virtual_size: self.virtual_size.into(),
            uuid: encode_uuid(self.uuid),
            parent_uuid: encode_uuid(self.parent_uuid),
            reserved: [0; 2],
            version: VERSION,
            sub_version: SUB_VERSION,
            message,
        };
        let mut bytes = [0; HEADER_LEN];
        let written = raw.write_to_prefix(&mut bytes);
        debug_assert!(written.is_ok(), "the structure fits the header");
        bytes
    }
}

/// Decodes a uuid in the text form of a layer: 36 characters and a NUL.
fn decode_uuid(text: &[u8; 37]) -> Uuid {
    Uuid::try_parse_ascii(&text[..36]).unwrap_or_default()
}

fn encode_uuid(uuid: Uuid) -> [u8; 37] {
    let mut text = [0; 37];
    uuid.hyphenated().encode_upper(&mut text);
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    fn header() -> Header {
        Header {
            index_offset: 4096 + 512 * 100,
            index_entries: 3,
            virtual_size: 12_345,
            uuid: Uuid::from_u128(0xABCD_EF00_1234),
            parent_uuid: Uuid::nil(),
            message: b"hello".to_vec(),
        }
    }

    #[test]
    fn header_round_trip() {
        let header = header();
        let trailer = header.encode(HeaderKind::Trailer);
        assert_eq!(
            Header::decode(&trailer, HeaderKind::Trailer),
            Ok(header.clone())
        );
        let first = Header::decode(&header.encode(HeaderKind::Header), HeaderKind::Header).unwrap();
        assert_eq!((first.index_offset, first.index_entries), (0, 0));
        assert_eq!(first.uuid, header.uuid);
        assert_eq!(size_of::<Raw>(), 390);
        let text = b"00000000-0000-0000-0000-ABCDEF001234\0";
        assert_eq!(trailer[56..93], *text);
        assert!(trailer[390..].iter().all(|byte| *byte == 0));
    }

    #[test]
    fn a_message_may_fill_its_field() {
        let message = vec![b'm'; 256];
        let header = Header {
            message: message.clone(),
            ..header()
        };
        let read = Header::decode(&header.encode(HeaderKind::Trailer), HeaderKind::Trailer);
        assert_eq!(read.unwrap().message, message);
    }

    #[test]
    fn wrong_structures_are_named() {
        let trailer = header().encode(HeaderKind::Trailer);
        let with = |at: usize, byte: u8| {
            let mut bytes = trailer;
            bytes[at] = byte;
            Header::decode(&bytes, HeaderKind::Trailer)
        };
        assert_eq!(with(3, 0), Err(Error::Magic(HeaderKind::Trailer)));
        assert!(matches!(with(28, 7), Err(Error::Flags { found: 7, .. })));
        assert!(matches!(with(28, 4), Err(Error::Flags { found: 4, .. })));
        assert!(matches!(with(28, 2), Err(Error::Flags { found: 2, .. })));
        assert!(with(28, 0x36).is_ok(), "sealed sparse and hybrid layers");
        assert_eq!(with(132, 2), Err(Error::Version(2, 1)));
        assert!(matches!(with(55, 9), Err(Error::VirtualSize(_))));
        assert_eq!(with(60, b'!').unwrap().uuid, Uuid::nil());
        let part = HeaderKind::Header;
        let found = 6;
        let error = Header::decode(&trailer, part);
        assert!(matches!(error, Err(Error::Flags { found: f, .. }) if f == found));
    }
}
