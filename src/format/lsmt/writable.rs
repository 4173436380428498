//! Headers of the two files of a writable layer: the data file and the index file.
//!
//! Both start with the header of a sealed layer, with other flags. Entries of the index file are in the order
//! of the writes; where two overlap, the later one is valid.

use super::{Error, FLAG_DATA, FLAG_HEADER, FLAG_SEALED, HEADER_LEN, Header, HeaderKind, Raw};
use zerocopy::FromBytes;

const FLAG_SPARSE: u32 = 1 << 4;
const FLAG_HYBRID: u32 = 1 << 5;

/// Placement of the data in a writable layer.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    /// Data is appended, in the order of the writes.
    Append,
    /// Sector `s` of the disk is sector `8 + s` of the file, which is as long as the disk.
    Sparse,
    /// Existing data is overwritten in place; new data goes to free sectors or is appended.
    Hybrid,
}

impl Kind {
    /// Name in options and messages.
    pub fn name(self) -> &'static str {
        match self {
            Kind::Append => "append",
            Kind::Sparse => "sparse",
            Kind::Hybrid => "hybrid",
        }
    }

    fn flag(self) -> u32 {
        match self {
            Kind::Append => 0,
            Kind::Sparse => FLAG_SPARSE,
            Kind::Hybrid => FLAG_HYBRID,
        }
    }
}

/// Encodes the header of a data file.
pub fn encode_data_header(header: &Header, kind: Kind) -> [u8; HEADER_LEN] {
    header.bytes(FLAG_HEADER | FLAG_DATA | kind.flag(), 0, 0)
}

/// Encodes the header of an index file.
pub fn encode_index_header(header: &Header) -> [u8; HEADER_LEN] {
    header.bytes(FLAG_HEADER, HEADER_LEN as u64, 0)
}

/// Encodes the trailer that seals a data file of this kind in place.
pub fn encode_seal(header: &Header, kind: Kind) -> [u8; HEADER_LEN] {
    header.bytes(
        FLAG_DATA | FLAG_SEALED | kind.flag(),
        header.index_offset,
        header.index_entries,
    )
}

/// Decodes the header of a data file.
///
/// # Errors
/// [`Error::Magic`] without a magic, [`Error::Flags`] for the header of an index file or of a
/// committed layer, [`Error::VirtualSize`] for an impossible size.
pub fn decode_data_header(bytes: &[u8; HEADER_LEN]) -> Result<(Header, Kind), Error> {
    let header = Header::decode(bytes, HeaderKind::Header)?;
    let found = flags(bytes);
    let kind = match found & (FLAG_SPARSE | FLAG_HYBRID) {
        0 => Kind::Append,
        FLAG_SPARSE => Kind::Sparse,
        FLAG_HYBRID => Kind::Hybrid,
        _ => return Err(wrong(found, "one of sparse (bit 4) and hybrid (bit 5)")),
    };
    match found & FLAG_SEALED {
        0 => Ok((header, kind)),
        _ => Err(wrong(
            found,
            "a writable layer (bit 2 clear); this is a committed one",
        )),
    }
}

/// Decodes the header of an index file.
///
/// # Errors
/// [`Error::Magic`] without a magic, [`Error::Flags`] for the header of a data file,
/// [`Error::VirtualSize`] for an impossible size.
pub fn decode_index_header(bytes: &[u8; HEADER_LEN]) -> Result<Header, Error> {
    let found = flags(bytes);
    if !Header::has_magic(bytes) {
        return Err(Error::Magic(HeaderKind::Header));
    }
    if found & FLAG_DATA != 0 {
        return Err(wrong(
            found,
            "an index file (bit 1 clear); this is a data file",
        ));
    }
    // The other fields are those of a data file.
    let mut as_data = *bytes;
    as_data[28] |= FLAG_DATA as u8;
    Header::decode(&as_data, HeaderKind::Header)
}

fn flags(bytes: &[u8; HEADER_LEN]) -> u32 {
    Raw::ref_from_prefix(bytes).map_or(0, |(raw, _)| raw.flags.get())
}

fn wrong(found: u32, expected: &'static str) -> Error {
    Error::Flags {
        part: HeaderKind::Header,
        found,
        expected,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use uuid::Uuid;

    fn header() -> Header {
        Header {
            index_offset: 0,
            index_entries: 0,
            virtual_size: 1 << 30,
            uuid: Uuid::from_u128(7),
            parent_uuid: Uuid::from_u128(6),
            message: b"m".to_vec(),
        }
    }

    #[test]
    fn flags_are_those_that_other_tools_write() {
        let header = header();
        let flags = |kind| flags(&encode_data_header(&header, kind));
        assert_eq!(
            [Kind::Append, Kind::Sparse, Kind::Hybrid].map(flags),
            [0x3, 0x13, 0x23]
        );
        let index = encode_index_header(&header);
        assert_eq!((index[28], index[33]), (1, 16), "index at 4096");
        let seal = |kind| encode_seal(&header, kind)[28];
        assert_eq!(
            [Kind::Append, Kind::Sparse, Kind::Hybrid].map(seal),
            [0x6, 0x16, 0x26]
        );
    }

    #[test]
    fn headers_round_trip_and_are_not_taken_for_each_other() {
        let header = header();
        for kind in [Kind::Append, Kind::Sparse, Kind::Hybrid] {
            let data = encode_data_header(&header, kind);
            assert_eq!(decode_data_header(&data), Ok((header.clone(), kind)));
            assert!(matches!(
                decode_index_header(&data),
                Err(Error::Flags { .. })
            ));
        }
        let index = encode_index_header(&header);
        assert_eq!(
            decode_index_header(&index).map(|index| index.uuid),
            Ok(header.uuid)
        );
        assert!(matches!(
            decode_data_header(&index),
            Err(Error::Flags { .. })
        ));
        let committed = header.encode(HeaderKind::Header);
        assert!(decode_data_header(&committed).is_err());
        assert!(decode_index_header(&[0; HEADER_LEN]).is_err());
    }
}
