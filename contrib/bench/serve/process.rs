//! A daemon under measurement: started, bound to a processor, asked what it used.

use std::fs::{self, File};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::OnceLock;
use std::thread;
use std::time::{Duration, Instant};

use rustix::process::{Pid, Signal, kill_process};
use rustix::thread::{CpuSet, sched_getaffinity, sched_setaffinity};
use tempfile::TempDir;

use crate::Result;
use common::PATIENCE;

/// How long a daemon may take to end.
const LAST_WORDS: Duration = Duration::from_secs(5);

const SOCKET: &str = "socket";
const LOG: &str = "log";

/// A running daemon with its socket; stopped when dropped.
pub struct Process {
    child: Child,
    /// Holds its socket and its log.
    dir: TempDir,
}

/// The processors this process could use when it first asked: before it bound a thread to any.
pub fn processors() -> Result<&'static [usize]> {
    static ALL: OnceLock<Vec<usize>> = OnceLock::new();
    if let Some(all) = ALL.get() {
        return Ok(all);
    }
    let set = sched_getaffinity(None)?;
    let all = (0..CpuSet::MAX_CPU).filter(|cpu| set.is_set(*cpu));
    Ok(ALL.get_or_init(|| all.collect()))
}

/// Binds a thread, or this one, to some processors.
pub fn bind(thread: Option<Pid>, cpus: &[usize]) -> Result<()> {
    let mut set = CpuSet::new();
    for cpu in cpus {
        set.set(*cpu);
    }
    Ok(sched_setaffinity(thread, &set)?)
}

impl Process {
    /// Starts the daemon that `command` gives for a socket, and waits until it listens.
    pub fn start(command: impl FnOnce(&Path) -> Command) -> Result<Self> {
        let dir = tempfile::tempdir()?;
        let mut command = command(&dir.path().join(SOCKET));
        let log = File::create(dir.path().join(LOG))?;
        let child = command
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(log)
            .spawn();
        let child =
            child.map_err(|error| format!("{}: {error}", command.get_program().display()))?;
        let mut process = Self { child, dir };
        let start = Instant::now();
        while !process.dir.path().join(SOCKET).exists() {
            if process.child.try_wait()?.is_some() || start.elapsed() > PATIENCE {
                let log = fs::read_to_string(process.dir.path().join(LOG))?;
                return Err(format!("{command:?} does not listen: {log}").into());
            }
            thread::sleep(Duration::from_micros(200));
        }
        Ok(process)
    }

    /// A new connection.
    pub fn connect(&self) -> Result<UnixStream> {
        let start = Instant::now();
        loop {
            match UnixStream::connect(self.dir.path().join(SOCKET)) {
                // The socket is there before it listens.
                Err(_) if start.elapsed() < PATIENCE => thread::sleep(Duration::from_millis(1)),
                result => return Ok(result?),
            }
        }
    }

    fn path(&self, name: &str) -> PathBuf {
        format!("/proc/{}/{name}", self.child.id()).into()
    }

    fn threads(&self) -> Result<Vec<PathBuf>> {
        let entries = fs::read_dir(self.path("task"))?;
        Ok(entries
            .map(|entry| entry.map(|entry| entry.path()))
            .collect::<std::io::Result<_>>()?)
    }

    /// Binds all its threads; those to come follow the one that starts them.
    pub fn bind(&self, cpus: &[usize]) -> Result<()> {
        for thread in self.threads()? {
            let id = thread
                .file_name()
                .and_then(|name| name.to_str()?.parse().ok());
            bind(id.and_then(Pid::from_raw), cpus)?;
        }
        Ok(())
    }

    /// Nanoseconds its living threads have run.
    pub fn cpu(&self) -> Result<u64> {
        let mut total = 0;
        for thread in self.threads()? {
            // A thread may end between the two steps.
            let text = fs::read_to_string(thread.join("schedstat")).unwrap_or_default();
            total += text
                .split(' ')
                .next()
                .and_then(|run| run.parse().ok())
                .unwrap_or(0);
        }
        Ok(total)
    }

    /// Bytes it made the system read from storage.
    pub fn read_from_storage(&self) -> Result<u64> {
        let text = fs::read_to_string(self.path("io"))?;
        let line = text
            .lines()
            .find_map(|line| line.strip_prefix("read_bytes: "));
        Ok(line.ok_or("io: no read_bytes")?.parse()?)
    }

    /// KiB of memory that no file backs. `Private_Dirty` would not do: it counts pages of a program file that was linked a moment ago and is not on storage yet.
    pub fn private(&self) -> Result<u64> {
        let text = fs::read_to_string(self.path("smaps_rollup"))?;
        let line = text.lines().find(|line| line.starts_with("Anonymous:"));
        let number = line.and_then(|line| line.split_whitespace().nth(1)?.parse().ok());
        Ok(number.ok_or("smaps_rollup: no Anonymous")?)
    }
}

/// Nanoseconds all threads of this process have run, those that ended among them.
pub fn own_cpu() -> u64 {
    let now = rustix::time::clock_gettime(rustix::time::ClockId::ProcessCPUTime);
    now.tv_sec as u64 * 1_000_000_000 + now.tv_nsec as u64
}

impl Drop for Process {
    fn drop(&mut self) {
        // Already gone is as good.
        let _ = kill_process(Pid::from_child(&self.child), Signal::TERM);
        let start = Instant::now();
        while matches!(self.child.try_wait(), Ok(None)) && start.elapsed() < LAST_WORDS {
            thread::sleep(Duration::from_millis(1));
        }
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}
