//! Origins: the interface to servers of blobs.

use std::fmt::Debug;
use std::io::Read;
use std::time::Duration;

use crate::source::FetchErrorKind;

/// One blob at one place that serves ranges of it.
pub trait Origin: Debug + Send + Sync {
    /// Asks for `len` bytes from `offset` on. The body starts there; it may be shorter.
    ///
    /// # Errors
    /// A [`Failure`]; [`Failure::without_ranges`] if only [`Origin::read_whole`] will do.
    fn read(&self, offset: u64, len: u64, from: From) -> Result<Body, Failure>;

    /// Asks for the whole blob.
    ///
    /// # Errors
    /// A [`Failure`].
    fn read_whole(&self) -> Result<Body, Failure>;

    /// Asks for the length of the blob.
    ///
    /// # Errors
    /// A [`Failure`], also if the server does not tell.
    fn blob_len(&self) -> Result<u64, Failure>;
}

/// Servers that a range may be fetched from.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum From {
    /// A mirror, if there is one that does.
    Nearest,
    /// The registry itself: a mirror may have served wrong bytes.
    Registry,
}

/// Bytes of a blob as they arrive.
pub struct Body {
    /// Yields `len` bytes, then the end. An error in it may be a [`Failure`].
    pub reader: Box<dyn Read + Send>,
    /// Bytes that come.
    pub len: u64,
}

/// Error of a fetch.
#[derive(Clone, Debug, thiserror::Error)]
#[error("{reason}")]
pub struct Failure {
    /// Kind of the failure.
    pub kind: FetchErrorKind,
    /// Whether repeating the request soon gives the same.
    pub definite: bool,
    /// Whether a start ends with it, although the next attempt may succeed.
    pub ends_start: bool,
    /// The server's wish for a pause.
    pub retry_after: Option<Duration>,
    /// Whether no request was made, because the server did not answer others.
    pub resting: bool,
    /// Whether the server answered, and the answer cannot be one to the request.
    pub malformed: bool,
    /// Whether the server serves whole blobs only.
    pub without_ranges: bool,
    /// The reason in words.
    pub reason: String,
}

impl Failure {
    /// A failure that the next attempt may not meet.
    pub fn passing(kind: FetchErrorKind, reason: impl Into<String>) -> Self {
        Self {
            kind,
            definite: false,
            ends_start: false,
            retry_after: None,
            resting: false,
            malformed: false,
            without_ranges: false,
            reason: reason.into(),
        }
    }

    /// A failure that the next attempt meets as well.
    pub fn definite(kind: FetchErrorKind, reason: impl Into<String>) -> Self {
        Self {
            definite: true,
            ends_start: true,
            ..Self::passing(kind, reason)
        }
    }
}
