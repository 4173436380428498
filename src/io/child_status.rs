//! Exit status of child processes.
#![allow(unsafe_code)] // `signal(2)` has no safe wrapper

/// Sets SIGCHLD to its default action, with which the kernel keeps the exit status of a child until
/// `waitpid` takes it.
///
/// A process inherits an ignored SIGCHLD from its parent. While it is ignored, the kernel drops the exit
/// status of children, and `waitpid` fails with ECHILD.
pub fn keep() {
    // SAFETY: installs no handler, so no code of this process runs in a signal context.
    unsafe { libc::signal(libc::SIGCHLD, libc::SIG_DFL) };
}
