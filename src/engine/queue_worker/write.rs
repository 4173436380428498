//! Requests that change the disk, and those that make changes durable.
//!
//! A write goes from guest memory into the page cache at once. Everything else is left to the
//! offload thread, whose results are taken as finished reads are. The compiler is told to keep all
//! this out of the loop that serves reads.

use super::QueueWorker;
use crate::engine::offload::{Change, Job, JobId, JobResult, Offload};
use crate::engine::request::{Outcome, Request};
use crate::units::SectorRange;
use crate::virtio::config::writes_through;
use crate::virtio::discard::DiscardRange;
use crate::virtio::request::HEADER;
use crate::virtio::status::Status;
use crate::writable::FlushRetries;

/// A write that is not done yet.
#[derive(Debug)]
struct Write<'a> {
    request: Request<'a>,
    range: SectorRange,
    retries: FlushRetries,
}

/// What the offload thread works for.
#[derive(Debug)]
enum Offloaded<'a> {
    /// A request whose answer is the job's result.
    Whole(Request<'a>),
    /// A write that is done again after the flush.
    Retry(Write<'a>),
}

/// The offload thread of a writable disk, and the requests it works for.
#[derive(Debug)]
pub struct OffloadedRequests<'a> {
    thread: Offload,
    requests: Vec<Option<Offloaded<'a>>>,
}

impl<'a> OffloadedRequests<'a> {
    /// No request yet.
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
        let free = self.requests.iter().position(Option::is_none);
        let index = free.unwrap_or_else(|| {
            self.requests.push(None);
            self.requests.len() - 1
        });
        self.requests[index] = Some(offloaded);
        // At most as many as the queue has descriptors, 32768.
        self.thread.begin(JobId(index as u16), job);
    }

    fn take(&mut self, JobId(index): JobId) -> Option<Offloaded<'a>> {
        self.requests.get_mut(usize::from(index))?.take()
    }
}

impl<'a> QueueWorker<'a> {
    /// Whether writes must be durable before they are answered.
    fn writes_through(&self) -> bool {
        writes_through(self.features, self.backend.writeback())
    }

    /// Writes the request's data to a range of the disk.
    #[inline(never)]
    pub(super) fn write(&mut self, request: Request<'a>, range: SectorRange) {
        self.try_write(Write {
            request,
            range,
            retries: FlushRetries::default(),
        });
    }

    /// Does a write. If it needs a flush first, the offload thread flushes, and the write is repeated.
    fn try_write(&mut self, mut write: Write<'a>) {
        if self.context.is_lost() {
            // The zeros that replace lost memory are not the guest's data. The answer is never
            // published.
            return self.finish(write.request.answer(Status::IoError));
        }
        // Read before the write: a driver that switches meanwhile is promised neither.
        let through = self.writes_through();
        let data = write.request.chain().readable().cursor(HEADER);
        let written = self.backend.volume().write_now(write.range, data);
        match written {
            Ok(()) if through => self.flush(write.request),
            Ok(()) => self.finish(write.request.answer(Status::Ok)),
            Err(error) if write.retries.allow(&error) => {
                self.offload(Offloaded::Retry(write), FLUSH);
            }
            Err(error) => {
                self.warn("a write", &error);
                self.finish(write.request.answer(Status::IoError));
            }
        }
    }

    /// Answers the request once all writes so far are durable.
    #[inline(never)]
    pub(super) fn flush(&mut self, request: Request<'a>) {
        self.offload(Offloaded::Whole(request), FLUSH);
    }

    /// Answers the request once `ranges` are changed.
    #[inline(never)]
    pub(super) fn change(
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
        self.offload(Offloaded::Whole(request), job);
    }

    /// Leaves the rest of a request to the offload thread.
    fn offload(&mut self, offloaded: Offloaded<'a>, job: Job) {
        if let Some(offload) = &mut self.offload {
            return offload.begin(offloaded, job);
        }
        // A read-only backend: a flush has nothing to do, and no other request comes here.
        let status = match job.change {
            None => Status::Ok,
            Some(_) => Status::IoError,
        };
        match offloaded {
            Offloaded::Whole(request) => self.finish(request.answer(status)),
            Offloaded::Retry(write) => self.finish(write.request.answer(Status::IoError)),
        }
    }

    /// Requests that are left to the offload thread.
    pub(super) fn offloaded(&self) -> usize {
        let offload = self.offload.as_ref();
        offload.map_or(0, |offload| offload.thread.under_way())
    }

    /// Takes what the offload thread has done; returns whether there was anything.
    pub(super) fn take_offloaded(&mut self) -> bool {
        let mut any = false;
        while let Some(result) = self.offload.as_mut().and_then(|own| own.thread.result()) {
            any = true;
            self.end_job(result);
        }
        any
    }

    /// Waits for all that is left to the offload thread.
    pub(super) fn wait_offloaded(&mut self) {
        while let Some(result) = self.offload.as_mut().and_then(|own| own.thread.wait()) {
            self.end_job(result);
        }
    }

    /// Answers a request whose job has ended, or does its write again.
    fn end_job(&mut self, (id, result): JobResult) {
        let Some(offloaded) = self.offload.as_mut().and_then(|own| own.take(id)) else {
            return;
        };
        let outcome = result.map_or(Outcome::Open, Outcome::Answered);
        match offloaded {
            Offloaded::Retry(write) if outcome == Outcome::Answered(Status::Ok) => {
                self.try_write(write);
            }
            Offloaded::Whole(request) | Offloaded::Retry(Write { request, .. }) => {
                self.finish(request.finish(outcome, 0));
            }
        }
    }
}

const FLUSH: Job = Job {
    change: None,
    flush: true,
};
