//! Block table of a ZFile: stored lengths on disk, offsets in memory.

use super::{BlockFormat, Error, Header, Totals};
use crate::format::crc;
use crate::io::prefetch;
use crate::io::section::Section;

/// Number of blocks that share a 64-bit base in a [`BlockTable`].
const GROUP: usize = 1 << GROUP_SHIFT;
const GROUP_SHIFT: u32 = 10;

/// Offsets of all blocks: 4 bytes for each, and 8 for every 1024.
#[derive(Debug)]
pub struct BlockTable {
    bases: Section<u64>,
    /// Start of each block, and the end of the last, relative to the base of its group.
    relative: Section<u32>,
    /// End of the last block.
    end: u64,
}

impl BlockTable {
    /// Creates a table of the bases and relative offsets that [`BlockTable::sections`] returned, for blocks
    /// that end at byte `end`. Returns `None` if the numbers of bases and offsets do not match.
    pub fn from_sections(bases: Section<u64>, relative: Section<u32>, end: u64) -> Option<Self> {
        let fits = !relative.is_empty() && bases.len() == Self::bases(relative.len());
        fits.then_some(Self {
            bases,
            relative,
            end,
        })
    }

    /// Number of bases for this number of relative offsets.
    pub const fn bases(relative: usize) -> usize {
        relative.div_ceil(GROUP)
    }

    /// The bases, and the relative offsets.
    pub fn sections(&self) -> (&[u64], &[u32]) {
        (&self.bases, &self.relative)
    }

    /// Number of blocks.
    pub fn blocks(&self) -> u64 {
        (self.relative.len() as u64).saturating_sub(1)
    }

    /// Byte of the ZFile at which block `block` starts; the end of the last block if there is no such
    /// block.
    ///
    /// The offsets of a table that was read from a layer were verified. A mapped table may hold any number,
    /// so callers check what they compute from it.
    #[inline]
    pub fn offset(&self, block: u64) -> u64 {
        let block = block as usize;
        let base = self.bases.get(block >> GROUP_SHIFT);
        match (base, self.relative.get(block)) {
            (Some(base), Some(relative)) => base.wrapping_add(u64::from(*relative)),
            _ => self.end,
        }
    }

    /// Prefetches the entry of a block into the processor's cache.
    #[inline]
    pub fn prefetch(&self, block: u64) {
        if let Some(entry) = self.relative.get(block as usize) {
            prefetch::value(entry);
        }
    }
}

/// Builds a [`BlockTable`] from the bytes of the table, in any number of pieces.
#[derive(Debug)]
pub struct TableReader {
    format: BlockFormat,
    totals: Totals,
    expected_crc: Option<u32>,
    crc: u32,
    end: u64,
    bases: Vec<u64>,
    /// As in [`BlockTable`].
    relative: Vec<u32>,
}

impl TableReader {
    /// Creates a reader of the table that `header`, returned by [`reconcile`](super::reconcile), describes.
    pub fn new(header: &Header) -> Self {
        let mut reader = Self {
            format: header.format,
            totals: header.totals,
            expected_crc: header.digest.then_some(header.totals.table_crc),
            crc: 0,
            end: header.format.first_block(),
            bases: Vec::new(),
            relative: Vec::new(),
        };
        reader.push_end();
        reader
    }

    /// Reads the next entries; `bytes` has whole entries.
    ///
    /// # Errors
    /// [`Error::StoredLength`] for an impossible length.
    pub fn read(&mut self, bytes: &[u8]) -> Result<(), Error> {
        self.crc = crc::raw(self.crc, bytes);
        let (min, max) = self.format.stored_bounds();
        let (entries, _) = bytes.as_chunks::<4>();
        self.relative.reserve(entries.len());
        for entry in entries {
            let stored = u32::from_le_bytes(*entry);
            if !(min..=max).contains(&stored) {
                let block = self.blocks();
                return Err(Error::StoredLength {
                    block,
                    stored,
                    min,
                    max,
                });
            }
            self.end = self.end.saturating_add(u64::from(stored));
            self.push_end();
        }
        Ok(())
    }

    /// Returns the table after all entries were read.
    ///
    /// # Errors
    /// [`Error::TableChecksum`] for a wrong checksum, [`Error::BlockCount`] for missing entries,
    /// [`Error::BlocksEnd`] if the blocks do not end where the table starts.
    pub fn finish(self) -> Result<BlockTable, Error> {
        if let Some(expected) = self.expected_crc.filter(|crc| *crc != self.crc) {
            return Err(Error::TableChecksum {
                found: self.crc,
                expected,
            });
        }
        let Totals {
            blocks,
            original_size,
            table_offset,
            ..
        } = self.totals;
        if self.blocks() != blocks {
            let block_size = self.format.block_size;
            let blocks = self.blocks();
            return Err(Error::BlockCount {
                blocks,
                block_size,
                original_size,
            });
        }
        if self.end != table_offset {
            return Err(Error::BlocksEnd {
                end: self.end,
                offset: table_offset,
            });
        }
        Ok(BlockTable {
            bases: self.bases.into(),
            relative: self.relative.into(),
            end: self.end,
        })
    }

    /// Number of blocks read.
    fn blocks(&self) -> u64 {
        (self.relative.len() as u64).saturating_sub(1)
    }

    fn push_end(&mut self) {
        if self.relative.len().is_multiple_of(GROUP) {
            self.bases.push(self.end);
        }
        // Fits: a group has at most 1024 blocks of 128 KiB.
        let base = self.bases.last().copied().unwrap_or_default();
        self.relative.push(self.end.saturating_sub(base) as u32);
    }
}

/// Returns the bytes of a block table with these stored lengths, which include the checksums of blocks.
pub fn encode_table(stored: &[u32]) -> Vec<u8> {
    stored.iter().flat_map(|len| len.to_le_bytes()).collect()
}

#[cfg(test)]
mod tests {
    use super::super::{Algorithm, HeaderKind, trailer};
    use super::*;

    const FORMAT: BlockFormat = BlockFormat {
        algorithm: Algorithm::Lz4,
        block_size: 16384,
        checksum: true,
        dictionary_len: 100,
    };

    /// The header of a file whose blocks have these stored lengths.
    fn header(stored: &[u32]) -> Header {
        let blocks = stored.len() as u64;
        let totals = Totals {
            table_offset: 612 + stored.iter().map(|len| u64::from(*len)).sum::<u64>(),
            blocks,
            original_size: blocks * 16384,
            table_crc: crc::raw(0, &encode_table(stored)),
        };
        Header::decode(&trailer(&FORMAT, &totals), HeaderKind::Trailer).unwrap()
    }

    #[test]
    fn offsets_across_groups() {
        let stored: Vec<u32> = (0..2500).map(|block| 4 + block % 999 + 1).collect();
        let header = header(&stored);
        let mut reader = TableReader::new(&header);
        reader.read(&encode_table(&stored)).unwrap();
        let table = reader.finish().unwrap();
        let mut at = 612;
        for (block, len) in stored.iter().enumerate() {
            assert_eq!(table.offset(block as u64), at);
            at += u64::from(*len);
        }
        assert_eq!(table.offset(2500), header.totals.table_offset);
        for beyond in [2501, 3072, u64::MAX] {
            assert_eq!(table.offset(beyond), table.offset(2500));
        }
        let (bases, relative) = table.sections();
        let sections = |bases: &[u64], relative: &[u32]| {
            BlockTable::from_sections(bases.to_vec().into(), relative.to_vec().into(), 7)
        };
        let same = sections(bases, relative).unwrap();
        assert!((0..=2500).all(|block| same.offset(block) == table.offset(block)));
        assert!(sections(&bases[1..], relative).is_none());
        assert!(sections(&[], &[]).is_none());
    }

    #[test]
    fn tables_that_do_not_add_up() {
        let good = [9, 32768, 5];
        let header = header(&good);
        let read = |stored: &[u32], header: &Header| {
            let mut reader = TableReader::new(header);
            reader.read(&encode_table(stored))?;
            reader.finish().map(|table| table.blocks())
        };
        assert_eq!(read(&good, &header), Ok(3));
        for (block, stored) in [(0, 4), (1, 32769), (2, 0), (2, u32::MAX)] {
            let mut bad = good;
            bad[block] = stored;
            let error = read(&bad, &header);
            let block = block as u64;
            let (min, max) = (5, 32768);
            assert_eq!(
                error,
                Err(Error::StoredLength {
                    block,
                    stored,
                    min,
                    max
                })
            );
        }
        let swapped = [32768, 9, 5];
        assert!(matches!(
            read(&swapped, &header),
            Err(Error::TableChecksum { .. })
        ));
        let mut unchecked = header;
        unchecked.digest = false;
        assert_eq!(read(&swapped, &unchecked), Ok(3));
        assert!(matches!(
            read(&[9, 9, 9], &unchecked),
            Err(Error::BlocksEnd { .. })
        ));
        assert!(matches!(
            read(&[9, 9], &unchecked),
            Err(Error::BlockCount { .. })
        ));
    }
}
