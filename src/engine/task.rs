//! A request on its way from the available ring to the used ring.

use crate::image::MAX_STORED;
use crate::image::plan::{Piece, Pieces};
use crate::units::{SECTOR_SIZE, Sector};
use crate::upper::{Overlay, SpanContent, Volume};
use crate::virtio::chain::Chain;
use crate::virtio::request::StatusByte;

/// Where the next bytes of a read come from.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Part {
    /// From the image.
    Lower(Piece),
    /// From the data file of an upper.
    Upper {
        /// Its number in the task's overlay.
        file: u16,
        /// Byte of the file.
        offset: u64,
        /// Number of bytes.
        len: u64,
    },
}

impl Part {
    /// Number of bytes of the range that this part makes up.
    #[expect(clippy::len_without_is_empty, reason = "no part is empty")]
    pub fn len(&self) -> u64 {
        match self {
            Part::Lower(piece) => piece.len(),
            Part::Upper { len, .. } => *len,
        }
    }

    /// The first bytes of it, as many as fit one buffer, and the rest.
    fn split(self) -> (Self, Option<Self>) {
        const MOST: u64 = MAX_STORED as u64;
        if self.len() <= MOST {
            return (self, None);
        }
        match self {
            Part::Lower(Piece::Plain { layer, offset, len }) => {
                let part = |offset, len| Part::Lower(Piece::Plain { layer, offset, len });
                (part(offset, MOST), Some(part(offset + MOST, len - MOST)))
            }
            Part::Upper { file, offset, len } => {
                let part = |offset, len| Part::Upper { file, offset, len };
                (part(offset, MOST), Some(part(offset + MOST, len - MOST)))
            }
            // Needs no buffer, or what it needs is bounded already.
            Part::Lower(_) => (self, None),
        }
    }
}

/// What is left to plan of a read.
#[derive(Debug)]
struct Plan<'a> {
    volume: &'a Volume,
    /// The pieces of what lies in the image next, without an upper above it.
    pieces: Option<Pieces<'a>>,
    /// The next span of the overlay, and where it starts.
    span: usize,
    at: Sector,
}

impl<'a> Plan<'a> {
    fn next(&mut self, overlay: &Overlay) -> Option<Part> {
        loop {
            if let Some(piece) = self.pieces.as_mut().and_then(Iterator::next) {
                return Some(Part::Lower(piece));
            }
            let span = overlay.spans().get(self.span)?;
            let start = self.at;
            self.span += 1;
            self.at = Sector(start.0 + span.sectors);
            let len = span.sectors * SECTOR_SIZE;
            match span.content {
                SpanContent::Lower => {
                    self.pieces = Some(self.volume.image().pieces(start, span.sectors));
                }
                SpanContent::Zero => return Some(Part::Lower(Piece::Zero { len })),
                SpanContent::Data { file, offset } => {
                    return Some(Part::Upper { file, offset, len });
                }
            }
        }
    }
}

/// One request. Its chain's lists are kept and refilled when the task is used again.
#[derive(Debug, Default)]
pub struct Task<'a> {
    /// Head descriptor of the chain.
    pub head: u16,
    /// The guest memory it lends.
    pub chain: Chain<'a>,
    /// Where the answer goes.
    pub status: Option<StatusByte<'a>>,
    /// What of a read lies in uppers. Held until the answer: so long, the bytes stay what they are.
    pub overlay: Overlay,
    plan: Option<Plan<'a>>,
    /// Planned and not yet begun.
    next: Option<Part>,
    /// Where in the data the next part goes, in bytes.
    position: usize,
    /// Reads under way for it.
    pub outstanding: usize,
    /// A part could not be served.
    pub failed: bool,
}

impl<'a> Task<'a> {
    /// Makes the task a read of `sectors` sectors at `start` into the chain's writable memory, and
    /// starts to bring closer what planning it needs.
    pub fn begin(&mut self, volume: &'a Volume, start: Sector, sectors: u64) {
        volume.overlay(start, sectors, &mut self.overlay);
        let whole = || {
            let mut pieces = volume.image().pieces(start, sectors);
            pieces.prefetch();
            pieces
        };
        self.plan = Some(Plan {
            volume,
            pieces: self.overlay.is_empty().then(whole),
            span: 0,
            at: start,
        });
        self.next = None;
        (self.position, self.outstanding, self.failed) = (0, 0, false);
    }

    /// The next part, without taking it, and where in the data it goes. Its stored bytes fit one
    /// buffer of [`MAX_STORED`].
    pub fn peek(&mut self) -> Option<(Part, usize)> {
        if self.next.is_none() {
            self.next = self.plan.as_mut()?.next(&self.overlay);
        }
        Some((self.next?.split().0, self.position))
    }

    /// Takes what [`Task::peek`] gave.
    pub fn take(&mut self) {
        let Some(next) = self.next.take() else { return };
        let (taken, rest) = next.split();
        // At most the request's data, which is a `usize`.
        self.position += taken.len() as usize;
        self.next = rest;
    }

    /// Gives up on what is not begun.
    pub fn abandon(&mut self) {
        (self.plan, self.next, self.failed) = (None, None, true);
    }
}
