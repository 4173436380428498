//! The bytes of blobs: where they lie, and whether they are local.
//!
//! A [`Blob`] is a layer's file as stored: a local file, or a file in the cache whose bytes are
//! fetched from a registry when they are needed. The bytes of an unfetched range read as zeros, so
//! no method of a blob reads a range that was not located first:
//!
//! ```text
//! blob.locate(offset, len) -> Located::Present(PresentRange)   read it: mapped, cached, ring, pread
//!                             Located::Absent(AbsentRange)     fetch it: request, wait, fetch_ahead
//! ```
//!
//! Only a [`PresentRange`] has methods that yield bytes or a descriptor. A local file has no
//! [`Presence`], so that locating costs one branch.
//!
//! A queue worker calls [`AbsentRange::request`] with its own [`Waker`] and a ticket that names the
//! parked request, and goes on with other requests. The waker's descriptor turns readable when a
//! fetch has finished; [`Waker::take`] returns the tickets. For a ticket without an error the worker
//! locates the range again, which may be absent again; an error fails the parked request. A worker
//! that stops drops its waker; what finishes later is lost with it.
//!
//! Tools, and the code that opens layers, use [`Blob::read_exact_at`], which waits for absent bytes
//! up to the deadline of the blob's presence.

pub mod blob;
pub mod cached;
pub mod client;
pub mod counts;
mod layer_ref;
pub mod link;
mod opened;
pub mod presence;
pub mod protocol;
pub mod range;
pub mod recorder;
pub mod resident_map;
pub mod waker;

use std::io;

use rustix::process::Resource;
use thiserror::Error;

use crate::io::rlimit;

pub use blob::{Blob, BlobIdentity};
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
        /// What the system said.
        source: io::Error,
    },
    /// The file cannot be locked.
    #[error("cannot lock {layer}")]
    Lock {
        /// The blob.
        layer: LayerRef,
        /// What the system said.
        source: io::Error,
    },
    /// The path names something that has no bytes at offsets.
    #[error("{layer} is neither a regular file nor a block device")]
    NotAFile {
        /// The blob.
        layer: LayerRef,
    },
    /// The system failed to read.
    #[error("cannot read {expected} bytes at byte {offset} of {layer}")]
    Read {
        /// The blob.
        layer: LayerRef,
        /// First byte wanted.
        offset: u64,
        /// Number of bytes wanted.
        expected: usize,
        /// What the system said.
        source: io::Error,
    },
    /// The file ends before the bytes wanted do.
    #[error("{layer} is too short: expected {expected} bytes at byte {offset}, found {found}")]
    Short {
        /// The blob.
        layer: LayerRef,
        /// First byte wanted.
        offset: u64,
        /// Number of bytes wanted.
        expected: usize,
        /// Number of bytes there are.
        found: usize,
    },
    /// The blob is in a registry, and this program does not fetch it.
    #[error("{layer} is not local: pull it, or name its file")]
    Remote {
        /// The blob.
        layer: LayerRef,
    },
    /// The bytes are not local, and cannot be fetched.
    #[error("cannot fetch {expected} bytes at byte {offset} of {layer}")]
    Fetch {
        /// The blob.
        layer: LayerRef,
        /// First byte wanted.
        offset: u64,
        /// Number of bytes wanted.
        expected: usize,
        /// Why they cannot be fetched.
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
