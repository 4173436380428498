//! Requests that wait for the offload thread, which flushes, discards and writes zeroes for them.
//!
//! The loop takes the results as it takes finished reads. The functions are not inlined, to keep the loop
//! small for reads.
#![cfg_attr(not(test), warn(clippy::indexing_slicing))]

use super::QueueWorker;
use super::paused::Paused;
use super::unfinished_write::UnfinishedWrite;
use crate::engine::full_storage::SpaceWait;
use crate::engine::offload::{Change, Job, JobEnd, JobId, JobResult, Offload};
use crate::engine::request::{Outcome, Request};
use crate::virtio::discard::DiscardRange;
use crate::virtio::status::Status;

const FLUSH: Job = Job {
    change: None,
    flush: true,
};

/// Request that waits for a job of the offload thread.
#[derive(Debug)]
struct Offloaded<'a> {
    then: Then<'a>,
    /// If it waited for space in the storage before.
    wait: Option<SpaceWait<'a>>,
}

/// What follows the end of a job.
#[derive(Debug)]
enum Then<'a> {
    /// The job's result is the answer.
    Answer(Request<'a>),
    /// The job is a flush, after which the write is repeated.
    Write(UnfinishedWrite<'a>),
}

/// Offload thread of a writable disk, and the requests that wait for its jobs, by job id.
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

    fn begin(&mut self, offloaded: Offloaded<'a>, job: Job) {
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
        self.thread.begin(JobId(id), job);
    }

    fn take(&mut self, JobId(index): JobId) -> Option<Offloaded<'a>> {
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
        change: Change,
        ranges: Vec<DiscardRange>,
    ) {
        if self.context.is_lost() {
            return self.finish(request.answer(Status::IoError));
        }
        let job = Job {
            change: Some((change, ranges)),
            flush: self.writes_through(),
        };
        self.offload(Then::Answer(request), None, job);
    }

    /// Repeats a write, which may have waited for space, after a flush.
    pub(super) fn flush_and_retry(
        &mut self,
        write: UnfinishedWrite<'a>,
        wait: Option<SpaceWait<'a>>,
    ) {
        self.offload(Then::Write(write), wait, FLUSH);
    }

    /// Repeats the job of a request that waited for space.
    pub(super) fn repeat_job(&mut self, request: Request<'a>, job: Job, wait: SpaceWait<'a>) {
        self.offload(Then::Answer(request), Some(wait), job);
    }

    /// Offloads a job, for which a request waits.
    fn offload(&mut self, then: Then<'a>, wait: Option<SpaceWait<'a>>, job: Job) {
        if let Some(offload) = &mut self.offload {
            return offload.begin(Offloaded { then, wait }, job);
        }
        // A read-only backend: a flush has nothing to do, and no other request comes here.
        let status = match (&then, job.change) {
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
            self.end_job(result);
        }
        any
    }

    /// Waits for all offloaded requests.
    pub(super) fn wait_offloaded(&mut self) {
        while let Some(result) = self.offload.as_mut().and_then(|own| own.thread.wait()) {
            self.end_job(result);
        }
    }

    /// Answers the request of a job that has ended, or repeats its write.
    fn end_job(&mut self, JobResult { id, job, end }: JobResult) {
        let Some(Offloaded { then, wait }) = self.offload.as_mut().and_then(|own| own.take(id))
        else {
            return;
        };
        let outcome = match end {
            JobEnd::StorageFull { reason } => {
                let wait = self.wait_for_space(wait, &reason);
                return self.pause(match then {
                    Then::Answer(request) => Paused::Job(request, job, wait),
                    Then::Write(write) => Paused::Write(write, wait),
                });
            }
            JobEnd::Late => Outcome::Open,
            JobEnd::Answered(status) => Outcome::Answered(status),
        };
        match then {
            Then::Write(write) if outcome == Outcome::Answered(Status::Ok) => {
                self.try_write(write, wait);
            }
            then => self.finish(then.into_request().finish(outcome, 0)),
        }
    }
}
