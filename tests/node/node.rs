//! A running node, and requests to it.

use std::fs;
use std::io::{Read, Write};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::thread;
use std::time::{Duration, Instant};

use common::{PATIENCE, programs};
use rustix::process::{Pid, Signal, kill_process};
use serde_json::Value;
use tempfile::TempDir;

/// A node with directories of its own; it and its disks are killed when it is dropped.
pub struct Node {
    pub dir: TempDir,
    child: Child,
}

/// Status and body of an answer.
pub type Answer = (u16, Value);

impl Node {
    pub fn start() -> Self {
        Self::start_with(&[])
    }

    /// Starts a node with more options.
    pub fn start_with(options: &[&str]) -> Self {
        let dir = tempfile::tempdir().unwrap();
        Self::start_in(dir, |command| {
            command.args(options);
        })
    }

    /// Starts a node with the directories of `dir`, after `change` changed its command line.
    pub fn start_in(dir: TempDir, change: impl FnOnce(&mut Command)) -> Self {
        let mut command = Self::command(dir.path());
        change(&mut command);
        let child = command.spawn().unwrap();
        let node = Self { dir, child };
        node.until_ready();
        node
    }

    /// Returns the command line of a node with its directories in `dir`.
    pub fn command(dir: &Path) -> Command {
        fs::create_dir_all(dir.join("images")).unwrap();
        let mut command = Command::new(programs::path("ovbd-node"));
        command
            .arg("--control")
            .arg(dir.join("control.sock"))
            .arg("--state")
            .arg(dir.join("state"))
            .arg("--run-dir")
            .arg(dir.join("run"))
            .arg("--allow-dir")
            .arg(dir.join("images"))
            .stdin(Stdio::null());
        command
    }

    /// The directory below which requests may name files.
    pub fn images(&self) -> PathBuf {
        fs::canonicalize(self.dir.path()).unwrap().join("images")
    }

    /// Control socket.
    pub fn control(&self) -> PathBuf {
        self.dir.path().join("control.sock")
    }

    pub fn run_dir(&self) -> PathBuf {
        self.dir.path().join("run")
    }

    pub fn state(&self, id: &str) -> PathBuf {
        self.dir.path().join(format!("state/disks/{id}.json"))
    }

    /// Kills the node, but not its disks.
    pub fn kill(&mut self) {
        self.child.kill().unwrap();
        self.child.wait().unwrap();
    }

    /// Starts another node on the same directories.
    pub fn start_again(&mut self) {
        self.child = Self::command(self.dir.path()).spawn().unwrap();
        self.until_ready();
    }

    /// Starts it again, with these options.
    pub fn start_again_with(&mut self, options: &[&str]) {
        let mut command = Self::command(self.dir.path());
        self.child = command.args(options).spawn().unwrap();
        self.until_ready();
    }

    /// Starts it again, after `change` changed its command line.
    pub fn start_again_as(&mut self, change: impl FnOnce(&mut Command)) {
        let mut command = Self::command(self.dir.path());
        change(&mut command);
        self.child = command.spawn().unwrap();
        self.until_ready();
    }

    fn until_ready(&self) {
        until("the node is ready", || {
            UnixStream::connect(self.dir.path().join("control.sock")).is_ok()
        });
    }

    pub fn get(&self, path: &str) -> Answer {
        self.request("GET", path, "")
    }

    pub fn put(&self, path: &str, body: &Value) -> Answer {
        self.request("PUT", path, &body.to_string())
    }

    /// Sends one request and returns the answer.
    pub fn request(&self, method: &str, path: &str, body: &str) -> Answer {
        let path = match path.strip_prefix('!') {
            Some(whole) => whole.to_owned(),
            None => format!("/api/v1{path}"),
        };
        let len = body.len();
        let head = format!(
            "{method} {path} HTTP/1.1\r\nHost: x\r\nConnection: close\r\nContent-Length: {len}\r\n\r\n"
        );
        let text = self.exchange(&(head + body));
        let (head, body) = text.split_once("\r\n\r\n").expect("head and body");
        let status = head
            .split(' ')
            .nth(1)
            .and_then(|status| status.parse().ok())
            .expect("status");
        (
            status,
            serde_json::from_str(body).unwrap_or_else(|_| Value::from(body)),
        )
    }

    /// Number of the node's process.
    pub fn node_pid(&self) -> i32 {
        self.child.id() as i32
    }

    /// Entries of `/proc/PID/NAME` of the node: `fd` or `task`.
    pub fn count(&self, name: &str) -> usize {
        let path = format!("/proc/{}/{name}", self.node_pid());
        fs::read_dir(path).unwrap().count()
    }

    /// Number of the node's child processes, of all its threads.
    pub fn children(&self) -> usize {
        let tasks = fs::read_dir(format!("/proc/{}/task", self.node_pid())).unwrap();
        let children = tasks.flatten().map(|task| {
            let text = fs::read_to_string(task.path().join("children")).unwrap_or_default();
            text.split_whitespace().count()
        });
        children.sum()
    }

    /// Sends bytes as they are, and waits for no answer; the connection stays open.
    pub fn send(&self, request: &str) {
        let mut stream = UnixStream::connect(self.control()).unwrap();
        stream.write_all(request.as_bytes()).unwrap();
        std::mem::forget(stream);
    }

    /// Sends bytes as they are and returns all that is answered.
    pub fn exchange(&self, request: &str) -> String {
        let mut stream = UnixStream::connect(self.dir.path().join("control.sock")).unwrap();
        stream.set_read_timeout(Some(PATIENCE)).unwrap();
        stream.write_all(request.as_bytes()).unwrap();
        let mut text = String::new();
        stream.read_to_string(&mut text).unwrap();
        text
    }

    pub fn pid(&self, id: &str) -> i32 {
        let (status, disk) = self.get(&format!("/disks/{id}"));
        assert_eq!(status, 200, "{disk}");
        disk["pid"].as_i64().unwrap_or_default() as i32
    }

    /// Waits until a disk has a state.
    pub fn until_state(&self, id: &str, state: &str) {
        until(state, || {
            self.get(&format!("/disks/{id}")).1["state"] == state
        });
    }

    /// Connects to a disk.
    pub fn connect(&self, id: &str) -> UnixStream {
        UnixStream::connect(self.run_dir().join(format!("{id}.sock"))).unwrap()
    }
}

impl Drop for Node {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
        kill_disks(&self.dir.path().join("state"));
    }
}

/// Kills the disk processes that the entries of a state directory name.
pub fn kill_disks(state: &Path) {
    let entries = fs::read_dir(state.join("disks"))
        .into_iter()
        .flatten()
        .flatten();
    for entry in entries {
        let text = fs::read_to_string(entry.path()).unwrap_or_default();
        let pid = serde_json::from_str::<Value>(&text)
            .ok()
            .and_then(|entry| entry["process"]["pid"].as_i64());
        if let Some(pid) = pid.and_then(|pid| Pid::from_raw(pid as i32)) {
            let _ = kill_process(pid, Signal::KILL);
        }
    }
}

/// Waits until `done`, and fails after a minute.
pub fn until(what: &str, mut done: impl FnMut() -> bool) {
    let start = Instant::now();
    while !done() {
        assert!(start.elapsed() < PATIENCE, "not within a minute: {what}");
        thread::sleep(Duration::from_millis(5));
    }
}

/// Kills a process.
pub fn kill(pid: i32) {
    kill_process(Pid::from_raw(pid).unwrap(), Signal::KILL).unwrap();
}
