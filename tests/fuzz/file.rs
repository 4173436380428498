//! Files that need no disk.

use std::fs::File;
use std::io::Write;
use std::os::fd::AsRawFd;
use std::path::{Path, PathBuf};
use std::sync::LazyLock;

use tempfile::TempDir;

/// A file in memory, with a path as long as it lives.
pub struct Held {
    _file: File,
    path: PathBuf,
}

impl Held {
    /// A file of these bytes.
    pub fn new(bytes: &[u8]) -> Self {
        let flags = rustix::fs::MemfdFlags::CLOEXEC;
        let mut file = File::from(rustix::fs::memfd_create("fuzz", flags).expect("memfd"));
        file.write_all(bytes).expect("memory");
        let path = PathBuf::from(format!("/proc/self/fd/{}", file.as_raw_fd()));
        Self { _file: file, path }
    }

    /// Its path.
    pub fn path(&self) -> &Path {
        &self.path
    }
}

/// A new folder for files that are written, in memory if there is such a place.
#[allow(dead_code, reason = "not all targets write")]
pub fn folder() -> TempDir {
    /// Goes with all that is in it.
    static PARENT: LazyLock<TempDir> = LazyLock::new(|| {
        let memory = Path::new("/dev/shm");
        let folder = match memory.is_dir() {
            true => tempfile::tempdir_in(memory),
            false => tempfile::tempdir(),
        };
        folder.expect("folder")
    });
    tempfile::tempdir_in(PARENT.path()).expect("folder")
}
