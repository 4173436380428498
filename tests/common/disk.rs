//! The disk most tests read: the golden stack of 64 layers in every encoding, served by the daemon.

use std::sync::{Arc, OnceLock};

use ovbd_vhost::image::Image;
use ovbd_vhost::image::config::Stack;
use ovbd_vhost::image::reader::Reader;
use ovbd_vhost::units::Sector;
use sha2::{Digest, Sha256};

use super::daemon::Daemon;
use super::golden::{self, Case};
use super::guest::{Guest, Options};
use super::memory::Memory;
use super::session::{Session, Wanted};

/// A running daemon and what its disk must read as.
pub struct Disk {
    /// The daemon.
    pub daemon: Daemon,
    /// Every byte of the disk.
    pub content: Arc<Vec<u8>>,
}

/// The stack most tests serve, and its content.
pub fn deep() -> (Case, Arc<Vec<u8>>) {
    static CONTENT: OnceLock<Arc<Vec<u8>>> = OnceLock::new();
    let case = golden::find("08-deep64-small");
    let bytes = CONTENT.get_or_init(|| Arc::new(content(&case)));
    (case, Arc::clone(bytes))
}

/// The content of a golden stack, which the manifest's hash vouches for.
pub fn content(case: &Case) -> Vec<u8> {
    let stack = Stack::new(case.layers.iter().map(std::path::PathBuf::as_path));
    let image = Image::open(&stack).expect("golden stack");
    let mut bytes = vec![0; (image.at_own_size().sectors().0 * super::blk::SECTOR) as usize];
    Reader::new()
        .read(image.at_own_size(), Sector(0), &mut bytes)
        .expect("golden content");
    bytes.truncate(case.size as usize);
    assert_eq!(sha256(&bytes), case.sha256, "{}", case.name);
    bytes
}

/// SHA-256 in hexadecimal.
pub fn sha256(bytes: &[u8]) -> String {
    Sha256::digest(bytes)
        .iter()
        .map(|byte| format!("{byte:02x}"))
        .collect()
}

impl Disk {
    /// Serves it.
    pub fn serve() -> Self {
        Self::serve_with(&[])
    }

    /// Serves it with more options on the daemon's command line.
    pub fn serve_with(options: &[&str]) -> Self {
        let (case, content) = deep();
        Self {
            daemon: Daemon::with(&case.layers, options),
            content,
        }
    }

    /// A guest on a new connection.
    pub fn guest(&self, options: Options) -> Guest {
        Guest::boot(self.daemon.connect(), options).expect("guest")
    }

    /// A new connection that has memory and no queues yet.
    pub fn session(&self) -> (Session, Memory) {
        let session = Session::negotiate(self.daemon.connect(), Wanted::all()).expect("session");
        let memory = Memory::typical();
        session.share(&memory).expect("memory");
        (session, memory)
    }

    /// `len` bytes of the content from `sector` on.
    pub fn expected(&self, sector: u64, len: u32) -> &[u8] {
        let start = (sector * super::blk::SECTOR) as usize;
        &self.content[start..start + len as usize]
    }

    /// Sectors of the disk.
    pub fn sectors(&self) -> u64 {
        self.content.len() as u64 / super::blk::SECTOR
    }

    /// Asserts that the daemon runs and serves a new front-end.
    pub fn assert_well(&mut self) {
        self.daemon.assert_alive();
        let mut guest = self.guest(Options::default());
        guest.assert_reads(0, &self.content);
    }
}
