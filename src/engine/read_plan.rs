//! Plan of a read: its subreads in order, each with the place where its bytes lie.
#![cfg_attr(not(test), warn(clippy::indexing_slicing))]

use crate::image::MAX_STORED;
use crate::image::pieces::{Piece, Pieces};
use crate::units::{SectorRange, Sectors};
use crate::writable::{Lookup, SpanContent, Volume};

/// A run of bytes of one read that lies in one place.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Subread {
    /// In the image.
    Image(Piece),
    /// In the data file of a writable layer.
    Writable {
        /// Number of the file in the plan's lookup.
        file: u32,
        /// First byte in the file.
        offset: u64,
        /// Number of bytes.
        len: u64,
    },
}

impl Subread {
    /// Bytes of the read that it fills.
    #[expect(clippy::len_without_is_empty, reason = "no subread is empty")]
    pub fn len(&self) -> u64 {
        match self {
            Subread::Image(piece) => piece.len(),
            Subread::Writable { len, .. } => *len,
        }
    }

    /// Shortens it to the bytes that fit one buffer; returns the rest, if there is one. Compressed runs are
    /// bounded already, and zeros need no buffer.
    #[inline]
    fn split_rest(&mut self) -> Option<Self> {
        const MOST: u64 = MAX_STORED as u64;
        let (offset, len) = match self {
            Subread::Image(Piece::Plain { offset, len, .. }) => (offset, len),
            Subread::Writable { offset, len, .. } => (offset, len),
            Subread::Image(_) => return None,
        };
        let left = len.checked_sub(MOST).filter(|left| *left > 0)?;
        let after = *offset + MOST;
        *len = MOST;
        let mut rest = *self;
        if let Subread::Image(Piece::Plain { offset, len, .. })
        | Subread::Writable { offset, len, .. } = &mut rest
        {
            (*offset, *len) = (after, left);
        }
        Some(rest)
    }
}

/// Plan of one read. It is made piece by piece, as subreads are taken. Its lists keep their memory when
/// it is used for the next read.
#[derive(Debug)]
pub struct ReadPlan<'a> {
    volume: &'a Volume,
    /// Spans of the writable layers looked up last. Held until the read is answered: until then the
    /// bytes of their data files are not reused.
    lookup: Lookup,
    /// Pieces of the current span of the image.
    pieces: Option<Pieces<'a>>,
    /// Next span of the lookup.
    span: usize,
    /// Sectors that are not planned yet.
    left: SectorRange,
    /// The next subread, if it is planned. Its stored bytes fit one buffer of [`MAX_STORED`].
    next: Option<Subread>,
    /// What follows it in the same place.
    rest: Option<Subread>,
    /// First byte of the request's data that the next subread fills.
    position: usize,
}

impl<'a> ReadPlan<'a> {
    /// Plan of no subread.
    pub fn new(volume: &'a Volume) -> Self {
        Self {
            volume,
            lookup: Lookup::default(),
            pieces: None,
            span: 0,
            left: SectorRange::default(),
            next: None,
            rest: None,
            position: 0,
        }
    }

    /// Begins the plan of a range, which lies on the disk, and prefetches what planning needs.
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
        (self.next, self.rest, self.position) = (None, None, 0);
    }

    /// The looked-up spans, which name the data files of [`Subread::Writable`].
    #[inline]
    pub fn lookup(&self) -> &Lookup {
        &self.lookup
    }

    /// Plans the next subread, unless it is planned already.
    #[inline]
    pub fn prepare(&mut self) {
        if self.next.is_none() {
            self.next = match self.pieces.as_mut().and_then(Iterator::next) {
                Some(piece) => Some(Subread::Image(piece)),
                None if self.left.is_empty() => None,
                None => self.next_span(),
            };
            self.rest = self.next.as_mut().and_then(Subread::split_rest);
        }
    }

    /// The prepared subread, and the first byte of the request's data that it fills; `None` if there is no
    /// subread left. Its stored bytes fit one buffer of [`MAX_STORED`].
    #[inline]
    pub fn next(&self) -> Option<(&Subread, usize)> {
        Some((self.next.as_ref()?, self.position))
    }

    /// The next subread from the current span of the lookup on.
    #[inline(never)]
    fn next_span(&mut self) -> Option<Subread> {
        while !self.left.is_empty() {
            let Some(span) = self.lookup.spans().get(self.span).copied() else {
                self.volume.lookup(self.left, &mut self.lookup);
                self.span = 0;
                if self.lookup.is_empty() {
                    return self.image_subread(self.left.len());
                }
                continue;
            };
            self.span += 1;
            if span.content == SpanContent::Lower {
                return self.image_subread(span.sectors);
            }
            let len = self.take_left(span.sectors).len().bytes();
            return Some(match span.content {
                SpanContent::Data { file, offset } => Subread::Writable { file, offset, len },
                _ => Subread::Image(Piece::Zero { len }),
            });
        }
        None
    }

    /// The first subread of the next `sectors` sectors, at least 1, which lie in the image.
    fn image_subread(&mut self, sectors: Sectors) -> Option<Subread> {
        let range = self.take_left(sectors);
        let pieces = self.volume.lower().pieces(range);
        self.pieces.insert(pieces).next().map(Subread::Image)
    }

    /// Takes the first `sectors` sectors of those that are not planned yet.
    fn take_left(&mut self, sectors: Sectors) -> SectorRange {
        let (start, end) = (self.left.start(), self.left.end());
        let middle = start + sectors;
        self.left = SectorRange::new(middle, end);
        SectorRange::new(start, middle)
    }

    /// Takes the prepared subread.
    #[inline]
    pub fn take(&mut self) -> Option<Subread> {
        let taken = self.next.take()?;
        // At most the request's data, which is a `usize`.
        self.position += taken.len() as usize;
        if self.rest.is_some() {
            self.next = self.rest.take();
            self.rest = self.next.as_mut().and_then(Subread::split_rest);
        }
        Some(taken)
    }

    /// Drops the subreads that are not taken.
    pub fn abandon(&mut self) {
        (self.pieces, self.next, self.rest) = (None, None, None);
        self.left = SectorRange::default();
    }

    /// Releases the data files.
    #[inline]
    pub fn clear(&mut self) {
        self.lookup.clear();
    }
}
