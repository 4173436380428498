//! The real `ovbd-vhost` binary as a child process, with its socket in a directory of its own.

use std::ffi::{OsStr, OsString};
use std::fs::{self, File};
use std::os::unix::net::UnixStream;
use std::os::unix::process::ExitStatusExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Output, Stdio};
use std::thread;
use std::time::{Duration, Instant};

use rustix::process::{Pid, Signal, kill_process};
use tempfile::TempDir;

use super::fetch_processes::{Role, children};
use super::namespace::{self, Namespace};
use super::{PATIENCE, programs};

/// A command line of the daemon that nothing was added to yet.
pub fn command() -> Command {
    command_after(&[])
}

/// The same, run by another program whose last argument is the daemon.
fn command_after(prefix: &[OsString]) -> Command {
    let daemon = programs::path("ovbd-vhost");
    let mut command = match prefix.split_first() {
        None => Command::new(daemon),
        Some((program, arguments)) => {
            let mut command = Command::new(program);
            command.args(arguments).arg(daemon);
            command
        }
    };
    command
        .stdin(Stdio::null())
        // One heap: how much of it is kept does not depend on which threads met.
        .env("MALLOC_ARENA_MAX", "1")
        .env_remove("NOTIFY_SOCKET")
        .env_remove("LISTEN_FDS");
    command
}

/// Options of every daemon that serves, from the environment: the way to run all tests on another
/// path through the daemon, as in `OVBD_TEST_OPTIONS="--block-cache 16M" cargo test`.
fn everywhere() -> Vec<String> {
    let options = std::env::var("OVBD_TEST_OPTIONS").unwrap_or_default();
    options.split_whitespace().map(str::to_owned).collect()
}

/// Runs the daemon to its end, which it is expected to come to by itself.
pub fn run<A: AsRef<OsStr>>(arguments: impl IntoIterator<Item = A>) -> Output {
    run_command(command().args(arguments))
}

/// The same in a mount namespace of its own: see [`Daemon::in_namespace`].
pub fn run_in_namespace(setup: &str, arguments: &[&str]) -> Output {
    run_command(command_after(&namespace::with_own(setup)).args(arguments))
}

fn run_command(command: &mut Command) -> Output {
    let mut child = command
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .expect("start of the daemon");
    let start = Instant::now();
    while child.try_wait().expect("child").is_none() {
        if start.elapsed() > PATIENCE {
            let _ = child.kill();
            panic!("the daemon goes on where it should have ended");
        }
        thread::sleep(Duration::from_millis(5));
    }
    child.wait_with_output().expect("output")
}

/// A running daemon; it is killed when dropped.
pub struct Daemon {
    child: Child,
    directory: TempDir,
    prefix: Vec<OsString>,
    arguments: Vec<OsString>,
}

impl Daemon {
    /// Serves a stack of layers, bottom first, and waits until the socket listens.
    pub fn serve<P: AsRef<Path>>(layers: &[P]) -> Self {
        Self::with(layers, &[])
    }

    /// Serves a stack of layers with more options.
    pub fn with<P: AsRef<Path>>(layers: &[P], options: &[&str]) -> Self {
        let mut arguments: Vec<OsString> = Vec::new();
        for layer in layers {
            arguments.push("--layers".into());
            arguments.push(layer.as_ref().into());
        }
        arguments.extend(options.iter().map(OsString::from));
        Self::start(Vec::new(), arguments)
    }

    /// Serves what the options say, in a mount namespace of its own: the shell script `setup` may
    /// change what is mounted there.
    pub fn in_namespace(setup: &str, options: &[&str]) -> Self {
        let arguments = options.iter().map(OsString::from).collect();
        Self::start(namespace::with_own(setup), arguments)
    }

    /// Serves what the options say, in a mount namespace that is there.
    pub fn inside(namespace: &Namespace, options: &[&str]) -> Self {
        let arguments = options.iter().map(OsString::from).collect();
        Self::start(namespace.enter(), arguments)
    }

    fn start(prefix: Vec<OsString>, arguments: Vec<OsString>) -> Self {
        let directory = tempfile::tempdir().expect("temporary directory");
        let child = Self::spawn(directory.path(), &prefix, &arguments);
        let mut daemon = Self {
            child,
            directory,
            prefix,
            arguments,
        };
        daemon.wait_until_listening();
        daemon
    }

    fn spawn(directory: &Path, prefix: &[OsString], arguments: &[OsString]) -> Child {
        let log = File::options()
            .create(true)
            .append(true)
            .open(directory.join("stderr"))
            .expect("log file");
        command_after(prefix)
            .arg("--socket")
            .arg(directory.join("ovbd.sock"))
            .args(arguments)
            .args(everywhere())
            .stdout(Stdio::null())
            .stderr(log)
            .spawn()
            .expect("start of the daemon")
    }

    fn wait_until_listening(&mut self) {
        let start = Instant::now();
        while UnixStream::connect(self.socket()).is_err() {
            if let Some(status) = self.child.try_wait().expect("child") {
                panic!("the daemon ended, {status}: {}", self.log());
            }
            assert!(
                start.elapsed() < PATIENCE,
                "the daemon does not listen: {}",
                self.log()
            );
            thread::sleep(Duration::from_millis(2));
        }
    }

    /// Its socket.
    pub fn socket(&self) -> PathBuf {
        self.directory.path().join("ovbd.sock")
    }

    /// A new connection.
    pub fn connect(&self) -> UnixStream {
        UnixStream::connect(self.socket()).expect("the daemon listens")
    }

    /// What it has written to stderr.
    pub fn log(&self) -> String {
        fs::read_to_string(self.directory.path().join("stderr")).unwrap_or_default()
    }

    /// Entries of `/proc/PID/NAME`: `fd` or `task`.
    pub fn count(&self, name: &str) -> usize {
        let path = format!("/proc/{}/{name}", self.child.id());
        fs::read_dir(path).expect("the daemon runs").count()
    }

    /// Private anonymous memory in KiB: what is mapped from layers and guests does not count.
    pub fn private_kib(&self) -> u64 {
        let path = format!("/proc/{}/smaps_rollup", self.child.id());
        let text = fs::read_to_string(path).expect("the daemon runs");
        let line = text.lines().find(|line| line.starts_with("Anonymous:"));
        let number = line.and_then(|line| line.split_whitespace().nth(1)?.parse().ok());
        number.expect("a line with a number of KiB")
    }

    /// Its process.
    pub fn pid(&self) -> Pid {
        Pid::from_child(&self.child)
    }

    /// Ends it without a warning, as a crash does.
    pub fn kill(&mut self) {
        self.child.kill().expect("kill");
        self.child.wait().expect("child");
    }

    /// Asks it to stop and waits until it did.
    pub fn terminate(&mut self) -> ExitStatus {
        kill_process(self.pid(), Signal::TERM).expect("SIGTERM");
        self.wait()
    }

    /// Waits until it ends by itself.
    pub fn wait(&mut self) -> ExitStatus {
        let start = Instant::now();
        loop {
            if let Some(status) = self.child.try_wait().expect("child") {
                return status;
            }
            assert!(
                start.elapsed() < PATIENCE,
                "the daemon does not end: {}",
                self.log()
            );
            thread::sleep(Duration::from_millis(2));
        }
    }

    /// Starts it anew on the same socket, after [`Daemon::kill`] or [`Daemon::terminate`].
    pub fn restart(&mut self) {
        self.child = Self::spawn(self.directory.path(), &self.prefix, &self.arguments);
        self.wait_until_listening();
    }

    /// The process that keeps the daemon's fetcher running, and the fetcher, as far as they run.
    pub fn fetcher(&self) -> (Option<Pid>, Option<Pid>) {
        let keeper = children(self.pid(), Role::Keeper).first().copied();
        let fetcher = keeper.and_then(|keeper| children(keeper, Role::Fetcher).first().copied());
        (keeper, fetcher)
    }

    /// Asserts that it still runs: nothing so far made it end.
    pub fn assert_alive(&mut self) {
        if let Some(status) = self.child.try_wait().expect("child") {
            let signal = status.signal();
            panic!(
                "the daemon ended, {status}, signal {signal:?}: {}",
                self.log()
            );
        }
    }
}

impl Drop for Daemon {
    #[allow(clippy::print_stderr)] // Shown by the test runner with a failed test.
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
        if thread::panicking() {
            eprintln!("the daemon's log:\n{}", self.log());
        }
    }
}
