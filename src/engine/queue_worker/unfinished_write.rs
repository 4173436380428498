//! A write that has not succeeded yet: it may be repeated after a flush, or once the storage has space.
#![cfg_attr(not(test), warn(clippy::indexing_slicing))]

use crate::engine::request::Request;
use crate::io::scatter::Cursor;
use crate::units::SectorRange;
use crate::virtio::request::HEADER;
use crate::writable::{Error, FlushRetries};

/// A write that has not succeeded yet.
#[derive(Debug)]
pub(super) struct UnfinishedWrite<'a> {
    request: Request<'a>,
    range: SectorRange,
    retries: FlushRetries,
}

impl<'a> UnfinishedWrite<'a> {
    /// A write of the data of `request` to a range of the disk.
    pub(super) fn new(request: Request<'a>, range: SectorRange) -> Self {
        Self {
            request,
            range,
            retries: FlushRetries::default(),
        }
    }

    /// The request.
    pub(super) fn request(&self) -> &Request<'a> {
        &self.request
    }

    /// The request, to answer it.
    pub(super) fn into_request(self) -> Request<'a> {
        self.request
    }

    /// The range of the disk.
    pub(super) fn range(&self) -> SectorRange {
        self.range
    }

    /// The data, in guest memory.
    pub(super) fn data(&self) -> Cursor<'_, 'a> {
        self.request.chain().readable().cursor(HEADER)
    }

    /// Whether the write, which failed with `error`, may be repeated after a flush.
    pub(super) fn may_retry(&mut self, error: &Error) -> bool {
        self.retries.allow(error)
    }
}
