//! Presence map of a blob that is fetched in pieces: tells which 64 KiB units are in the cache.
//!
//! ```text
//! 0      header, 4096 bytes: which blob, its state, and the boot whose live bits count
//! 4096   live bitmap: a bit is set as soon as the unit is written to the page cache
//! ...    durable bitmap, at the next multiple of 4096: a bit is set once the unit is on storage
//! ```
//! Bit `i` of a bitmap is bit `i % 64` of its little-endian word `i / 64`. The live bitmap is valid until the
//! next boot: the page cache keeps map and data together, even if processes are killed. After another boot
//! only the durable bitmap is valid, because a live bit may be on storage although its data was lost.
//!
//! The first 64 bytes have a checksum and never change. State and boot change in place; each value that a
//! torn write could leave there is refused or harmless.

use std::ops::Range;

use uuid::Uuid;
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout, Unaligned, little_endian};

use super::crc;
use super::digest::Digest;

/// Bytes of a unit. The last unit of a blob may be shorter.
pub const UNIT: u64 = 64 << 10;

/// Longest blob that has a presence map: its two bitmaps take 16 MiB.
pub const MAX_BLOB_LEN: u64 = 4 << 40;

/// Bytes of the header.
pub const HEADER_LEN: u64 = 4096;

/// Offset of the state in the header, a 32-bit word.
pub const STATE_OFFSET: usize = 64;

/// Offset of the boot id in the header, 16 bytes.
pub const BOOT_OFFSET: usize = 72;

const MAGIC: [u8; 8] = *b"ovbdmap1";

/// Bytes of the header that have a meaning.
const RAW_HEADER_LEN: usize = size_of::<RawHeader>();

/// A contiguous range of units of a blob. Units are never mixed with bytes: [`Identity`] converts.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct UnitRange {
    start: u64,
    /// At least `start`.
    end: u64,
}

impl UnitRange {
    /// The units from `start` up to `end`, exclusive; empty if `end` is before `start`.
    pub const fn new(start: u64, end: u64) -> Self {
        let end = if end < start { start } else { end };
        Self { start, end }
    }

    /// One unit.
    pub const fn one(unit: u64) -> Self {
        Self::new(unit, unit.saturating_add(1))
    }

    /// First unit.
    pub const fn start(self) -> u64 {
        self.start
    }

    /// First unit after the range.
    pub const fn end(self) -> u64 {
        self.end
    }

    /// Number of units.
    pub const fn len(self) -> u64 {
        self.end.saturating_sub(self.start)
    }

    /// Whether the range has no unit.
    pub const fn is_empty(self) -> bool {
        self.start == self.end
    }

    /// Whether all units of `other` are in this range.
    pub const fn contains(self, other: Self) -> bool {
        self.start <= other.start && other.end <= self.end
    }

    /// The numbers of the units, which are the bits of a bitmap.
    pub const fn numbers(self) -> Range<u64> {
        self.start..self.end
    }
}

/// Why a file is not the presence map of a blob.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum Error {
    /// The blob is empty or too long to have a map.
    #[error("blob has {0} bytes; the cache takes 1 to {MAX_BLOB_LEN}")]
    BlobLength(u64),
    /// The file is shorter or longer than a map of the blob.
    #[error("presence map has {found} bytes; a blob of {blob} bytes needs {expected}")]
    Length {
        /// Bytes of the blob.
        blob: u64,
        /// Bytes that its map has.
        expected: u64,
        /// Bytes of the file.
        found: u64,
    },
    /// The file is shorter than a header.
    #[error("presence map has {0} bytes; expected at least the header ({RAW_HEADER_LEN} bytes)")]
    Short(usize),
    /// The file does not start with the magic of a map.
    #[error("not a presence map: expected magic \"ovbdmap1\", found {0:02x?}")]
    Magic([u8; 8]),
    /// The checksum does not match.
    #[error("presence map is damaged: checksum {found:#010x}, expected {expected:#010x}")]
    Checksum {
        /// Checksum of the bytes.
        expected: u32,
        /// Checksum in the header.
        found: u32,
    },
    /// The map has units of another size.
    #[error("presence map has units of 2^{0} bytes; this program uses 2^16")]
    Unit(u32),
    /// The map describes another blob.
    #[error(
        "presence map belongs to {found} ({found_len} bytes); expected {expected} ({len} bytes)"
    )]
    OtherBlob {
        /// Digest of the blob that was asked for.
        expected: Digest,
        /// Length of the blob that was asked for.
        len: u64,
        /// Digest in the header.
        found: Digest,
        /// Blob length in the header.
        found_len: u64,
    },
    /// The state is unknown.
    #[error("presence map has unknown state {0}")]
    State(u32),
}

/// State of a blob as a whole.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum State {
    /// Units may be absent, and the digest was not verified.
    Partial,
    /// All units are present, and the digest was verified.
    Complete,
    /// As [`State::Partial`], after all units were present and did not have the digest. The units are
    /// fetched again from the registry itself: a mirror may have served wrong bytes.
    Restarted,
}

impl State {
    /// Number of the state in the header.
    pub const fn number(self) -> u32 {
        match self {
            Self::Partial => 0,
            Self::Complete => 1,
            Self::Restarted => 2,
        }
    }

    /// Returns the state with this number.
    ///
    /// # Errors
    /// [`Error::State`] if there is none.
    pub const fn from_number(number: u32) -> Result<Self, Error> {
        match number {
            0 => Ok(Self::Partial),
            1 => Ok(Self::Complete),
            2 => Ok(Self::Restarted),
            other => Err(Error::State(other)),
        }
    }
}

/// Identity of a blob: digest and length.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Identity {
    digest: Digest,
    len: u64,
}

impl Identity {
    /// Creates the identity of a blob with this digest and length in bytes.
    ///
    /// # Errors
    /// [`Error::BlobLength`] if it is empty or longer than [`MAX_BLOB_LEN`].
    pub const fn new(digest: Digest, len: u64) -> Result<Self, Error> {
        if len == 0 || len > MAX_BLOB_LEN {
            return Err(Error::BlobLength(len));
        }
        Ok(Self { digest, len })
    }

    /// Digest of the blob.
    pub const fn digest(&self) -> Digest {
        self.digest
    }

    /// Length of the blob in bytes, at least 1.
    // A blob is never empty.
    #[allow(clippy::len_without_is_empty)]
    pub const fn len(&self) -> u64 {
        self.len
    }

    /// Number of units of the blob.
    pub const fn units(&self) -> u64 {
        self.len.div_ceil(UNIT)
    }

    /// All units of the blob.
    pub const fn all_units(&self) -> UnitRange {
        UnitRange::new(0, self.units())
    }

    /// The units that contain any of `len` bytes at `offset`; `None` if the range is empty or ends
    /// after the blob.
    pub fn units_of(&self, offset: u64, len: u64) -> Option<UnitRange> {
        let end = offset.checked_add(len)?;
        let inside = len > 0 && end <= self.len;
        inside.then(|| UnitRange::new(offset / UNIT, end.div_ceil(UNIT)))
    }

    /// The bytes of a range of units, up to the end of the blob.
    pub fn bytes_of(&self, units: UnitRange) -> Range<u64> {
        let byte = |unit: u64| unit.saturating_mul(UNIT).min(self.len);
        byte(units.start)..byte(units.end)
    }

    /// Bytes of one bitmap in the file.
    pub const fn bitmap_len(&self) -> u64 {
        self.units().div_ceil(8).next_multiple_of(HEADER_LEN)
    }

    /// Bytes of the map file.
    pub const fn map_len(&self) -> u64 {
        self.bitmap_len()
            .saturating_mul(2)
            .saturating_add(HEADER_LEN)
    }

    /// Compares the length of a map file with the one it must have.
    ///
    /// # Errors
    /// [`Error::Length`] if they differ.
    pub const fn check_map_len(&self, found: u64) -> Result<(), Error> {
        let expected = self.map_len();
        if found == expected {
            return Ok(());
        }
        Err(Error::Length {
            blob: self.len,
            expected,
            found,
        })
    }
}

#[derive(Clone, Copy, FromBytes, IntoBytes, KnownLayout, Immutable, Unaligned)]
#[repr(C)]
struct RawHeader {
    magic: [u8; 8],
    unit_log2: little_endian::U32,
    crc: little_endian::U32,
    blob_len: little_endian::U64,
    digest: [u8; 32],
    zero: [u8; 8],
    // The fields below change in place and are not covered by the checksum.
    state: little_endian::U32,
    zero2: [u8; 4],
    boot: [u8; 16],
}

impl RawHeader {
    fn new(identity: &Identity) -> Self {
        let mut header = Self {
            magic: MAGIC,
            unit_log2: UNIT.trailing_zeros().into(),
            crc: 0.into(),
            blob_len: identity.len.into(),
            digest: *identity.digest.as_bytes(),
            zero: [0; 8],
            state: State::Partial.number().into(),
            zero2: [0; 4],
            boot: [0; 16],
        };
        header.crc = header.sum().into();
        header
    }

    fn sum(&self) -> u32 {
        let mut fixed = *self;
        fixed.crc = 0.into();
        let bytes = fixed.as_bytes();
        crc::raw(crc::BLOCK_SEED, bytes.get(..STATE_OFFSET).unwrap_or(bytes))
    }
}

/// Header of a presence map.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Header {
    /// State of the blob.
    pub state: State,
    /// Boot in which the live bits are valid; nil if there was none.
    pub boot: Uuid,
}

impl Header {
    /// Returns the first bytes of a new map, with no unit present and no boot.
    pub fn new_map(identity: &Identity) -> Vec<u8> {
        RawHeader::new(identity).as_bytes().to_vec()
    }

    /// Decodes the start of a file of `file_len` bytes as the header of the map of a blob.
    ///
    /// # Errors
    /// Any [`Error`], if the file is not the map of this blob or is damaged.
    pub fn decode(bytes: &[u8], file_len: u64, identity: &Identity) -> Result<Self, Error> {
        let Ok((raw, _)) = RawHeader::read_from_prefix(bytes) else {
            return Err(Error::Short(bytes.len()));
        };
        if raw.magic != MAGIC {
            return Err(Error::Magic(raw.magic));
        }
        if raw.crc.get() != raw.sum() {
            return Err(Error::Checksum {
                expected: raw.sum(),
                found: raw.crc.get(),
            });
        }
        if raw.unit_log2.get() != UNIT.trailing_zeros() {
            return Err(Error::Unit(raw.unit_log2.get()));
        }
        let (found, found_len) = (Digest::from_bytes(raw.digest), raw.blob_len.get());
        if (found, found_len) != (identity.digest, identity.len) {
            return Err(Error::OtherBlob {
                expected: identity.digest,
                len: identity.len,
                found,
                found_len,
            });
        }
        identity.check_map_len(file_len)?;
        Ok(Self {
            state: State::from_number(raw.state.get())?,
            boot: Uuid::from_bytes(raw.boot),
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn identity(len: u64) -> Identity {
        Identity::new(Digest::of(b"blob"), len).unwrap()
    }

    #[test]
    fn layout_for_blobs_of_all_sizes() {
        assert!(Identity::new(Digest::of(b""), 0).is_err());
        assert!(Identity::new(Digest::of(b""), MAX_BLOB_LEN + 1).is_err());
        for (len, units, bitmap) in [
            (1, 1, 4096),
            (UNIT, 1, 4096),
            (UNIT + 1, 2, 4096),
            (UNIT * 32768, 32768, 4096),
            (UNIT * 32768 + 1, 32769, 8192),
            (MAX_BLOB_LEN, 64 << 20, 8 << 20),
        ] {
            let identity = identity(len);
            assert_eq!(identity.units(), units);
            assert_eq!(identity.bitmap_len(), bitmap);
            assert_eq!(identity.map_len(), 4096 + 2 * bitmap);
            assert_eq!(identity.bytes_of(UnitRange::one(units - 1)).end, len);
        }
    }

    #[test]
    fn ranges_outside_the_blob_have_no_units() {
        let identity = identity(UNIT * 2 + 1);
        assert_eq!(identity.units_of(0, 1), Some(UnitRange::one(0)));
        assert_eq!(identity.units_of(UNIT - 1, 2), Some(UnitRange::new(0, 2)));
        let all = identity.units_of(0, UNIT * 2 + 1);
        assert_eq!(all, Some(identity.all_units()));
        assert_eq!(all.map(UnitRange::len), Some(3));
        for (offset, len) in [(0, 0), (0, UNIT * 2 + 2), (UNIT * 3, 1), (u64::MAX, 2)] {
            assert_eq!(identity.units_of(offset, len), None, "{offset}+{len}");
        }
    }

    #[test]
    fn what_is_encoded_is_decoded() {
        let identity = identity(UNIT * 3);
        let mut bytes = Header::new_map(&identity);
        let len = identity.map_len();
        let header = Header::decode(&bytes, len, &identity).unwrap();
        let (state, boot) = (State::Partial, Uuid::nil());
        assert_eq!(header, Header { state, boot });
        let boot = Uuid::new_v4();
        bytes[BOOT_OFFSET..][..16].copy_from_slice(boot.as_bytes());
        bytes[STATE_OFFSET] = 2;
        let header = Header::decode(&bytes, len, &identity).unwrap();
        let state = State::Restarted;
        assert_eq!(header, Header { state, boot });
    }

    #[test]
    fn every_changed_bit_of_the_fixed_part_is_noticed() {
        let identity = identity(UNIT * 3);
        let good = Header::new_map(&identity);
        for bit in 0..STATE_OFFSET * 8 {
            let mut bytes = good.clone();
            bytes[bit / 8] ^= 1 << (bit % 8);
            let error = Header::decode(&bytes, identity.map_len(), &identity);
            assert!(error.is_err(), "bit {bit}");
        }
        let mut bytes = good.clone();
        bytes[STATE_OFFSET] = 3;
        let error = Header::decode(&bytes, identity.map_len(), &identity);
        assert_eq!(error, Err(Error::State(3)));
        for len in [0, 10, identity.map_len() - 1, identity.map_len() + 1] {
            assert!(Header::decode(&good, len, &identity).is_err());
        }
        assert!(Header::decode(&good[..60], identity.map_len(), &identity).is_err());
        let other = Identity::new(Digest::of(b"other"), UNIT * 3).unwrap();
        assert!(matches!(
            Header::decode(&good, identity.map_len(), &other),
            Err(Error::OtherBlob { .. })
        ));
    }
}
