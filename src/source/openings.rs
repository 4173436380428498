//! The blobs that a client opens and has open, by their numbers.
//!
//! ```text
//! ask --> Asked --answered--> Done --take--> Taken --register--> Open
//! ```
//! A fetcher also sends the descriptors of a blob without being asked: when it opens a blob that an earlier
//! fetcher opened for the client, and when it opens another file in place of a damaged one. The open blob
//! takes them ([`Reopen`]): the files of the cache may have been removed meanwhile, and bytes arrive in the
//! new ones only.

use std::collections::HashMap;
use std::fmt::Debug;
use std::sync::{Arc, Weak};

use super::opened::Opened;
use super::waker::FetchError;

/// An open blob that takes the descriptors that a fetcher sends later.
pub(super) trait Reopen: Debug + Send + Sync {
    /// Takes descriptors of the blob. They may be of the files that are open already.
    fn reopen(&self, opened: Opened);
}

/// State of a blob.
#[derive(Debug)]
enum Opening {
    /// The fetcher was asked for the descriptors.
    Asked,
    Done(Result<Opened, FetchError>),
    /// The thread that asked has the descriptors; these arrived later.
    Taken(Option<Opened>),
    Open(Weak<dyn Reopen>),
}

/// The blobs of a client.
#[derive(Debug, Default)]
pub(super) struct Openings(HashMap<u32, Opening>);

impl Openings {
    /// Notes that the fetcher is asked for a blob.
    pub(super) fn ask(&mut self, blob: u32) {
        self.0.insert(blob, Opening::Asked);
    }

    /// The blobs that the fetcher did not answer.
    pub(super) fn asked(&self) -> impl Iterator<Item = u32> {
        let asked = self
            .0
            .iter()
            .filter(|(_, opening)| matches!(opening, Opening::Asked));
        asked.map(|(blob, _)| *blob)
    }

    /// Takes the answer for a blob, if it has arrived.
    pub(super) fn take(&mut self, blob: u32) -> Option<Result<Opened, FetchError>> {
        let opening = self.0.get_mut(&blob)?;
        if !matches!(opening, Opening::Done(_)) {
            return None;
        }
        match std::mem::replace(opening, Opening::Taken(None)) {
            Opening::Done(result) => Some(result),
            Opening::Asked | Opening::Taken(_) | Opening::Open(_) => None,
        }
    }

    /// Notes that no thread waits for a blob any more.
    pub(super) fn give_up(&mut self, blob: u32) {
        self.0.remove(&blob);
    }

    /// Notes an answer. Returns the open blob that takes the descriptors, if there is one.
    pub(super) fn answered(
        &mut self,
        blob: u32,
        result: Result<Opened, FetchError>,
    ) -> Option<(Arc<dyn Reopen>, Opened)> {
        match (self.0.get_mut(&blob)?, result) {
            (opening @ Opening::Asked, result) => *opening = Opening::Done(result),
            // The newest descriptors are those that bytes arrive in.
            (Opening::Done(done), Ok(opened)) => *done = Ok(opened),
            (Opening::Taken(later), Ok(opened)) => *later = Some(opened),
            (Opening::Open(open), Ok(opened)) => return open.upgrade().map(|open| (open, opened)),
            (Opening::Done(_) | Opening::Taken(_) | Opening::Open(_), Err(_)) => {}
        }
        None
    }

    /// Notes the open blob that was made of the descriptors; returns those that arrived later.
    pub(super) fn register(&mut self, blob: u32, open: Weak<dyn Reopen>) -> Option<Opened> {
        match self.0.insert(blob, Opening::Open(open))? {
            Opening::Taken(later) => later,
            Opening::Asked | Opening::Done(_) | Opening::Open(_) => None,
        }
    }
}
