//! What the daemon gives up before it serves the first front-end.
//!
//! By then the layers are open and the socket listens, so that nearly nothing else is needed. Three
//! fences stand behind each other: [`privileges`] (no capabilities, none to gain), [`files`]
//! (Landlock: no file or port can be opened) and [`calls`] (seccomp: no system call outside the
//! read path). `docs/security.md` says what each is for and what none of them stops.

pub mod landlock;
pub mod privileges;
pub mod seccomp;

use std::io;
use std::path::{Path, PathBuf};

/// Why a fence cannot be put up on a kernel that has it.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The right to gain privileges, or a capability, cannot be given up.
    #[error("privileges cannot be dropped")]
    Privileges(#[source] io::Error),
    /// A directory that stays reachable cannot be opened.
    #[error("the directory of the socket or of a writable layer cannot be opened")]
    Directory(#[from] ::landlock::PathFdError),
    /// Landlock refuses the rules.
    #[error("Landlock refuses its rules")]
    Files(#[from] ::landlock::RulesetError),
    /// The filter cannot be made.
    #[error("the filter of system calls is wrong")]
    Filter(#[from] seccompiler::BackendError),
    /// seccomp refuses the filter.
    #[error("seccomp refuses its filter")]
    Calls(#[from] seccompiler::Error),
}

/// Whether this kernel has what a fence is made of.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Support {
    /// The fence stands.
    Full,
    /// The kernel, or its port to this processor, lacks it.
    Missing,
}

/// Puts up all fences around the process, for good. Call it while the process has one thread:
/// threads started later are inside, one started earlier is so only in part.
///
/// `socket_directories` hold the files the daemon removes when it ends: its sockets. In `upper_directories`,
/// which a read-only device has none of, files can be opened, made, renamed and removed. Nothing
/// elsewhere can be opened. What the kernel lacks is left out with one warning.
///
/// # Errors
///
/// A fence the kernel has cannot be put up.
pub fn enter(socket_directories: &[&Path], upper_directories: &[PathBuf]) -> Result<(), Error> {
    privileges::drop_all().map_err(Error::Privileges)?;
    let files = landlock::close(socket_directories, upper_directories)?;
    let calls = seccomp::restrict(seccomp::Needs {
        remove: !socket_directories.is_empty(),
        write: !upper_directories.is_empty(),
        // Where nothing else keeps them to a directory, no file is opened.
        open: !upper_directories.is_empty() && files == Support::Full,
    })?;
    let missing: Vec<_> = [("Landlock", files), ("seccomp", calls)]
        .into_iter()
        .filter(|(_, support)| *support == Support::Missing)
        .map(|(name, _)| name)
        .collect();
    if !missing.is_empty() {
        let missing = missing.join(" and no ");
        log::warn!("this kernel has no {missing}: the sandbox does without");
    }
    Ok(())
}
