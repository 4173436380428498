//! Writable layers against a plain model: an array of sectors. Layers are reopened after every few
//! operations, die without a flush, lose power, and have their tails torn.

mod limits;
mod opening;
mod snapshots;

use common::volume::BlockingIo as _;
use std::fs::{self, File};
use std::os::unix::fs::FileExt;
use std::path::Path;
use std::sync::Barrier;
use std::thread;
use std::time::{Duration, Instant};

use common::layers::{LayerBuilder, upper_header, write};
use common::recorder::{Call, Recorder};
use fuser::Errno;
use ovbd_vhost::format::lsmt::Header;
use ovbd_vhost::format::lsmt::writable::Kind;
use ovbd_vhost::image::config::Stack;
use ovbd_vhost::image::reader::Reader;
use ovbd_vhost::image::{self, Image};
use ovbd_vhost::io::scatter::Scatter;
use ovbd_vhost::units::Sector;
use ovbd_vhost::writable::{
    Bounds, Error, Lookup, Options, Paths, Snapshots, Volume, WritableLayer, create, journal,
};
use proptest::prelude::*;
use tempfile::TempDir;
use uuid::Uuid;
use vm_memory::VolatileSlice;

const KINDS: [Kind; 3] = [Kind::Append, Kind::Sparse, Kind::Hybrid];

/// Sectors of the disks.
const SECTORS: u64 = 400;

/// A disk of a layer and a writable layer, and what it must hold.
struct Disk {
    folder: TempDir,
    paths: Paths,
    volume: Option<Volume>,
    reader: Reader,
    now: Vec<[u8; 512]>,
    /// What each sector held since the last flush: any of it may be what a power loss leaves.
    since: Vec<Vec<[u8; 512]>>,
    writes: u32,
}

fn header() -> Header {
    upper_header(SECTORS * 512, Uuid::new_v4())
}

/// Each sector of the lower layer tells its number; some are holes.
fn lower(folder: &Path) -> Vec<[u8; 512]> {
    let content: Vec<_> = (0..SECTORS)
        .map(|sector| match sector / 50 % 3 {
            2 => [0; 512],
            _ => [sector as u8 | 1; 512],
        })
        .collect();
    let mut layer = LayerBuilder::new(SECTORS * 512);
    for start in (0..SECTORS).step_by(50).filter(|start| start / 50 % 3 != 2) {
        let part = &content[start as usize..start as usize + 50];
        layer = layer.data(start, part.as_flattened());
    }
    write(folder, "lower.obd", &layer.lsmt());
    content
}

fn open(folder: &Path, paths: &Paths, limit: u64) -> Result<Volume, Error> {
    let options = Options {
        limit,
        // Small, so that flushes by themselves and new logs happen.
        bounds: Bounds {
            max_pending: 6,
            index_slack: 3,
            max_index_entries: 1 << 20,
        },
    };
    let upper = WritableLayer::open(paths, Some(SECTORS * 512), &options)?;
    let image = Image::open(&Stack::new([folder.join("lower.obd")])).unwrap();
    Ok(Volume::writable(image, upper))
}

impl Disk {
    fn new(kind: Kind) -> Self {
        let folder = tempfile::tempdir().unwrap();
        let paths = Paths {
            data: folder.path().join("upper.data"),
            index: folder.path().join("upper.index"),
        };
        create(&paths, kind, &header()).unwrap();
        let now = lower(folder.path());
        let volume = open(folder.path(), &paths, u64::MAX).unwrap();
        Self {
            folder,
            paths,
            volume: Some(volume),
            reader: Reader::new(),
            since: history(&now),
            now,
            writes: 0,
        }
    }

    fn volume(&self) -> &Volume {
        self.volume.as_ref().unwrap()
    }

    fn write(&mut self, start: u64, sectors: u64) {
        self.writes += 1;
        let mut bytes = vec![0; (sectors * 512) as usize];
        for (n, sector) in bytes.chunks_mut(512).enumerate() {
            sector.fill(n as u8);
            sector[..4].copy_from_slice(&self.writes.to_le_bytes());
        }
        put(self.volume(), start, &mut bytes).unwrap();
        for (n, sector) in bytes.as_chunks().0.iter().enumerate() {
            self.now[start as usize + n] = *sector;
            self.since[start as usize + n].push(*sector);
        }
    }

    /// Four threads write neighbouring ranges, each twice and with something taken out between,
    /// while another flushes.
    fn write_together(&mut self, start: u64, sectors: u64) {
        self.writes += 1;
        let (volume, fill) = (self.volume.as_ref().unwrap(), self.writes as u8);
        thread::scope(|scope| {
            for number in 0..4 {
                let start = start + number * sectors;
                scope.spawn(move || {
                    let mut bytes = vec![fill ^ 0x55; (sectors * 512) as usize];
                    put(volume, start, &mut bytes).unwrap();
                    volume
                        .discard(common::sectors(start, sectors.div_ceil(2)))
                        .unwrap();
                    bytes.fill(fill);
                    put(volume, start, &mut bytes).unwrap();
                });
            }
            scope.spawn(|| volume.flush().unwrap());
        });
        for number in 0..4 {
            let start = (start + number * sectors) as usize;
            for sector in start..start + sectors as usize {
                self.now[sector] = [fill; 512];
                self.since[sector].extend([[fill ^ 0x55; 512], [0; 512], [fill; 512]]);
            }
        }
    }

    fn zero(&mut self, start: u64, sectors: u64, unmap: bool, discard: bool) {
        let volume = self.volume();
        match discard {
            true => volume.discard(common::sectors(start, sectors)).unwrap(),
            false => volume
                .write_zeroes(common::sectors(start, sectors), unmap)
                .unwrap(),
        }
        for sector in start as usize..(start + sectors) as usize {
            self.now[sector] = [0; 512];
            self.since[sector].push([0; 512]);
        }
    }

    fn flush(&mut self) {
        self.volume().flush().unwrap();
        self.since = history(&self.now);
    }

    fn read(&mut self) -> Vec<u8> {
        let mut found = vec![0; (SECTORS * 512) as usize];
        let volume = self.volume.as_ref().unwrap();
        let read = volume.read(&mut self.reader, Sector(0), &mut found);
        read.unwrap();
        found
    }

    fn check(&mut self) {
        for (sector, found) in self.read().as_chunks::<512>().0.iter().enumerate() {
            assert!(*found == self.now[sector], "sector {sector}");
        }
    }

    /// The process dies and another takes over.
    fn die(&mut self) {
        self.volume = None;
        self.volume = Some(open(self.folder.path(), &self.paths, u64::MAX).unwrap());
    }

    /// The same, while it was about to append to the index.
    fn tear(&mut self, bytes: usize) {
        self.volume = None;
        let index = File::options().append(true).open(&self.paths.index);
        std::io::Write::write_all(&mut index.unwrap(), &vec![7; bytes]).unwrap();
        self.die();
    }

    /// The machine starts again: what is in memory only is gone, the rest is as it was, for all
    /// we know.
    fn lose_power(&mut self) {
        self.volume = None;
        for path in journal::paths(&self.paths.index) {
            let file = File::options().write(true).open(path).unwrap();
            // The name of the running system.
            file.write_all_at(b"another start of it", 8).unwrap();
        }
        self.volume = Some(open(self.folder.path(), &self.paths, u64::MAX).unwrap());
        // Old or new, sector by sector.
        for (sector, found) in self.read().as_chunks::<512>().0.iter().enumerate() {
            assert!(self.since[sector].contains(found), "sector {sector}");
            self.now[sector] = *found;
        }
        self.since = history(&self.now);
    }
}

fn history(now: &[[u8; 512]]) -> Vec<Vec<[u8; 512]>> {
    now.iter().map(|sector| vec![*sector]).collect()
}

fn put(volume: &Volume, start: u64, bytes: &mut [u8]) -> Result<(), Error> {
    let sectors = bytes.len() as u64 / 512;
    // In pieces that are no whole sectors.
    let middle = bytes.len() / 3;
    let (first, second) = bytes.split_at_mut(middle);
    let mut scatter = Scatter::new();
    scatter.push(VolatileSlice::from(first));
    scatter.push(VolatileSlice::from(second));
    volume.write(common::sectors(start, sectors), scatter.cursor(0))
}

#[derive(Clone, Copy, Debug)]
enum Step {
    Write(u64, u64),
    Discard(u64, u64),
    Zero(u64, u64, bool),
    /// Some threads write at the same time, from there on, so many sectors each.
    Together(u64, u64),
    Flush,
    Die,
    /// So many bytes of an index entry were written when the process died.
    Tear(usize),
    LosePower,
}

fn step() -> impl Strategy<Value = Step> {
    let range = || {
        (0..SECTORS, prop_oneof![1..9_u64, 1..120_u64])
            .prop_map(|(start, sectors)| (start, sectors.min(SECTORS - start)))
    };
    prop_oneof![
        10 => range().prop_map(|(start, sectors)| Step::Write(start, sectors)),
        4 => range().prop_map(|(start, sectors)| Step::Write(start / 8 * 8, sectors.min(8))),
        3 => range().prop_map(|(start, sectors)| Step::Discard(start, sectors)),
        2 => (range(), any::<bool>())
            .prop_map(|((start, sectors), unmap)| Step::Zero(start, sectors, unmap)),
        2 => (0..SECTORS - 4 * 20, 1..20_u64)
            .prop_map(|(start, sectors)| Step::Together(start, sectors)),
        2 => Just(Step::Flush),
        1 => Just(Step::Die),
        1 => (1..16_usize).prop_map(Step::Tear),
        1 => Just(Step::LosePower),
    ]
}

proptest! {
    #![proptest_config(ProptestConfig { failure_persistence: None, ..ProptestConfig::with_cases(60) })]
    #[test]
    fn any_history_reads_as_the_model(steps in prop::collection::vec(step(), 1..60)) {
        for kind in KINDS {
            let mut disk = Disk::new(kind);
            for step in &steps {
                match *step {
                    Step::Write(start, sectors) => disk.write(start, sectors),
                    Step::Discard(start, sectors) => disk.zero(start, sectors, true, true),
                    Step::Zero(start, sectors, unmap) => disk.zero(start, sectors, unmap, false),
                    Step::Together(start, sectors) => disk.write_together(start, sectors),
                    Step::Flush => disk.flush(),
                    Step::Tear(bytes) => disk.tear(bytes),
                    Step::Die => disk.die(),
                    Step::LosePower => disk.lose_power(),
                }
            }
            disk.check();
            disk.die();
            disk.check();
            disk.flush();
            disk.lose_power();
            disk.check();
        }
    }
}

/// Many threads, each with sectors of its own that lie between those of the others, and all
/// flushing: none sees anything but its own last write.
#[test]
fn writers_do_not_disturb_each_other() {
    const THREADS: u64 = 4;
    for kind in KINDS {
        let mut disk = Disk::new(kind);
        let (volume, barrier) = (disk.volume(), Barrier::new(THREADS as usize));
        let work = |thread: u64| {
            let mut reader = Reader::new();
            barrier.wait();
            for round in 0..300_u64 {
                let sector = (round * 7 % (SECTORS / THREADS)) * THREADS + thread;
                let mut bytes = [(round + thread * 60) as u8; 512];
                put(volume, sector, &mut bytes).unwrap();
                let mut found = [0; 512];
                volume
                    .read(&mut reader, Sector(sector), &mut found)
                    .unwrap();
                assert_eq!(found, bytes);
                match round % 10 {
                    3 => volume.flush().unwrap(),
                    5 => {
                        volume.discard(common::sectors(sector, 1)).unwrap();
                        volume
                            .read(&mut reader, Sector(sector), &mut found)
                            .unwrap();
                        assert_eq!(found, [0; 512]);
                    }
                    _ => {}
                }
            }
        };
        thread::scope(|scope| {
            for thread in 0..THREADS {
                scope.spawn(move || work(thread));
            }
        });
        let mut found = vec![0; (SECTORS * 512) as usize];
        volume
            .read(&mut Reader::new(), Sector(0), &mut found)
            .unwrap();
        disk.now = found.as_chunks().0.to_vec();
        disk.die();
        disk.check();
    }
}
