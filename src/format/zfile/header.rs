//! Header and trailer of a ZFile, which have the same structure, and the choice between them.

use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout, little_endian};

use super::{
    Algorithm, BLOCK_SIZES, BlockFormat, Error, HEADER_LEN, HeaderKind, MAX_BLOCKS, Totals,
};
use crate::format::crc;

const MAGIC: [u8; 24] = *b"ZFile\0\x01\0tuji.yyf@Alibaba";
const STRUCT_LEN: u32 = 96;
const DIGEST: std::ops::Range<usize> = 28..32;
/// Bytes that files written before 2023 left uninitialized; zero in all others.
const TAIL: std::ops::Range<usize> = 89..HEADER_LEN;

const FLAG_HEADER: u64 = 1 << 0;
const FLAG_DATA: u64 = 1 << 1;
const FLAG_SEALED: u64 = 1 << 2;
const FLAG_OVERWRITTEN: u64 = 1 << 3;
const FLAG_DIGEST: u64 = 1 << 4;
const FLAG_TABLE_COMPRESSED: u64 = 1 << 5;

/// The structure on disk; zeros follow up to [`HEADER_LEN`].
#[derive(FromBytes, IntoBytes, KnownLayout, Immutable, zerocopy::Unaligned)]
#[repr(C)]
struct Raw {
    magic: [u8; 24],
    struct_len: little_endian::U32,
    digest: little_endian::U32,
    flags: little_endian::U64,
    table_offset: little_endian::U64,
    blocks: little_endian::U64,
    original_size: little_endian::U64,
    table_crc: little_endian::U32,
    reserved: [u8; 4],
    block_size: little_endian::U32,
    algorithm: u8,
    level: u8,
    use_dictionary: u8,
    reserved_too: [u8; 5],
    dictionary_len: little_endian::U32,
    checksum: u8,
    padding: [u8; 7],
}

/// A decoded header or trailer.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Header {
    /// Format of the blocks.
    pub format: BlockFormat,
    /// Content and block table; without meaning in a header that was not overwritten at the end.
    pub totals: Totals,
    /// Whether the structure has a digest, which was then verified. Without one, the checksum of the block
    /// table has no meaning either.
    pub digest: bool,
    flags: u64,
}

impl Header {
    /// Whether `bytes` start with the magic of a ZFile structure.
    pub fn has_magic(bytes: &[u8]) -> bool {
        bytes.starts_with(&MAGIC)
    }

    /// Decodes the header or the trailer of a ZFile.
    ///
    /// Reserved bits and bytes may have any value: files written before 2023 have random ones.
    ///
    /// # Errors
    /// [`Error::NoTrailer`], [`Error::Digest`], [`Error::Flags`], [`Error::Algorithm`], [`Error::BlockSize`]
    /// and [`Error::Dictionary`].
    pub fn decode(bytes: &[u8; HEADER_LEN], part: HeaderKind) -> Result<Self, Error> {
        let raw = match Raw::ref_from_prefix(bytes) {
            Ok((raw, _)) if raw.magic == MAGIC => raw,
            _ => return Err(Error::NoTrailer),
        };
        let digest = check_digest(raw, bytes, part)?;
        let flags = raw.flags.get();
        let wrong = |expected| Error::Flags {
            part,
            found: flags,
            expected,
        };
        if (flags & FLAG_HEADER != 0) != (part == HeaderKind::Header) {
            return Err(wrong("bit 0 set in the header and clear in the trailer"));
        }
        if flags & FLAG_DATA == 0 {
            return Err(wrong("a data file (bit 1)"));
        }
        if part == HeaderKind::Trailer && flags & FLAG_SEALED == 0 {
            return Err(wrong("a sealed file (bit 2)"));
        }
        let Some(algorithm) = Algorithm::from_id(raw.algorithm) else {
            return Err(Error::Algorithm {
                part,
                found: raw.algorithm,
            });
        };
        let block_size = raw.block_size.get();
        if !block_size.is_power_of_two() || !BLOCK_SIZES.contains(&block_size) {
            return Err(Error::BlockSize {
                part,
                found: block_size,
            });
        }
        if raw.use_dictionary != 0 {
            return Err(Error::Dictionary);
        }
        Ok(Self {
            format: BlockFormat {
                algorithm,
                block_size,
                checksum: raw.checksum != 0,
                dictionary_len: raw.dictionary_len.get(),
            },
            totals: Totals {
                table_offset: raw.table_offset.get(),
                blocks: raw.blocks.get(),
                original_size: raw.original_size.get(),
                table_crc: raw.table_crc.get(),
            },
            digest,
            flags,
        })
    }

    /// Whether the header was overwritten when the file was finished, so that all fields have a meaning.
    pub fn is_overwritten(&self) -> bool {
        self.flags & FLAG_OVERWRITTEN != 0
    }

    /// Byte at which the trailer starts, according to a header that was overwritten when the file was
    /// finished.
    pub fn trailer_offset(&self) -> Option<u64> {
        self.table_end().filter(|_| self.is_overwritten())
    }

    /// Whether the block table ends exactly at the trailer, which starts at byte `trailer`.
    fn table_ends_at(&self, trailer: u64) -> bool {
        self.table_end() == Some(trailer)
    }

    fn table_end(&self) -> Option<u64> {
        let bytes = self.totals.blocks.checked_mul(4)?;
        self.totals.table_offset.checked_add(bytes)
    }
}

/// Verifies the digest of a structure. Returns whether it has one.
fn check_digest(raw: &Raw, bytes: &[u8; HEADER_LEN], part: HeaderKind) -> Result<bool, Error> {
    if raw.flags.get() & FLAG_DIGEST == 0 {
        return Ok(false);
    }
    let (found, expected) = (digest(bytes), raw.digest.get());
    if found == expected {
        return Ok(true);
    }
    // Old writers left random bits in flags, digest and tail, and are recognized by their tail: in a file
    // with a digest the tail is zero, and damage to the tail alone changes no content.
    let tail = bytes.get(TAIL).unwrap_or_default();
    if tail.iter().any(|byte| *byte != 0) {
        return Ok(false);
    }
    Err(Error::Digest {
        part,
        found,
        expected,
    })
}

/// CRC of the whole structure with a digest field of zero.
fn digest(bytes: &[u8; HEADER_LEN]) -> u32 {
    let mut without = *bytes;
    if let Some(field) = without.get_mut(DIGEST) {
        field.fill(0);
    }
    crc::raw(0, &without)
}

/// Returns the header that is written first, before the content is known.
pub fn initial_header(format: &BlockFormat) -> [u8; HEADER_LEN] {
    encode(
        format,
        &Totals::default(),
        FLAG_HEADER | FLAG_DATA | FLAG_DIGEST,
    )
}

/// Returns the header that replaces the initial one when the file is finished.
pub fn final_header(format: &BlockFormat, totals: &Totals) -> [u8; HEADER_LEN] {
    let flags = FLAG_HEADER | FLAG_DATA | FLAG_OVERWRITTEN | FLAG_DIGEST;
    encode(format, totals, flags)
}

/// Returns the trailer, which is written last.
pub fn trailer(format: &BlockFormat, totals: &Totals) -> [u8; HEADER_LEN] {
    encode(format, totals, FLAG_DATA | FLAG_SEALED | FLAG_DIGEST)
}

fn encode(format: &BlockFormat, totals: &Totals, flags: u64) -> [u8; HEADER_LEN] {
    let mut raw = Raw {
        magic: MAGIC,
        struct_len: STRUCT_LEN.into(),
        digest: 0.into(),
        flags: flags.into(),
        table_offset: totals.table_offset.into(),
        blocks: totals.blocks.into(),
        original_size: totals.original_size.into(),
        table_crc: totals.table_crc.into(),
        reserved: [0; 4],
        block_size: format.block_size.into(),
        algorithm: format.algorithm.id(),
        level: 0,
        use_dictionary: 0,
        reserved_too: [0; 5],
        dictionary_len: format.dictionary_len.into(),
        checksum: format.checksum.into(),
        padding: [0; 7],
    };
    let mut bytes = [0; HEADER_LEN];
    let written = raw.write_to_prefix(&mut bytes);
    debug_assert!(written.is_ok(), "the structure fits the header");
    raw.digest = digest(&bytes).into();
    let written = raw.write_to_prefix(&mut bytes);
    debug_assert!(written.is_ok(), "the structure fits the header");
    bytes
}

/// Compares header and trailer with each other and with the file, whose trailer starts at byte
/// `trailer_offset`, and returns the one to use.
///
/// That is the header if it was overwritten at the end and its table ends at the trailer, otherwise the
/// trailer. The flag alone is not enough, because old writers left it random.
///
/// # Errors
/// [`Error::Disagree`] if they contradict each other; [`Error::TooManyBlocks`], [`Error::TableRange`],
/// [`Error::CompressedTable`] and [`Error::BlockCount`] for impossible numbers.
pub fn reconcile(header: &Header, trailer: &Header, trailer_offset: u64) -> Result<Header, Error> {
    if header.format != trailer.format {
        return Err(Error::Disagree("block format"));
    }
    let by_header = header.is_overwritten() && header.table_ends_at(trailer_offset);
    if by_header && header.totals != trailer.totals {
        return Err(Error::Disagree("content"));
    }
    let chosen = if by_header { *header } else { *trailer };
    let Totals {
        table_offset,
        blocks,
        original_size,
        ..
    } = chosen.totals;
    if blocks > MAX_BLOCKS {
        return Err(Error::TooManyBlocks(blocks));
    }
    let fits = chosen.table_end().is_some_and(|end| end <= trailer_offset);
    if !fits || table_offset < chosen.format.first_block() {
        let offset = table_offset;
        return Err(Error::TableRange {
            offset,
            blocks,
            trailer: trailer_offset,
        });
    }
    if chosen.flags & FLAG_TABLE_COMPRESSED != 0 && !chosen.table_ends_at(trailer_offset) {
        return Err(Error::CompressedTable);
    }
    let block_size = chosen.format.block_size;
    if original_size.div_ceil(u64::from(block_size)) != blocks {
        return Err(Error::BlockCount {
            blocks,
            block_size,
            original_size,
        });
    }
    Ok(chosen)
}

#[cfg(test)]
mod tests {
    use super::super::{TableReader, encode_table};
    use super::*;

    const FORMAT: BlockFormat = BlockFormat {
        algorithm: Algorithm::Zstd,
        block_size: 16384,
        checksum: true,
        dictionary_len: 100,
    };

    fn totals(stored: &[u32]) -> Totals {
        let table_offset = 612 + stored.iter().map(|len| u64::from(*len)).sum::<u64>();
        let blocks = stored.len() as u64;
        Totals {
            table_offset,
            blocks,
            original_size: blocks * 16384,
            table_crc: crc::raw(0, &encode_table(stored)),
        }
    }

    fn parse(bytes: &[u8; 512], part: HeaderKind) -> Header {
        Header::decode(bytes, part).unwrap()
    }

    /// Changes the structure and gives it a right digest again.
    fn tampered(mut bytes: [u8; 512], at: usize, with: &[u8]) -> [u8; 512] {
        bytes[at..at + with.len()].copy_from_slice(with);
        let digest = digest(&bytes);
        bytes[DIGEST].copy_from_slice(&digest.to_le_bytes());
        bytes
    }

    #[test]
    fn written_structures_read_back() {
        let stored = [5, 16384, 77];
        let totals = totals(&stored);
        let (first, last) = (final_header(&FORMAT, &totals), trailer(&FORMAT, &totals));
        assert_eq!((size_of::<Raw>(), first[32], last[32]), (96, 0x1B, 0x16));
        assert_eq!(initial_header(&FORMAT)[32], 0x13);
        let trailer = parse(&last, HeaderKind::Trailer);
        let end = totals.table_offset + 12;
        for first in [first, initial_header(&FORMAT)] {
            let chosen = reconcile(&parse(&first, HeaderKind::Header), &trailer, end).unwrap();
            assert_eq!(
                (chosen.format, chosen.totals, chosen.digest),
                (FORMAT, totals, true)
            );
            let mut reader = TableReader::new(&chosen);
            let bytes = encode_table(&stored);
            reader.read(&bytes[..8]).unwrap();
            reader.read(&bytes[8..]).unwrap();
            let table = reader.finish().unwrap();
            let offsets: Vec<u64> = (0..=3).map(|block| table.offset(block)).collect();
            assert_eq!(offsets, [612, 617, 17001, 17078]);
            assert_eq!(table.blocks(), 3);
        }
    }

    #[test]
    fn every_flip_in_a_structure_is_seen_or_harmless() {
        let good = trailer(&FORMAT, &totals(&[9, 9]));
        let expected = parse(&good, HeaderKind::Trailer);
        for at in 0..HEADER_LEN {
            for bit in 0..8 {
                let mut bytes = good;
                bytes[at] ^= 1 << bit;
                if let Ok(read) = Header::decode(&bytes, HeaderKind::Trailer) {
                    let same = (read.format, read.totals) == (expected.format, expected.totals);
                    assert!(
                        same && (at == 32 || TAIL.contains(&at)),
                        "byte {at} bit {bit}"
                    );
                }
            }
        }
    }

    #[test]
    fn garbage_of_old_writers_is_tolerated() {
        let totals = totals(&[9, 9]);
        for bits in [0x7FFE_A464_0B40_u64, 0x7FFE_A464_0B78] {
            let mut first = initial_header(&FORMAT);
            let mut last = trailer(&FORMAT, &totals);
            for (bytes, low) in [(&mut first, 3), (&mut last, 6)] {
                bytes[32..40].copy_from_slice(&(bits | low).to_le_bytes());
                bytes[28..32].fill(0x5A);
                bytes[40..64].fill(if low == 3 { 0xEE } else { 0 });
                bytes[TAIL].fill(0xA5);
            }
            last[40..64].copy_from_slice(&trailer(&FORMAT, &totals)[40..64]);
            let (first, last) = (
                parse(&first, HeaderKind::Header),
                parse(&last, HeaderKind::Trailer),
            );
            let chosen = reconcile(&first, &last, totals.table_offset + 8).unwrap();
            assert!(!chosen.digest && chosen.totals == totals);
        }
    }

    #[test]
    fn what_is_not_supported_is_named() {
        let good = trailer(&FORMAT, &totals(&[9]));
        let decode =
            |at, with: &[u8]| Header::decode(&tampered(good, at, with), HeaderKind::Trailer);
        let part = HeaderKind::Trailer;
        assert_eq!(decode(76, &[0]), Err(Error::Algorithm { part, found: 0 }));
        assert_eq!(decode(76, &[3]), Err(Error::Algorithm { part, found: 3 }));
        for found in [0, 2048, 12288, 131_072, u32::MAX] {
            let error = Err(Error::BlockSize { part, found });
            assert_eq!(decode(72, &found.to_le_bytes()), error);
        }
        assert_eq!(decode(78, &[1]), Err(Error::Dictionary));
        assert_eq!(decode(0, b"z"), Err(Error::NoTrailer));
        for flags in [0x17, 0x14, 0x12] {
            let error = decode(32, &[flags]);
            assert!(
                matches!(error, Err(Error::Flags { .. })),
                "{flags:#x}: {error:?}"
            );
        }
        let compressed = decode(32, &[0x36]).unwrap();
        let first = parse(&initial_header(&FORMAT), HeaderKind::Header);
        let end = 612 + 9 + 4;
        assert!(reconcile(&first, &compressed, end).is_ok());
        assert_eq!(
            reconcile(&first, &compressed, end + 1),
            Err(Error::CompressedTable)
        );
    }

    #[test]
    fn absurd_numbers_are_refused() {
        let first = parse(&initial_header(&FORMAT), HeaderKind::Header);
        let good = totals(&[9]);
        let refused = |change: &dyn Fn(&mut Totals)| {
            let mut totals = good;
            change(&mut totals);
            let last = parse(&trailer(&FORMAT, &totals), HeaderKind::Trailer);
            reconcile(&first, &last, 612 + 9 + 4).unwrap_err()
        };
        let range = |error| matches!(error, Error::TableRange { .. });
        assert!(range(refused(&|totals| totals.table_offset = u64::MAX)));
        assert!(range(refused(&|totals| totals.table_offset = 611)));
        assert!(range(refused(&|totals| totals.table_offset += 1)));
        assert!(range(refused(&|totals| totals.blocks = 2)));
        let error = refused(&|totals| totals.blocks = u64::MAX / 4 + 2);
        assert!(matches!(error, Error::TooManyBlocks(_)));
        let count = |error| matches!(error, Error::BlockCount { .. });
        assert!(count(refused(&|totals| totals.original_size += 1)));
        assert!(count(refused(&|totals| totals.original_size = 0)));
        assert!(count(refused(&|totals| totals.original_size = u64::MAX)));
        assert!(count(refused(&|totals| totals.blocks = 0)));

        let other = BlockFormat {
            checksum: false,
            ..FORMAT
        };
        let last = parse(&trailer(&other, &good), HeaderKind::Trailer);
        let error = reconcile(&first, &last, 612 + 9 + 4);
        assert_eq!(error, Err(Error::Disagree("block format")));
    }
}
