//! Starts disk processes.
//!
//! The node binds the listening socket and passes it to the process (`sd_listen_fds(3)`), so that front-ends can connect
//! while the process is replaced. `LISTEN_PID` must name the process itself, whose number is known only after the fork.
//! So the node starts its own program with [`launch`], which sets the variable and executes `ovbd-vhost`.

mod arguments;
mod socket;
mod strays;

use std::env;
use std::ffi::OsString;
use std::fs;
use std::io::{self, Read, Seek, SeekFrom};
use std::os::fd::OwnedFd;
use std::os::unix::net::UnixListener;
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Command, ExitCode, Stdio};
use std::time::Duration;

use command_fds::{CommandFdExt, FdMapping};
use serde_json::Value;
use tokio::net::UnixDatagram;

use super::entry::Entry;
use super::error::{Code, Error, Failure};
use super::id::DiskId;
use super::process::{Identity, Process};
use super::socket::hidden;
use super::watcher::Watcher;
use crate::engine::stats::figures::Figures;
use crate::io::directory::create_all;
use crate::io::regular::{create_regular, open_to_read};
use crate::logging;

pub use socket::bind;

/// First word of the arguments with which the node starts itself to become a disk process.
pub const LAUNCH: &str = "launch-disk";

/// Most bytes of a socket's path.
pub const MAX_SOCKET_PATH: usize = 107;

/// How long a process may take to be ready. It waits for a registry for a minute.
const START_LIMIT: Duration = Duration::from_secs(90);

/// How long the program may take to tell its feature bits.
const FEATURES_LIMIT: Duration = Duration::from_secs(10);

/// Bytes of its log that are searched for the reason of a failure.
const LOG_TAIL: u64 = 4096;

/// Descriptor of the passed socket (`SD_LISTEN_FDS_START`).
const PASSED: i32 = 3;

/// Starts disk processes with their sockets and logs in the run directory.
#[derive(Debug)]
pub struct Launcher {
    run_dir: PathBuf,
    program: PathBuf,
    /// Options that all disks get.
    options: Vec<OsString>,
    watcher: Watcher,
}

impl Launcher {
    /// Creates the run directory if it is missing. `options` are options of `program` that all disks get.
    ///
    /// # Errors
    /// [`Error::File`] if the directory cannot be created, or the program does not exist.
    pub fn new(run_dir: &Path, program: &Path, options: Vec<OsString>) -> Result<Self, Error> {
        create_all(run_dir).map_err(Error::file("create", run_dir))?;
        let run_dir = fs::canonicalize(run_dir).map_err(Error::file("find", run_dir))?;
        let program = fs::canonicalize(program).map_err(Error::file("find", program))?;
        let watcher = Watcher::start().map_err(Error::Runtime)?;
        Ok(Self {
            run_dir,
            program,
            options,
            watcher,
        })
    }

    /// Returns the default path of a disk's socket.
    pub fn socket(&self, id: &DiskId) -> PathBuf {
        self.run_dir.join(format!("{id}.sock"))
    }

    /// Returns the path of the control socket of a disk's process.
    pub fn control(&self, id: &DiskId) -> PathBuf {
        self.run_dir.join(format!("{id}.control"))
    }

    fn log(&self, id: &DiskId) -> PathBuf {
        self.run_dir.join(format!("{id}.log"))
    }

    fn stats(&self, id: &DiskId) -> PathBuf {
        self.run_dir.join(format!("{id}.stats"))
    }

    /// Returns the values of a disk's statistics page; zeros if there is none.
    pub fn figures(&self, id: &DiskId) -> Figures {
        Figures::read(&self.stats(id)).unwrap_or_default()
    }

    fn notify(&self, id: &DiskId) -> PathBuf {
        self.run_dir.join(format!("{id}.notify"))
    }

    /// Checks that the sockets of disk `id` fit the system's limit.
    ///
    /// # Errors
    /// [`Error::LongPath`] names the path.
    pub fn check_paths(&self, id: &DiskId, socket: &Path) -> Result<(), Error> {
        for path in [socket.to_owned(), self.control(id), self.notify(id)] {
            if path.as_os_str().len() > MAX_SOCKET_PATH {
                return Err(Error::LongPath {
                    path,
                    limit: MAX_SOCKET_PATH,
                });
            }
        }
        Ok(())
    }

    /// Starts the process of `entry` on `listener` and waits until it is ready.
    ///
    /// # Errors
    /// [`Code::NoLayer`] with what the process reported, or [`Code::Timeout`] if it was not ready in time.
    pub async fn start(&self, entry: &Entry, listener: &UnixListener) -> Result<Process, Failure> {
        let notify = self.notify(&entry.id);
        // The leftover of a node that was killed meanwhile.
        let _ = fs::remove_file(&notify);
        let ready = UnixDatagram::bind(&notify).map_err(Error::file("bind", &notify))?;
        let started = self.spawn(entry, listener, &notify);
        let outcome = match started {
            Ok((Some(process), child)) => {
                reap(child);
                self.until_ready(entry, process, &ready).await
            }
            Ok((None, mut child)) => {
                let _ = child.wait().await;
                Err(Failure::of_disk_process(self.reason(&entry.id)))
            }
            Err(error) => Err(error.into()),
        };
        let _ = fs::remove_file(&notify);
        outcome
    }

    /// Starts a process; `None` in place of it if it has ended before it could be watched.
    fn spawn(
        &self,
        entry: &Entry,
        listener: &UnixListener,
        notify: &Path,
    ) -> Result<(Option<Process>, tokio::process::Child), Error> {
        let path = self.log(&entry.id);
        let log = create_regular(&path).map_err(Error::file("create", &path))?;
        let errors = log.try_clone().map_err(Error::file("open", &path))?;
        let itself = env::current_exe().map_err(Error::file("find", "/proc/self/exe"))?;
        let passed = listener
            .try_clone()
            .map_err(Error::file("pass", &entry.socket))?;
        let mut command = Command::new(itself);
        command
            .arg(LAUNCH)
            .arg(&self.program)
            .args(self.arguments(entry))
            .env("NOTIFY_SOCKET", notify)
            .env("LISTEN_FDS", "1")
            .stdin(Stdio::null())
            .stdout(log)
            .stderr(errors)
            // A signal to the node's terminal must not end its disks.
            .process_group(0);
        logging::pass_format(&mut command);
        command
            .fd_mappings(vec![FdMapping {
                parent_fd: OwnedFd::from(passed),
                child_fd: PASSED,
            }])
            .map_err(|error| Error::file("pass", &entry.socket)(io::Error::other(error)))?;
        let child = tokio::process::Command::from(command).spawn();
        let mut child = child.map_err(Error::file("start", &self.program))?;
        let pid = child
            .id()
            .and_then(|pid| i32::try_from(pid).ok())
            .unwrap_or_default();
        match Process::of_pid(&self.watcher, pid) {
            Ok(process) => Ok((Some(process), child)),
            Err(error) => {
                // A process that is not watched must not serve. One that has ended cannot be killed.
                let _ = child.start_kill();
                if error.kind() == io::ErrorKind::NotFound {
                    return Ok((None, child));
                }
                reap(child);
                Err(Error::file("watch", &self.program)(error))
            }
        }
    }

    async fn until_ready(
        &self,
        entry: &Entry,
        process: Process,
        ready: &UnixDatagram,
    ) -> Result<Process, Failure> {
        let mut message = [0; 512];
        let said_ready = async {
            loop {
                let len = ready.recv(&mut message).await.unwrap_or_default();
                if message[..len]
                    .split(|byte| *byte == b'\n')
                    .any(|line| line == b"READY=1")
                {
                    return;
                }
            }
        };
        tokio::select! {
            () = said_ready => Ok(process),
            () = process.ended() => Err(Failure::of_disk_process(self.reason(&entry.id))),
            () = tokio::time::sleep(START_LIMIT) => {
                process.stop(Duration::ZERO).await;
                let text = format!("disk {} was not ready within {START_LIMIT:?}", entry.id);
                Err(Failure::new(Code::Timeout, text))
            }
        }
    }

    /// Returns the process that serves the control socket of disk `id`, if there is one.
    pub async fn serving(&self, id: &DiskId) -> Option<Process> {
        self.owner(&self.control(id)).await
    }

    /// The process of this program that listens on a control socket.
    async fn owner(&self, control: &Path) -> Option<Process> {
        let stream = tokio::net::UnixStream::connect(control).await.ok()?;
        let pid = stream.peer_cred().ok()?.pid()?;
        let program = fs::read_link(format!("/proc/{pid}/exe")).ok()?;
        (program == self.program).then_some(())?;
        Process::of_pid(&self.watcher, pid).ok()
    }

    /// Returns the feature bits that disks of the program offer.
    ///
    /// # Errors
    /// [`Code::Internal`] if the program does not tell them.
    pub async fn offered_features(&self) -> Result<Value, Failure> {
        let failed = |error: io::Error| {
            let text = format!("{} --print-features: {error}", self.program.display());
            Failure::new(Code::Internal, text)
        };
        let asked = tokio::process::Command::new(&self.program)
            .arg("--print-features")
            .stdin(Stdio::null())
            .kill_on_drop(true)
            .output();
        let output = tokio::time::timeout(FEATURES_LIMIT, asked).await;
        let output = output.map_err(|_| failed(io::ErrorKind::TimedOut.into()))?;
        let output = output.map_err(failed)?;
        serde_json::from_slice(&output.stdout).map_err(|error| failed(error.into()))
    }

    /// Finds a process that a former node started.
    pub fn find(&self, identity: &Identity) -> Option<Process> {
        Process::find(&self.watcher, identity)
    }

    /// What the process of `id` reported last.
    pub fn reason(&self, id: &DiskId) -> String {
        last_line(&self.log(id))
            .unwrap_or_else(|| "the disk process ended without a message".to_owned())
    }

    /// Removes the socket, control socket and log of a disk that is gone.
    pub fn clean(&self, id: &DiskId, socket: &Path) {
        let files = [
            self.control(id),
            self.log(id),
            self.notify(id),
            self.stats(id),
            hidden(socket),
        ];
        for path in files.iter().map(PathBuf::as_path).chain([socket]) {
            // A path that is gone already is no failure.
            let _ = fs::remove_file(path);
        }
    }
}

/// Waits for the end of a child, so that it leaves no zombie.
fn reap(mut child: tokio::process::Child) {
    tokio::spawn(async move { child.wait().await });
}

/// The last line of text in a log.
fn last_line(path: &Path) -> Option<String> {
    let mut file = open_to_read(path).ok()?;
    let len = file.metadata().ok()?.len();
    file.seek(SeekFrom::Start(len.saturating_sub(LOG_TAIL)))
        .ok()?;
    let mut tail = Vec::new();
    file.take(LOG_TAIL).read_to_end(&mut tail).ok()?;
    let text = String::from_utf8_lossy(&tail);
    text.lines()
        .rev()
        .map(str::trim)
        .find(|line| !line.is_empty())
        .map(logging::message)
}

/// Becomes the program in `arguments`: the second half of [`Launcher::start`].
pub fn launch(mut arguments: impl Iterator<Item = OsString>) -> ExitCode {
    let Some(program) = arguments.next() else {
        return ExitCode::from(2);
    };
    let error = Command::new(&program)
        .args(arguments)
        .env("LISTEN_PID", std::process::id().to_string())
        .exec();
    log::error!("cannot execute {}: {error}", program.display());
    ExitCode::FAILURE
}
