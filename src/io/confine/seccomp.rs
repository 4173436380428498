//! Tables of system calls for seccomp filters, and their installation.

use libc::{c_int, c_long};
use seccompiler::{BpfProgram, Error, SeccompAction};

use super::Support;

/// Flags of `clone` for a thread instead of a process.
pub const THREAD: c_int = libc::CLONE_VM | libc::CLONE_SIGHAND | libc::CLONE_THREAD;

/// Condition for memory that is not executable: argument 2 of `mmap` and `mprotect`.
pub const NOT_EXECUTABLE: Test = Test::Bits {
    mask: libc::PROT_EXEC,
    set: 0,
};

/// Condition for an argument.
#[derive(Clone, Copy, Debug)]
pub enum Test {
    /// The argument has this value.
    Is(c_int),
    /// Of the bits in `mask`, exactly those in `set` are set.
    Bits {
        /// Bits that are compared.
        mask: c_int,
        /// Their values.
        set: c_int,
    },
    /// The argument is a null pointer.
    Null,
}

/// A system call that is allowed if a condition holds for an argument, counted from 0. Several conditions of
/// one call are alternatives.
pub type Conditional = (c_long, u8, Test);

/// The system calls of a process.
#[derive(Clone, Debug)]
pub struct Calls {
    /// Allowed calls.
    pub allowed: Vec<c_long>,
    /// Calls that are allowed with conditions; a condition counts also for a call in `allowed`.
    pub conditional: Vec<Conditional>,
    /// Calls that libraries can do without: they fail with ENOSYS, unless they are allowed.
    pub absent: &'static [c_long],
    /// Effect of all other calls.
    pub forbidden: SeccompAction,
}

/// Installs a filter for all threads.
///
/// Of two filters that are installed one after the other, the kernel obeys the one with the stricter answer, and of
/// two errors that of the later filter.
///
/// # Errors
/// The kernel has seccomp and refuses the filter.
pub fn install(filter: &BpfProgram) -> Result<Support, Error> {
    match seccompiler::apply_filter_all_threads(filter) {
        Ok(()) => Ok(Support::Full),
        Err(Error::Seccomp(error))
            if matches!(error.raw_os_error(), Some(libc::ENOSYS | libc::EINVAL)) =>
        {
            Ok(Support::Missing)
        }
        Err(error) => Err(error),
    }
}
