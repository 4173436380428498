//! A running `ovbd-node`, for benchmarks and soaks.

use std::fs::{self, File};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::thread;
use std::time::{Duration, Instant};

use ovbd_vhost::tool::node::client::Node;
use rustix::process::{Pid, Signal, kill_process};
use serde_json::Value;
use tempfile::TempDir;

use super::{PATIENCE, programs};

/// A node with directories of its own. It and its disks are killed when it is dropped.
pub struct NodeProcess {
    dir: TempDir,
    child: Child,
}

impl NodeProcess {
    /// Starts a node whose directories are below `parent`.
    pub fn start(parent: &Path) -> Self {
        let dir = tempfile::tempdir_in(parent).expect("directory");
        fs::create_dir(dir.path().join("images")).expect("directory");
        let child = Self::spawn(dir.path());
        let node = Self { dir, child };
        node.until_it_answers();
        node
    }

    fn spawn(dir: &Path) -> Child {
        let log = File::options()
            .create(true)
            .append(true)
            .open(dir.join("log"));
        Command::new(programs::path("ovbd-node"))
            .args([
                "--control",
                "node.sock",
                "--state",
                "state",
                "--run-dir",
                "run",
            ])
            .arg("--allow-dir")
            .arg(dir.join("images"))
            .current_dir(dir)
            .stdin(Stdio::null())
            .stderr(log.expect("log"))
            .spawn()
            .expect("the node starts")
    }

    fn until_it_answers(&self) {
        let start = Instant::now();
        while self.client().disks(None).is_err() {
            assert!(
                start.elapsed() < PATIENCE,
                "the node does not answer: {}",
                self.log()
            );
            thread::sleep(Duration::from_millis(1));
        }
    }

    /// A client of its API.
    pub fn client(&self) -> Node {
        Node::at(&self.dir.path().join("node.sock"))
    }

    /// Directory below which requests may name files.
    pub fn images(&self) -> PathBuf {
        self.dir.path().join("images")
    }

    /// Socket of a disk.
    pub fn socket(&self, id: &str) -> PathBuf {
        self.dir.path().join(format!("run/{id}.sock"))
    }

    /// What it has logged.
    pub fn log(&self) -> String {
        fs::read_to_string(self.dir.path().join("log")).unwrap_or_default()
    }

    /// Kills the node with SIGKILL, but not its disks.
    pub fn kill(&mut self) {
        self.child.kill().expect("kill");
        self.child.wait().expect("end");
    }

    /// Ends the node with SIGTERM, but not its disks.
    pub fn terminate(&mut self) {
        kill_process(Pid::from_child(&self.child), Signal::TERM).expect("signal");
        self.child.wait().expect("end");
    }

    /// Starts another node on the same directories, and waits until it answers.
    pub fn start_again(&mut self) {
        self.child = Self::spawn(self.dir.path());
        self.until_it_answers();
    }

    /// The disk processes that the state entries name.
    pub fn disk_processes(&self) -> Vec<Pid> {
        let entries = fs::read_dir(self.dir.path().join("state/disks"));
        let entries = entries.into_iter().flatten().flatten();
        entries
            .filter_map(|entry| process_in(&entry.path()))
            .collect()
    }

    /// The process that the state entry of a disk names.
    pub fn disk_process(&self, id: &str) -> Option<Pid> {
        process_in(&self.dir.path().join(format!("state/disks/{id}.json")))
    }

    /// Files in the run directory.
    pub fn run_files(&self) -> Vec<PathBuf> {
        let files = fs::read_dir(self.dir.path().join("run")).expect("directory");
        files.map(|file| file.expect("file").path()).collect()
    }
}

/// The process in a state entry, which may be replaced at the same time.
fn process_in(entry: &Path) -> Option<Pid> {
    let text = fs::read_to_string(entry).ok()?;
    let entry: Value = serde_json::from_str(&text).ok()?;
    Pid::from_raw(i32::try_from(entry["process"]["pid"].as_i64()?).ok()?)
}

impl Drop for NodeProcess {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
        for process in self.disk_processes() {
            let _ = kill_process(process, Signal::KILL);
        }
    }
}
