//! Index of an LSMT layer: maps sectors of the disk to sectors of the layer.

use super::{Error, HEADER_LEN, Header, MAX_ENTRIES, MAX_SECTORS};
use crate::units::{Sector, SectorRange, Sectors};

/// Bytes of an index entry.
pub const ENTRY_LEN: usize = 16;

/// The number of entries of a committed index is a multiple of this.
pub const ENTRY_GROUP: u64 = 256;

/// Most sectors of one mapping.
pub const MAX_LENGTH: u16 = (1 << 14) - 1;

/// First sector of a layer that can hold data: the first after the header.
pub const FIRST_DATA: Sector = Sector(HEADER_LEN as u64 / 512);

/// A padding entry at the end of an index.
pub const PADDING: [u8; ENTRY_LEN] = [
    0xFF, 0xFF, 0xFF, 0xFF, 0xFF, 0xFF, 3, 0, 0, 0, 0, 0, 0, 0, 0, 0,
];

/// An index entry: maps sectors of the disk to their data in the layer. 16 bytes, as on disk.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Mapping {
    place: u64,
    data: u64,
}

const ZEROED: u64 = 1 << 55;
const MOFFSET_MASK: u64 = ZEROED - 1;
const OFFSET_MASK: u64 = MAX_SECTORS.0 - 1;

impl Mapping {
    /// Maps `length` sectors of the disk from `offset` on to data at sector `moffset` of the layer. `None` if
    /// a number does not fit its field, or `length` is 0.
    pub fn data(offset: Sector, length: u16, moffset: Sector) -> Option<Self> {
        let fits = offset.0 <= OFFSET_MASK && moffset.0 <= MOFFSET_MASK;
        let length_fits = (1..=MAX_LENGTH).contains(&length);
        (fits && length_fits).then_some(Self {
            place: offset.0 | u64::from(length) << 50,
            data: moffset.0,
        })
    }

    /// Maps `length` sectors of the disk from `offset` on to zeros, which hide the layers below. `moffset` is
    /// the current end of the layer's data, which upstream's reader checks.
    pub fn zeroed(offset: Sector, length: u16, moffset: Sector) -> Option<Self> {
        let mut mapping = Self::data(offset, length, moffset)?;
        mapping.data |= ZEROED;
        Some(mapping)
    }

    /// First sector of the disk.
    pub fn offset(self) -> Sector {
        Sector(self.place & OFFSET_MASK)
    }

    /// Number of sectors.
    pub fn length(self) -> u16 {
        (self.place >> 50) as u16
    }

    /// The sectors of the disk.
    pub fn range(self) -> SectorRange {
        SectorRange::new(self.offset(), self.end())
    }

    /// First sector after the mapping.
    pub fn end(self) -> Sector {
        Sector((self.place & OFFSET_MASK).saturating_add(self.place >> 50))
    }

    /// Sector of the layer at which the data starts.
    pub fn moffset(self) -> Sector {
        Sector(self.data & MOFFSET_MASK)
    }

    /// Whether the sectors read as zeros.
    pub fn is_zeroed(self) -> bool {
        self.data & ZEROED != 0
    }

    /// Decodes entry number `entry`; `None` for padding.
    ///
    /// # Errors
    /// [`Error::EmptyEntry`] for an entry without sectors, [`Error::BeyondDisk`] past the largest disk.
    pub fn decode(raw: &[u8; ENTRY_LEN], entry: u64) -> Result<Option<Self>, Error> {
        let word = u128::from_le_bytes(*raw);
        // The high byte of the second word is a tag without meaning in plain layers.
        let mapping = Mapping {
            place: word as u64,
            data: (word >> 64) as u64 & (ZEROED | MOFFSET_MASK),
        };
        if mapping.length() == 0 {
            let padding = mapping.offset().0 == OFFSET_MASK;
            return if padding {
                Ok(None)
            } else {
                Err(Error::EmptyEntry { entry })
            };
        }
        let end = mapping.end();
        if end.0 > MAX_SECTORS.0 {
            return Err(Error::BeyondDisk { entry, end });
        }
        Ok(Some(mapping))
    }

    /// The bytes on disk, with tag 0.
    pub fn encode(self) -> [u8; ENTRY_LEN] {
        let mut bytes = [0; ENTRY_LEN];
        bytes[..8].copy_from_slice(&self.place.to_le_bytes());
        bytes[8..].copy_from_slice(&self.data.to_le_bytes());
        bytes
    }
}

/// Decodes the entries of a sealed index, in order, and verifies them.
#[derive(Debug)]
pub struct IndexReader {
    /// Number of the next entry.
    entry: u64,
    /// End of the previous mapping on the disk.
    end: Sector,
    /// End of the data in the layer.
    data_end: Sector,
}

impl IndexReader {
    /// Creates a reader for the index that `trailer` describes, in a layer whose trailer starts at byte
    /// `trailer_offset`.
    ///
    /// # Errors
    /// [`Error::TooManyEntries`]; [`Error::IndexRange`] if the index is not between header and trailer.
    pub fn new(trailer: &Header, trailer_offset: u64) -> Result<Self, Error> {
        let (offset, entries) = (trailer.index_offset, trailer.index_entries);
        if entries > MAX_ENTRIES {
            return Err(Error::TooManyEntries(entries));
        }
        let len = entries.checked_mul(ENTRY_LEN as u64);
        let end = len.and_then(|len| offset.checked_add(len));
        if offset < HEADER_LEN as u64 || end.is_none_or(|end| end > trailer_offset) {
            return Err(Error::IndexRange {
                offset,
                entries,
                trailer: trailer_offset,
            });
        }
        Ok(Self {
            entry: 0,
            end: Sector(0),
            data_end: Sector::containing(offset),
        })
    }

    /// Decodes the next entries and appends their mappings to `into`; `bytes` has whole entries.
    ///
    /// # Errors
    /// Those of [`Mapping::decode`], [`Error::Unsorted`] and [`Error::DataRange`]. Reading may continue after
    /// an error.
    pub fn read(&mut self, bytes: &[u8], into: &mut Vec<Mapping>) -> Result<(), Error> {
        let (entries, _) = bytes.as_chunks::<ENTRY_LEN>();
        into.reserve(entries.len());
        for raw in entries {
            let mapping = self.entry(raw);
            self.entry = self.entry.saturating_add(1);
            into.extend(mapping?);
        }
        Ok(())
    }

    /// Decodes one entry; `None` for padding.
    fn entry(&mut self, raw: &[u8; ENTRY_LEN]) -> Result<Option<Mapping>, Error> {
        let entry = self.entry;
        let Some(mapping) = Mapping::decode(raw, entry)? else {
            return Ok(None);
        };
        let length = mapping.length();
        if mapping.offset() < self.end {
            let (offset, end) = (mapping.offset(), self.end);
            return Err(Error::Unsorted { entry, offset, end });
        }
        let end = mapping.end();
        // A zeroed entry has no data, only a position, which may be the end of the data.
        let sectors = match mapping.is_zeroed() {
            true => Sectors(0),
            false => Sectors(length.into()),
        };
        let moffset = mapping.moffset();
        let data_end = moffset.checked_add(sectors);
        if moffset < FIRST_DATA || data_end.is_none_or(|end| end > self.data_end) {
            return Err(Error::DataRange {
                entry,
                moffset,
                length,
                end: self.data_end,
            });
        }
        self.end = end;
        Ok(Some(mapping))
    }
}

/// Number of padding entries that follow `entries` mappings in a committed index.
pub fn padding_after(entries: u64) -> u64 {
    match entries % ENTRY_GROUP {
        0 => 0,
        rest => ENTRY_GROUP.saturating_sub(rest),
    }
}

#[cfg(test)]
mod tests {
    use uuid::Uuid;

    use super::*;

    fn header() -> Header {
        Header {
            index_offset: 4096 + 512 * 100,
            index_entries: 0,
            virtual_size: 1 << 40,
            uuid: Uuid::nil(),
            parent_uuid: Uuid::nil(),
            message: Vec::new(),
        }
    }

    fn read(entries: &[[u8; 16]]) -> Result<Vec<Mapping>, Error> {
        let header = Header {
            index_entries: entries.len() as u64,
            ..header()
        };
        let mut reader = IndexReader::new(&header, 1 << 40)?;
        let mut out = Vec::new();
        reader.read(entries.as_flattened(), &mut out)?;
        Ok(out)
    }

    fn data(offset: u64, length: u16, moffset: u64) -> Mapping {
        Mapping::data(Sector(offset), length, Sector(moffset)).unwrap()
    }

    #[test]
    fn entries_round_trip_without_tag() {
        let zeroed = Mapping::zeroed(Sector(1 << 49), MAX_LENGTH, Sector(108)).unwrap();
        let mut entries = [
            data(0, 1, 8).encode(),
            PADDING,
            data(1, 99, 9).encode(),
            zeroed.encode(),
        ];
        let expected = vec![data(0, 1, 8), data(1, 99, 9), zeroed];
        assert_eq!(read(&entries), Ok(expected.clone()));
        entries[2][15] = 0xA5;
        assert_eq!(read(&entries), Ok(expected));
        assert!(zeroed.is_zeroed() && zeroed.length() == MAX_LENGTH);
        assert_eq!(zeroed.end(), Sector((1 << 49) + 16383));
        let padding = Mapping {
            place: u64::from_le_bytes(*PADDING.first_chunk().unwrap()),
            data: 0,
        };
        assert_eq!((padding.offset().0, padding.length()), ((1 << 50) - 1, 0));
    }

    #[test]
    fn rules_of_entries() {
        let zeroed = |moffset| {
            Mapping::zeroed(Sector(5), 50, Sector(moffset))
                .unwrap()
                .encode()
        };
        let one = |entry: [u8; 16]| read(&[entry]);
        assert!(one(data(5, 100, 8).encode()).is_ok());
        assert!(matches!(
            one(data(5, 101, 8).encode()),
            Err(Error::DataRange { .. })
        ));
        assert!(matches!(
            one(data(5, 1, 7).encode()),
            Err(Error::DataRange { .. })
        ));
        assert!(matches!(
            one(data(5, 1, 108).encode()),
            Err(Error::DataRange { .. })
        ));
        assert!(one(zeroed(108)).is_ok());
        assert!(matches!(one(zeroed(109)), Err(Error::DataRange { .. })));
        assert!(matches!(one(zeroed(0)), Err(Error::DataRange { .. })));
        assert_eq!(one([0; 16]), Err(Error::EmptyEntry { entry: 0 }));
        assert!(one(data((1 << 50) - 1, 1, 8).encode()).is_ok());
        assert!(matches!(
            one(data((1 << 50) - 1, 2, 8).encode()),
            Err(Error::BeyondDisk { .. })
        ));
        let pair = |second| read(&[data(5, 10, 8).encode(), data(second, 1, 8).encode()]);
        assert!(pair(15).is_ok());
        assert!(matches!(pair(14), Err(Error::Unsorted { entry: 1, .. })));
    }

    #[test]
    fn rules_of_the_index() {
        let new = |index_offset, index_entries, trailer| {
            let header = Header {
                index_offset,
                index_entries,
                ..header()
            };
            IndexReader::new(&header, trailer).map(|_| ())
        };
        assert_eq!(new(4096, 2, 4128), Ok(()));
        assert!(matches!(new(4096, 2, 4127), Err(Error::IndexRange { .. })));
        assert!(matches!(new(4095, 0, 8192), Err(Error::IndexRange { .. })));
        assert!(matches!(
            new(u64::MAX - 8, 1, 8192),
            Err(Error::IndexRange { .. })
        ));
        assert!(matches!(
            new(4096, u64::MAX, u64::MAX),
            Err(Error::TooManyEntries(_))
        ));
    }

    #[test]
    fn index_padding() {
        assert_eq!(
            [0, 1, 255, 256, 257].map(padding_after),
            [0, 255, 1, 0, 255]
        );
    }
}
