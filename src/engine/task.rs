//! A request on its way from the available ring to the used ring.

use crate::image::MAX_STORED;
use crate::image::plan::{Piece, Pieces};
use crate::virtio::chain::Chain;
use crate::virtio::request::StatusByte;

/// One request. Its chain's lists are kept and refilled when the task is used again.
#[derive(Debug, Default)]
pub struct Task<'a> {
    /// Head descriptor of the chain.
    pub head: u16,
    /// The guest memory it lends.
    pub chain: Chain<'a>,
    /// Where the answer goes.
    pub status: Option<StatusByte<'a>>,
    /// What is left to plan of a read.
    pieces: Option<Pieces<'a>>,
    /// Planned and not yet begun.
    next: Option<Piece>,
    /// Where in the data the next piece goes, in bytes.
    position: usize,
    /// Reads under way for it.
    pub outstanding: usize,
    /// A piece could not be served.
    pub failed: bool,
}

impl<'a> Task<'a> {
    /// Makes the task a read of `pieces`, in order, into the chain's writable memory, and starts
    /// to bring closer what planning them needs.
    pub fn begin(&mut self, mut pieces: Pieces<'a>) {
        pieces.prefetch();
        (self.pieces, self.next) = (Some(pieces), None);
        (self.position, self.outstanding, self.failed) = (0, 0, false);
    }

    /// The next piece, without taking it, and where in the data it goes. Its stored bytes fit
    /// one buffer of [`MAX_STORED`].
    pub fn peek(&mut self) -> Option<(Piece, usize)> {
        if self.next.is_none() {
            self.next = self.pieces.as_mut().and_then(Iterator::next);
        }
        let piece = match self.next? {
            Piece::Plain { layer, offset, len } => Piece::Plain {
                layer,
                offset,
                len: len.min(MAX_STORED as u64),
            },
            other => other,
        };
        Some((piece, self.position))
    }

    /// Takes `piece`, which [`Task::peek`] gave.
    pub fn take(&mut self, piece: &Piece) {
        // At most the request's data, which is a `usize`.
        self.position += piece.len() as usize;
        self.next = match self.next {
            Some(Piece::Plain { layer, offset, len }) if len > piece.len() => {
                let (offset, len) = (offset + piece.len(), len - piece.len());
                Some(Piece::Plain { layer, offset, len })
            }
            _ => None,
        };
    }

    /// Gives up on what is not begun.
    pub fn abandon(&mut self) {
        (self.pieces, self.next, self.failed) = (None, None, true);
    }
}
