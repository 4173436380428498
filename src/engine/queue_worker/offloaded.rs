//! Requests that wait for the offload thread, which flushes, discards and writes zeroes for them.
//!
//! The loop takes the results as it takes finished reads. The functions are not inlined, to keep the loop
//! small for reads.
#![cfg_attr(not(test), warn(clippy::indexing_slicing))]

use super::QueueWorker;
use super::paused::Paused;
use super::unfinished_write::UnfinishedWrite;
use crate::engine::full_storage::SpaceWait;
use crate::engine::offload::{
    EndedOperation, Offload, OperationEnd, OperationId, RangeChange, VolumeOperation,
};
use crate::engine::request::{Request, RequestEnd};
use crate::virtio::discard::DiscardRange;
use crate::virtio::status::Status;

const FLUSH: VolumeOperation = VolumeOperation {
    change: None,
    flush: true,
};

/// Request that waits for an operation of the offload thread.
#[derive(Debug)]
struct Offloaded<'a> {
    then: Then<'a>,
    /// If it waited for space in the storage before.
    wait: Option<SpaceWait<'a>>,
}

/// What follows the end of an operation.
#[derive(Debug)]
enum Then<'a> {
    /// The operation's result is the answer.
    Answer(Request<'a>),
    /// The operation is a flush, after which the write is repeated.
    Write(UnfinishedWrite<'a>),
}

/// Offload thread of a writable disk, and the requests that wait for its operations, by operation id.
#[derive(Debug)]
pub struct OffloadedRequests<'a> {
    thread: Offload,
    requests: Vec<Option<Offloaded<'a>>>,
}

impl<'a> OffloadedRequests<'a> {
    /// No offloaded request.
    pub fn new(thread: Offload) -> Self {
        Self {
            thread,
            requests: Vec::new(),
        }
    }

    /// The thread.
    pub fn thread(&self) -> &Offload {
        &self.thread
    }

    fn begin(&mut self, offloaded: Offloaded<'a>, operation: VolumeOperation) {
        let mut requests = (0u16..).zip(&mut self.requests);
        let id = match requests.find(|(_, request)| request.is_none()) {
            Some((id, request)) => {
                *request = Some(offloaded);
                id
            }
            None => {
                // As many requests as the queue has descriptors, at most 32768.
                let id = self.requests.len() as u16;
                self.requests.push(Some(offloaded));
                id
            }
        };
        self.thread.begin(OperationId(id), operation);
    }

    fn take(&mut self, OperationId(index): OperationId) -> Option<Offloaded<'a>> {
        self.requests.get_mut(usize::from(index))?.take()
    }
}

impl<'a> Then<'a> {
    fn into_request(self) -> Request<'a> {
        match self {
            Then::Answer(request) => request,
            Then::Write(write) => write.into_request(),
        }
    }
}

impl<'a> QueueWorker<'a> {
    /// Answers a request, which may have waited for space, once all earlier writes are durable.
    #[inline(never)]
    pub(super) fn flush(&mut self, request: Request<'a>, wait: Option<SpaceWait<'a>>) {
        self.offload(Then::Answer(request), wait, FLUSH);
    }

    /// Answers a request once `ranges` are discarded or zeroed.
    #[inline(never)]
    pub(super) fn discard_or_zero(
        &mut self,
        request: Request<'a>,
        change: RangeChange,
        ranges: Vec<DiscardRange>,
    ) {
        if self.context.is_lost() {
            return self.finish(request.answer(Status::IoError));
        }
        let operation = VolumeOperation {
            change: Some((change, ranges)),
            flush: self.writes_through(),
        };
        self.offload(Then::Answer(request), None, operation);
    }

    /// Repeats a write, which may have waited for space, after a flush.
    pub(super) fn flush_and_retry(
        &mut self,
        write: UnfinishedWrite<'a>,
        wait: Option<SpaceWait<'a>>,
    ) {
        self.offload(Then::Write(write), wait, FLUSH);
    }

    /// Repeats the operation of a request that waited for space.
    pub(super) fn repeat_operation(
        &mut self,
        request: Request<'a>,
        operation: VolumeOperation,
        wait: SpaceWait<'a>,
    ) {
        self.offload(Then::Answer(request), Some(wait), operation);
    }

    /// Offloads an operation, for which a request waits.
    fn offload(&mut self, then: Then<'a>, wait: Option<SpaceWait<'a>>, operation: VolumeOperation) {
        if let Some(offload) = &mut self.offload {
            return offload.begin(Offloaded { then, wait }, operation);
        }
        // A read-only backend: a flush has nothing to do, and no other request comes here.
        let status = match (&then, operation.change) {
            (Then::Answer(_), None) => Status::Ok,
            _ => Status::IoError,
        };
        self.finish(then.into_request().answer(status));
    }

    /// Number of offloaded requests.
    pub(super) fn offloaded(&self) -> usize {
        let offload = self.offload.as_ref();
        offload.map_or(0, |offload| offload.thread.under_way())
    }

    /// Takes the results of the offload thread; returns whether there were any.
    pub(super) fn take_offloaded(&mut self) -> bool {
        let mut any = false;
        while let Some(result) = self.offload.as_mut().and_then(|own| own.thread.result()) {
            any = true;
            self.end_operation(result);
        }
        any
    }

    /// Waits for all offloaded requests.
    pub(super) fn wait_offloaded(&mut self) {
        while let Some(result) = self.offload.as_mut().and_then(|own| own.thread.wait()) {
            self.end_operation(result);
        }
    }

    /// Answers the request of an operation that has ended, or repeats its write.
    fn end_operation(&mut self, EndedOperation { id, operation, end }: EndedOperation) {
        let Some(Offloaded { then, wait }) = self.offload.as_mut().and_then(|own| own.take(id))
        else {
            return;
        };
        let end = match end {
            OperationEnd::StorageFull { reason } => {
                let wait = self.wait_for_space(wait, &reason);
                return self.pause(match then {
                    Then::Answer(request) => Paused::Operation(request, operation, wait),
                    Then::Write(write) => Paused::Write(write, wait),
                });
            }
            OperationEnd::Late => RequestEnd::Open,
            OperationEnd::Answered(status) => RequestEnd::Answered(status),
        };
        match then {
            Then::Write(write) if end == RequestEnd::Answered(Status::Ok) => {
                self.try_write(write, wait);
            }
            then => self.finish(then.into_request().finish(end, 0)),
        }
    }
}
