//! Confines the tool before it reads layers.
//!
//! A command opens its files, enters the sandbox of the daemon, and only then parses what the files hold.
//! A command that makes a file writes its content in a child process: a confined process cannot name a
//! file, because it could replace others in that directory. The parent reads no layer. It waits, and
//! names the file if the child succeeded.
#![allow(unsafe_code)] // fork has no safe form

use std::error::Error;
use std::io;
use std::path::PathBuf;
use std::process::exit;

use ovbd_vhost::daemon;
use ovbd_vhost::daemon::sandbox::{Reach, Sandbox, privileges};
use ovbd_vhost::reason::reason;
use ovbd_vhost::tool;
use ovbd_vhost::tool::open_files::OpenFiles;
use ovbd_vhost::tool::sources::Sources;
use rustix::process::{
    Pid, Signal, WaitOptions, WaitStatus, getpid, getppid, set_parent_process_death_signal, waitpid,
};

use super::options::SandboxArgs;
use super::say;

/// What a confined command does beside reading its files and writing to standard output.
#[derive(Clone, Copy, PartialEq, Eq)]
pub enum Writes {
    /// Nothing.
    Nothing,
    /// It writes to a file that is open.
    OpenFile,
}

/// Enters the sandbox, unless the options leave it out. Inside, files can be opened for reading below
/// `readable` only. Call it with one thread, after all other files are open.
///
/// # Errors
/// The kernel has a mechanism and refuses to apply it.
pub fn enter(
    options: &SandboxArgs,
    readable: &[PathBuf],
    writes: Writes,
) -> Result<Option<Sandbox>, daemon::Error> {
    if !options.is_on() {
        return Ok(None);
    }
    let reach = Reach {
        readable,
        write: writes == Writes::OpenFile,
        progress: true,
        ..Reach::default()
    };
    Ok(Some(Sandbox::enter(&reach)?))
}

/// Opens the layers in registries; the thread that receives their bytes is confined like the others.
///
/// # Errors
/// [`tool::Error::Layers`].
pub fn open(options: &SandboxArgs, sources: Sources) -> Result<OpenFiles, tool::Error> {
    let is_on = options.is_on();
    sources.open(move || {
        // The sandbox took the other capabilities from all threads that start in it.
        if is_on && let Err(error) = privileges::drop_rest() {
            log::error!("cannot drop the privileges of a thread: {error}");
        }
    })
}

/// Gives up what only parsing needs.
///
/// # Errors
/// The kernel refuses the second filter.
pub fn tighten(sandbox: Option<Sandbox>) -> Result<(), daemon::Error> {
    Ok(sandbox.map_or(Ok(()), Sandbox::tighten)?)
}

/// Runs `work` in a child process, which reports its own errors. Returns whether it succeeded.
///
/// Call it with one thread. The child ends with `work`, and with its parent.
///
/// # Errors
/// The system refuses a process, or a signal killed it.
pub fn in_child(work: impl FnOnce() -> Result<(), Box<dyn Error>>) -> io::Result<bool> {
    let parent = getpid();
    // SAFETY: the process has one thread, so no lock is held that the child would wait for.
    match unsafe { libc::fork() } {
        -1 => Err(io::Error::last_os_error()),
        0 => {
            let result = die_with(parent).map_err(Into::into).and_then(|()| work());
            if let Err(error) = &result {
                say(&reason(&**error));
            }
            // Not by returning: what the parent still uses must not be dropped here.
            exit(i32::from(result.is_err()))
        }
        child => wait_for(Pid::from_raw(child)),
    }
}

/// Ends this process when its parent ends.
fn die_with(parent: Pid) -> io::Result<()> {
    set_parent_process_death_signal(Some(Signal::KILL))?;
    match getppid() == Some(parent) {
        true => Ok(()),
        false => Err(io::Error::other("the parent process ended")),
    }
}

fn wait_for(child: Option<Pid>) -> io::Result<bool> {
    let waited = rustix::io::retry_on_intr(|| waitpid(child, WaitOptions::empty()))?;
    let status = waited.map(|(_, status)| status);
    match status.and_then(WaitStatus::terminating_signal) {
        None => Ok(status.and_then(WaitStatus::exit_status) == Some(0)),
        Some(libc::SIGSYS) => Err(io::Error::other(
            "the process that reads the layers made a system call that its sandbox forbids (SIGSYS)",
        )),
        Some(signal) => {
            let text = format!("signal {signal} killed the process that reads the layers");
            Err(io::Error::other(text))
        }
    }
}
