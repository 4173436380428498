//! Result of a look-up: the parts of a range that lie in writable layers, and those below.

use std::sync::Arc;

use super::allocator::Hold;
use super::sealed_file::SealedFile;
use crate::source::Blob;
use crate::units::{Sector, SectorRange, Sectors};

/// Most spans of one look-up: bounds the memory of a read that consists of many small pieces.
const MAX_SPANS: usize = 256;

/// Set in the file numbers of sealed layers.
const SEALED: u32 = 1 << 31;

/// A run of sectors whose content is in one place.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Span {
    /// Number of sectors.
    pub sectors: Sectors,
    /// Where their content is.
    pub content: SpanContent,
}

/// Where the content of a span is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum SpanContent {
    /// In none of the writable layers looked up so far: at the end, in the image.
    Lower,
    /// It reads as zeros.
    Zero,
    /// In the data file of a writable layer.
    Data {
        /// Number of the file, for [`Lookup::file`].
        file: u32,
        /// Byte of the file.
        offset: u64,
    },
}

/// The first spans of a range, in order; empty if all of the range lies below. Sectors of data files that the spans
/// name are not reused before the look-up is cleared or dropped.
#[derive(Debug, Default)]
pub struct Lookup {
    spans: Vec<Span>,
    /// Memory for the next list of spans.
    spare: Vec<Span>,
    files: Vec<(Arc<Blob>, Hold)>,
    /// The sealed layers, by number without [`SEALED`].
    sealed: Option<Arc<[SealedFile]>>,
}

impl Lookup {
    /// Clears the spans, and releases the files.
    pub fn clear(&mut self) {
        self.spans.clear();
        self.files.clear();
        self.sealed = None;
    }

    /// Returns whether no part of the range lies in a writable layer.
    pub fn is_empty(&self) -> bool {
        self.spans.is_empty()
    }

    /// Returns the spans, which make up the range from its start on.
    pub fn spans(&self) -> &[Span] {
        &self.spans
    }

    /// Returns the data file with a number from a span.
    pub fn file(&self, number: u32) -> &Arc<Blob> {
        match number & SEALED {
            0 => &self.files[number as usize].0,
            _ => self.sealed.as_deref().unwrap_or_default()[(number ^ SEALED) as usize].blob(),
        }
    }

    /// Begins another look-up. Sectors of earlier spans are still not reused.
    pub(super) fn begin(&mut self) {
        self.spans.clear();
    }

    /// Ends a look-up: clears the spans if all of them lie below.
    pub(super) fn end(&mut self) {
        let is_lower = |span: &Span| span.content == SpanContent::Lower;
        if self.spans.iter().all(is_lower) {
            self.spans.clear();
        }
    }

    /// Returns whether no more spans fit.
    pub(super) fn is_full(&self) -> bool {
        self.spans.len() >= MAX_SPANS
    }

    /// Appends a span.
    pub(super) fn push(&mut self, range: SectorRange, content: SpanContent) {
        let sectors = range.len();
        self.spans.push(Span { sectors, content });
    }

    /// Returns the number of the data file `blob` of a writable layer. `hold` is called for a new file only: the first
    /// hold covers all sectors that are freed later.
    pub(super) fn number_of(&mut self, blob: &Arc<Blob>, hold: impl FnOnce() -> Hold) -> u32 {
        let known = self
            .files
            .iter()
            .position(|(known, _)| Arc::ptr_eq(known, blob));
        let number = known.unwrap_or_else(|| {
            self.files.push((blob.clone(), hold()));
            self.files.len() - 1
        });
        // One file for each writable layer, of which there are few.
        number as u32
    }

    /// Returns the number of a file of sealed layers. `files` are all of them, oldest first; earlier look-ups may have
    /// used fewer.
    pub(super) fn number_of_sealed(&mut self, files: &Arc<[SealedFile]>, place: u16) -> u32 {
        let known = self.sealed.as_ref().map_or(0, |known| known.len());
        if known < files.len() {
            self.sealed = Some(files.clone());
        }
        SEALED | u32::from(place)
    }

    /// Replaces the spans of `range` that lie below by the spans that `spans` appends for each, until the limit.
    pub(super) fn fill(
        &mut self,
        range: SectorRange,
        mut spans: impl FnMut(SectorRange, &mut Lookup),
    ) {
        if self.spans.is_empty() {
            return spans(range, self);
        }
        // Both lists keep their memory: a look-up allocates nothing.
        let spare = std::mem::take(&mut self.spare);
        let mut before = std::mem::replace(&mut self.spans, spare);
        self.refill(range.start(), &before, spans);
        before.clear();
        self.spare = before;
    }

    /// Appends the spans `searched`, which begin at `start`, with those that `spans` finds in the places of those below.
    fn refill(
        &mut self,
        mut start: Sector,
        searched: &[Span],
        mut spans: impl FnMut(SectorRange, &mut Lookup),
    ) {
        for span in searched {
            let part = SectorRange::new(start, start + span.sectors);
            let before = self.spans.len();
            match span.content {
                _ if self.is_full() => return,
                SpanContent::Lower => spans(part, self),
                _ => self.spans.push(*span),
            }
            let covered: Sectors = self.spans[before..].iter().map(|span| span.sectors).sum();
            if covered < span.sectors {
                return;
            }
            start = part.end();
        }
    }
}
