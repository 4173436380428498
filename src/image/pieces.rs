//! Look-up of the bytes that hold a range of the disk. Does no I/O and allocates nothing.

use super::Image;
use super::segment::{Segment, SegmentContent};
use crate::units::{Sector, SectorRange, Sectors};

/// An image with a size, which may differ from the size that its layers declare: a writable layer above
/// them has its own size. Bytes beyond the size read as zeros.
#[derive(Clone, Copy, Debug)]
pub struct SizedImage<'i> {
    image: &'i Image,
    /// In bytes.
    size: u64,
}

impl<'i> SizedImage<'i> {
    /// Creates a disk of `size` bytes.
    #[inline]
    pub(super) fn new(image: &'i Image, size: u64) -> Self {
        Self { image, size }
    }

    /// The merged layers.
    #[inline]
    pub fn image(self) -> &'i Image {
        self.image
    }

    /// Size of the disk in sectors, with a partial last sector.
    pub fn sectors(self) -> Sectors {
        Sectors::to_hold(self.size)
    }

    /// Looks up a range of sectors.
    #[inline]
    pub fn pieces(self, range: SectorRange) -> Pieces<'i> {
        Pieces::new(self.image, range, self.size)
    }
}

/// Location of the next bytes of a range.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Piece {
    /// Zeros.
    Zero {
        /// Number of bytes.
        len: u64,
    },
    /// Uncompressed bytes of a layer's file.
    Plain {
        /// Number of the layer, counted from the bottom.
        layer: u16,
        /// Byte of the file.
        offset: u64,
        /// Number of bytes.
        len: u64,
    },
    /// Bytes of compressed blocks.
    Compressed(CompressedRun),
}

/// Adjacent compressed blocks of one layer, and the range of their content that is wanted.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct CompressedRun {
    /// Number of the layer, counted from the bottom.
    pub layer: u16,
    /// Number of the first block.
    pub first: u64,
    /// Number of blocks.
    pub count: u32,
    /// Number of bytes at the start of the first block that are not wanted.
    pub skip: u32,
    /// Byte of the file at which the stored blocks start.
    pub offset: u64,
    /// Stored bytes of all blocks, at most [`MAX_STORED`](super::MAX_STORED).
    pub stored: u32,
    /// Number of bytes wanted of all blocks.
    pub len: u64,
}

impl Piece {
    /// Number of bytes of the range in the piece.
    #[expect(clippy::len_without_is_empty, reason = "no piece is empty")]
    pub fn len(&self) -> u64 {
        match self {
            Piece::Zero { len } | Piece::Plain { len, .. } => *len,
            Piece::Compressed(run) => run.len,
        }
    }
}

/// Iterator over the pieces of a range, in order.
#[derive(Clone, Debug)]
pub struct Pieces<'i> {
    image: &'i Image,
    /// Next byte of the disk; the start of a sector while it is below `end`.
    at: u64,
    /// End of the range or of the disk, whichever is first.
    end: u64,
    /// Number of bytes of the range beyond the disk.
    beyond: u64,
    /// The segment that covers or follows `at`, if it was looked up.
    segment: Option<Segment>,
}

impl<'i> Pieces<'i> {
    fn new(image: &'i Image, range: SectorRange, size: u64) -> Self {
        // A sector past 2^64 bytes counts as the last byte before; a disk is far smaller.
        let byte = |sector: Sector| sector.checked_byte().unwrap_or(u64::MAX);
        let (from, to) = (byte(range.start()), byte(range.end()));
        let end = to.min(size);
        Self {
            image,
            at: from,
            end,
            beyond: to - end.max(from),
            segment: None,
        }
    }

    /// Looks up the layer of the first bytes, and prefetches the table entry that the first
    /// [`next`](Iterator::next) needs.
    #[inline]
    pub fn prefetch(&mut self) {
        if self.at >= self.end || self.segment.is_some() {
            return;
        }
        let sector = Sector::containing(self.at);
        self.segment = self.image.index().find(sector);
        if let Some(segment) = self.segment
            && let SegmentContent::Data { layer, moffset } = segment.content()
            && segment.start() <= sector
        {
            let offset = (moffset + (sector - segment.start())).byte();
            self.image.prefetch_table(layer, offset);
        }
    }

    /// A piece of zeros up to `end`.
    fn zeros(&self, end: u64) -> Piece {
        let len = end - self.at;
        Piece::Zero { len }
    }

    /// The next piece, which begins at `sector` of `segment`. Keeps a segment that has more pieces.
    #[inline(always)]
    fn covered(&mut self, segment: Segment, sector: Sector) -> Piece {
        let end = self.end.min(segment.end().byte());
        let piece = match segment.content() {
            SegmentContent::Zeroed => self.zeros(end),
            SegmentContent::Data { layer, moffset } => {
                let offset = (moffset + (sector - segment.start())).byte();
                self.image.piece(layer, offset, end - self.at)
            }
        };
        if self.at + piece.len() < end {
            self.segment = Some(segment);
        }
        piece
    }
}

impl Iterator for Pieces<'_> {
    type Item = Piece;

    #[inline]
    fn next(&mut self) -> Option<Piece> {
        if self.at >= self.end {
            let len = std::mem::take(&mut self.beyond);
            return (len > 0).then_some(Piece::Zero { len });
        }
        let sector = Sector::containing(self.at);
        let segment = match self.segment.take() {
            Some(segment) => Some(segment),
            None => self.image.index().find(sector),
        };
        let piece = match segment {
            None => self.zeros(self.end),
            Some(segment) if segment.start() > sector => {
                self.segment = Some(segment);
                self.zeros(self.end.min(segment.start().byte()))
            }
            Some(segment) => self.covered(segment, sector),
        };
        self.at += piece.len();
        Some(piece)
    }
}
