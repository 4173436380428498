//! Receivers of the news that units are present.

use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::mpsc::Sender;

use super::origin::Failure;
use crate::source::link::Link;
use crate::source::protocol::{Reply, Subject};

/// A receiver, which is answered once.
#[derive(Debug)]
pub(super) enum Waiter {
    /// A disk process.
    Session {
        link: Arc<Link>,
        ticket: u64,
        /// Answers that it still waits for.
        outstanding: Arc<AtomicUsize>,
    },
    /// A thread of this process.
    Local { sender: Sender<Result<(), Failure>> },
}

impl Waiter {
    pub(super) fn answer(self, result: Result<(), &Failure>) {
        match self {
            Self::Session {
                link,
                ticket,
                outstanding,
            } => {
                outstanding.fetch_sub(1, Ordering::Relaxed);
                let reply = match result {
                    Ok(()) => Reply::Ready { ticket },
                    Err(failure) => Reply::Failed {
                        subject: Subject::Ticket(ticket),
                        kind: failure.kind,
                        reason: failure.reason.clone(),
                    },
                };
                link.send(reply.encode(), Vec::new());
            }
            // A thread that is gone needs no answer.
            Self::Local { sender } => _ = sender.send(result.map_err(Clone::clone)),
        }
    }

    /// Whether it is the disk process at the other end of `link`.
    pub(super) fn is_at(&self, link: &Arc<Link>) -> bool {
        match self {
            Self::Session { link: own, .. } => Arc::ptr_eq(own, link),
            Self::Local { .. } => false,
        }
    }
}
