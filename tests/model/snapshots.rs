//! Many snapshots in one life of a device: whatever was written, and whether what is frozen was
//! sealed or not, each reader gets what was written last, at any moment.

use common::volume::BlockingIo as _;
use std::fs;
use std::path::Path;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex};
use std::thread;

use common::layers::{self, LayerBuilder, upper_header};
use ovbd_vhost::format::lsmt::writable::Kind;
use ovbd_vhost::image::Image;
use ovbd_vhost::image::config::Stack;
use ovbd_vhost::image::reader::Reader;
use ovbd_vhost::io::scatter::Scatter;
use ovbd_vhost::units::Sector;
use ovbd_vhost::writable::{
    Bounds, Lookup, Options, Paths, Snapshots, SpanContent, Volume, create,
};
use proptest::prelude::*;
use tempfile::TempDir;
use uuid::Uuid;
use vm_memory::VolatileSlice;

const KINDS: [Kind; 3] = [Kind::Append, Kind::Sparse, Kind::Hybrid];
const SECTORS: u64 = 700;

/// Number of the write a sector is from; 0 for zeros.
type Version = u32;

/// What the layer below holds everywhere.
const BELOW: Version = u32::MAX;

struct Disk {
    folder: TempDir,
    volume: Arc<Volume>,
    snapshots: Snapshots,
}

fn stack(folder: &Path) -> Stack {
    Stack::new([folder.join("below.obd")])
}

fn open(folder: &Path) -> (Arc<Volume>, Snapshots) {
    let paths = Paths {
        data: folder.join("data"),
        index: folder.join("index"),
    };
    let options = Options {
        // Small, so that flushes by themselves happen.
        bounds: Bounds {
            max_pending: 40,
            ..Bounds::default()
        },
        ..Options::default()
    };
    common::volume::open(&stack(folder), &paths, options).unwrap()
}

impl Disk {
    fn new(kind: Kind) -> Self {
        let memory = Path::new("/dev/shm");
        let folder = match memory.is_dir() {
            true => tempfile::tempdir_in(memory).unwrap(),
            false => tempfile::tempdir().unwrap(),
        };
        let layer = LayerBuilder::new(SECTORS * 512).data(0, &[0xFF; SECTORS as usize * 512]);
        layers::write(folder.path(), "below.obd", &layer.lsmt());
        let paths = Paths {
            data: folder.path().join("data"),
            index: folder.path().join("index"),
        };
        let header = upper_header(SECTORS * 512, Uuid::new_v4());
        create(&paths, kind, &header).unwrap();
        let (volume, snapshots) = open(folder.path());
        Self {
            folder,
            volume,
            snapshots,
        }
    }

    fn write(&self, start: u64, sectors: u64, version: Version) {
        let mut bytes = version.to_le_bytes().repeat(sectors as usize * 128);
        let mut scatter = Scatter::new();
        scatter.push(VolatileSlice::from(&mut bytes[..]));
        let written = self
            .volume
            .write(common::sectors(start, sectors), scatter.cursor(0));
        written.unwrap();
    }
}

/// What `sectors` sectors from `start` on hold. Where a write is under way, the first bytes count.
fn read(volume: &Volume, start: u64, sectors: u64) -> Vec<Version> {
    let mut bytes = vec![0; sectors as usize * 512];
    volume
        .read(&mut Reader::new(), Sector(start), &mut bytes)
        .unwrap();
    let found = bytes.as_chunks::<512>().0.iter();
    found
        .map(|sector| Version::from_le_bytes(*sector.first_chunk().unwrap()))
        .collect()
}

/// What each sector held, and from which of these on it is what a reader may find.
struct History(Mutex<Vec<(Vec<Version>, usize)>>);

impl History {
    fn begin(&self, start: u64, sectors: u64, version: Version) {
        let mut history = self.0.lock().unwrap();
        let range = start as usize..(start + sectors) as usize;
        history[range]
            .iter_mut()
            .for_each(|(held, _)| held.push(version));
    }

    fn end(&self, start: u64, sectors: u64) {
        let mut history = self.0.lock().unwrap();
        let range = start as usize..(start + sectors) as usize;
        let range = history[range].iter_mut();
        range.for_each(|(held, since)| *since = held.len() - 1);
    }

    fn now(&self) -> Vec<Version> {
        let history = self.0.lock().unwrap();
        history
            .iter()
            .map(|(held, _)| *held.last().unwrap())
            .collect()
    }

    /// Reads and asserts that what it found was there meanwhile.
    fn check(&self, volume: &Volume, start: u64, sectors: u64) {
        let range = start as usize..(start + sectors) as usize;
        let since: Vec<_> = {
            let history = self.0.lock().unwrap();
            history[range.clone()]
                .iter()
                .map(|(_, since)| *since)
                .collect()
        };
        let found = read(volume, start, sectors);
        let history = self.0.lock().unwrap();
        for ((found, since), (sector, (held, _))) in found
            .iter()
            .zip(since)
            .zip(range.clone().zip(&history[range]))
        {
            let possible = &held[since..];
            assert!(
                possible.contains(found),
                "sector {sector} holds {found}, not one of {possible:?}"
            );
        }
    }
}

#[derive(Clone, Copy, Debug)]
enum Step {
    Write(u64, u64),
    Discard(u64, u64),
    Zero(u64, u64, bool),
    Flush,
    Snapshot,
    Seal,
}

fn step() -> impl Strategy<Value = Step> {
    let range = || {
        (0..SECTORS, prop_oneof![1..9_u64, 1..300_u64])
            .prop_map(|(start, sectors)| (start, sectors.min(SECTORS - start)))
    };
    prop_oneof![
        10 => range().prop_map(|(start, sectors)| Step::Write(start, sectors)),
        3 => range().prop_map(|(start, sectors)| Step::Discard(start, sectors)),
        2 => (range(), any::<bool>())
            .prop_map(|((start, sectors), unmap)| Step::Zero(start, sectors, unmap)),
        1 => Just(Step::Flush),
        5 => Just(Step::Snapshot),
        2 => Just(Step::Seal),
    ]
}

/// Does the steps while others read; returns the layers of the snapshots, and what each holds.
fn run(disk: &Disk, steps: &[Step], history: &History) -> Vec<(Stack, Vec<Version>)> {
    let mut taken = Vec::new();
    for (number, step) in (1..).zip(steps) {
        let volume = &disk.volume;
        match *step {
            Step::Write(start, sectors) => {
                history.begin(start, sectors, number);
                disk.write(start, sectors, number);
                history.end(start, sectors);
            }
            Step::Discard(start, sectors) => {
                history.begin(start, sectors, 0);
                volume.discard(common::sectors(start, sectors)).unwrap();
                history.end(start, sectors);
            }
            Step::Zero(start, sectors, unmap) => {
                history.begin(start, sectors, 0);
                volume
                    .write_zeroes(common::sectors(start, sectors), unmap)
                    .unwrap();
                history.end(start, sectors);
            }
            Step::Flush => volume.flush().unwrap(),
            Step::Snapshot => {
                let snapshot = disk.snapshots.take(&number.to_string()).unwrap();
                taken.push((Stack::new(snapshot.layers), history.now()));
            }
            Step::Seal => disk.snapshots.seal().unwrap(),
        }
    }
    taken
}

proptest! {
    #![proptest_config(ProptestConfig { failure_persistence: None, ..ProptestConfig::with_cases(40) })]
    #[test]
    fn each_reader_gets_what_was_written_last(steps in prop::collection::vec(step(), 1..120)) {
        for kind in KINDS {
            let disk = Disk::new(kind);
            let since = vec![(vec![BELOW], 0); SECTORS as usize];
            let history = History(Mutex::new(since));
            let done = AtomicBool::new(false);
            let taken = thread::scope(|scope| {
                for step in [37, 101] {
                    let (disk, history, done) = (&disk, &history, &done);
                    scope.spawn(move || {
                        for round in 0.. {
                            if done.load(Ordering::Relaxed) {
                                break;
                            }
                            let start = round * step % SECTORS;
                            let sectors = (1 + round % 500).min(SECTORS - start);
                            history.check(&disk.volume, start, sectors);
                        }
                    });
                }
                let taken = run(&disk, &steps, &history);
                done.store(true, Ordering::Relaxed);
                taken
            });
            prop_assert_eq!(read(&disk.volume, 0, SECTORS), history.now());
            disk.snapshots.seal().unwrap();
            prop_assert_eq!(disk.volume.layers().len(), 1);
            prop_assert_eq!(disk.volume.layers_below_active(), taken.len());
            prop_assert_eq!(read(&disk.volume, 0, SECTORS), history.now());
            for (stack, model) in &taken {
                let image = Volume::read_only(Image::open(stack).unwrap());
                prop_assert_eq!(&read(&image, 0, SECTORS), model);
            }
            let Disk { folder, volume, snapshots } = disk;
            drop((volume, snapshots));
            let (volume, _) = open(folder.path());
            prop_assert_eq!(read(&volume, 0, SECTORS), history.now());
        }
    }
}

/// More than were ever allowed at a time before: each keeps one open file, and is looked up as one
/// with the others; what was looked up earlier stays what it was.
#[test]
fn hundreds_of_snapshots() {
    const COUNT: u32 = 300;
    let disk = Disk::new(Kind::Hybrid);
    disk.write(0, 8, 1);
    let mut reading = Lookup::default();
    disk.volume.lookup(common::sectors(0, 8), &mut reading);
    let mut model = vec![BELOW; SECTORS as usize];
    model[..8].fill(1);
    for number in 2..COUNT + 2 {
        let start = u64::from(number) * 2 % (SECTORS - 8);
        disk.write(start, 5, number);
        model[start as usize..start as usize + 5].fill(number);
        let name = number.to_string();
        let snapshot = disk.snapshots.take(&name).unwrap();
        if number.is_multiple_of(3) {
            disk.snapshots.seal().unwrap();
            assert!(disk.snapshots.take(&name).unwrap().sealed);
        } else {
            assert!(!snapshot.sealed);
        }
    }
    disk.snapshots.seal().unwrap();
    assert_eq!(disk.volume.layers_below_active(), COUNT as usize);
    assert_eq!(read(&disk.volume, 0, SECTORS), model);
    let own = fs::read_dir("/proc/self/fd").unwrap().filter(|file| {
        let to = fs::read_link(file.as_ref().unwrap().path());
        to.is_ok_and(|to| to.starts_with(disk.folder.path()))
    });
    // The active writable layer has five, the layer below one.
    assert_eq!(own.count(), COUNT as usize + 6);

    let mut bytes = [0; 512];
    for span in reading.spans() {
        let SpanContent::Data { file, offset } = span.content else {
            panic!("{span:?} is not where it was written");
        };
        reading
            .file(file)
            .read_exact_at(&mut bytes, offset)
            .unwrap();
        assert_eq!(bytes[..4], 1_u32.to_le_bytes());
    }
    let list = disk.snapshots.list();
    assert_eq!(list.len(), COUNT as usize);
    assert!(list.iter().all(|snapshot| snapshot.sealed));
}

/// Layers are sealed even if the caller only takes snapshots.
#[test]
fn what_is_not_sealed_stays_little() {
    let disk = Disk::new(Kind::Hybrid);
    for number in 0..60 {
        disk.write(number, 1, number as Version + 1);
        let name = number.to_string();
        disk.snapshots.take(&name).unwrap();
        assert!(disk.volume.layers().len() <= 17);
    }
    let model: Vec<_> = (1..61).collect();
    assert_eq!(read(&disk.volume, 0, 60), model);
    assert_eq!(disk.volume.layers_below_active(), 60);
}
