//! Header, trailer and index of a layer; maps damaged ranges to sectors of the disk.

use std::ops::Range;

use super::super::Error;
use super::super::layer_writer::UPSTREAM_ENTRIES;
use super::container::{PieceReader, place};
use super::findings::Findings;
use crate::format::lsmt::{
    ENTRY_LEN, HEADER_LEN, Header, HeaderKind, IndexReader, MAX_LENGTH, Mapping,
};
use crate::image::Container;
use crate::image::probe::layer_trailer;
use crate::units::{SECTOR_SIZE, Sector, SectorRange, Sectors};

/// Bytes of the header that are zero in all known files.
const RESERVED: Range<usize> = 390..HEADER_LEN;

/// Bytes of an index read at a time.
const INDEX_CHUNK: u64 = 1024 * 1024;

/// Wrong index entries after which the rest is skipped.
const MAX_WRONG: u64 = 1000;

/// Most ranges of sectors in one finding.
const MAX_NAMED: usize = 8;

/// Layout of a layer.
#[derive(Default)]
pub(super) struct Layout {
    /// Bytes of the layer.
    len: u64,
    /// End of the data, from the trailer.
    data_end: Option<u64>,
    /// Range of the index, if the trailer gives a possible one.
    index: Option<Range<u64>>,
    /// Whether the index breaks a rule, so that the layer is refused.
    refused: bool,
    /// Readable mappings with data, ordered by their place in the layer.
    mappings: Vec<Mapping>,
}

impl Layout {
    /// Reads header, trailer and index, and reports what is wrong. Damaged blocks are skipped here;
    /// the check of all blocks reports them.
    pub(super) fn read(container: &Container, findings: &mut Findings<'_>) -> Result<Self, Error> {
        let mut layout = Self {
            len: container.len(),
            ..Self::default()
        };
        let trailer_at = match layer_trailer(container) {
            Ok(at) => at,
            Err(error) => {
                findings.broken(None, &error)?;
                return Ok(layout);
            }
        };
        let padding = layout.len - HEADER_LEN as u64 - trailer_at;
        if padding > 0 {
            findings.note(None, format!("{padding} bytes of zeros follow the layer"))?;
            layout.len -= padding;
        }
        let mut reader = PieceReader::default();
        let header = structure(container, &mut reader, 0, HeaderKind::Header, findings)?;
        let trailer = structure(
            container,
            &mut reader,
            trailer_at,
            HeaderKind::Trailer,
            findings,
        )?;
        let Some(trailer) = trailer else {
            return Ok(layout);
        };
        if let Some(header) = header {
            compare(&header, &trailer, findings)?;
        }
        layout.data_end = Some(trailer.index_offset.min(trailer_at));
        match IndexReader::new(&trailer, trailer_at) {
            Ok(index) => layout.read_index(container, &trailer, index, &mut reader, findings)?,
            Err(error) => findings.broken_at(place(container, trailer_at), &error, "")?,
        }
        Ok(layout)
    }

    fn read_index(
        &mut self,
        container: &Container,
        trailer: &Header,
        mut index: IndexReader,
        reader: &mut PieceReader,
        findings: &mut Findings<'_>,
    ) -> Result<(), Error> {
        if trailer.index_entries > UPSTREAM_ENTRIES {
            let entries = trailer.index_entries;
            let what = format!("{entries} index entries; upstream opens about {UPSTREAM_ENTRIES}");
            findings.note(None, what)?;
        }
        let start = trailer.index_offset;
        let end = start + trailer.index_entries * ENTRY_LEN as u64;
        self.index = Some(start..end);
        let mut wrong = 0;
        let mut chunk = Vec::new();
        for at in (start..end).step_by(INDEX_CHUNK as usize) {
            chunk.resize((end - at).min(INDEX_CHUNK) as usize, 0);
            if let Err(error) = reader.read(container, at, &mut chunk) {
                findings.end_if_unfetched(&error)?;
                // The order of later entries cannot be judged without these.
                break;
            }
            for (entry, at) in chunk.chunks(ENTRY_LEN).zip((at..).step_by(ENTRY_LEN)) {
                if let Err(error) = index.read(entry, &mut self.mappings) {
                    findings.broken_at(place(container, at), &error, "")?;
                    wrong += 1;
                }
            }
            self.refused |= wrong > 0;
            if wrong >= MAX_WRONG {
                let what = format!("{wrong} wrong entries: the rest of the index was skipped");
                findings.note(None, what)?;
                break;
            }
        }
        let beyond = self.mappings.iter().filter(|mapping| {
            let last = mapping.end().0.saturating_sub(1) * SECTOR_SIZE;
            last >= trailer.virtual_size
        });
        let beyond = beyond.count();
        if beyond > 0 && trailer.virtual_size > 0 {
            let what = format!("{beyond} mappings reach beyond the disk of this layer");
            findings.note(None, what)?;
        }
        self.mappings.retain(|mapping| !mapping.is_zeroed());
        self.mappings.sort_by_key(|mapping| mapping.moffset());
        Ok(())
    }

    /// End of the range of the layer that is read.
    ///
    /// Compressed blocks are read even if nothing tells what they hold, because they have checksums. The
    /// data of an uncompressed layer has none, and is read only if a valid index leads to it: what a
    /// refused index says, and what lies between index and trailer, can be many times longer than any
    /// valid layer.
    pub(super) fn checkable(&self, container: &Container) -> u64 {
        if container.zfile_map().is_some() {
            return match (&self.index, self.data_end) {
                (None, Some(data_end)) => data_end,
                _ => self.len,
            };
        }
        let index = self.index.as_ref().filter(|_| !self.refused);
        index.map_or(0, |index| index.end)
    }

    /// Describes what is affected if these bytes of the layer are lost.
    pub(super) fn affected(&self, lost: Range<u64>) -> String {
        let header_len = HEADER_LEN as u64;
        let mut parts = Vec::new();
        let meets = |part: Range<u64>| lost.start < part.end && part.start < lost.end;
        if meets(0..header_len) {
            parts.push("the layer's header".to_owned());
        }
        parts.extend(self.sectors(&lost));
        match &self.index {
            Some(index) if meets(index.clone()) => parts.push("the layer's index".to_owned()),
            _ => {}
        }
        if meets(self.len.saturating_sub(header_len)..self.len) {
            parts.push("the layer's trailer".to_owned());
        }
        match parts.is_empty() {
            true if self.index.is_some() => "; affects no sector".to_owned(),
            true => "; the affected sectors are unknown without the trailer".to_owned(),
            false => format!("; affects {}", parts.join(" and ")),
        }
    }

    /// Sectors of the disk whose data is in these bytes of the layer.
    fn sectors(&self, lost: &Range<u64>) -> Option<String> {
        let lost = SectorRange::of_bytes(lost);
        // No mapping is longer, so no earlier one can reach the first sector.
        let from = Sector(lost.start().0.saturating_sub(u64::from(MAX_LENGTH)));
        let skip = self
            .mappings
            .partition_point(|mapping| mapping.moffset() < from);
        let candidates = self.mappings[skip..].iter();
        let mut ranges: Vec<SectorRange> = candidates
            .take_while(|mapping| mapping.moffset() < lost.end())
            .filter_map(|mapping| {
                let data = mapping.moffset();
                let end = data + Sectors(u64::from(mapping.length()));
                let part = SectorRange::new(data, end).intersection(lost);
                let start = mapping.offset() + (part.start() - data);
                (!part.is_empty()).then(|| SectorRange::new(start, start + part.len()))
            })
            .collect();
        ranges.sort_by_key(|range| range.start());
        let mut joined: Vec<SectorRange> = Vec::new();
        for range in ranges {
            match joined.last_mut() {
                Some(last) if range.start() <= last.end() => {
                    *last = SectorRange::new(last.start(), last.end().max(range.end()));
                }
                _ => joined.push(range),
            }
        }
        let named = joined.iter().take(MAX_NAMED);
        let named: Vec<_> = named
            .map(|range| match range.len() {
                Sectors(1) => range.start().0.to_string(),
                _ => format!("{}-{}", range.start().0, range.end().0 - 1),
            })
            .collect();
        let more = joined.len().saturating_sub(MAX_NAMED);
        let and_more = match more {
            0 => String::new(),
            more => format!(" and {more} more ranges"),
        };
        (!named.is_empty()).then(|| format!("sectors {}{and_more}", named.join(", ")))
    }
}

/// Reads the header or the trailer of the layer.
fn structure(
    container: &Container,
    reader: &mut PieceReader,
    at: u64,
    part: HeaderKind,
    findings: &mut Findings<'_>,
) -> Result<Option<Header>, Error> {
    let mut bytes = [0; HEADER_LEN];
    match reader.read(container, at, &mut bytes) {
        Ok(()) => {}
        // The check of all blocks reports the damage.
        Err(error) => {
            findings.end_if_unfetched(&error)?;
            return Ok(None);
        }
    }
    if bytes[RESERVED].iter().any(|byte| *byte != 0) {
        findings.note(None, format!("layer {part} with reserved bytes in use"))?;
    }
    match Header::decode(&bytes, part) {
        Ok(header) => Ok(Some(header)),
        Err(error) => {
            findings.broken_at(place(container, at), &error, "")?;
            Ok(None)
        }
    }
}

/// Reports fields that differ in header and trailer; the trailer counts.
fn compare(header: &Header, trailer: &Header, findings: &mut Findings<'_>) -> Result<(), Error> {
    for (what, same) in [
        ("uuid", header.uuid == trailer.uuid),
        ("parent uuid", header.parent_uuid == trailer.parent_uuid),
        ("virtual size", header.virtual_size == trailer.virtual_size),
    ] {
        if !same {
            let what = format!("layer header and trailer differ in the {what}");
            findings.note(None, what)?;
        }
    }
    Ok(())
}
