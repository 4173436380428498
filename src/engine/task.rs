//! A request on its way from the available ring to the used ring.

use crate::image::MAX_STORED;
use crate::image::plan::{Piece, Pieces};
use crate::units::{SECTOR_SIZE, Sector};
use crate::virtio::chain::Chain;
use crate::virtio::queue::Head;
use crate::virtio::status::StatusByte;
use crate::writable::{Lookup, SpanContent, Volume};

/// Where the next bytes of a read come from.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Part {
    /// From the image.
    Lower(Piece),
    /// From the data file of an upper.
    Upper {
        /// Its number in the task's lookup.
        file: u32,
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

    /// The first bytes of it, as many as fit one buffer. What is packed is bounded already, and zeros
    /// need no buffer.
    fn first(self) -> Self {
        const MOST: u64 = MAX_STORED as u64;
        match self {
            Part::Lower(Piece::Plain { layer, offset, len }) => {
                let len = len.min(MOST);
                Part::Lower(Piece::Plain { layer, offset, len })
            }
            Part::Upper { file, offset, len } => {
                let len = len.min(MOST);
                Part::Upper { file, offset, len }
            }
            other => other,
        }
    }

    /// What is left of it after its first `taken` bytes.
    fn rest(self, taken: u64) -> Option<Self> {
        let left = self.len().checked_sub(taken).filter(|left| *left > 0);
        match (self, left?) {
            (Part::Lower(Piece::Plain { layer, offset, .. }), len) => {
                let offset = offset + taken;
                Some(Part::Lower(Piece::Plain { layer, offset, len }))
            }
            (Part::Upper { file, offset, .. }, len) => {
                let offset = offset + taken;
                Some(Part::Upper { file, offset, len })
            }
            _ => None,
        }
    }
}

/// One request. Its chain's lists are kept and refilled when the task is used again.
#[derive(Debug, Default)]
pub struct Task<'a> {
    /// The chain, from its arrival to its answer.
    pub head: Option<Head>,
    /// The guest memory it lends.
    pub chain: Chain<'a>,
    /// Where the answer goes.
    pub status: Option<StatusByte<'a>>,
    /// Where on the disk it writes, once a flush has made room.
    pub write_again: Option<Sector>,
    /// Flushes it waited for.
    pub flushes: u32,
    /// What of a read lies in uppers, as far as it is looked up. Held until the answer: so long, the
    /// bytes stay what they are.
    pub lookup: Lookup,
    /// What is left to plan of it, and of what lies in the image next.
    volume: Option<&'a Volume>,
    pieces: Option<Pieces<'a>>,
    /// The next span of the lookup; where what is not planned starts, and where the read ends.
    span: usize,
    at: Sector,
    end: Sector,
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
        if volume.is_writable() {
            volume.lookup(start, sectors, &mut self.lookup);
        }
        (self.volume, self.pieces, self.span) = (Some(volume), None, 0);
        self.end = Sector(start.0 + sectors);
        self.at = start;
        if self.lookup.is_empty() {
            let mut pieces = volume.image().pieces(start, sectors);
            pieces.prefetch();
            (self.pieces, self.at) = (Some(pieces), self.end);
        }
        self.next = None;
        (self.position, self.outstanding, self.failed) = (0, 0, false);
    }

    /// The next part, without taking it, and where in the data it goes. Its stored bytes fit one
    /// buffer of [`MAX_STORED`].
    pub fn peek(&mut self) -> Option<(Part, usize)> {
        if self.next.is_none() {
            self.next = match self.pieces.as_mut().and_then(Iterator::next) {
                Some(piece) => Some(Part::Lower(piece)),
                None if self.at == self.end => None,
                None => self.next_span(),
            };
        }
        Some((self.next?.first(), self.position))
    }

    /// The next part from the spans of the lookup on, if there is one.
    #[inline(never)]
    fn next_span(&mut self) -> Option<Part> {
        while self.at < self.end {
            let Some(span) = self.lookup.spans().get(self.span).copied() else {
                let left = self.end.0 - self.at.0;
                self.volume?.lookup(self.at, left, &mut self.lookup);
                self.span = 0;
                if self.lookup.is_empty() {
                    return self.lower(left);
                }
                continue;
            };
            self.span += 1;
            if span.content == SpanContent::Lower {
                return self.lower(span.sectors);
            }
            self.at = Sector(self.at.0 + span.sectors);
            let len = span.sectors * SECTOR_SIZE;
            return Some(match span.content {
                SpanContent::Data { file, offset } => Part::Upper { file, offset, len },
                _ => Part::Lower(Piece::Zero { len }),
            });
        }
        None
    }

    /// The first part of the next `sectors` sectors, at least 1, which lie in the image.
    fn lower(&mut self, sectors: u64) -> Option<Part> {
        let pieces = self.volume?.image().pieces(self.at, sectors);
        self.at = Sector(self.at.0 + sectors);
        self.pieces.insert(pieces).next().map(Part::Lower)
    }

    /// Takes `part`, which [`Task::peek`] gave.
    pub fn take(&mut self, part: &Part) {
        // At most the request's data, which is a `usize`.
        self.position += part.len() as usize;
        self.next = self.next.and_then(|next| next.rest(part.len()));
    }

    /// Gives up on what is not begun.
    pub fn abandon(&mut self) {
        (self.pieces, self.next, self.failed) = (None, None, true);
        self.at = self.end;
    }
}
