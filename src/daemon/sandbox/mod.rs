//! Confines the process before it reads anything a stranger wrote.
//!
//! Three mechanisms stand behind each other: [`privileges`] (no capabilities, none to gain),
//! [`landlock`] (no path can be opened, no port bound) and [`seccomp`] (only the system calls in a
//! table). A program enters once its files are open ([`Sandbox::enter`]), and parses them inside.
//! The daemon then gives up what only its start needs ([`Sandbox::tighten`]) and serves.
//! `docs/security.md` says what each mechanism is for and what none of them stops.

pub mod landlock;
pub mod privileges;
pub mod seccomp;

use std::io;
use std::path::{Path, PathBuf};

use rustix::thread::CapabilitySet;

/// Why the sandbox cannot be entered.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// A capability, or the right to gain one, cannot be given up.
    #[error("cannot drop privileges")]
    Privileges(#[source] io::Error),
    /// A path that stays reachable cannot be opened.
    #[error("cannot open the directory of a socket or a file of a writable layer")]
    Path(#[from] ::landlock::PathFdError),
    /// The kernel refuses the Landlock rules.
    #[error("Landlock refuses the rules")]
    Landlock(#[from] ::landlock::RulesetError),
    /// The seccomp filter cannot be compiled.
    #[error("the seccomp filter does not compile")]
    Filter(#[from] seccompiler::BackendError),
    /// The kernel refuses the seccomp filter.
    #[error("seccomp refuses the filter")]
    Seccomp(#[from] seccompiler::Error),
}

/// Whether a mechanism is in force.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Support {
    /// It is.
    Full,
    /// The kernel, or its port to this processor, lacks it.
    Missing,
    /// Something outside, such as a container's seccomp profile, forbids its use.
    Forbidden,
}

/// What a confined process reaches beside its open files.
#[derive(Clone, Copy, Debug, Default)]
pub struct Reach<'a> {
    /// Directories in which sockets are bound, and removed at the end.
    pub sockets: &'a [PathBuf],
    /// Directories in which files are opened, created, renamed and removed: those of a writable
    /// layer.
    pub directories: &'a [PathBuf],
    /// Files outside of `directories` that are opened to read and write: those that a symbolic link
    /// of a writable layer points to.
    pub files: &'a [PathBuf],
    /// Whether open files are written to.
    pub write: bool,
    /// Whether reads go through rings of io_uring made before.
    pub rings: bool,
}

/// The sandbox of a process that still opens and parses.
#[derive(Debug)]
#[must_use = "a daemon that serves must tighten its sandbox first"]
pub struct Sandbox {
    needs: seccomp::Needs,
}

impl Sandbox {
    /// Confines the process for good. Call it while the process has one thread: threads started
    /// later are confined too, one started earlier is so only in part.
    ///
    /// What the kernel lacks is left out with one warning.
    ///
    /// # Errors
    ///
    /// The kernel has a mechanism and refuses to apply it.
    pub fn enter(reach: &Reach<'_>) -> Result<Sandbox, Error> {
        let landlock = landlock::close(reach)?;
        let opens = !reach.directories.is_empty();
        // Files of a writable layer may belong to another user, whom root without this capability
        // could not stand in for. Landlock keeps it to the layer's directories.
        let kept = match opens && landlock == Support::Full {
            true => CapabilitySet::DAC_OVERRIDE,
            false => CapabilitySet::empty(),
        };
        privileges::drop_all_but(kept).map_err(Error::Privileges)?;
        let needs = seccomp::Needs {
            sockets: !reach.sockets.is_empty(),
            write: reach.write || opens,
            open: opens,
            open_later: opens && landlock == Support::Full,
            rings: reach.rings,
        };
        let seccomp = seccomp::restrict(seccomp::Stage::Opening, needs)?;
        for (name, support) in [("Landlock", landlock), ("seccomp", seccomp)] {
            match support {
                Support::Full => {}
                Support::Missing => {
                    log::warn!("the sandbox lacks {name}: this kernel does not support it")
                }
                Support::Forbidden => log::warn!(
                    "the sandbox lacks {name}: its use is forbidden (EPERM), probably by the seccomp \
         profile of a container"
                ),
            }
        }
        Ok(Sandbox { needs })
    }

    /// Gives up what only opening and parsing need. Call it while the process has one thread.
    ///
    /// # Errors
    ///
    /// The kernel refuses the second filter.
    pub fn tighten(self) -> Result<(), Error> {
        privileges::drop_rest().map_err(Error::Privileges)?;
        seccomp::restrict(seccomp::Stage::Serving, self.needs)?;
        Ok(())
    }
}

/// The directory that holds `path`.
pub fn parent(path: &Path) -> PathBuf {
    match path.parent() {
        Some(parent) if !parent.as_os_str().is_empty() => parent.to_owned(),
        _ => PathBuf::from("."),
    }
}
