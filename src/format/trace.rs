//! Prefetch traces in upstream's format: the bytes of layers that a container read at its start.
//!
//! ```text
//! 0   magic (u32), padding, length of the records in bytes (u64), checksum (u32), padding
//! 24  records of 24 bytes: 'R' or 'W', padding, layer (u32), count (u64), offset (i64)
//! ```
//! Numbers are little-endian. A layer is counted from the bottom; offset and count are bytes of the
//! layer inside tar and ZFile. The checksum is a CRC-32C of all records as stored.

use thiserror::Error;
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout, Unaligned, little_endian};

use super::crc;

/// Most records of a trace.
pub const MAX_RECORDS: usize = 1_000_000;

/// Largest file that can be a trace, in bytes.
pub const MAX_TRACE_LEN: u64 = (HEADER_LEN + MAX_RECORDS * RECORD_LEN) as u64;

const HEADER_LEN: usize = size_of::<Header>();
const RECORD_LEN: usize = size_of::<Record>();
const MAGIC: u32 = 0xC2EF_1820;

#[derive(FromBytes, IntoBytes, KnownLayout, Immutable, Unaligned)]
#[repr(C)]
struct Header {
    magic: little_endian::U32,
    padding: [u8; 4],
    data_size: little_endian::U64,
    checksum: little_endian::U32,
    more_padding: [u8; 4],
}

#[derive(FromBytes, IntoBytes, KnownLayout, Immutable, Unaligned)]
#[repr(C)]
struct Record {
    kind: u8,
    padding: [u8; 3],
    layer: little_endian::U32,
    count: little_endian::U64,
    offset: little_endian::I64,
}

/// One read of a layer.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct TracedRead {
    /// Number of the layer, from the bottom.
    pub layer: u32,
    /// First byte in the layer.
    pub offset: u64,
    /// Number of bytes.
    pub len: u64,
}

/// Why bytes are not a trace.
#[derive(Clone, Debug, PartialEq, Eq, Error)]
pub enum Error {
    /// Another kind of file: a list of file names, for example.
    #[error("not a trace of reads: magic {found:#010x}, expected {MAGIC:#010x}")]
    Magic {
        /// The first four bytes.
        found: u32,
    },
    /// The file does not have the length that its header declares.
    #[error("trace has {found} bytes; its header says {expected}")]
    Length {
        /// Bytes of header and records.
        expected: u64,
        /// Bytes of the file.
        found: u64,
    },
    /// There are more records than a trace may have.
    #[error("trace has {0} records; at most {MAX_RECORDS} are read")]
    Records(usize),
    /// The records are damaged.
    #[error("trace has checksum {found:#010x}, expected {expected:#010x}")]
    Checksum {
        /// The checksum in the header.
        expected: u32,
        /// The one of the records.
        found: u32,
    },
    /// A record has an unknown kind or an impossible range.
    #[error("record {0} of the trace is malformed")]
    Record(usize),
}

/// Returns the reads of a trace, in order. Skips writes.
///
/// # Errors
/// Any [`Error`], if the file is not a trace or is damaged.
pub fn parse(bytes: &[u8]) -> Result<Vec<TracedRead>, Error> {
    let found = bytes.len() as u64;
    let short = |expected| Error::Length { expected, found };
    let (header, rest) = Header::ref_from_prefix(bytes).map_err(|_| short(HEADER_LEN as u64))?;
    if header.magic.get() != MAGIC {
        return Err(Error::Magic {
            found: header.magic.get(),
        });
    }
    let expected = header.data_size.get().saturating_add(HEADER_LEN as u64);
    if expected != found {
        return Err(short(expected));
    }
    let records = <[Record]>::ref_from_bytes(rest).map_err(|_| short(expected))?;
    if records.len() > MAX_RECORDS {
        return Err(Error::Records(records.len()));
    }
    let (expected, found) = (header.checksum.get(), crc::raw(0, rest));
    if expected != found {
        return Err(Error::Checksum { expected, found });
    }
    let mut reads = Vec::new();
    for (number, record) in records.iter().enumerate() {
        let malformed = || Error::Record(number);
        let offset = u64::try_from(record.offset.get()).map_err(|_| malformed())?;
        let len = record.count.get();
        offset.checked_add(len).ok_or_else(malformed)?;
        match record.kind {
            b'R' => reads.push(TracedRead {
                layer: record.layer.get(),
                offset,
                len,
            }),
            b'W' => {}
            _ => return Err(malformed()),
        }
    }
    Ok(reads)
}

/// Returns the bytes of a trace of these reads.
pub fn encode(reads: &[TracedRead]) -> Vec<u8> {
    let mut records = Vec::with_capacity(reads.len().saturating_mul(RECORD_LEN));
    for read in reads {
        let record = Record {
            kind: b'R',
            padding: [0; 3],
            layer: read.layer.into(),
            count: read.len.into(),
            offset: (read.offset.min(i64::MAX as u64) as i64).into(),
        };
        records.extend_from_slice(record.as_bytes());
    }
    let header = Header {
        magic: MAGIC.into(),
        padding: [0; 4],
        data_size: (records.len() as u64).into(),
        checksum: crc::raw(0, &records).into(),
        more_padding: [0; 4],
    };
    let mut bytes = header.as_bytes().to_vec();
    bytes.extend(records);
    bytes
}

#[cfg(test)]
mod tests {
    use super::*;

    fn reads() -> Vec<TracedRead> {
        let read = |number: u32| TracedRead {
            layer: number % 3,
            offset: u64::from(number) * 4096,
            len: 512,
        };
        (0..100).map(read).collect()
    }

    #[test]
    fn what_is_encoded_is_parsed() {
        assert_eq!(parse(&encode(&reads())).unwrap(), reads());
        assert_eq!(parse(&encode(&[])).unwrap(), []);
        assert_eq!(encode(&[])[..4], [0x20, 0x18, 0xEF, 0xC2]);
    }

    #[test]
    fn damage_is_refused() {
        let good = encode(&reads());
        for (at, expected) in [
            (0, "magic"),
            (8, "header says"),
            (16, "checksum"),
            (24, "checksum"),
            (good.len() - 1, "checksum"),
        ] {
            let mut bad = good.clone();
            bad[at] ^= 1;
            let error = parse(&bad).unwrap_err().to_string();
            assert!(error.contains(expected), "{at}: {error}");
        }
        for len in 0..good.len() {
            assert!(parse(&good[..len]).is_err(), "{len}");
        }
        assert!(parse(&[&good[..], b"x"].concat()).is_err());
        assert!(matches!(
            parse(b"/usr/bin/redis\n/etc/passwd\n"),
            Err(Error::Magic { .. })
        ));
    }

    #[test]
    fn absurd_records_are_refused() {
        for (at, bytes) in [
            (24, [b'X'; 1].to_vec()),
            (40, (-1i64).to_le_bytes().to_vec()),
        ] {
            let mut bad = encode(&reads());
            bad[at..at + bytes.len()].copy_from_slice(&bytes);
            let checksum = crc::raw(0, &bad[24..]);
            bad[16..20].copy_from_slice(&checksum.to_le_bytes());
            assert_eq!(parse(&bad), Err(Error::Record(0)));
        }
    }
}
