//! Blobs: the bytes of layers as stored, local or fetched from a registry on demand.
//!
//! A [`Blob`] is a local file, or a file in the cache whose bytes are fetched when they are needed. A
//! range that was not fetched reads as zeros, so no method of a blob reads a range that was not located
//! first:
//!
//! ```text
//! blob.locate(offset, len) -> Located::Present(PresentRange)   read it: mapped, cached, ring, pread
//!                             Located::Absent(AbsentRange)     fetch it: request, wait, fetch_ahead
//! ```
//!
//! Only a [`PresentRange`] gives access to bytes or a descriptor. A local file has no [`Presence`], so
//! that locating a range costs one branch. A partial blob is looked up in its [`Presence`] until it is known to be
//! complete, and is read like a local file from then on.
//!
//! A queue worker calls [`AbsentRange::request`] with its own [`Waker`] and a ticket that identifies the
//! parked request, and continues with other requests. The descriptor of the waker becomes readable when a
//! fetch has finished; [`Waker::take`] returns the tickets. For a ticket without an error the worker
//! locates the range again, which may be absent again. An error fails the parked request. A worker that
//! stops drops its waker, and with it the outcomes of later fetches.
//!
//! Tools, and the code that opens layers, use [`Blob::read_exact_at`], which waits for absent bytes up to
//! the deadline of the blob's presence.

pub mod blob;
mod blob_identity;
pub mod cached;
pub mod client;
mod completion;
pub mod counts;
mod layer_ref;
pub mod link;
mod lock;
mod opened;
mod openings;
pub mod presence;
pub mod protocol;
pub mod range;
pub mod recorder;
pub mod refetch;
pub mod resident_map;
pub mod waker;

use std::io;

use rustix::process::Resource;
use thiserror::Error;

use crate::io::rlimit;

pub use blob::Blob;
pub use blob_identity::BlobIdentity;
pub use layer_ref::{LayerRef, RemoteBlob};
pub use range::{AbsentRange, Located, PresentRange};
pub use waker::{FetchError, FetchErrorKind, Fetched, Presence, Ticket, Waker};

/// Why a blob's bytes cannot be read.
#[derive(Debug, Error)]
pub enum Error {
    /// The file cannot be opened.
    #[error("cannot open {layer}")]
    Open {
        /// The blob.
        layer: LayerRef,
        /// Error of the system.
        source: io::Error,
    },
    /// The file cannot be locked.
    #[error("cannot lock {layer}")]
    Lock {
        /// The blob.
        layer: LayerRef,
        /// Error of the system.
        source: io::Error,
    },
    /// The path names a file of another kind, such as a directory or a pipe.
    #[error("{layer} is neither a regular file nor a block device")]
    NotAFile {
        /// The blob.
        layer: LayerRef,
    },
    /// Reading failed.
    #[error("cannot read {expected} bytes at byte {offset} of {layer}")]
    Read {
        /// The blob.
        layer: LayerRef,
        /// First byte of the range.
        offset: u64,
        /// Number of bytes of the range.
        expected: usize,
        /// Error of the system.
        source: io::Error,
    },
    /// The file ends before the range does.
    #[error("{layer} is too short: expected {expected} bytes at byte {offset}, found {found}")]
    Short {
        /// The blob.
        layer: LayerRef,
        /// First byte of the range.
        offset: u64,
        /// Number of bytes of the range.
        expected: usize,
        /// Number of bytes in the file from `offset` on.
        found: usize,
    },
    /// The blob is in a registry, and the caller has no fetcher.
    #[error("{layer} is not local: pull it, or name its file")]
    Remote {
        /// The blob.
        layer: LayerRef,
    },
    /// The bytes are not local and cannot be fetched.
    #[error("cannot fetch {expected} bytes at byte {offset} of {layer}")]
    Fetch {
        /// The blob.
        layer: LayerRef,
        /// First byte of the range.
        offset: u64,
        /// Number of bytes of the range.
        expected: usize,
        /// Error of the fetch.
        source: FetchError,
    },
}

/// Raises the soft limit of open files to fit `count` more, as far as the hard limit allows. Returns how
/// many more fit, at most `count`. Each layer of a stack is an open file, and the usual soft limit is
/// 1024. Opening reports a layer that does not fit.
pub fn make_room(count: usize) -> usize {
    /// Files that the rest of the process may have open, unless that is more than half of the limit.
    const OTHERS: u64 = 512;
    let limit = rlimit::raise(Resource::Nofile, OTHERS.saturating_add(count as u64));
    count.min(limit.saturating_sub(OTHERS.min(limit / 2)) as usize)
}
