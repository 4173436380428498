//! Listening sockets that the service manager keeps while no node runs (`FDSTORE=1`, `sd_notify(3)`).
//!
//! A disk process has its listening socket too, and gives it to the next node. If the process ends while no node runs,
//! only a socket that the service manager keeps survives, with the front-ends that wait in its backlog. Without such a
//! service manager, the next node binds another socket at the same path.

use std::collections::{BTreeMap, BTreeSet};
use std::os::unix::net::UnixListener;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use super::id::DiskId;
use crate::daemon::activation;
use crate::daemon::handover::listening;
use crate::daemon::notify::Manager;
use crate::reason::reason;

/// The sockets that the service manager keeps.
#[derive(Debug)]
pub struct FdStore {
    manager: Arc<Manager>,
    /// Those of the last node that have not been taken yet.
    passed: Mutex<BTreeMap<DiskId, UnixListener>>,
}

impl FdStore {
    /// Takes the sockets that the service manager passed to this process. Call it before any file is opened.
    pub fn open(manager: Arc<Manager>) -> Self {
        let passed = activation::take_named().unwrap_or_else(|error| {
            log::warn!("{}", reason(&error));
            Vec::new()
        });
        let named = passed
            .into_iter()
            .filter_map(|(name, socket)| Some((name.parse().ok()?, listening(socket)?)));
        Self {
            manager,
            passed: Mutex::new(named.collect()),
        }
    }

    /// Takes the socket of a disk that was passed.
    pub fn take(&self, id: &DiskId) -> Option<UnixListener> {
        self.passed().remove(id)
    }

    /// Closes the sockets of disks that are not among `known`.
    pub fn close_others(&self, known: &BTreeSet<DiskId>) {
        self.passed().retain(|id, _| {
            let is_known = known.contains(id);
            if !is_known {
                self.forget(id);
            }
            is_known
        });
    }

    /// Gives the socket of a disk to the service manager.
    pub fn keep(&self, id: &DiskId, listener: &UnixListener) {
        self.manager.keep(id.as_str(), listener);
    }

    /// Lets the service manager close the socket of a disk.
    pub fn forget(&self, id: &DiskId) {
        self.manager.forget(id.as_str());
    }

    fn passed(&self) -> MutexGuard<'_, BTreeMap<DiskId, UnixListener>> {
        self.passed.lock().unwrap_or_else(PoisonError::into_inner)
    }
}
