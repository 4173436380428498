//! Ownership of the disk by one of several connected front-ends.
//!
//! Any number of front-ends may query the device. A front-end owns the disk from the moment it starts a
//! queue. Before that, the queues of the previous owner are drained and stopped, and its connection is
//! closed, so that no two front-ends use the disk or the same guest memory at a time. The [`takeover`](super::takeover)
//! policy may leave the disk to the previous owner. During a live migration source and destination are both
//! connected: the one whose guest runs owns the disk.

use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};

use super::error::Error;
use super::session::Session;
use super::takeover::Takeover;

/// Owner of the disk, if there is one.
#[derive(Debug, Default)]
pub struct Ownership {
    /// Held while the owner changes. It is locked before a handler, never after one.
    owner: Mutex<Option<Arc<Session>>>,
    policy: Takeover,
    /// Front-ends that the policy did not let take over.
    refused: AtomicU64,
}

impl Ownership {
    /// Returns the ownership of a disk that has no owner yet.
    pub fn new(policy: Takeover) -> Self {
        Self {
            policy,
            ..Self::default()
        }
    }

    /// Returns the number of front-ends that the policy did not let take over.
    pub fn refused(&self) -> u64 {
        self.refused.load(Ordering::Relaxed)
    }

    /// Makes `session` the owner. Drains the queues of the previous owner and closes its connection
    /// first.
    ///
    /// # Errors
    ///
    /// [`Error::TakenOver`] if another front-end has taken over from `session` meanwhile;
    /// [`Error::TakeoverRefused`] if the policy leaves the disk to the previous owner.
    pub fn give(&self, session: &Arc<Session>) -> Result<(), Error> {
        let mut owner = self.owner.lock().unwrap_or_else(PoisonError::into_inner);
        if session.is_retired() {
            return Err(Error::TakenOver);
        }
        match &*owner {
            Some(current) if Arc::ptr_eq(current, session) => return Ok(()),
            Some(current) if !self.policy.allows(&current.as_owner(), session.peer()) => {
                self.refused.fetch_add(1, Ordering::Relaxed);
                return Err(Error::TakeoverRefused {
                    owner: current.peer().to_string(),
                });
            }
            Some(current) => {
                session.announce_takeover(current);
                current.retire();
                *owner = Some(session.clone());
            }
            None => *owner = Some(session.clone()),
        }
        session.peer().hold();
        let (pid, uid) = session.peer().ids();
        session.stats().set_front_end(pid, uid);
        Ok(())
    }

    /// Whether `session` is the owner, or the owner is changing.
    pub fn has(&self, session: &Arc<Session>) -> bool {
        match self.owner.try_lock() {
            Ok(owner) => owner
                .as_ref()
                .is_some_and(|owner| Arc::ptr_eq(owner, session)),
            Err(_) => true,
        }
    }

    /// Ends the ownership of `session`, whose queues are stopped; returns whether it was the owner.
    pub fn give_back(&self, session: &Arc<Session>) -> bool {
        let mut owner = self.owner.lock().unwrap_or_else(PoisonError::into_inner);
        let had = owner
            .as_ref()
            .is_some_and(|owner| Arc::ptr_eq(owner, session));
        if had {
            *owner = None;
            session.stats().clear_front_end();
        }
        had
    }
}
