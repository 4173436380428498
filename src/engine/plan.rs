//! The parts of a read, in order: where in the writable layer or in the image its bytes lie.

use crate::image::MAX_STORED;
use crate::image::pieces::{Piece, Pieces};
use crate::units::{SectorRange, Sectors};
use crate::writable::{Lookup, SpanContent, Volume};

/// The source of the next bytes of a read.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ReadPart {
    /// The image.
    Lower(Piece),
    /// The data file of a writable layer.
    Writable {
        /// Number of the file in the lookup of the plan.
        file: u32,
        /// Byte of the file.
        offset: u64,
        /// Number of bytes.
        len: u64,
    },
}

impl ReadPart {
    /// Bytes of the read that the part makes up.
    #[expect(clippy::len_without_is_empty, reason = "no part is empty")]
    pub fn len(&self) -> u64 {
        match self {
            ReadPart::Lower(piece) => piece.len(),
            ReadPart::Writable { len, .. } => *len,
        }
    }

    /// The first bytes of the part, as many as fit one buffer. Compressed runs are bounded already,
    /// and zeros need no buffer.
    fn first(self) -> Self {
        const MOST: u64 = MAX_STORED as u64;
        match self {
            ReadPart::Lower(Piece::Plain { layer, offset, len }) => {
                let len = len.min(MOST);
                ReadPart::Lower(Piece::Plain { layer, offset, len })
            }
            ReadPart::Writable { file, offset, len } => {
                let len = len.min(MOST);
                ReadPart::Writable { file, offset, len }
            }
            other => other,
        }
    }

    /// The part without its first `taken` bytes.
    fn rest(self, taken: u64) -> Option<Self> {
        let left = self.len().checked_sub(taken).filter(|left| *left > 0);
        match (self, left?) {
            (ReadPart::Lower(Piece::Plain { layer, offset, .. }), len) => {
                let offset = offset + taken;
                Some(ReadPart::Lower(Piece::Plain { layer, offset, len }))
            }
            (ReadPart::Writable { file, offset, .. }, len) => {
                let offset = offset + taken;
                Some(ReadPart::Writable { file, offset, len })
            }
            _ => None,
        }
    }
}

/// The plan of one read. Its lists are kept and refilled when the plan is used again.
#[derive(Debug)]
pub struct Plan<'a> {
    volume: &'a Volume,
    /// Spans of the writable layers, as far as they are looked up. Held until the read is answered:
    /// so long, the bytes stay what they are.
    lookup: Lookup,
    /// What is left to plan of the image's next span.
    pieces: Option<Pieces<'a>>,
    /// The next span of the lookup.
    span: usize,
    /// What is left to look up.
    left: SectorRange,
    /// Planned and not yet taken.
    next: Option<ReadPart>,
    /// Byte of the request's data that the next part fills.
    position: usize,
}

impl<'a> Plan<'a> {
    /// A plan of nothing.
    pub fn new(volume: &'a Volume) -> Self {
        Self {
            volume,
            lookup: Lookup::default(),
            pieces: None,
            span: 0,
            left: SectorRange::default(),
            next: None,
            position: 0,
        }
    }

    /// Plans to read a range, which lies on the disk, and prefetches what planning needs.
    #[inline]
    pub fn begin(&mut self, range: SectorRange) {
        if self.volume.is_writable() {
            self.volume.lookup(range, &mut self.lookup);
        }
        (self.pieces, self.span, self.left) = (None, 0, range);
        if self.lookup.is_empty() {
            let mut pieces = self.volume.lower().pieces(range);
            pieces.prefetch();
            (self.pieces, self.left) = (Some(pieces), SectorRange::default());
        }
        (self.next, self.position) = (None, 0);
    }

    /// The looked-up spans, which name the data files of [`ReadPart::Writable`].
    pub fn lookup(&self) -> &Lookup {
        &self.lookup
    }

    /// The next part, without taking it, and the byte of the request's data that it fills first. Its
    /// stored bytes fit one buffer of [`MAX_STORED`].
    #[inline]
    pub fn peek(&mut self) -> Option<(ReadPart, usize)> {
        if self.next.is_none() {
            self.next = match self.pieces.as_mut().and_then(Iterator::next) {
                Some(piece) => Some(ReadPart::Lower(piece)),
                None if self.left.is_empty() => None,
                None => self.next_span(),
            };
        }
        Some((self.next?.first(), self.position))
    }

    /// The next part from the spans of the lookup on, if there is one.
    #[inline(never)]
    fn next_span(&mut self) -> Option<ReadPart> {
        while !self.left.is_empty() {
            let Some(span) = self.lookup.spans().get(self.span).copied() else {
                self.volume.lookup(self.left, &mut self.lookup);
                self.span = 0;
                if self.lookup.is_empty() {
                    return self.lower(self.left.len());
                }
                continue;
            };
            self.span += 1;
            if span.content == SpanContent::Lower {
                return self.lower(span.sectors);
            }
            let len = self.take_left(span.sectors).len().bytes();
            return Some(match span.content {
                SpanContent::Data { file, offset } => ReadPart::Writable { file, offset, len },
                _ => ReadPart::Lower(Piece::Zero { len }),
            });
        }
        None
    }

    /// The first part of the next `sectors` sectors, at least 1, which lie in the image.
    fn lower(&mut self, sectors: Sectors) -> Option<ReadPart> {
        let range = self.take_left(sectors);
        let pieces = self.volume.lower().pieces(range);
        self.pieces.insert(pieces).next().map(ReadPart::Lower)
    }

    /// Takes the first `sectors` sectors of what is left to look up.
    fn take_left(&mut self, sectors: Sectors) -> SectorRange {
        let (start, end) = (self.left.start(), self.left.end());
        let middle = start + sectors;
        self.left = SectorRange::new(middle, end);
        SectorRange::new(start, middle)
    }

    /// Takes `part`, which [`Plan::peek`] gave.
    #[inline]
    pub fn take(&mut self, part: &ReadPart) {
        // At most the request's data, which is a `usize`.
        self.position += part.len() as usize;
        self.next = self.next.and_then(|next| next.rest(part.len()));
    }

    /// Gives up on the parts that are not taken.
    pub fn abandon(&mut self) {
        (self.pieces, self.next) = (None, None);
        self.left = SectorRange::default();
    }

    /// Lets go of the data files.
    #[inline]
    pub fn clear(&mut self) {
        self.lookup.clear();
    }
}
