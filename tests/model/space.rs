//! How much storage a writable layer takes, whatever the guest does: at most a page for each sector
//! that it holds.

use common::volume::BlockingIo as _;
use std::fs;
use std::os::unix::fs::{FileExt, MetadataExt};
use std::path::Path;
use std::sync::Arc;

use common::content::Random;
use common::layers::upper_header;
use ovbd_vhost::format::lsmt::writable::Kind;
use ovbd_vhost::image::config::Stack;
use ovbd_vhost::io::scatter::Scatter;
use ovbd_vhost::writable::{Error, Options, Paths, Snapshots, Volume, create};
use tempfile::TempDir;
use uuid::Uuid;
use vm_memory::VolatileSlice;

/// Sectors of the disks: 16 MiB.
const SECTORS: u64 = 32 << 10;

/// Sectors written at a time: 4 MiB.
const PART: u64 = 8 << 10;

/// What the limit does not count: the header, and what the file system needs for itself.
const SLACK: u64 = 128 << 10;

struct Disk {
    folder: TempDir,
    options: Options,
    device: Option<(Arc<Volume>, Snapshots)>,
}

impl Disk {
    fn new(kind: Kind, limit: u64) -> Self {
        let folder = tempfile::tempdir().unwrap();
        let header = upper_header(SECTORS * 512, Uuid::new_v4());
        create(&paths(folder.path()), kind, &header).unwrap();
        let mut disk = Self {
            folder,
            options: Options {
                limit,
                ..Options::default()
            },
            device: None,
        };
        disk.restart();
        disk
    }

    fn restart(&mut self) {
        self.device = None;
        let paths = paths(self.folder.path());
        let stack = Stack::default();
        self.device = Some(common::volume::open(&stack, &paths, self.options).unwrap());
    }

    fn volume(&self) -> &Volume {
        &self.device.as_ref().unwrap().0
    }

    fn write(&self, start: u64, sectors: u64) -> Result<(), Error> {
        let mut bytes = vec![7; sectors as usize * 512];
        let mut scatter = Scatter::new();
        scatter.push(VolatileSlice::from(&mut bytes[..]));
        self.volume()
            .write(common::sectors(start, sectors), scatter.cursor(0))
    }

    fn discard(&self, start: u64, sectors: u64) {
        self.volume()
            .discard(common::sectors(start, sectors))
            .unwrap();
    }

    fn flush(&self) {
        self.volume().flush().unwrap();
    }

    /// Bytes that the active data file takes.
    fn stored(&self) -> u64 {
        let data = self.volume().layers()[0].paths().data.clone();
        fs::metadata(data).unwrap().blocks() * 512
    }

    fn used(&self) -> u64 {
        self.volume().layers()[0].used()
    }

    /// Asserts the bound that the documents promise.
    fn check(&self, when: &str) {
        let (stored, used) = (self.stored(), self.used());
        assert!(
            stored <= 8 * used + SLACK,
            "{when}: {stored} bytes for {used}"
        );
    }
}

fn paths(folder: &Path) -> Paths {
    Paths {
        data: folder.join("data"),
        index: folder.join("index"),
    }
}

/// A sector of each part is kept, the rest goes in pieces that are no whole pages.
#[test]
fn discards_in_small_pieces_give_storage_back() {
    for size in [1, 3, 7, 8, 13, 100] {
        let mut disk = Disk::new(Kind::Hybrid, 8 << 20);
        for round in 0..12 {
            let start = round % 4 * PART;
            disk.write(start, PART).unwrap();
            let mut pieces: Vec<_> = (start + 1..start + PART).step_by(size).collect();
            match round % 3 {
                0 => {}
                1 => pieces.reverse(),
                _ => Random::new(round).shuffle(&mut pieces),
            }
            for piece in pieces {
                disk.discard(piece, (size as u64).min(start + PART - piece));
            }
            disk.flush();
            disk.check(&format!("pieces of {size}, round {round}"));
            assert!(disk.used() <= 16 * 512, "{} bytes", disk.used());
            if round == 7 {
                disk.restart();
                disk.check(&format!("pieces of {size}, started again"));
            }
        }
    }
}

#[test]
fn what_is_all_discarded_takes_nothing() {
    for kind in [Kind::Append, Kind::Hybrid, Kind::Sparse] {
        let disk = Disk::new(kind, u64::MAX);
        for start in (0..SECTORS).step_by(PART as usize) {
            disk.write(start, PART).unwrap();
        }
        let before = disk.stored();
        assert!(before >= SECTORS * 512);
        for start in (0..SECTORS).step_by(7) {
            disk.discard(start, 7.min(SECTORS - start));
        }
        disk.flush();
        let left = disk.stored();
        assert!(left <= SLACK, "{kind:?}: {left} bytes");
    }
}

/// Sectors that a write moves elsewhere, or that a failed flush keeps, are given back as well.
#[test]
fn writes_over_scattered_data_give_storage_back() {
    let mut disk = Disk::new(Kind::Hybrid, u64::MAX);
    let index = disk.folder.path().join("index.new");
    disk.options.bounds.max_index_entries = 3000;
    disk.restart();
    for round in 0..6 {
        for start in (0..PART).step_by(2) {
            disk.write(start, 1).unwrap();
            if start % 1000 == 0 {
                disk.flush();
            }
        }
        // No new index can be made, and the old one is full.
        fs::create_dir(&index).unwrap();
        for start in (0..PART).step_by(16) {
            disk.write(start, 16).unwrap();
        }
        for start in (0..PART).step_by(5) {
            disk.discard(start, 4);
        }
        disk.volume().flush().unwrap_err();
        fs::remove_dir(&index).unwrap();
        if round % 2 == 0 {
            disk.restart();
        }
        disk.flush();
        disk.check(&format!("round {round}"));
    }
    disk.discard(0, PART);
    disk.flush();
    disk.check("all discarded");
}

/// What a process freed and could not punch before it died is given back by the next.
#[test]
fn a_restart_gives_back_what_is_free() {
    let mut disk = Disk::new(Kind::Hybrid, u64::MAX);
    disk.write(0, PART).unwrap();
    disk.flush();
    for start in (0..PART).step_by(9) {
        disk.discard(start, 9.min(PART - start));
    }
    disk.restart();
    assert!(disk.stored() <= SLACK, "{} bytes", disk.stored());
    // Behind the end, as a write that was never answered leaves it.
    drop(disk.device.take());
    let data = fs::File::options()
        .write(true)
        .open(paths(disk.folder.path()).data)
        .unwrap();
    data.write_all_at(&[1; 4 << 20], 4 << 20).unwrap();
    disk.restart();
    assert!(disk.stored() <= SLACK, "{} bytes", disk.stored());
}

/// Each layer of a snapshot keeps to the bound, and so does the layer above.
#[test]
fn snapshots_keep_to_the_bound() {
    let disk = Disk::new(Kind::Hybrid, 8 << 20);
    for round in 0..4 {
        disk.write(0, PART).unwrap();
        for start in (1..PART).step_by(7) {
            disk.discard(start, 7.min(PART - start));
        }
        let (volume, snapshots) = disk.device.as_ref().unwrap();
        let layer = volume.layers()[0].paths().data.clone();
        let used = {
            disk.flush();
            disk.used()
        };
        snapshots.take(&round.to_string()).unwrap();
        snapshots.seal().unwrap();
        let metadata = fs::metadata(&layer).unwrap();
        // The index and the trailer lie behind the data.
        let stored = metadata.blocks() * 512;
        assert!(stored <= 8 * used + SLACK, "{stored} bytes for {used}");
        disk.check(&format!("round {round}"));
    }
}
