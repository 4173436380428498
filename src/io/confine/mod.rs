//! Mechanisms that confine a process: capabilities, Landlock, seccomp.
//!
//! The sandboxes of the daemon and of the fetcher are made of them, each with its own tables of paths and
//! system calls. All functions change the calling thread, and the threads that it starts: call them while
//! the process has one thread.

pub mod filter;
pub mod landlock;
pub mod seccomp;

use std::io;

use rustix::thread::{self, CapabilitySet, CapabilitySets};

/// Support for a mechanism.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Support {
    /// It is in force.
    Full,
    /// The kernel does not support it, or not on this processor.
    Missing,
    /// Another policy, such as a container's seccomp profile, forbids its use.
    Forbidden,
}

impl Support {
    /// Logs a warning if `sandbox` lacks the mechanism `name`.
    pub fn warn(self, sandbox: &str, name: &str) {
        match self {
            Self::Full => {}
            Self::Missing => {
                log::warn!("{sandbox} lacks {name}: this kernel does not support it");
            }
            Self::Forbidden => log::warn!(
                "{sandbox} lacks {name}: its use is forbidden (EPERM), probably by the seccomp \
                 profile of a container"
            ),
        }
    }
}

/// Drops all capabilities but those of `kept` that the thread has, and sets `no_new_privs`.
///
/// # Errors
/// Those of `prctl(2)` and `capset(2)`.
pub fn drop_all_but(kept: CapabilitySet) -> io::Result<()> {
    thread::set_no_new_privs(true)?;
    thread::clear_ambient_capability_set()?;
    set(thread::capabilities(None)?.effective & kept)
}

/// Drops the capabilities that [`drop_all_but`] kept.
///
/// # Errors
/// Those of `capset(2)`.
pub fn drop_rest() -> io::Result<()> {
    set(CapabilitySet::empty())
}

fn set(kept: CapabilitySet) -> io::Result<()> {
    let sets = CapabilitySets {
        effective: kept,
        permitted: kept,
        inheritable: CapabilitySet::empty(),
    };
    Ok(thread::set_capabilities(None, sets)?)
}
