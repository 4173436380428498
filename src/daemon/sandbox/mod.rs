//! The sandbox of the daemon and of the image tool.
//!
//! A program opens its files, enters the sandbox ([`Sandbox::enter`]), and only then parses what the
//! files hold. Three mechanisms restrict it: [`privileges`] drops capabilities, [`landlock`] limits paths
//! and ports, and [`seccomp`] limits system calls. After parsing, the program drops the rights that only
//! parsing needs ([`Sandbox::tighten`]). `docs/security.md` describes the purpose of each mechanism, and what
//! is left to an attacker.

pub mod landlock;
pub mod privileges;
pub mod seccomp;

use std::io;
use std::path::PathBuf;

use rustix::thread::CapabilitySet;

use crate::io::confine::{self, Support};

/// The sandbox cannot be entered.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// Capabilities cannot be dropped.
    #[error("cannot drop privileges")]
    Privileges(#[source] io::Error),
    /// A path that stays reachable cannot be opened.
    #[error("cannot open the directory of a socket or a file of a writable layer")]
    Path(#[from] ::landlock::PathFdError),
    /// The kernel refuses the Landlock rules.
    #[error("Landlock refuses the rules")]
    Landlock(#[from] ::landlock::RulesetError),
    /// The kernel refuses the seccomp filter.
    #[error("seccomp refuses the filter")]
    Seccomp(#[from] seccompiler::Error),
}

/// What a confined process can access beside its open files.
#[derive(Clone, Copy, Debug, Default)]
pub struct Reach<'a> {
    /// Directories in which sockets are bound, and removed at the end.
    pub sockets: &'a [PathBuf],
    /// Directories in which files are opened, created, renamed and removed: those of a writable
    /// layer.
    pub directories: &'a [PathBuf],
    /// Files outside of `directories` that are opened for reading and writing: targets of symbolic links
    /// of a writable layer.
    pub files: &'a [PathBuf],
    /// Directories in which files are opened for reading, and files that are: a writable layer that the
    /// image tool reads.
    pub readable: &'a [PathBuf],
    /// Whether open files are written to.
    pub write: bool,
    /// Whether a progress bar is drawn, which asks the terminal for its width.
    pub progress: bool,
    /// Whether reads go through io_uring rings that were created before.
    pub rings: bool,
}

/// The sandbox of a process that opens and parses.
#[derive(Debug)]
#[must_use = "a daemon that serves must tighten its sandbox first"]
pub struct Sandbox {
    needs: seccomp::Needs,
}

impl Sandbox {
    /// Confines the process for good. Call it while the process has one thread: threads started
    /// later are confined too, one started earlier is so only in part.
    ///
    /// A mechanism that the kernel lacks is skipped with a warning.
    ///
    /// # Errors
    ///
    /// The kernel has a mechanism and refuses to apply it.
    pub fn enter(reach: &Reach<'_>) -> Result<Sandbox, Error> {
        let landlock = landlock::close(reach)?;
        let needs = seccomp::Needs::of(reach, landlock);
        // Files of a writable layer may belong to another user: root opens them by this capability.
        // Landlock limits it to the directories of the layer.
        let kept = match landlock == Support::Full {
            true if needs.open => CapabilitySet::DAC_OVERRIDE,
            true if needs.read => CapabilitySet::DAC_READ_SEARCH,
            _ => CapabilitySet::empty(),
        };
        confine::drop_all_but(kept).map_err(Error::Privileges)?;
        let seccomp = seccomp::restrict(seccomp::Stage::Opening, needs)?;
        for (name, support) in [("Landlock", landlock), ("seccomp", seccomp)] {
            support.warn("the sandbox", name);
        }
        Ok(Sandbox { needs })
    }

    /// Drops the rights that only opening and parsing need. Call it while the process has one thread.
    ///
    /// # Errors
    ///
    /// The kernel refuses the second filter.
    pub fn tighten(self) -> Result<(), Error> {
        confine::drop_rest().map_err(Error::Privileges)?;
        seccomp::restrict(seccomp::Stage::Serving, self.needs)?;
        Ok(())
    }
}
