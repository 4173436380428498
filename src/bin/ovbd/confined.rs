//! Confines the tool before it reads layers.
//!
//! A command opens its files, enters the sandbox of the daemon, and only then parses what the files hold.
//! A command that makes a file writes its content in a child process: a confined process cannot name a
//! file, because it could replace others in that directory. The parent reads no layer. It waits, and
//! names the file if the child succeeded. A command that makes the files of a writable layer has the layers
//! below parsed by such a child, and gets a header from it.
#![allow(unsafe_code)] // fork has no safe form

use std::error::Error;
use std::io::{self, Read, Write};
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::PathBuf;
use std::process::exit;

use ovbd_vhost::daemon;
use ovbd_vhost::daemon::sandbox::{Reach, Sandbox};
use ovbd_vhost::io::confine;
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
        if is_on && let Err(error) = confine::drop_rest() {
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
            let work = || die_with(parent).map_err(Into::into).and_then(|()| work());
            // Neither by returning nor by unwinding: what the parent still uses must not be dropped here.
            exit(exit_code_of(work))
        }
        child => wait_for(Pid::from_raw(child)),
    }
}

/// Runs `work` in a child process as [`in_child`] does, and returns its answer; `None` if it failed. The
/// child may be subverted, so its answer is foreign input.
///
/// # Errors
/// Those of [`in_child`]; the answer is shorter than `N` bytes.
pub fn answer_of_child<const N: usize>(
    work: impl FnOnce() -> Result<[u8; N], Box<dyn Error>>,
) -> io::Result<Option<[u8; N]>> {
    // A pipe holds a page at least, so that the child does not wait for its parent to read.
    const { assert!(N <= 4096) };
    let (mut reader, mut writer) = io::pipe()?;
    let succeeded = in_child(|| Ok(writer.write_all(&work()?)?))?;
    drop(writer);
    if !succeeded {
        return Ok(None);
    }
    let mut answer = [0; N];
    reader.read_exact(&mut answer)?;
    Ok(Some(answer))
}

/// Does `work`, reports its error, and returns the exit code. A panic has reported itself.
fn exit_code_of(work: impl FnOnce() -> Result<(), Box<dyn Error>>) -> i32 {
    match catch_unwind(AssertUnwindSafe(work)) {
        Ok(Ok(())) => 0,
        Ok(Err(error)) => {
            say(&reason(&*error));
            1
        }
        Err(_) => 1,
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

#[cfg(test)]
mod tests {
    use std::fs;

    use super::*;

    /// Removes a file when it is dropped, as an output that was not published does.
    struct Output(PathBuf);

    impl Drop for Output {
        fn drop(&mut self) {
            // The assertion reports the failure.
            let _ = fs::remove_file(&self.0);
        }
    }

    #[test]
    fn a_panic_of_the_child_leaves_what_the_parent_uses() {
        let folder = tempfile::tempdir().unwrap();
        let output = Output(folder.path().join("output"));
        fs::write(&output.0, "parent").unwrap();
        let succeeded = in_child(|| panic!("a panic for the test")).unwrap();
        assert!(!succeeded);
        assert_eq!(fs::read_to_string(&output.0).unwrap(), "parent");
    }

    #[test]
    fn an_answer_arrives_whole_or_not_at_all() {
        assert_eq!(answer_of_child(|| Ok([7; 4096])).unwrap(), Some([7; 4096]));
        let failed = answer_of_child::<4096>(|| Err("a failure for the test".into()));
        assert_eq!(failed.unwrap(), None);
        let error = answer_of_child::<4096>(|| exit(0)).unwrap_err();
        assert_eq!(error.kind(), io::ErrorKind::UnexpectedEof);
    }
}
