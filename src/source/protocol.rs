//! Messages between a process that serves a disk and the fetcher.
//!
//! ```text
//! disk process                                   fetcher
//!      | <------------------------------- Hello     after each start of a fetcher: repeat what is unanswered
//!      | Open { blob } ------------------------>
//!      | <------- Opened { blob, len, complete }    with the data file, and the map if not complete;
//!      |                                            also unasked, before bytes arrive in other files
//!      | Fetch { ticket, blob, range, cause } -->
//!      | <---------- Ready { ticket } | Failed { subject, kind, reason }
//!      | Fill { ticket, blob } ---------------->   all of the blob, verified
//!      | <---------- Ready { ticket } | Failed { subject, kind, reason }
//!      | Count ------------------------------->
//!      | <--------------------------- Counts
//! ```
//! Each message is one packet of [`MESSAGE_LEN`] bytes. A blob is named by its number in the list
//! that the owner of the fetcher gave it: a disk process cannot name any other. Neither side trusts
//! the other; every field is checked, and what is unused must be zero.

use thiserror::Error;
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout, Unaligned, little_endian};

use super::counts::{self, Counts};
use super::waker::FetchErrorKind;

/// Bytes of each message.
pub const MESSAGE_LEN: usize = 256;

/// Most bytes that one request may ask for.
pub const MAX_FETCH: u64 = 64 << 20;

const TEXT_LEN: usize = 208;

/// A packet as it is sent.
pub type Packet = [u8; MESSAGE_LEN];

/// Error of a packet that is not a message.
#[derive(Clone, Debug, PartialEq, Eq, Error)]
pub enum Error {
    /// It has another length.
    #[error("message has {0} bytes, expected {MESSAGE_LEN}")]
    Length(usize),
    /// Its kind is unknown to this side.
    #[error("unknown message kind {0}")]
    Kind(u32),
    /// A field has an invalid value.
    #[error("message of kind {kind} has the value {value} in field {field}")]
    Field {
        /// Kind of the message.
        kind: u32,
        /// Name of the field.
        field: &'static str,
        /// Its value.
        value: u64,
    },
    /// The text is longer than its field, or not UTF-8.
    #[error("the text of the message is malformed")]
    Text,
}

/// Why bytes are fetched, the most urgent first.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Cause {
    /// Opening a layer waits for them: a definite refusal ends the wait at once.
    Start,
    /// A guest's request waits for them.
    Demand,
    /// A program without a guest waits for them: as a demand, but a definite refusal ends the wait.
    Read,
    /// The bytes in the cache are damaged: they are fetched again and replaced, as a demand.
    Repair,
    /// The same while a layer is opened, or for a program without a guest: a refusal ends the wait.
    RepairRead,
    /// A recorded trace says that they will be needed. Nothing waits.
    Replay,
    /// A sequential reader will probably need them. Nothing waits.
    ReadAhead,
    /// The whole blob is wanted some day. Nothing waits.
    Background,
}

impl Cause {
    /// All causes.
    pub const ALL: [Self; 8] = [
        Self::Start,
        Self::Demand,
        Self::Read,
        Self::Repair,
        Self::RepairRead,
        Self::Replay,
        Self::ReadAhead,
        Self::Background,
    ];

    /// Whether a request with this cause is answered.
    pub const fn is_waited_for(self) -> bool {
        matches!(self, Self::Start | Self::Demand | Self::Read) || self.repairs()
    }

    /// Whether a guest waits, which outwaits refusals: an error would damage its file system.
    pub const fn is_of_guest(self) -> bool {
        matches!(self, Self::Demand | Self::Repair)
    }

    /// Whether a start or a command waits, and gives up after a while.
    pub const fn has_deadline(self) -> bool {
        matches!(self, Self::Start | Self::Read | Self::RepairRead)
    }

    /// Whether bytes that are present are fetched and replaced.
    pub const fn repairs(self) -> bool {
        matches!(self, Self::Repair | Self::RepairRead)
    }
}

/// Request of a disk process.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Request {
    /// The descriptors of a blob.
    Open {
        /// Number of the blob.
        blob: u32,
    },
    /// Bytes of a blob.
    Fetch {
        /// Name of the request in the answer.
        ticket: u64,
        /// Number of the blob.
        blob: u32,
        /// First byte.
        offset: u64,
        /// Number of bytes, 1 to [`MAX_FETCH`].
        len: u64,
        /// Why they are wanted.
        cause: Cause,
    },
    /// All of a blob, compared with its digest.
    Fill {
        /// Name of the request in the answer.
        ticket: u64,
        /// Number of the blob.
        blob: u32,
    },
    /// The fetcher's counters.
    Count,
}

/// Subject of a failure.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Subject {
    /// The opening of this blob.
    Blob(u32),
    /// The fetch with this ticket.
    Ticket(u64),
}

/// Reply of the fetcher.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Reply {
    /// A fetcher took over the connection, and knows of no earlier request.
    Hello,
    /// A blob is open; its descriptors come with the message.
    Opened {
        /// Number of the blob.
        blob: u32,
        /// Bytes of the blob.
        len: u64,
        /// Whether all of it is there: then it has no presence map.
        complete: bool,
    },
    /// The bytes of a fetch are present.
    Ready {
        /// The fetch.
        ticket: u64,
    },
    /// A request cannot be fulfilled.
    Failed {
        /// The request.
        subject: Subject,
        /// Kind of the failure.
        kind: FetchErrorKind,
        /// Reason in words, at most 208 bytes.
        reason: String,
    },
    /// The fetcher's counters.
    Counts(Counts),
}

const OPEN: u32 = 1;
const FETCH: u32 = 2;
const COUNT: u32 = 3;
const FILL: u32 = 4;
const HELLO: u32 = 16;
const OPENED: u32 = 17;
const READY: u32 = 18;
const FAILED_BLOB: u32 = 19;
const FAILED_TICKET: u32 = 20;
const COUNTS: u32 = 21;

#[derive(Clone, Copy, FromBytes, IntoBytes, KnownLayout, Immutable, Unaligned)]
#[repr(C)]
struct Raw {
    kind: little_endian::U32,
    blob: little_endian::U32,
    ticket: little_endian::U64,
    offset: little_endian::U64,
    len: little_endian::U64,
    /// Cause, kind of failure or completeness.
    detail: little_endian::U32,
    text_len: little_endian::U32,
    zero: [u8; 8],
    text: [u8; TEXT_LEN],
}

const _: () = assert!(size_of::<Raw>() == MESSAGE_LEN);
const _: () = assert!(counts::NAMES.len() * 8 <= TEXT_LEN);

impl Raw {
    fn new(kind: u32) -> Self {
        Self {
            kind: kind.into(),
            blob: 0.into(),
            ticket: 0.into(),
            offset: 0.into(),
            len: 0.into(),
            detail: 0.into(),
            text_len: 0.into(),
            zero: [0; 8],
            text: [0; TEXT_LEN],
        }
    }

    fn packet(&self) -> Packet {
        let mut packet = [0; MESSAGE_LEN];
        packet.copy_from_slice(self.as_bytes());
        packet
    }

    fn read(bytes: &[u8]) -> Result<Self, Error> {
        Self::read_from_bytes(bytes).map_err(|_| Error::Length(bytes.len()))
    }

    fn wrong(&self, field: &'static str, value: u64) -> Error {
        let kind = self.kind.get();
        Error::Field { kind, field, value }
    }

    /// Refuses a message that has more than the fields that were taken from it.
    fn expect(&self, taken: Self) -> Result<(), Error> {
        if self.as_bytes() == taken.as_bytes() {
            return Ok(());
        }
        Err(self.wrong("unused", 1))
    }
}

impl Request {
    /// Encodes the request.
    pub fn encode(&self) -> Packet {
        self.raw().packet()
    }

    fn raw(&self) -> Raw {
        match *self {
            Self::Open { blob } => Raw {
                blob: blob.into(),
                ..Raw::new(OPEN)
            },
            Self::Fetch {
                ticket,
                blob,
                offset,
                len,
                cause,
            } => Raw {
                blob: blob.into(),
                ticket: ticket.into(),
                offset: offset.into(),
                len: len.into(),
                detail: (cause as u32).into(),
                ..Raw::new(FETCH)
            },
            Self::Fill { ticket, blob } => Raw {
                blob: blob.into(),
                ticket: ticket.into(),
                ..Raw::new(FILL)
            },
            Self::Count => Raw::new(COUNT),
        }
    }

    /// Decodes a packet.
    ///
    /// # Errors
    /// One of [`Error`] if the packet is not a request.
    pub fn decode(bytes: &[u8]) -> Result<Self, Error> {
        let raw = Raw::read(bytes)?;
        let blob = raw.blob.get();
        let request = match raw.kind.get() {
            OPEN => Self::Open { blob },
            FETCH => {
                let (offset, len) = (raw.offset.get(), raw.len.get());
                if len == 0 || len > MAX_FETCH || offset.checked_add(len).is_none() {
                    return Err(raw.wrong("len", len));
                }
                let detail = raw.detail.get();
                let cause = Cause::ALL.get(detail as usize).copied();
                Self::Fetch {
                    ticket: raw.ticket.get(),
                    blob,
                    offset,
                    len,
                    cause: cause.ok_or_else(|| raw.wrong("cause", detail.into()))?,
                }
            }
            FILL => Self::Fill {
                ticket: raw.ticket.get(),
                blob,
            },
            COUNT => Self::Count,
            other => return Err(Error::Kind(other)),
        };
        raw.expect(request.raw())?;
        Ok(request)
    }
}

const FAILURES: [FetchErrorKind; 8] = [
    FetchErrorKind::Unauthorized,
    FetchErrorKind::NotFound,
    FetchErrorKind::Unreachable,
    FetchErrorKind::Busy,
    FetchErrorKind::Unexpected,
    FetchErrorKind::Timeout,
    FetchErrorKind::Damaged,
    FetchErrorKind::System,
];

impl Reply {
    /// Encodes the reply. A reason that is too long is cut.
    pub fn encode(&self) -> Packet {
        self.raw().packet()
    }

    fn raw(&self) -> Raw {
        match self {
            Self::Hello => Raw::new(HELLO),
            Self::Opened {
                blob,
                len,
                complete,
            } => Raw {
                blob: (*blob).into(),
                len: (*len).into(),
                detail: u32::from(*complete).into(),
                ..Raw::new(OPENED)
            },
            Self::Ready { ticket } => Raw {
                ticket: (*ticket).into(),
                ..Raw::new(READY)
            },
            Self::Failed {
                subject,
                kind,
                reason,
            } => {
                let mut raw = match subject {
                    Subject::Blob(blob) => Raw {
                        blob: (*blob).into(),
                        ..Raw::new(FAILED_BLOB)
                    },
                    Subject::Ticket(ticket) => Raw {
                        ticket: (*ticket).into(),
                        ..Raw::new(FAILED_TICKET)
                    },
                };
                let number = FAILURES.iter().position(|known| known == kind);
                raw.detail = (number.unwrap_or(FAILURES.len() - 1) as u32).into();
                let mut ends = (0..=TEXT_LEN.min(reason.len())).rev();
                let end = ends.find(|end| reason.is_char_boundary(*end));
                let text = &reason.as_bytes()[..end.unwrap_or(0)];
                raw.text[..text.len()].copy_from_slice(text);
                raw.text_len = (text.len() as u32).into();
                raw
            }
            Self::Counts(counts) => {
                let mut raw = Raw::new(COUNTS);
                for (place, count) in raw.text.chunks_exact_mut(8).zip(counts) {
                    place.copy_from_slice(&count.to_le_bytes());
                }
                raw
            }
        }
    }

    /// Decodes a packet.
    ///
    /// # Errors
    /// One of [`Error`] if the packet is not a reply.
    pub fn decode(bytes: &[u8]) -> Result<Self, Error> {
        let raw = Raw::read(bytes)?;
        let reply = match raw.kind.get() {
            HELLO => Self::Hello,
            OPENED => Self::Opened {
                blob: raw.blob.get(),
                len: raw.len.get(),
                complete: match raw.detail.get() {
                    0 => false,
                    1 => true,
                    other => return Err(raw.wrong("complete", other.into())),
                },
            },
            READY => Self::Ready {
                ticket: raw.ticket.get(),
            },
            FAILED_BLOB => raw.failed(Subject::Blob(raw.blob.get()))?,
            FAILED_TICKET => raw.failed(Subject::Ticket(raw.ticket.get()))?,
            COUNTS => Self::Counts(raw.counts()),
            other => return Err(Error::Kind(other)),
        };
        raw.expect(reply.raw())?;
        Ok(reply)
    }
}

impl Raw {
    fn counts(&self) -> Counts {
        let mut counts = Counts::default();
        for (count, place) in counts.iter_mut().zip(self.text.as_chunks().0) {
            *count = u64::from_le_bytes(*place);
        }
        counts
    }

    fn failed(&self, subject: Subject) -> Result<Reply, Error> {
        let detail = self.detail.get();
        let kind = FAILURES.get(detail as usize).copied();
        let kind = kind.ok_or_else(|| self.wrong("failure", detail.into()))?;
        let text = self.text.get(..self.text_len.get() as usize);
        let text = text.and_then(|bytes| std::str::from_utf8(bytes).ok());
        let reason = text.ok_or(Error::Text)?.to_owned();
        Ok(Reply::Failed {
            subject,
            kind,
            reason,
        })
    }
}

#[cfg(test)]
mod tests;
