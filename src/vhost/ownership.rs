//! Ownership of the disk by one of several connected front-ends.
//!
//! Any number of front-ends may query the device. A front-end owns the disk from the moment it starts a
//! queue. Before that, the queues of the previous owner are drained and stopped, and its connection is
//! closed, so that no two front-ends use the disk or the same guest memory at a time. During a live
//! migration source and destination are both connected: the one whose guest runs owns the disk.

use std::sync::{Arc, Mutex, PoisonError};

use super::error::Error;
use super::session::Session;

/// Owner of the disk, if there is one.
#[derive(Debug, Default)]
pub struct Ownership {
    /// Held while the owner changes. It is locked before a handler, never after one.
    owner: Mutex<Option<Arc<Session>>>,
}

impl Ownership {
    /// Makes `session` the owner. Drains the queues of the previous owner and closes its connection
    /// first.
    ///
    /// # Errors
    ///
    /// [`Error::TakenOver`] if another front-end has taken over from `session` meanwhile.
    pub fn give(&self, session: &Arc<Session>) -> Result<(), Error> {
        let mut owner = self.owner.lock().unwrap_or_else(PoisonError::into_inner);
        if session.is_retired() {
            return Err(Error::TakenOver);
        }
        match &*owner {
            Some(current) if Arc::ptr_eq(current, session) => {}
            Some(current) => {
                session.announce_takeover(current);
                current.retire();
                *owner = Some(session.clone());
            }
            None => *owner = Some(session.clone()),
        }
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
        }
        had
    }
}
