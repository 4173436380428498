//! Process of a front-end.

use std::fmt;
use std::os::fd::OwnedFd;
use std::os::unix::net::UnixStream;
use std::sync::OnceLock;

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::io::Errno;
use rustix::process::{Pid, PidfdFlags, pidfd_open};

use crate::io::peer::{Credentials, credentials};

/// The process that connected a front-end's socket.
#[derive(Debug)]
pub struct Peer {
    credentials: Option<Credentials>,
    held: OnceLock<Held>,
}

/// How the process is held, so that a reused number is not taken for it.
#[derive(Debug)]
enum Held {
    /// Its pidfd becomes readable when the process ends.
    Pidfd(OwnedFd),
    Ended,
    /// The process is in another PID namespace, or no descriptor is left.
    Unknown,
}

/// Whether a process runs.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Life {
    /// It runs.
    Running,
    /// It has ended.
    Ended,
    /// The kernel does not tell.
    Unknown,
}

impl Peer {
    /// Returns the process that connected `stream`.
    pub fn of(stream: &UnixStream) -> Self {
        Self {
            credentials: credentials(stream).ok(),
            held: OnceLock::new(),
        }
    }

    /// Holds the process, for [`Peer::life`].
    pub fn hold(&self) {
        self.held.get_or_init(|| self.open());
    }

    fn open(&self) -> Held {
        let Some(pid) = self.pid() else {
            return Held::Unknown;
        };
        match pidfd_open(pid, PidfdFlags::empty()) {
            Ok(pidfd) => Held::Pidfd(pidfd),
            Err(Errno::SRCH) => Held::Ended,
            Err(_) => Held::Unknown,
        }
    }

    /// Returns whether the process runs.
    pub fn life(&self) -> Life {
        match self.held.get_or_init(|| self.open()) {
            Held::Pidfd(pidfd) => {
                let mut pidfd = [PollFd::new(pidfd, PollFlags::IN)];
                match poll(&mut pidfd, Some(&Timespec::default())) {
                    Ok(0) => Life::Running,
                    Ok(_) => Life::Ended,
                    Err(_) => Life::Unknown,
                }
            }
            Held::Ended => Life::Ended,
            Held::Unknown => Life::Unknown,
        }
    }

    /// Returns whether both are known to be one process.
    pub fn is_same(&self, other: &Self) -> bool {
        self.pid().is_some_and(|pid| other.pid() == Some(pid))
    }

    /// Returns the numbers of the process and of its user, as far as they are known.
    pub fn ids(&self) -> (Option<u32>, Option<u32>) {
        let pid = self
            .pid()
            .map(|pid| pid.as_raw_nonzero().get().unsigned_abs());
        (pid, self.credentials.map(|credentials| credentials.uid))
    }

    fn pid(&self) -> Option<Pid> {
        self.credentials.and_then(|credentials| credentials.pid)
    }
}

/// Name of the front-end in the log.
impl fmt::Display for Peer {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        match &self.credentials {
            Some(Credentials {
                pid: Some(pid),
                uid,
            }) => write!(formatter, "front-end of process {pid}, user {uid}"),
            Some(Credentials { pid: None, uid }) => {
                write!(
                    formatter,
                    "front-end of a process in another PID namespace, user {uid}"
                )
            }
            None => write!(formatter, "front-end of an unknown process"),
        }
    }
}

#[cfg(test)]
impl Peer {
    /// A process that connected, by its number.
    pub fn from_pid(pid: Option<Pid>) -> Self {
        Self {
            credentials: Some(Credentials { pid, uid: 0 }),
            held: OnceLock::new(),
        }
    }
}
