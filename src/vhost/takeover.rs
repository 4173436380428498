//! Takeover policy: whether a front-end that starts a queue gets the disk from the one that has it.
//!
//! VMMs that lost the disk connect again, some after 100 ms. Without a policy, two VMMs with the same socket,
//! such as two clones of one VM, would take a disk from each other for ever.

use clap::ValueEnum;
use serde::{Deserialize, Serialize};

use super::peer::{Life, Peer};
use crate::ratelimited_log;

/// When a front-end that starts a queue takes the disk over from another.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, ValueEnum, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Takeover {
    /// Whenever it starts a queue
    Always,
    /// If it is of the same process, if the process of the other has ended, or if the other has handed its
    /// guest over by a live migration
    #[default]
    Peer,
    /// Only once the other has disconnected
    Never,
}

/// A front-end that has the disk, at the moment at which another starts a queue.
#[derive(Debug)]
pub struct Owner<'a> {
    /// Its process.
    pub peer: &'a Peer,
    /// It has closed its connection.
    pub disconnected: bool,
    /// It has logged the guest's writes for a migration, and stopped all queues.
    pub handed_over: bool,
}

impl Takeover {
    /// Returns the word for it on command lines and in requests.
    pub fn word(self) -> &'static str {
        match self {
            Self::Always => "always",
            Self::Peer => "peer",
            Self::Never => "never",
        }
    }

    /// Returns whether `newcomer` gets the disk from `owner`.
    pub fn allows(self, owner: &Owner<'_>, newcomer: &Peer) -> bool {
        match self {
            _ if owner.disconnected => true,
            Self::Always => true,
            Self::Never => false,
            Self::Peer if owner.handed_over || owner.peer.is_same(newcomer) => true,
            Self::Peer => match owner.peer.life() {
                Life::Ended => true,
                Life::Running => false,
                Life::Unknown => {
                    ratelimited_log::warn(format_args!(
                        "cannot tell whether the {} still runs; another takes the disk over from it",
                        owner.peer
                    ));
                    true
                }
            },
        }
    }
}

#[cfg(test)]
mod tests {
    use std::process::Command;

    use rustix::process::{Pid, getpid};

    use super::*;

    #[test]
    fn only_a_front_end_that_is_gone_or_has_handed_over_gives_way() {
        let mut child = Command::new("sleep").arg("600").spawn().unwrap();
        let process = |pid| Peer::from_pid(Some(pid));
        let (running, own) = (Pid::from_child(&child), getpid());
        let allows = |policy: Takeover, peer: &Peer, newcomer, handed_over| {
            let owner = |disconnected| Owner {
                peer,
                disconnected,
                handed_over,
            };
            assert!(policy.allows(&owner(true), &newcomer));
            policy.allows(&owner(false), &newcomer)
        };
        let owner = process(running);
        owner.hold();
        let unknown = || Peer::from_pid(None);
        assert!(!allows(Takeover::Peer, &owner, process(own), false));
        assert!(!allows(Takeover::Peer, &owner, unknown(), false));
        assert!(allows(Takeover::Peer, &owner, process(own), true));
        assert!(allows(Takeover::Peer, &owner, process(running), false));
        assert!(allows(Takeover::Peer, &unknown(), process(own), false));
        assert!(allows(Takeover::Always, &owner, process(own), false));
        for newcomer in [process(running), process(own)] {
            assert!(!allows(Takeover::Never, &owner, newcomer, true));
        }
        child.kill().unwrap();
        child.wait().unwrap();
        assert!(allows(Takeover::Peer, &owner, process(own), false));
        let late = process(running);
        assert!(allows(Takeover::Peer, &late, process(own), false));
    }
}
