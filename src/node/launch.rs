//! Starts disk processes.
//!
//! The node binds the listening socket and passes it to the process ([`handover`]), so that front-ends can connect while
//! the process is replaced. Everything that the process inherits is a standard stream: the C library can then start it
//! without a copy of the node's page tables (`posix_spawn(3)`).

mod arguments;
mod bounded_log;
mod recovery;
mod socket;
mod strays;

use std::ffi::OsString;
use std::fs;
use std::io::{self, Read, Seek, SeekFrom};
use std::os::fd::OwnedFd;
use std::os::unix::net::{UnixListener, UnixStream};
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::Duration;

use serde_json::Value;
use tokio::io::{AsyncBufReadExt, AsyncReadExt, BufReader};
use tokio::sync::{Semaphore, SemaphorePermit};

use super::entry::Entry;
use super::error::{Code, Error, Failure};
use super::id::DiskId;
use super::process::Process;
use super::socket::hidden;
use super::watcher::Watcher;
use crate::daemon::handover::{self, MAX_READY, Ready};
use crate::engine::stats::figures::Figures;
use crate::io::directory::create_all;
use crate::io::processors;
use crate::io::regular::open_to_read;
use crate::logging;

pub use socket::bind;

/// Most bytes of a socket's path.
pub const MAX_SOCKET_PATH: usize = 107;

/// How long a process may take to be ready. It waits for a registry for a minute.
const START_LIMIT: Duration = Duration::from_secs(90);

/// How long the program may take to tell its feature bits.
const FEATURES_LIMIT: Duration = Duration::from_secs(10);

/// Bytes of its log that are searched for the reason of a failure.
const LOG_TAIL: u64 = 4096;

/// How long a process that has closed its stream to the node may take to end.
const END_LIMIT: Duration = Duration::from_secs(1);

/// Processes of local layers that are started at a time, for each processor: more would only wait for it.
const PARALLEL_STARTS: usize = 2;

/// Processes that are started at a time and may wait for a registry, which must not delay others.
const PARALLEL_REMOTE_STARTS: usize = 64;

/// Variables of the service manager's interface, which concern the node alone.
const OF_MANAGER: [&str; 6] = [
    "NOTIFY_SOCKET",
    "LISTEN_FDS",
    "LISTEN_PID",
    "LISTEN_FDNAMES",
    "WATCHDOG_PID",
    "WATCHDOG_USEC",
];

/// Starts disk processes with their sockets and logs in the run directory.
#[derive(Debug)]
pub struct Launcher {
    run_dir: PathBuf,
    program: PathBuf,
    /// Options that all disks get.
    options: Vec<OsString>,
    watcher: Watcher,
    /// Permits to start processes of local layers.
    starts: Semaphore,
    /// Permits to start processes that may wait for a registry.
    remote_starts: Semaphore,
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
            starts: Semaphore::new(PARALLEL_STARTS * processors::available()),
            remote_starts: Semaphore::new(PARALLEL_REMOTE_STARTS),
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

    fn stats(&self, id: &DiskId) -> PathBuf {
        self.run_dir.join(format!("{id}.stats"))
    }

    /// Returns the values of a disk's statistics page; zeros if there is none.
    pub fn figures(&self, id: &DiskId) -> Figures {
        Figures::read(&self.stats(id)).unwrap_or_default()
    }

    /// Checks that the sockets of disk `id` fit the system's limit.
    ///
    /// # Errors
    /// [`Error::LongPath`] names the path.
    pub fn check_paths(&self, id: &DiskId, socket: &Path) -> Result<(), Error> {
        for path in [socket.to_owned(), self.control(id)] {
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
    pub async fn start(
        &self,
        entry: &Entry,
        listener: &UnixListener,
    ) -> Result<(Process, Ready), Failure> {
        let _permit = self.permit(entry).await;
        let (process, stream) = self.spawn(entry, listener)?;
        let ready = async {
            tokio::select! {
                ready = until_ready(stream) => ready,
                // A process that it started may have the stream too.
                () = process.ended() => Err(io::ErrorKind::UnexpectedEof.into()),
            }
        };
        match tokio::time::timeout(START_LIMIT, ready).await {
            Ok(Ok(ready)) => Ok((process, ready)),
            Ok(Err(_)) => {
                process.stop(END_LIMIT).await;
                Err(Failure::of_disk_process(self.reason(&entry.id)))
            }
            Err(_) => {
                process.stop(Duration::ZERO).await;
                let text = format!("disk {} was not ready within {START_LIMIT:?}", entry.id);
                Err(Failure::new(Code::Timeout, text))
            }
        }
    }

    /// Waits for the permit to start the process of a disk.
    async fn permit(&self, entry: &Entry) -> Option<SemaphorePermit<'_>> {
        let permits = match entry.content.may_be_remote() {
            true => &self.remote_starts,
            false => &self.starts,
        };
        // Cannot fail: the semaphore is never closed.
        permits.acquire().await.ok()
    }

    /// Starts a process. Returns it with the node's end of the stream to it.
    fn spawn(
        &self,
        entry: &Entry,
        listener: &UnixListener,
    ) -> Result<(Process, UnixStream), Failure> {
        let prepared = handover::prepare(listener);
        let (stream, stdin) = prepared.map_err(Error::file("pass", &entry.socket))?;
        // The process's end is closed here before the answer is waited for: its end is the end of the stream.
        let spawned = self.command(entry, stdin)?.spawn();
        let mut child = spawned.map_err(Error::file("start", &self.program))?;
        let pid = i32::try_from(child.id()).unwrap_or_default();
        match Process::of_pid(&self.watcher, pid) {
            Ok(process) => Ok((process, stream)),
            Err(error) => {
                // A process that is not watched must not serve. One that has ended cannot be killed.
                let _ = child.kill();
                let _ = child.wait();
                Err(match error.kind() {
                    io::ErrorKind::NotFound => Failure::of_disk_process(self.reason(&entry.id)),
                    _ => Error::file("watch", &self.program)(error).into(),
                })
            }
        }
    }

    fn command(&self, entry: &Entry, stdin: OwnedFd) -> Result<Command, Error> {
        let log = self.begin_log(&entry.id)?;
        let errors = log.try_clone();
        let errors = errors.map_err(Error::file("open", self.log(&entry.id)))?;
        let mut command = Command::new(&self.program);
        command
            .arg("--started-by-node")
            .args(self.arguments(entry))
            .stdin(stdin)
            .stdout(log)
            .stderr(errors)
            // A signal to the node's terminal must not end its disks.
            .process_group(0);
        for variable in OF_MANAGER {
            command.env_remove(variable);
        }
        logging::pass_format(&mut command);
        Ok(command)
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
            self.old_log(id),
            self.stats(id),
            hidden(socket),
        ];
        for path in files.iter().map(PathBuf::as_path).chain([socket]) {
            // A path that is gone already is no failure.
            let _ = fs::remove_file(path);
        }
    }
}

/// Waits for the report of a process that is ready.
async fn until_ready(stream: UnixStream) -> io::Result<Ready> {
    stream.set_nonblocking(true)?;
    let stream = tokio::net::UnixStream::from_std(stream)?;
    let mut line = Vec::new();
    let limited = stream.take(MAX_READY as u64);
    BufReader::new(limited).read_until(b'\n', &mut line).await?;
    Ok(serde_json::from_slice(&line)?)
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
