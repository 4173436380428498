//! The daemon with the disk most tests read, under a writable layer.

use std::fs;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use ovbd_vhost::format::lsmt::Header;
use ovbd_vhost::format::lsmt::writable::Kind;
use ovbd_vhost::writable::{self, Paths, journal};
use tempfile::TempDir;
use uuid::Uuid;

use super::daemon::Daemon;
use super::disk::deep;
use super::guest::{Guest, Options};

/// A running daemon whose disk can be written to.
pub struct Writable {
    /// The daemon.
    pub daemon: Daemon,
    /// Every byte of the disk before anything was written.
    pub content: Arc<Vec<u8>>,
    path: PathBuf,
    /// Where the layer is, if the folder is our own.
    _folder: Option<TempDir>,
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

    /// Serves it with a new layer of a kind that is not the usual one.
    pub fn serve_kind(kind: Kind, options: &[&str]) -> Self {
        let folder = tempfile::tempdir().expect("temporary directory");
        let paths = Paths {
            data: folder.path().join("upper.data"),
            index: folder.path().join("upper.index"),
        };
        let header = Header::empty(deep().1.len() as u64, Uuid::new_v4(), Uuid::nil());
        writable::create(&paths, kind, &header).expect("a layer");
        Self::serve_in(folder, options)
    }

    /// Serves it with a layer in `folder`.
    pub fn serve_in(folder: TempDir, options: &[&str]) -> Self {
        let mut disk = Self::serve_at(folder.path(), options);
        disk._folder = Some(folder);
        disk
    }

    /// Serves it with a layer in a folder that outlives it.
    pub fn serve_at(path: &Path, options: &[&str]) -> Self {
        let (case, content) = deep();
        let folder = path.to_str().expect("UTF-8");
        let options = [&["--upper-auto", folder], options].concat();
        Self {
            daemon: Daemon::with(&case.layers, &options),
            content,
            path: path.to_owned(),
            _folder: None,
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
        self.path.join(name)
    }

    /// Kills the daemon, takes away what a power loss takes away, and starts it anew: what is not
    /// durable may be lost, and here the journal is, which counts only as long as the system runs.
    pub fn lose_power(&mut self) {
        self.daemon.kill();
        // The layer the daemon was first started with, or the one a snapshot put above it.
        let indexes = ["upper.index", "upper.index.1"].map(|index| self.file(index));
        let journals = indexes.iter().flat_map(|index| journal::paths(index));
        let removed = journals.filter(|file| fs::remove_file(file).is_ok());
        assert_eq!(removed.count(), 2, "files of one journal");
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

/// Removes the journal of a layer that `--upper-auto` made in `folder`.
pub fn forget_journal(folder: &Path) {
    for name in ["upper.index.journal0", "upper.index.journal1"] {
        fs::remove_file(folder.join(name)).expect("a journal");
    }
}
