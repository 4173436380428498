//! Sectors and bytes, which must not be mixed. Sectors have types of their own. A bare `u64`, `usize` or
//! `Range<u64>` that is a position, a length or a range is always in bytes, as in the standard library's
//! I/O.
//!
//! | | position | length | range |
//! |---|---|---|---|
//! | 512-byte sectors | [`Sector`] | [`Sectors`] | [`SectorRange`] |
//! | bytes | `u64` | `u64`, `usize` in memory | `Range<u64>` |
//! | 64 KiB units of a presence map | `u64`, named `unit` | `u64` | [`UnitRange`] |
//! | bits of a bitmap, inside the type that has one | `u64` | `u64` | `Range<u64>` |
//!
//! Arithmetic is that of integers: it panics or wraps on overflow. Numbers from a file, a socket or guest
//! memory go through a `checked` function first, which bounds them to a disk or a file.
//!
//! [`UnitRange`]: crate::format::presence::UnitRange

use std::fmt;
use std::iter::Sum;
use std::ops::{Add, AddAssign, Range, Sub, SubAssign};

/// Bytes of a sector, of virtio-blk and of LSMT.
pub const SECTOR_SIZE: u64 = 512;

/// A position in 512-byte sectors, on a disk or in a file.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Sector(pub u64);

/// A number of 512-byte sectors.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Sectors(pub u64);

/// A contiguous range of sectors.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub struct SectorRange {
    start: Sector,
    /// At least `start`.
    end: Sector,
}

impl Sector {
    /// First sector that starts at or after byte `byte`.
    #[inline]
    pub const fn at_or_after(byte: u64) -> Self {
        Sector(byte.div_ceil(SECTOR_SIZE))
    }

    /// Sector that contains byte `byte`.
    #[inline]
    pub const fn containing(byte: u64) -> Self {
        Sector(byte / SECTOR_SIZE)
    }

    /// First byte of the sector.
    #[inline]
    pub const fn byte(self) -> u64 {
        self.0 * SECTOR_SIZE
    }

    /// First byte of the sector; `None` past 2^64 bytes.
    #[inline]
    pub const fn checked_byte(self) -> Option<u64> {
        self.0.checked_mul(SECTOR_SIZE)
    }

    /// The sector `count` sectors later; `None` on overflow.
    #[inline]
    pub const fn checked_add(self, count: Sectors) -> Option<Self> {
        match self.0.checked_add(count.0) {
            Some(sector) => Some(Sector(sector)),
            None => None,
        }
    }

    /// Number of sectors from `earlier` to this one; 0 if `earlier` is not earlier.
    #[inline]
    pub const fn saturating_since(self, earlier: Sector) -> Sectors {
        Sectors(self.0.saturating_sub(earlier.0))
    }

    /// Rounds up to a multiple of `unit`.
    #[inline]
    pub const fn round_up(self, unit: Sectors) -> Self {
        Sector(self.0.next_multiple_of(unit.0))
    }

    /// Rounds down to a multiple of `unit`.
    #[inline]
    pub const fn round_down(self, unit: Sectors) -> Self {
        Sector(self.0 / unit.0 * unit.0)
    }
}

impl Sectors {
    /// Number of sectors that hold `bytes` bytes; a partial last sector counts as one.
    #[inline]
    pub const fn to_hold(bytes: u64) -> Self {
        Sectors(bytes.div_ceil(SECTOR_SIZE))
    }

    /// Number of whole sectors in `bytes` bytes.
    #[inline]
    pub const fn whole_in(bytes: u64) -> Self {
        Sectors(bytes / SECTOR_SIZE)
    }

    /// Number of bytes.
    #[inline]
    pub const fn bytes(self) -> u64 {
        self.0 * SECTOR_SIZE
    }

    /// Whether the number is 0.
    #[inline]
    pub const fn is_zero(self) -> bool {
        self.0 == 0
    }
}

impl SectorRange {
    /// The sectors from `start` up to `end`, exclusive; empty if `end` is before `start`.
    #[inline]
    pub const fn new(start: Sector, end: Sector) -> Self {
        let end = if end.0 < start.0 { start } else { end };
        Self { start, end }
    }

    /// `len` sectors from `start` on; `None` on overflow.
    #[inline]
    pub const fn checked(start: Sector, len: Sectors) -> Option<Self> {
        match start.checked_add(len) {
            Some(end) => Some(Self { start, end }),
            None => None,
        }
    }

    /// The sectors that contain `bytes`; empty if `bytes` is.
    #[inline]
    pub const fn of_bytes(bytes: &Range<u64>) -> Self {
        let start = Sector::containing(bytes.start);
        if bytes.start >= bytes.end {
            return Self { start, end: start };
        }
        Self {
            start,
            end: Sector::at_or_after(bytes.end),
        }
    }

    /// First sector.
    #[inline]
    pub const fn start(self) -> Sector {
        self.start
    }

    /// First sector after the range.
    #[inline]
    pub const fn end(self) -> Sector {
        self.end
    }

    /// Number of sectors.
    #[inline]
    pub const fn len(self) -> Sectors {
        Sectors(self.end.0 - self.start.0)
    }

    /// Whether the range has no sector.
    #[inline]
    pub const fn is_empty(self) -> bool {
        self.start.0 == self.end.0
    }

    /// The sectors that are in both ranges; empty if there are none.
    #[inline]
    pub fn intersection(self, other: Self) -> Self {
        Self::new(self.start.max(other.start), self.end.min(other.end))
    }

    /// Whether a sector is in both ranges.
    #[inline]
    pub const fn overlaps(self, other: Self) -> bool {
        self.start.0 < other.end.0
            && other.start.0 < self.end.0
            && !self.is_empty()
            && !other.is_empty()
    }

    /// The bytes of the sectors.
    #[inline]
    pub const fn bytes(self) -> Range<u64> {
        self.start.byte()..self.end.byte()
    }

    /// Splits the range into steps of `most` sectors; the last step may be shorter.
    pub fn steps(self, most: Sectors) -> impl Iterator<Item = Self> {
        let count = self.len().0.div_ceil(most.0);
        (0..count).map(move |step| {
            let start = self.start + Sectors(step * most.0);
            Self::new(start, start + most.min(self.end - start))
        })
    }
}

impl Add<Sectors> for Sector {
    type Output = Sector;

    #[inline]
    fn add(self, count: Sectors) -> Sector {
        Sector(self.0 + count.0)
    }
}

impl AddAssign<Sectors> for Sector {
    #[inline]
    fn add_assign(&mut self, count: Sectors) {
        *self = *self + count;
    }
}

impl Sub<Sectors> for Sector {
    type Output = Sector;

    #[inline]
    fn sub(self, count: Sectors) -> Sector {
        Sector(self.0 - count.0)
    }
}

impl Sub for Sector {
    type Output = Sectors;

    #[inline]
    fn sub(self, earlier: Sector) -> Sectors {
        Sectors(self.0 - earlier.0)
    }
}

impl Add for Sectors {
    type Output = Sectors;

    #[inline]
    fn add(self, more: Sectors) -> Sectors {
        Sectors(self.0 + more.0)
    }
}

impl AddAssign for Sectors {
    #[inline]
    fn add_assign(&mut self, more: Sectors) {
        *self = *self + more;
    }
}

impl Sub for Sectors {
    type Output = Sectors;

    #[inline]
    fn sub(self, less: Sectors) -> Sectors {
        Sectors(self.0 - less.0)
    }
}

impl SubAssign for Sectors {
    #[inline]
    fn sub_assign(&mut self, less: Sectors) {
        *self = *self - less;
    }
}

impl Sum for Sectors {
    fn sum<I: Iterator<Item = Self>>(counts: I) -> Self {
        Sectors(counts.map(|count| count.0).sum())
    }
}

/// Parses a number of bytes with an optional suffix K, M, G or T (powers of 1024) in either case.
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

/// Text that [`parse_size`] does not accept.
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

impl fmt::Display for Sectors {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} sectors", self.0)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn sectors(start: u64, end: u64) -> SectorRange {
        SectorRange::new(Sector(start), Sector(end))
    }

    #[test]
    fn ranges_never_end_before_they_start() {
        assert!(sectors(7, 3).is_empty());
        assert_eq!(sectors(7, 3).len(), Sectors(0));
        assert_eq!(SectorRange::checked(Sector(1), Sectors(u64::MAX)), None);
        let whole = SectorRange::checked(Sector(1), Sectors(u64::MAX - 1)).unwrap();
        assert_eq!(whole.len(), Sectors(u64::MAX - 1));
    }

    #[test]
    fn ranges_overlap_where_a_sector_lies_in_both() {
        for (a, b, both) in [
            (sectors(0, 8), sectors(8, 9), sectors(8, 8)),
            (sectors(0, 9), sectors(8, 20), sectors(8, 9)),
            (sectors(0, 20), sectors(5, 7), sectors(5, 7)),
            (sectors(0, 20), sectors(5, 5), sectors(5, 5)),
        ] {
            assert_eq!((a.intersection(b), b.intersection(a)), (both, both));
            assert_eq!(a.overlaps(b), !both.is_empty());
            assert_eq!(b.overlaps(a), !both.is_empty());
        }
    }

    #[test]
    fn bytes_and_sectors_are_converted() {
        assert_eq!(sectors(2, 5).bytes(), 1024..2560);
        assert_eq!(SectorRange::of_bytes(&(1023..1025)), sectors(1, 3));
        assert_eq!(SectorRange::of_bytes(&(1025..1025)), sectors(2, 2));
        assert_eq!(SectorRange::of_bytes(&(1024..1536)), sectors(2, 3));
        assert_eq!(Sectors::to_hold(513), Sectors(2));
        assert_eq!(Sectors::whole_in(1023), Sectors(1));
    }

    #[test]
    fn steps_make_up_the_range() {
        let steps = |end| sectors(7, end).steps(Sectors(4)).collect::<Vec<_>>();
        assert_eq!(steps(7), []);
        assert_eq!(steps(10), [sectors(7, 10)]);
        assert_eq!(steps(15), [sectors(7, 11), sectors(11, 15)]);
        assert_eq!(
            steps(16),
            [sectors(7, 11), sectors(11, 15), sectors(15, 16)]
        );
    }

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
