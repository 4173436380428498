//! Bytes as a file that needs no disk.

use std::fs::File;
use std::io::Write;
use std::os::fd::AsRawFd;
use std::path::{Path, PathBuf};

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
