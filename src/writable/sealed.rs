//! What sealed uppers hold, all together: one index over their files, as an image has.
//!
//! It takes the place of their maps once they are sealed, so that neither a look-up nor the memory
//! grows with the number of snapshots. It never changes: with more sealed uppers, another one is
//! made. The sectors of their files are never used for anything else, so nothing is held.

use std::sync::Arc;

use super::coverage::Coverage;
use super::lookup::{Lookup, MAX_SPANS, SEALED, Span, SpanContent};
use super::{Error, WritableLayer};
use crate::image;
use crate::image::index::Index;
use crate::image::segment::{self, Content, MAX_LAYERS, Segment};
use crate::source::Blob;
use crate::units::Sector;

/// Sealed uppers as one.
#[derive(Debug)]
pub(super) struct SealedLayers {
    index: Index,
    touched: Coverage,
    /// Their data files, the oldest first: a segment's layer is a place here. More come behind, so
    /// that a number stays that of its file.
    files: Arc<[Arc<Blob>]>,
    /// Mappings of all of them, also of those that newer ones hide.
    mappings: u64,
}

impl SealedLayers {
    /// `below` with `uppers` above it, the oldest first, which are sealed; for a disk of `sectors`
    /// sectors.
    ///
    /// # Errors
    /// There are more than an index can tell apart, or one has data beyond what it can point at.
    pub fn above(
        below: Option<&Self>,
        uppers: &[Arc<WritableLayer>],
        sectors: u64,
    ) -> Result<Self, Error> {
        let mut files = below.map_or_else(Vec::new, |below| below.files.to_vec());
        let mut mappings = below.map_or(0, |below| below.mappings);
        // Few as a rule, and then merged with the many once.
        let mut merged = Vec::new();
        for upper in uppers {
            let segments = segments(upper, files.len())?;
            mappings += segments.len() as u64;
            merged = segment::merge(merged, &segments);
            files.push(upper.blob().clone());
        }
        if let Some(below) = below {
            merged = segment::merge(below.index.iter(), &merged);
        }
        let touched = Coverage::new(sectors);
        for segment in &merged {
            touched.set(segment.start().0, segment.length().0);
        }
        Ok(Self {
            index: Index::new(&merged),
            touched,
            files: files.into(),
            mappings,
        })
    }

    /// Number of uppers.
    pub fn len(&self) -> usize {
        self.files.len()
    }

    /// Mappings of all of them as layers.
    pub fn mappings(&self) -> u64 {
        self.mappings
    }

    /// Whether they may hold some of `sectors` sectors, at least 1, from `start` on.
    #[inline]
    pub fn may_hold(&self, start: u64, sectors: u64) -> bool {
        self.touched.any(start, sectors)
    }

    /// Appends the spans that make up a range to `into`, until that is full; what they do not hold
    /// lies below.
    pub fn spans(&self, start: u64, sectors: u64, into: &mut Lookup) {
        let end = start + sectors;
        let mut at = start;
        while at < end && into.spans.len() < MAX_SPANS {
            let found = self.index.find(Sector(at));
            let (to, content) = match found.filter(|segment| segment.start() < Sector(end)) {
                None => (end, SpanContent::Lower),
                Some(segment) if segment.start() > Sector(at) => {
                    (segment.start().0, SpanContent::Lower)
                }
                Some(segment) => {
                    let content = match segment.content() {
                        Content::Zeroed => SpanContent::Zero,
                        Content::Data { layer, moffset } => {
                            let known = into.sealed.as_ref().map_or(0, |known| known.len());
                            if known < self.files.len() {
                                into.sealed = Some(self.files.clone());
                            }
                            SpanContent::Data {
                                file: SEALED | u32::from(layer),
                                offset: (moffset + (Sector(at) - segment.start())).byte(),
                            }
                        }
                    };
                    (segment.end().0.min(end), content)
                }
            };
            into.spans.push(Span {
                sectors: to - at,
                content,
            });
            at = to;
        }
    }
}

/// The segments of an upper that is to have this number.
fn segments(upper: &WritableLayer, number: usize) -> Result<Vec<Segment>, Error> {
    if number >= MAX_LAYERS {
        return Err(Error::TooTall);
    }
    upper
        .index_entries()
        .into_iter()
        .map(|mapping| {
            // Below `MAX_LAYERS`.
            Segment::new(mapping, number as u16).ok_or_else(|| {
                Error::Image(image::Error::Position {
                    layer: upper.paths().data.clone().into(),
                    offset: mapping.offset(),
                    moffset: mapping.moffset(),
                })
            })
        })
        .collect()
}
