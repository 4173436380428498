//! What a keeper holds, and passes to its standby piece by piece.

use std::io;
use std::os::fd::{AsFd, OwnedFd};

use super::message::OwnerMessage;
use crate::source::link::{Link, Message};
use crate::source::protocol::{MESSAGE_LEN, Packet};

/// Something that a keeper holds.
#[derive(Debug)]
pub(super) enum Piece {
    /// Control socket of an owner, and its number.
    Owner(u32, OwnedFd),
    /// The owner of this number closed its control socket.
    Gone(u32),
    /// The socket at which further owners connect.
    Listener(OwnedFd),
    /// Text of the configuration.
    Config(OwnedFd),
    /// An order of an owner.
    Order(OwnerMessage),
    /// The keeper's end of the control socket of the running fetcher.
    Fetcher(OwnedFd),
}

const OWNER: u8 = 1;
const GONE: u8 = 2;
const LISTENER: u8 = 3;
const CONFIG: u8 = 4;
const ORDER: u8 = 5;
const FETCHER: u8 = 6;

impl Piece {
    /// The piece as a packet.
    pub(super) fn encode(self) -> (Packet, Vec<OwnedFd>) {
        let (kind, number, files) = match self {
            Self::Owner(number, socket) => (OWNER, number, vec![socket]),
            Self::Gone(number) => (GONE, number, Vec::new()),
            Self::Listener(socket) => (LISTENER, 0, vec![socket]),
            Self::Config(text) => (CONFIG, 0, vec![text]),
            Self::Order(order) => (ORDER, 0, order.into_files()),
            Self::Fetcher(socket) => (FETCHER, 0, vec![socket]),
        };
        let mut packet = [0; MESSAGE_LEN];
        packet[0] = kind;
        packet[4..8].copy_from_slice(&number.to_le_bytes());
        (packet, files)
    }

    /// The piece in a packet; `None` if it lacks its descriptor.
    pub(super) fn decode(message: Message) -> Option<Self> {
        let number = message.bytes.get(4..8)?.try_into().ok()?;
        let number = u32::from_le_bytes(number);
        let kind = *message.bytes.first()?;
        if kind == ORDER {
            return OwnerMessage::new(message).map(Self::Order);
        }
        let mut files = message.files.into_iter();
        match kind {
            OWNER => Some(Self::Owner(number, files.next()?)),
            GONE => Some(Self::Gone(number)),
            LISTENER => files.next().map(Self::Listener),
            CONFIG => files.next().map(Self::Config),
            FETCHER => files.next().map(Self::Fetcher),
            _ => None,
        }
    }

    /// The same piece, with descriptors of its own.
    pub(super) fn try_clone(&self) -> io::Result<Self> {
        Ok(match self {
            Self::Owner(number, socket) => Self::Owner(*number, socket.try_clone()?),
            Self::Gone(number) => Self::Gone(*number),
            Self::Listener(socket) => Self::Listener(socket.try_clone()?),
            Self::Config(text) => Self::Config(text.try_clone()?),
            Self::Order(order) => Self::Order(order.try_clone()?),
            Self::Fetcher(socket) => Self::Fetcher(socket.try_clone()?),
        })
    }
}

/// All that a keeper holds.
#[derive(Debug, Default)]
pub(super) struct Held {
    /// Control sockets by their numbers.
    pub(super) owners: Vec<(u32, Link)>,
    /// Number of the next owner.
    next: u32,
    pub(super) listener: Option<OwnedFd>,
    pub(super) config: Option<OwnedFd>,
    pub(super) orders: Vec<OwnerMessage>,
    pub(super) fetcher: Option<Link>,
}

impl Held {
    /// Adds a piece.
    ///
    /// # Errors
    /// The process has no descriptor left.
    pub(super) fn add(&mut self, piece: Piece) -> io::Result<()> {
        match piece {
            Piece::Owner(number, socket) => {
                self.next = self.next.max(number.saturating_add(1));
                self.owners.push((number, Link::new(socket)?));
            }
            Piece::Gone(gone) => self.owners.retain(|(number, _)| *number != gone),
            Piece::Listener(socket) => self.listener = Some(socket),
            Piece::Config(text) => self.config = Some(text),
            Piece::Order(order) => self.orders.push(order),
            Piece::Fetcher(socket) => self.fetcher = Some(Link::new(socket)?),
        }
        Ok(())
    }

    /// Number for another owner.
    pub(super) fn next_owner(&self) -> u32 {
        self.next
    }

    /// All pieces, with descriptors of their own.
    ///
    /// # Errors
    /// The process has no descriptor left.
    pub(super) fn pieces(&self) -> io::Result<Vec<Piece>> {
        let mut pieces = Vec::new();
        let copy = |socket: &dyn AsFd| socket.as_fd().try_clone_to_owned();
        for (number, owner) in &self.owners {
            pieces.push(Piece::Owner(*number, copy(owner)?));
        }
        if let Some(listener) = &self.listener {
            pieces.push(Piece::Listener(copy(listener)?));
        }
        if let Some(config) = &self.config {
            pieces.push(Piece::Config(copy(config)?));
        }
        for order in &self.orders {
            pieces.push(Piece::Order(order.try_clone()?));
        }
        if let Some(fetcher) = &self.fetcher {
            pieces.push(Piece::Fetcher(copy(fetcher)?));
        }
        Ok(pieces)
    }

    /// Drops the orders whose senders closed their sockets.
    pub(super) fn drop_finished(&mut self) {
        self.orders.retain(|order| !order.is_over());
    }

    /// Whether no owner and no disk is left.
    pub(super) fn is_over(&self) -> bool {
        self.owners.is_empty() && self.orders.is_empty()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::source::link;

    /// What a keeper holds arrives at its standby, and nothing else does.
    #[test]
    fn pieces_arrive_whole() {
        let socket = || link::pair().unwrap().0;
        let mut held = Held::default();
        for piece in [
            Piece::Owner(3, socket()),
            Piece::Listener(socket()),
            Piece::Config(socket()),
            Piece::Fetcher(socket()),
            Piece::Owner(4, socket()),
            Piece::Gone(3),
        ] {
            held.add(piece).unwrap();
        }
        let mut copy = Held::default();
        for piece in held.pieces().unwrap() {
            let (packet, files) = piece.encode();
            let bytes = packet.to_vec();
            copy.add(Piece::decode(Message { bytes, files }).unwrap())
                .unwrap();
        }
        let numbers: Vec<_> = copy.owners.iter().map(|(number, _)| *number).collect();
        assert_eq!(numbers, [4]);
        assert_eq!(copy.next_owner(), 5);
        assert!(copy.listener.is_some() && copy.config.is_some() && copy.fetcher.is_some());
        for bytes in [Vec::new(), vec![1; 8], vec![9; 8], vec![2; 4]] {
            let files = Vec::new();
            assert!(Piece::decode(Message { bytes, files }).is_none());
        }
    }
}
