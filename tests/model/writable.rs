//! Writable layers against a plain model: an array of sectors. Layers are reopened after every few
//! operations, die without a flush, lose power, and have their tails torn.

use std::fs::{self, File};
use std::os::unix::fs::FileExt;
use std::path::Path;
use std::sync::Barrier;
use std::thread;
use std::time::Duration;

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
    Error, Lookup, Options, Paths, Snapshots, Volume, WritableLayer, create, journal,
};
use proptest::prelude::*;
use tempfile::TempDir;
use uuid::Uuid;
use vm_memory::VolatileSlice;

const KINDS: [Kind; 3] = [Kind::Append, Kind::Sparse, Kind::Hybrid];

/// Sectors of the disks.
const SECTORS: u64 = 400;

/// A disk of a layer and an upper, and what it must hold.
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
        default_size: SECTORS * 512,
        // Small, so that flushes by themselves and new logs happen.
        max_pending: 6,
        log_slack: 3,
        max_log: 1 << 20,
    };
    let upper = WritableLayer::open(paths, &options)?;
    let image = Image::open(&Stack::new([folder.join("lower.obd")])).unwrap();
    Ok(Volume::writable(image, vec![upper]))
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

    /// Four threads write neighbouring ranges, each twice and with something taken out between, while
    /// another flushes.
    fn write_together(&mut self, start: u64, sectors: u64) {
        self.writes += 1;
        let (volume, fill) = (self.volume.as_ref().unwrap(), self.writes as u8);
        thread::scope(|scope| {
            for number in 0..4 {
                let start = start + number * sectors;
                scope.spawn(move || {
                    let mut bytes = vec![fill ^ 0x55; (sectors * 512) as usize];
                    put(volume, start, &mut bytes).unwrap();
                    volume.discard(Sector(start), sectors.div_ceil(2)).unwrap();
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
            true => volume.discard(Sector(start), sectors).unwrap(),
            false => volume.write_zeroes(Sector(start), sectors, unmap).unwrap(),
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

    fn check(&mut self) {
        let mut found = vec![0; (SECTORS * 512) as usize];
        let volume = self.volume.as_ref().unwrap();
        volume
            .read(&mut self.reader, Sector(0), &mut found)
            .unwrap();
        for (sector, found) in found.as_chunks::<512>().0.iter().enumerate() {
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
        let mut found = vec![0; (SECTORS * 512) as usize];
        let volume = self.volume.as_ref().unwrap();
        volume
            .read(&mut self.reader, Sector(0), &mut found)
            .unwrap();
        for (sector, found) in found.as_chunks::<512>().0.iter().enumerate() {
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
    volume.write(Sector(start), sectors, scatter.cursor(0))
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

/// Where no shorter index can be made, a full one fails the flush, and says what to do.
#[test]
fn an_index_that_is_full() {
    let mut disk = Disk::new(Kind::Hybrid);
    disk.volume = None;
    let options = Options {
        log_slack: 1000,
        max_log: 30,
        ..Options::default()
    };
    let upper = WritableLayer::open(&disk.paths, &options).unwrap();
    let new = disk.folder.path().join("upper.index.new");
    for round in 0..200 {
        // Each takes a mapping.
        upper.discard(0, 1).unwrap();
        let mut bytes = [round; 512];
        let mut scatter = Scatter::new();
        scatter.push(VolatileSlice::from(&mut bytes[..]));
        upper.write(0, 1, scatter.cursor(0)).unwrap();
        if round == 100 {
            fs::create_dir(&new).unwrap();
        }
        match upper.flush() {
            Ok(()) => assert!(fs::metadata(&disk.paths.index).unwrap().len() <= 4096 + 30 * 16),
            Err(error) => {
                assert!(round > 100, "{error}");
                let said = error.to_string();
                assert!(
                    said.contains("index has") && said.contains("folder"),
                    "{said}"
                );
                fs::remove_dir(&new).unwrap();
                upper.flush().unwrap();
                return;
            }
        }
    }
    panic!("it is never full");
}

#[test]
fn a_torn_tail_is_cut_off() {
    for kind in KINDS {
        let mut disk = Disk::new(kind);
        disk.write(10, 4);
        disk.flush();
        disk.tear(9);
        disk.check();
        disk.write(12, 30);
        disk.flush();
        disk.lose_power();
        disk.check();
    }
}

#[test]
fn entries_without_data_never_were() {
    for kind in [Kind::Append, Kind::Hybrid] {
        let mut disk = Disk::new(kind);
        disk.write(10, 4);
        disk.flush();
        let before = disk.now.clone();
        disk.write(100, 8);
        disk.flush();
        disk.volume = None;
        let data = File::options().write(true).open(&disk.paths.data).unwrap();
        data.set_len(4096 + 4 * 512).unwrap();
        disk.now = before;
        disk.die();
        disk.check();
        // What is written next takes the place of what is gone, and nobody mistakes it for that.
        disk.write(200, 8);
        disk.flush();
        disk.die();
        disk.check();
    }
}

#[test]
fn rewriting_takes_no_more_space() {
    for kind in [Kind::Append, Kind::Hybrid] {
        let mut disk = Disk::new(kind);
        for round in 0..50 {
            disk.write(0, 64);
            if round % 3 == 0 {
                disk.zero(0, 64, true, true);
                disk.write(0, 64);
            }
            disk.flush();
        }
        let len = fs::metadata(&disk.paths.data).unwrap().len();
        assert!(len <= 4096 + 3 * 64 * 512, "{kind:?}: {len}");
        let upper = disk.volume().uppers()[0].clone();
        assert_eq!((upper.extents(), upper.used()), (1, 64 * 512));
    }
}

#[test]
fn full_is_an_error_that_passes() {
    let mut disk = Disk::new(Kind::Hybrid);
    disk.volume = None;
    disk.volume = Some(open(disk.folder.path(), &disk.paths, 16 * 512).unwrap());
    disk.write(0, 16);
    let full = put(disk.volume(), 20, &mut [1; 4096]);
    assert!(
        matches!(full, Err(Error::Full { limit: 8192, .. })),
        "{full:?}"
    );
    disk.write(4, 8);
    disk.check();
    disk.zero(0, 8, true, true);
    disk.write(20, 8);
    disk.check();
}

/// What was discarded is free once nobody reads it any more; nobody waits for that for ever.
#[test]
fn full_passes_when_a_request_ends() {
    let mut disk = Disk::new(Kind::Hybrid);
    disk.volume = None;
    disk.volume = Some(open(disk.folder.path(), &disk.paths, 16 * 512).unwrap());
    disk.write(0, 8);
    disk.write(40, 8);
    let mut reading = Lookup::default();
    disk.volume().lookup(Sector(40), 8, &mut reading);
    disk.zero(0, 8, true, true);
    disk.flush();
    let mut bytes = [1; 4096];
    let mut scatter = Scatter::new();
    scatter.push(VolatileSlice::from(&mut bytes[..]));
    let now = || disk.volume().write_now(Sector(60), 8, scatter.cursor(0));
    assert!(matches!(now(), Err(Error::FlushFirst)));
    let full = disk.volume().write(Sector(60), 8, scatter.cursor(0));
    assert!(matches!(full, Err(Error::Full { .. })), "{full:?}");
    drop(reading);
    now().unwrap();
}

#[test]
fn one_process_at_a_time() {
    let disk = Disk::new(Kind::Hybrid);
    let second = open(disk.folder.path(), &disk.paths, u64::MAX);
    assert!(matches!(second, Err(Error::Busy { .. })));
}

#[test]
fn files_that_do_not_belong_together_are_refused() {
    let (one, other) = (Disk::new(Kind::Hybrid), Disk::new(Kind::Hybrid));
    let paths = Paths {
        data: one.paths.data.clone(),
        index: other.paths.index.clone(),
    };
    drop(one.volume);
    let mixed = open(one.folder.path(), &paths, u64::MAX);
    assert!(matches!(mixed, Err(Error::NoPair { .. })), "{mixed:?}");
    let twice = create(&other.paths, Kind::Hybrid, &header());
    assert!(matches!(twice, Err(Error::File { .. })));
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
                        volume.discard(Sector(sector), 1).unwrap();
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

/// Snapshots while threads write: each holds one moment, nothing written is lost, and others open
/// them at once.
#[test]
fn snapshots_hold_what_was_there_when_they_were_taken() {
    for kind in KINDS {
        let mut disk = Disk::new(kind);
        disk.volume = None;
        let stack = Stack::new([disk.folder.path().join("lower.obd")]);
        let device = || Snapshots::open(&stack, &disk.paths, Options::default()).unwrap();
        let mut model = disk.now.clone();
        let mut taken = Vec::new();
        for round in 0..3_u8 {
            let (volume, snapshots) = device();
            for number in 0..2 {
                let fill = round * 16 + number + 1;
                let start = u64::from(fill) * 5;
                put(&volume, start, &mut [fill; 40 * 512]).unwrap();
                volume.discard(Sector(start + 8), 3).unwrap();
                model[start as usize..start as usize + 40].fill([fill; 512]);
                model[start as usize + 8..start as usize + 11].fill([0; 512]);
                let name = format!("{round} {number}");
                let mut snapshot = snapshots.take(&volume, &name).unwrap();
                assert_eq!(snapshots.take(&volume, &name).unwrap(), snapshot);
                assert!(!snapshot.sealed);
                snapshot.sealed = true;
                if round == 1 {
                    snapshots.seal(&volume).unwrap();
                    assert_eq!(snapshots.take(&volume, &name).unwrap(), snapshot);
                }
                let now = content(&volume);
                assert!(now == model, "{kind:?} {name}");
                taken.push((snapshot, model.clone()));
            }
        }
        let (volume, snapshots) = device();
        assert!(content(&volume) == model);
        let listed = snapshots.list(&volume);
        assert!(listed.iter().eq(taken.iter().map(|(snapshot, _)| snapshot)));
        for (snapshot, model) in taken {
            let image = Image::open(&Stack::new(&snapshot.layers)).unwrap();
            let top = image.layers().last().unwrap();
            assert_eq!(top.uuid(), snapshot.uuid);
            assert!(
                content(&Volume::read_only(image)) == model,
                "{}",
                snapshot.name
            );
        }
    }
}

#[test]
fn a_snapshot_that_cannot_be_taken_changes_nothing() {
    let mut disk = Disk::new(Kind::Hybrid);
    disk.volume = None;
    let stack = Stack::new([disk.folder.path().join("lower.obd")]);
    let (volume, snapshots) = Snapshots::open(&stack, &disk.paths, Options::default()).unwrap();
    put(&volume, 3, &mut [7; 1024]).unwrap();
    // A folder where the list is to be.
    let list = disk.folder.path().join("upper.data.snapshots");
    fs::create_dir(&list).unwrap();
    assert!(snapshots.take(&volume, "one").is_err());
    assert!(snapshots.list(&volume).is_empty());
    put(&volume, 4, &mut [8; 512]).unwrap();
    fs::remove_dir(&list).unwrap();
    let snapshot = snapshots.take(&volume, "one").unwrap();
    snapshots.seal(&volume).unwrap();
    let image = Image::open(&Stack::new(&snapshot.layers)).unwrap();
    let now = content(&volume);
    assert_eq!((now[3], now[4]), ([7; 512], [8; 512]));
    assert!(content(&Volume::read_only(image)) == now);
}

/// Whoever opens what a snapshot froze waits until it is a layer, and takes nothing for one before:
/// what the guest wrote may end like one.
#[test]
fn a_layer_that_is_not_sealed_yet_is_waited_for() {
    for kind in KINDS {
        let mut disk = Disk::new(kind);
        disk.volume = None;
        let stack = Stack::new([disk.folder.path().join("lower.obd")]);
        let (volume, snapshots) = Snapshots::open(&stack, &disk.paths, Options::default()).unwrap();
        let forged = LayerBuilder::new(SECTORS * 512).data(0, &[0xEE; 512]);
        let mut forged = forged.lsmt();
        let mut forge = || put(&volume, SECTORS - forged.len() as u64 / 512, &mut forged).unwrap();
        forge();
        let snapshot = snapshots.take(&volume, "one").unwrap();
        let now = content(&volume);
        let open = || Image::open(&Stack::new(&snapshot.layers));
        thread::scope(|scope| {
            let others: Vec<_> = (0..3).map(|_| scope.spawn(open)).collect();
            thread::sleep(Duration::from_millis(30));
            assert!(others.iter().all(|other| !other.is_finished()), "{kind:?}");
            snapshots.seal(&volume).unwrap();
            for other in others {
                let image = other.join().unwrap().unwrap();
                assert!(content(&Volume::read_only(image)) == now, "{kind:?}");
            }
        });

        // Nobody seals what nobody has open.
        forge();
        let snapshot = snapshots.take(&volume, "two").unwrap();
        let unsealed = snapshot.layers.last().unwrap();
        drop((volume, snapshots));
        let error = Image::open(&Stack::new(&snapshot.layers)).unwrap_err();
        assert!(
            matches!(&error, image::Error::Unsealed { path } if path == unsealed),
            "{error}"
        );
        drop(Snapshots::open(&stack, &disk.paths, Options::default()).unwrap());
        let image = Image::open(&Stack::new(&snapshot.layers)).unwrap();
        assert!(content(&Volume::read_only(image)) == now);
    }
}

/// Who waits for the files while their last user takes a snapshot goes on above that.
#[test]
fn a_snapshot_taken_while_the_next_process_waits() {
    for pause in [0, 5, 20, 80] {
        let mut disk = Disk::new(Kind::Hybrid);
        disk.volume = None;
        let stack = Stack::new([disk.folder.path().join("lower.obd")]);
        let open = || Snapshots::open(&stack, &disk.paths, Options::default());
        let (volume, snapshots) = open().unwrap();
        put(&volume, 3, &mut [7; 512]).unwrap();
        thread::scope(|scope| {
            let next = scope.spawn(open);
            thread::sleep(Duration::from_millis(pause));
            let snapshot = snapshots.take(&volume, "one").unwrap();
            put(&volume, 3, &mut [8; 512]).unwrap();
            drop((volume, snapshots));
            let (volume, snapshots) = next.join().unwrap().unwrap();
            assert_eq!(content(&volume)[3], [8; 512]);
            put(&volume, 4, &mut [9; 512]).unwrap();
            assert_eq!(snapshots.list(&volume)[0].uuid, snapshot.uuid);
            let image = Image::open(&Stack::new(&snapshot.layers)).unwrap();
            assert_eq!(content(&Volume::read_only(image))[3], [7; 512]);
        });
    }
}

/// One that could not be sealed is sealed before another is taken, or none is.
#[test]
fn snapshots_are_sealed_in_order() {
    let recorder = Recorder::mount();
    let folder = recorder.path();
    lower(folder);
    let paths = Paths {
        data: folder.join("upper.data"),
        index: folder.join("upper.index"),
    };
    create(&paths, Kind::Hybrid, &header()).unwrap();
    let stack = Stack::new([folder.join("lower.obd")]);
    let (volume, snapshots) = Snapshots::open(&stack, &paths, Options::default()).unwrap();
    put(&volume, 0, &mut [1; 4096]).unwrap();
    volume.flush().unwrap();
    recorder.fail(Call::Write, "upper.data", Errno::ENOSPC);
    snapshots.take(&volume, "one").unwrap();
    put(&volume, 8, &mut [2; 4096]).unwrap();
    snapshots.take(&volume, "two").unwrap();
    snapshots.seal(&volume).unwrap_err();
    snapshots.take(&volume, "three").unwrap_err();
    let sealed = |snapshots: &Snapshots| -> Vec<bool> {
        let list = snapshots.list(&volume);
        list.iter().map(|snapshot| snapshot.sealed).collect()
    };
    assert_eq!(
        sealed(&snapshots),
        [false, false],
        "the third changed nothing"
    );
    recorder.heal();
    let three = snapshots.take(&volume, "three").unwrap();
    assert_eq!(sealed(&snapshots), [true, true, false]);
    snapshots.seal(&volume).unwrap();
    let now = content(&volume);
    let image = Image::open(&Stack::new(&three.layers)).unwrap();
    assert!(content(&Volume::read_only(image)) == now);

    // One there is no room to seal is above the others at the next start.
    snapshots.take(&volume, "four").unwrap();
    let number = 3;
    drop((volume, snapshots));
    recorder.fail(Call::Write, &format!("upper.data.{number}"), Errno::ENOSPC);
    let (volume, snapshots) = Snapshots::open(&stack, &paths, Options::default()).unwrap();
    assert!(content(&volume) == now);
    let four = snapshots.list(&volume).pop().unwrap();
    assert!(!four.sealed && snapshots.take(&volume, "five").is_err());
    recorder.heal();
    snapshots.seal(&volume).unwrap();
    assert!(snapshots.list(&volume).pop().unwrap().sealed);
    let image = Image::open(&Stack::new(&four.layers)).unwrap();
    assert!(content(&Volume::read_only(image)) == now);
}

/// A layer below another device is not one that is written to.
#[test]
fn a_layer_in_use_is_refused() {
    let disk = Disk::new(Kind::Hybrid);
    let error = Image::open(&Stack::new([&disk.paths.data])).unwrap_err();
    assert!(matches!(error, image::Error::InUse { .. }), "{error}");
}

fn content(volume: &Volume) -> Vec<[u8; 512]> {
    let mut content = vec![[0; 512]; SECTORS as usize];
    let into = content.as_flattened_mut();
    volume.read(&mut Reader::new(), Sector(0), into).unwrap();
    content
}
