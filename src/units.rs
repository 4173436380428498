//! Units that must not be mixed: 512-byte sectors and bytes.

use std::fmt;

/// Bytes in a sector, everywhere: virtio-blk and LSMT both count in these.
pub const SECTOR_SIZE: u64 = 512;

/// A position or a count in 512-byte sectors.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Sector(pub u64);

/// A position in bytes.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct ByteOffset(pub u64);

impl Sector {
    /// The byte at which this sector starts, or `None` past 2^64 bytes.
    pub const fn checked_bytes(self) -> Option<ByteOffset> {
        match self.0.checked_mul(SECTOR_SIZE) {
            Some(bytes) => Some(ByteOffset(bytes)),
            None => None,
        }
    }

    /// The sector `count` sectors further on, or `None` on overflow.
    pub const fn checked_add(self, count: u64) -> Option<Sector> {
        match self.0.checked_add(count) {
            Some(sector) => Some(Sector(sector)),
            None => None,
        }
    }
}

impl ByteOffset {
    /// The sectors needed to hold this many bytes; a last partial sector counts whole.
    pub const fn sectors_up(self) -> Sector {
        Sector(self.0.div_ceil(SECTOR_SIZE))
    }

    /// The position `len` bytes further on, or `None` on overflow.
    pub const fn checked_add(self, len: u64) -> Option<ByteOffset> {
        match self.0.checked_add(len) {
            Some(bytes) => Some(ByteOffset(bytes)),
            None => None,
        }
    }
}

impl fmt::Display for Sector {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "sector {}", self.0)
    }
}

impl fmt::Display for ByteOffset {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "byte {}", self.0)
    }
}
