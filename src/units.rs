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

/// Parses a number of bytes, with an optional suffix K, M, G or T (powers of 1024) in either case.
///
/// # Errors
/// [`SizeError`] for any other text, and for 2^64 bytes and more.
pub fn parse_size(text: &str) -> Result<u64, SizeError> {
    let units = [("k", 10), ("m", 20), ("g", 30), ("t", 40)];
    let lower = text.to_ascii_lowercase();
    let suffixed = units
        .iter()
        .find_map(|(suffix, shift)| Some((lower.strip_suffix(suffix)?, *shift)));
    let (digits, shift) = suffixed.unwrap_or((&lower, 0));
    // Parsing a number accepts a sign.
    let number = digits
        .parse::<u64>()
        .ok()
        .filter(|_| !digits.starts_with('+'));
    let size = number.and_then(|number| number.checked_mul(1 << shift));
    size.ok_or_else(|| SizeError {
        found: text.chars().take(40).collect(),
    })
}

/// A text is not a number of bytes.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("expected a number of bytes, or one with K, M, G or T, as 512M; found {found:?}")]
pub struct SizeError {
    /// The text, cut after 40 characters.
    pub found: String,
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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sizes_have_suffixes_up_to_tebibytes() {
        for (text, size) in [
            ("0", 0),
            ("512", 512),
            ("3k", 3 << 10),
            ("3K", 3 << 10),
            ("1M", 1 << 20),
            ("2g", 2 << 30),
            ("64T", 64 << 40),
            ("16777215T", u64::MAX >> 40 << 40),
        ] {
            assert_eq!(parse_size(text).unwrap(), size, "{text}");
        }
        for text in [
            "",
            "T",
            "-1",
            "+1",
            "1 K",
            "1KB",
            "1.5G",
            "0x10",
            "16777216T",
            "é",
        ] {
            let error = parse_size(text).unwrap_err().to_string();
            assert!(error.contains("with K, M, G or T"), "{error}");
        }
    }
}
