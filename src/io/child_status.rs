//! The status of child processes.
#![allow(unsafe_code)] // signal actions have no safe form

/// Keeps the status of child processes until it is waited for, as by default.
///
/// A process inherits from its parent that SIGCHLD is ignored. The kernel then drops the status of a child,
/// and `waitpid` fails with ECHILD.
pub fn keep() {
    // SAFETY: the default action runs no code of this process.
    unsafe { libc::signal(libc::SIGCHLD, libc::SIG_DFL) };
}
