//! A request from the available ring to the used ring: [`Request`], then [`Finished`].
//!
//! Neither is copied, and neither can be dropped unnoticed: each holds the [`Head`] that must go
//! back to the queue.

use crate::virtio::chain::Chain;
use crate::virtio::queue::Head;
use crate::virtio::status::{Status, StatusByte};

/// A chain that was taken and can be answered.
#[derive(Debug)]
pub struct Request<'a> {
    head: Head,
    status: StatusByte<'a>,
    chain: Box<Chain<'a>>,
}

/// How a request ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Outcome {
    /// It is answered with this status.
    Answered(Status),
    /// The queue stops before it is done. The next worker of the queue does it again.
    Open,
}

/// A request of which nothing is under way any more.
#[derive(Debug)]
pub struct Finished<'a> {
    /// Its chain in the rings.
    pub head: Head,
    /// The place of its status.
    pub status: StatusByte<'a>,
    /// Its memory.
    pub chain: Box<Chain<'a>>,
    /// How it ended.
    pub outcome: Outcome,
    /// Bytes of its writable memory that may have been written, from the first one on; all of them
    /// were if the status is good.
    pub touched: usize,
}

impl<'a> Request<'a> {
    /// A request whose chain was walked into `chain`.
    pub fn new(head: Head, status: StatusByte<'a>, chain: Box<Chain<'a>>) -> Self {
        Self {
            head,
            status,
            chain,
        }
    }

    /// The guest memory of the request.
    pub fn chain(&self) -> &Chain<'a> {
        &self.chain
    }

    /// Ends the request, of whose writable memory the first `touched` bytes may have been written.
    pub fn finish(self, outcome: Outcome, touched: usize) -> Finished<'a> {
        Finished {
            head: self.head,
            status: self.status,
            chain: self.chain,
            outcome,
            touched,
        }
    }

    /// Ends a request that wrote nothing but its status.
    pub fn answer(self, status: Status) -> Finished<'a> {
        self.finish(Outcome::Answered(status), 0)
    }
}
