//! A request from the available ring to the used ring: [`Request`], then [`Finished`].
//!
//! Both hold the [`Head`] that must go back to the virtqueue, so that no request is dropped unanswered.
#![cfg_attr(not(test), warn(clippy::indexing_slicing))]

use super::stats::queue::{Counted, Op, Taken};
use crate::virtio::chain::Chain;
use crate::virtio::queue::{Head, Queue};
use crate::virtio::status::{Status, StatusByte};

/// A request that was taken from the available ring.
#[derive(Debug)]
pub struct Request<'a> {
    head: Head,
    op: Op,
    begun: Taken,
    status: StatusByte<'a>,
    chain: Box<Chain<'a>>,
}

/// How a request ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum RequestEnd {
    /// Answer it with this status.
    Answered(Status),
    /// The queue stops before the request is done. The next worker of the queue repeats it.
    Open,
}

/// A request of which no work is under way any more.
#[derive(Debug)]
pub struct Finished<'a> {
    request: Request<'a>,
    end: RequestEnd,
    /// Bytes of its writable memory that may have been written, from the first one on; all of them
    /// were if the status is good.
    written: usize,
}

impl<'a> Request<'a> {
    /// A request whose chain was walked into `chain`, and which is taken at `begun`.
    pub fn new(head: Head, status: StatusByte<'a>, chain: Box<Chain<'a>>, begun: Taken) -> Self {
        Self {
            head,
            op: Op::Other,
            begun,
            status,
            chain,
        }
    }

    /// Counts the request as one of operation `op`.
    #[inline]
    pub fn is_a(&mut self, op: Op) {
        self.op = op;
    }

    /// The guest memory of the request.
    #[inline]
    pub fn chain(&self) -> &Chain<'a> {
        &self.chain
    }

    /// Ends the request. The first `written` bytes of its writable memory may have been written.
    #[inline]
    pub fn finish(self, end: RequestEnd, written: usize) -> Finished<'a> {
        Finished {
            request: self,
            end,
            written,
        }
    }

    /// Ends a request that wrote nothing but its status.
    pub fn answer(self, status: Status) -> Finished<'a> {
        self.finish(RequestEnd::Answered(status), 0)
    }
}

impl<'a> Finished<'a> {
    /// Writes the status and puts the chain into the used ring, or leaves the chain to the next worker
    /// of `queue`. Without an in-flight area the queue has no such worker: then the request fails.
    #[inline]
    pub fn put(self, queue: &mut Queue<'a>) -> Put<'a> {
        let Request {
            head,
            op,
            begun,
            status: byte,
            chain,
        } = self.request;
        let (head, status) = match self.end {
            RequestEnd::Answered(status) => (head, status),
            RequestEnd::Open => match queue.leave(head) {
                Ok(()) => {
                    return Put {
                        answer: None,
                        chain,
                    };
                }
                Err(head) => (head, Status::IoError),
            },
        };
        let log = queue.memory().log();
        if let Some(log) = log {
            chain.mark_written(log, self.written as u64);
        }
        byte.write(status, log);
        let data = match status {
            Status::Ok => self.written,
            _ => 0,
        };
        // The data is no longer than MAX_DATA.
        let len = data as u32 + 1;
        queue.finish(head, len);
        let answer = Answer {
            counted: Counted { op, begun },
            status,
            len,
        };
        Put {
            answer: Some(answer),
            chain,
        }
    }
}

/// A request that was put into the used ring, or left.
#[derive(Debug)]
pub struct Put<'a> {
    /// `None` for a request that was left.
    pub answer: Option<Answer>,
    /// The lists of the chain, for reuse.
    pub chain: Box<Chain<'a>>,
}

/// The answer of a request.
#[derive(Clone, Copy, Debug)]
pub struct Answer {
    /// The request.
    pub counted: Counted,
    /// The status.
    pub status: Status,
    /// Bytes written, with the status.
    pub len: u32,
}
