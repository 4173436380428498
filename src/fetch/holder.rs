//! Disk processes that have a blob open, and the descriptors that they get.

use std::io;
use std::os::fd::OwnedFd;
use std::sync::{Arc, Weak};

use crate::cache::Entry;
use crate::format::presence::Identity;
use crate::source::link::Link;
use crate::source::protocol::Reply;

/// A disk process that has a blob open.
#[derive(Debug)]
pub(super) struct Holder {
    link: Weak<Link>,
    /// The blob's place in the list of the disk process.
    number: u32,
}

impl Holder {
    pub(super) fn new(link: &Arc<Link>, number: u32) -> Self {
        Self {
            link: Arc::downgrade(link),
            number,
        }
    }

    /// Whether the disk process is gone.
    pub(super) fn is_gone(&self) -> bool {
        self.link.strong_count() == 0
    }

    /// Sends the descriptors of a blob.
    pub(super) fn send(&self, entry: &Entry, identity: &Identity) -> io::Result<()> {
        let files = descriptors(entry)?;
        let reply = Reply::Opened {
            blob: self.number,
            len: identity.len(),
            complete: entry.is_complete(),
        };
        if let Some(link) = self.link.upgrade() {
            link.send(reply.encode(), files);
        }
        Ok(())
    }
}

/// Descriptors that only read. They share the open file descriptions that are locked against
/// eviction.
fn descriptors(entry: &Entry) -> io::Result<Vec<OwnedFd>> {
    match entry {
        Entry::Complete(file) => Ok(vec![file.try_clone()?.into()]),
        Entry::Partial(partial) => {
            let files = partial.files();
            let (data, map) = (files.data.try_clone()?, files.map.try_clone()?);
            Ok(vec![data.into(), map.into()])
        }
    }
}
