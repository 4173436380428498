//! The daemon with the disk most tests read, under a writable layer.

use std::fs;
use std::path::PathBuf;
use std::sync::Arc;

use tempfile::TempDir;

use super::daemon::Daemon;
use super::disk::deep;
use super::guest::{Guest, Options};

/// A running daemon whose disk can be written to.
pub struct Writable {
    /// The daemon.
    pub daemon: Daemon,
    /// Every byte of the disk before anything was written.
    pub content: Arc<Vec<u8>>,
    folder: TempDir,
}

impl Writable {
    /// Serves it with a new, empty layer.
    pub fn serve() -> Self {
        Self::serve_with(&[])
    }

    /// Serves it with more options on the daemon's command line.
    pub fn serve_with(options: &[&str]) -> Self {
        let folder = tempfile::tempdir().expect("temporary directory");
        Self::serve_in(folder, options)
    }

    /// Serves it with a layer in `folder`.
    pub fn serve_in(folder: TempDir, options: &[&str]) -> Self {
        let (case, content) = deep();
        let path = folder.path().to_str().expect("UTF-8");
        let options = [&["--upper-auto", path], options].concat();
        Self {
            daemon: Daemon::with(&case.layers, &options),
            content,
            folder,
        }
    }

    /// A guest on a new connection.
    pub fn guest(&self, options: Options) -> Guest {
        Guest::boot(self.daemon.connect(), options).expect("guest")
    }

    /// A guest with one queue.
    pub fn plain_guest(&self) -> Guest {
        self.guest(Options::default())
    }

    /// A file of the layer.
    pub fn file(&self, name: &str) -> PathBuf {
        self.folder.path().join(name)
    }

    /// Kills the daemon, takes away what a power loss takes away, and starts it anew: what is not
    /// durable may be lost, and here the journal is, which counts only as long as the system runs.
    pub fn lose_power(&mut self) {
        self.daemon.kill();
        for name in ["upper.index.journal0", "upper.index.journal1"] {
            fs::remove_file(self.file(name)).expect("a journal");
        }
        self.daemon.restart();
    }

    /// Kills the daemon and starts it anew.
    pub fn crash(&mut self) {
        self.daemon.kill();
        self.daemon.restart();
    }

    /// Stops the daemon as a service manager does, and starts it anew.
    pub fn stop_and_start(&mut self) {
        assert_eq!(
            self.daemon.terminate().code(),
            Some(0),
            "{}",
            self.daemon.log()
        );
        self.daemon.restart();
    }
}
