//! The sealed layers of a disk in use, folded into one: an index over their data files, as an image has.
//!
//! The index replaces their maps, so that neither look-ups nor memory grow with the number of snapshots. It never
//! changes: folding more layers makes a new one. Sectors of sealed files are never reused, so a look-up needs no hold.

use std::sync::Arc;

use super::coverage::Coverage;
use super::frozen::SealedLayer;
use super::lookup::{Lookup, SpanContent};
use super::manifest::FrozenPair;
use super::sealed_file::SealedFile;
use super::{Error, WritableLayer};
use crate::image;
use crate::image::index::Index;
use crate::image::segment::{self, MAX_LAYERS, Segment, SegmentContent};
use crate::units::{Sector, SectorRange};

/// The folded layers.
#[derive(Debug)]
pub(super) struct SealedLayers {
    index: Index,
    coverage: Coverage,
    /// The layers, oldest first. A segment's layer is an index into this list. New files are appended, so that
    /// each keeps its number.
    files: Arc<[SealedFile]>,
    /// Number of mappings of all layers, those that newer layers hide included.
    mappings: u64,
}

impl SealedLayers {
    /// Folds `layers`, oldest first, into `below`, for a disk that ends at `disk_end`.
    ///
    /// # Errors
    /// [`Error::TooTall`] if there are more layers than an index can number; [`Error::Image`] if one has data that an
    /// index cannot point at.
    pub fn above(
        below: Option<&Self>,
        layers: &[SealedLayer],
        disk_end: Sector,
    ) -> Result<Self, Error> {
        let mut files = below.map_or_else(Vec::new, |below| below.files.to_vec());
        let mut mappings = below.map_or(0, |below| below.mappings);
        // Usually few segments, merged once with the many below.
        let mut merged = Vec::new();
        for layer in layers {
            let segments = segments(layer.layer(), files.len())?;
            mappings += segments.len() as u64;
            merged = segment::merge(merged, &segments);
            files.push(SealedFile::new(
                layer.pair().clone(),
                layer.layer().blob().clone(),
            ));
        }
        if let Some(below) = below {
            merged = segment::merge(below.index.iter(), &merged);
        }
        // A layer may have extents beyond the end of the disk, which can grow.
        let end = merged
            .last()
            .map_or(disk_end, |last| last.end().max(disk_end));
        let coverage = Coverage::new(end);
        for segment in &merged {
            coverage.set(segment.range());
        }
        Ok(Self {
            index: Index::new(&merged),
            coverage,
            files: files.into(),
            mappings,
        })
    }

    /// Returns the number of layers.
    pub fn len(&self) -> usize {
        self.files.len()
    }

    /// Returns the frozen pairs that the layers were, oldest first.
    pub fn pairs(&self) -> impl Iterator<Item = &FrozenPair> {
        self.files.iter().map(SealedFile::pair)
    }

    /// Returns the number of mappings of all layers.
    pub fn mappings(&self) -> u64 {
        self.mappings
    }

    /// Returns whether they may have extents in `range`. Takes no lock.
    #[inline]
    pub fn may_hold(&self, range: SectorRange) -> bool {
        self.coverage.any(range)
    }

    /// Appends the spans that make up `range` to `into`, until that is full. Sectors without a segment lie below.
    pub fn spans(&self, range: SectorRange, into: &mut Lookup) {
        let mut rest = range;
        while !rest.is_empty() && !into.is_full() {
            let (part, content) = self.first_span(rest, into);
            into.push(part, content);
            rest = SectorRange::new(part.end(), rest.end());
        }
    }

    /// The first span of a range, which is not empty: its sectors and their content.
    fn first_span(&self, range: SectorRange, into: &mut Lookup) -> (SectorRange, SpanContent) {
        let (start, end) = (range.start(), range.end());
        let found = self.index.find(start);
        let Some(segment) = found.filter(|segment| segment.start() < end) else {
            return (range, SpanContent::Lower);
        };
        if start < segment.start() {
            return (SectorRange::new(start, segment.start()), SpanContent::Lower);
        }
        let content = match segment.content() {
            SegmentContent::Zeroed => SpanContent::Zero,
            SegmentContent::Data { layer, moffset } => SpanContent::Data {
                file: into.number_of_sealed(&self.files, layer),
                offset: (moffset + (start - segment.start())).byte(),
            },
        };
        (segment.range().intersection(range), content)
    }
}

/// The segments of a layer that gets this number.
fn segments(layer: &WritableLayer, number: usize) -> Result<Vec<Segment>, Error> {
    if number >= MAX_LAYERS {
        return Err(Error::TooTall);
    }
    layer
        .index_entries()
        .into_iter()
        .map(|mapping| {
            // Below `MAX_LAYERS`.
            Segment::new(mapping, number as u16).ok_or_else(|| {
                Error::Image(image::Error::Position {
                    layer: layer.paths().data.clone().into(),
                    offset: mapping.offset(),
                    moffset: mapping.moffset(),
                })
            })
        })
        .collect()
}
