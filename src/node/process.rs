//! A disk process: its identity, its end, and signals to it.
//!
//! A process is held by a pidfd, so that no other process with a reused number is ever signalled.
//! A process from before a restart of the node is identified by its number, its start time and the boot id.

use std::fs;
use std::io;
use std::os::fd::OwnedFd;
use std::time::Duration;

use rustix::process::{Pid, PidfdFlags, Signal, pidfd_open, pidfd_send_signal};
use serde::{Deserialize, Serialize};
use tokio::sync::watch;

use super::watcher::Watcher;

use crate::io::boot::boot_id;
use crate::ratelimited_log;

/// Identity of a process, across restarts of the node.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Identity {
    /// Process number.
    pub pid: i32,
    /// Clock ticks between the system's start and the process's.
    pub start: u64,
    /// Boot id of the kernel.
    pub boot: String,
}

impl Identity {
    /// Identity of the running process `pid`.
    fn of(pid: i32) -> Option<Self> {
        let stat = fs::read_to_string(format!("/proc/{pid}/stat")).ok()?;
        Some(Self {
            pid,
            start: start_of(&stat)?,
            boot: boot_id().to_string(),
        })
    }
}

/// Field 22 of `/proc/PID/stat` (proc_pid_stat(5)) of a process that has not ended. The name in field 2 may hold blanks
/// and parentheses.
fn start_of(stat: &str) -> Option<u64> {
    let mut fields = stat.rsplit_once(')')?.1.split_ascii_whitespace();
    // Field 3: a process that ended stays until its parent waits for it.
    let state = fields.next()?;
    match state {
        "Z" | "X" | "x" => None,
        _ => fields.nth(18)?.parse().ok(),
    }
}

/// A running process.
#[derive(Debug)]
pub struct Process {
    identity: Identity,
    pidfd: OwnedFd,
    /// Becomes `true` at its end.
    end: watch::Receiver<bool>,
}

impl Process {
    /// Holds the process `pid`: a child that was not waited for, or a process that is known to run.
    ///
    /// # Errors
    /// Those of `pidfd_open(2)`; `NotFound` if the process has ended, or `/proc` is missing.
    pub fn of_pid(watcher: &Watcher, pid: i32) -> io::Result<Self> {
        let pidfd = open(pid)?;
        let identity = Identity::of(pid).ok_or(io::ErrorKind::NotFound)?;
        Self::hold(watcher, pidfd, identity)
    }

    /// Finds the process of `identity`, if it still runs.
    pub fn find(watcher: &Watcher, identity: &Identity) -> Option<Self> {
        let pidfd = open(identity.pid).ok()?;
        // Compared after the descriptor is open: from then on the number is not reused.
        let found = Identity::of(identity.pid).filter(|found| found == identity)?;
        Self::hold(watcher, pidfd, found).ok()
    }

    fn hold(watcher: &Watcher, pidfd: OwnedFd, identity: Identity) -> io::Result<Self> {
        let end = watcher.watch(&pidfd, identity.pid)?;
        Ok(Self {
            identity,
            pidfd,
            end,
        })
    }

    /// Returns the identity of the process.
    pub fn identity(&self) -> &Identity {
        &self.identity
    }

    /// Waits until the process has ended.
    pub async fn ended(&self) {
        // If the watcher has ended, this returns too: nothing else would end the wait.
        let _ = self.end.clone().wait_for(|ended| *ended).await;
    }

    /// Asks the process to end (SIGTERM), and kills it after `patience`. Returns when it has ended.
    pub async fn stop(&self, patience: Duration) {
        // A process that has ended already cannot be signalled.
        let _ = pidfd_send_signal(&self.pidfd, Signal::TERM);
        if tokio::time::timeout(patience, self.ended()).await.is_err() {
            ratelimited_log::warn(format_args!(
                "process {} did not end within {patience:?}; killing it",
                self.identity.pid
            ));
            let _ = pidfd_send_signal(&self.pidfd, Signal::KILL);
            self.ended().await;
        }
    }
}

fn open(pid: i32) -> io::Result<OwnedFd> {
    let pid = Pid::from_raw(pid).ok_or(io::ErrorKind::InvalidInput)?;
    Ok(pidfd_open(pid, PidfdFlags::empty())?)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_start_time_is_found_behind_any_name() {
        let fields: Vec<_> = (4..=30).map(|field| field.to_string()).collect();
        let stat = |state: &str| format!("7 (a) b) {state} {}", fields.join(" "));
        assert_eq!(start_of(&stat("S")), Some(22));
        assert_eq!(start_of(&stat("Z")), None, "ended");
        assert_eq!(start_of("7 (a"), None);
    }

    #[tokio::test]
    async fn a_process_is_found_again_and_stopped() {
        let mut child = std::process::Command::new("sleep")
            .arg("600")
            .spawn()
            .unwrap();
        let watcher = Watcher::start().unwrap();
        let process = Process::of_pid(&watcher, child.id() as i32).unwrap();
        let identity = process.identity().clone();
        assert!(Process::find(&watcher, &identity).is_some());
        let other = Identity {
            start: identity.start + 1,
            ..identity.clone()
        };
        assert!(Process::find(&watcher, &other).is_none());
        process.stop(Duration::from_secs(60)).await;
        assert!(Process::find(&watcher, &identity).is_none());
        // The watcher has waited for it.
        let waited = child.wait().unwrap_err();
        assert_eq!(waited.raw_os_error(), Some(libc::ECHILD));
    }
}
