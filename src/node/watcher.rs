//! A thread that waits for processes to end.
//!
//! A pidfd becomes readable when its process ends. One thread watches all of them. Among them are processes that a
//! former node started, which this node cannot wait for as a parent. The thread waits for the others, so that they leave
//! no zombies.

use std::collections::HashMap;
use std::io;
use std::os::fd::OwnedFd;
use std::sync::{Arc, Mutex, PoisonError};
use std::thread;

use rustix::process::{Pid, WaitId, WaitIdOptions, waitid};
use tokio::sync::watch;

use crate::io::poller::{Poller, Trigger};

type Waiting = Arc<Mutex<HashMap<u64, watch::Sender<bool>>>>;

/// The thread, and the channels of those that wait for a process.
#[derive(Debug)]
pub struct Watcher {
    poller: Arc<Poller>,
    waiting: Waiting,
}

impl Watcher {
    /// Starts the thread.
    ///
    /// # Errors
    /// What the system reports.
    pub fn start() -> io::Result<Self> {
        let poller = Arc::new(Poller::new()?);
        let waiting = Waiting::default();
        let (events, ended) = (poller.clone(), waiting.clone());
        thread::Builder::new()
            .name("watcher".to_owned())
            .spawn(move || report(&events, &ended))?;
        Ok(Self { poller, waiting })
    }

    /// Returns a channel that becomes `true` when the process `pid` of `pidfd` ends.
    ///
    /// # Errors
    /// What the system reports.
    pub fn watch(&self, pidfd: &OwnedFd, pid: i32) -> io::Result<watch::Receiver<bool>> {
        // Process numbers are positive.
        let token = pid.unsigned_abs().into();
        // Locked first, so that the thread finds the sender even if the process has ended.
        let mut waiting = self.lock();
        self.poller.watch(pidfd, token, Trigger::Edge)?;
        // Another watch of the same process, whose descriptor may be closed first, gets the same end.
        let sender = waiting
            .entry(token)
            .or_insert_with(|| watch::channel(false).0);
        Ok(sender.subscribe())
    }

    fn lock(&self) -> std::sync::MutexGuard<'_, HashMap<u64, watch::Sender<bool>>> {
        self.waiting.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

fn report(poller: &Poller, waiting: &Waiting) {
    loop {
        let waited = poller.wait(-1, |token| {
            reap(token);
            let mut waiting = waiting.lock().unwrap_or_else(PoisonError::into_inner);
            if let Some(sender) = waiting.remove(&token) {
                sender.send_replace(true);
            }
        });
        if let Err(error) = waited {
            log::error!("cannot watch disk processes any longer: {error}");
            return;
        }
    }
}

/// Takes the exit status of a process that has ended, if it is a child.
fn reap(token: u64) {
    let pid = i32::try_from(token).ok().and_then(Pid::from_raw);
    if let Some(pid) = pid {
        // A process that another node started is no child.
        let _ = waitid(
            WaitId::Pid(pid),
            WaitIdOptions::EXITED | WaitIdOptions::NOHANG,
        );
    }
}
