//! Which parts of a range lie in writable layers, and which below them.

use std::sync::Arc;

use super::allocator::Hold;
use crate::source::Blob;

/// Most spans of one look-up: bounds the memory that a read in many small pieces takes.
pub(super) const MAX_SPANS: usize = 256;

/// Set in the numbers of files of sealed layers.
pub(super) const SEALED: u32 = 1 << 31;

/// Sectors of a range that lie in one piece.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Span {
    /// Number of sectors.
    pub sectors: u64,
    /// Where they are.
    pub content: SpanContent,
}

/// Where the content of a span is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum SpanContent {
    /// In the image below.
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

/// The first spans of a range, in order; empty if all of it lies below. Sectors of data files that it
/// named are not reused before it is cleared or dropped.
#[derive(Debug, Default)]
pub struct Lookup {
    pub(super) spans: Vec<Span>,
    pub(super) files: Vec<(Arc<Blob>, Hold)>,
    /// The files of sealed layers, by number without [`SEALED`].
    pub(super) sealed: Option<Arc<[Arc<Blob>]>>,
}

impl Lookup {
    /// Clears the spans, and lets go of the files.
    pub fn clear(&mut self) {
        self.spans.clear();
        self.files.clear();
        self.sealed = None;
    }

    /// Whether no part of the range lies in a writable layer.
    pub fn is_empty(&self) -> bool {
        self.spans.is_empty()
    }

    /// The spans, which make up the range from its start on.
    pub fn spans(&self) -> &[Span] {
        &self.spans
    }

    /// The data file with this number, which comes from a span.
    pub fn file(&self, number: u32) -> &Arc<Blob> {
        match number & SEALED {
            0 => &self.files[number as usize].0,
            _ => &self.sealed.as_deref().unwrap_or_default()[(number ^ SEALED) as usize],
        }
    }
}
