//! Which of several connected front-ends has the disk.
//!
//! Any number of front-ends may look at the device. The disk goes to the one that starts a queue:
//! the one that had it before is stopped, drained and hung up on first, so that no two work on the
//! disk, or on the same guest memory, at a time. During a live migration both sides are connected;
//! this way the side whose guest runs is served, whichever it is.

use std::sync::{Arc, Mutex, PoisonError};

use super::error::Error;
use super::session::Session;

/// The front-end that has the disk, if any.
#[derive(Debug, Default)]
pub struct Ownership {
    /// Held while the disk changes hands; no handler is locked when this is taken.
    owner: Mutex<Option<Arc<Session>>>,
}

impl Ownership {
    /// Gives the disk to `session`; another front-end that has it is hung up on. This takes as long
    /// as its queues take to drain.
    ///
    /// # Errors
    ///
    /// [`Error::TakenOver`] if `session` itself was hung up on meanwhile.
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

    /// Whether `session` has the disk, or may be about to get it.
    pub fn has(&self, session: &Arc<Session>) -> bool {
        match self.owner.try_lock() {
            Ok(owner) => owner
                .as_ref()
                .is_some_and(|owner| Arc::ptr_eq(owner, session)),
            Err(_) => true,
        }
    }

    /// Takes the disk back from `session`, whose queues are stopped; returns whether it had it.
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
