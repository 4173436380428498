//! Everything an upper does to its files, recorded; then a crash after each single step of it, by a
//! killed process or by a power loss, and what the next process finds.

#[path = "common/layers.rs"]
mod layers;
#[path = "common/recorder.rs"]
mod recorder;

use std::fs::{self, File};
use std::os::unix::fs::FileExt;
use std::path::Path;

use layers::LayerBuilder;
use ovbd_vhost::format::lsmt::Header;
use ovbd_vhost::format::lsmt::writable::Kind;
use ovbd_vhost::image::reader::Reader;
use ovbd_vhost::image::spec::Stack;
use ovbd_vhost::scatter::Scatter;
use ovbd_vhost::units::Sector;
use ovbd_vhost::upper::{Options, Paths, Snapshots, Volume, create};
use recorder::{Op, Recorder, after_kill, after_power_loss};
use tempfile::TempDir;
use uuid::Uuid;
use vm_memory::VolatileSlice;

const SECTORS: u64 = 96;
/// Small, so that flushes by themselves and new logs happen.
const OPTIONS: Options = Options {
    limit: u64::MAX,
    default_size: 0,
    max_pending: 9,
    log_slack: 4,
};

type Content = [u8; 512];

/// What a sector reads as where the upper has nothing.
const BELOW: Content = [0xBB; 512];

/// One thing the guest did.
struct Step {
    /// When it began and ended, by the recorder's count.
    began: usize,
    ended: usize,
    /// What the sectors it touched hold afterwards.
    changed: Vec<(usize, Content)>,
    is_flush: bool,
}

struct Random(u64);

impl Random {
    fn below(&mut self, end: u64) -> u64 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        self.0 % end
    }
}

fn paths(folder: &Path) -> Paths {
    Paths {
        data: folder.join("data"),
        index: folder.join("index"),
    }
}

/// A layer that holds [`BELOW`] everywhere.
fn below() -> (TempDir, Stack) {
    let folder = tempfile::tempdir().unwrap();
    let layer = LayerBuilder::new(SECTORS * 512).data(0, [BELOW; SECTORS as usize].as_flattened());
    let path = layers::write(folder.path(), "below.obd", &layer.lsmt());
    (folder, Stack::new([path]))
}

fn open(folder: &Path, stack: &Stack) -> (Volume, Snapshots) {
    Snapshots::open(stack, &paths(folder), OPTIONS).unwrap()
}

/// Makes an upper and works on it; returns what was done.
fn work(recorder: &Recorder, stack: &Stack, kind: Kind, random: &mut Random) -> Vec<Step> {
    let header = Header {
        index_offset: 0,
        index_entries: 0,
        virtual_size: SECTORS * 512,
        uuid: Uuid::new_v4(),
        parent_uuid: Uuid::nil(),
        message: Vec::new(),
    };
    create(&paths(recorder.path()), kind, &header).unwrap();
    let mut device = open(recorder.path(), stack);
    let mut steps = Vec::new();
    for number in 0..60_u32 {
        let start = random.below(SECTORS);
        let sectors = (1 + random.below(12)).min(SECTORS - start);
        let range = start as usize..(start + sectors) as usize;
        let began = recorder.position();
        let mut zeros = Vec::new();
        zeros.extend(range.clone().map(|sector| (sector, [0; 512])));
        let (volume, snapshots) = &device;
        let start = Sector(start);
        let (changed, is_flush) = match random.below(20) {
            0..=3 => {
                volume.flush().unwrap();
                (Vec::new(), true)
            }
            4 | 5 => {
                volume.discard(start, sectors).unwrap();
                (zeros, false)
            }
            6 | 7 => {
                volume.write_zeroes(start, sectors, false).unwrap();
                (zeros, false)
            }
            8 => {
                drop(device);
                device = open(recorder.path(), stack);
                (Vec::new(), true)
            }
            9 => {
                let name = format!("snapshot {number}");
                let taken = snapshots.take(volume, &name).unwrap();
                assert_eq!(snapshots.take(volume, &name).unwrap(), taken);
                (Vec::new(), false)
            }
            _ => {
                let mut content = Vec::new();
                for sector in range.clone() {
                    let mut bytes = [sector as u8; 512];
                    bytes[..4].copy_from_slice(&(number + 1).to_le_bytes());
                    content.push(bytes);
                }
                let mut bytes = content.as_flattened().to_vec();
                let mut scatter = Scatter::new();
                scatter.push(VolatileSlice::from(&mut bytes[..]));
                volume.write(start, sectors, scatter.cursor(0)).unwrap();
                (range.zip(content).collect(), false)
            }
        };
        steps.push(Step {
            began,
            ended: recorder.position(),
            changed,
            is_flush,
        });
    }
    steps
}

/// What the next process finds in `folder`.
fn found(folder: &Path, stack: &Stack) -> Vec<Content> {
    let (volume, _) = open(folder, stack);
    let mut content = vec![BELOW; SECTORS as usize];
    let into = content.as_flattened_mut();
    volume.read(&mut Reader::new(), Sector(0), into).unwrap();
    content
}

/// Where the crashes' leftovers are written: in memory, for there are thousands.
fn leftovers() -> TempDir {
    let memory = Path::new("/dev/shm");
    match memory.is_dir() {
        true => tempfile::tempdir_in(memory).unwrap(),
        false => tempfile::tempdir().unwrap(),
    }
}

/// What is left when the process dies after it did what `log` says.
fn folder_after(log: &[Op]) -> TempDir {
    let folder = leftovers();
    after_kill(log, folder.path());
    folder
}

/// What is left when a process that opens what is in `folder` dies, at each step of that.
fn die_while_opening(folder: &Path, stack: &Stack) -> Vec<TempDir> {
    let recorder = Recorder::mount();
    for file in fs::read_dir(folder).unwrap() {
        let path = file.unwrap().path();
        let name = path.file_name().unwrap();
        fs::write(recorder.path().join(name), fs::read(&path).unwrap()).unwrap();
    }
    let began = recorder.position();
    drop(open(recorder.path(), stack));
    let log = recorder.log();
    (began..=log.len())
        .map(|at| folder_after(&log[..at]))
        .collect()
}

fn crash_everywhere(kind: Kind, seed: u64) {
    let recorder = Recorder::mount();
    let mut random = Random(seed);
    let (_folder, stack) = below();
    let steps = work(&recorder, &stack, kind, &mut random);
    let log = recorder.log();
    for at in steps[0].began..=log.len() {
        let begun = || steps.iter().filter(|step| step.began < at);
        let over = || steps.iter().filter(|step| step.ended <= at);

        // The process dies: what was answered is there; what was under way, in part.
        let folder = folder_after(&log[..at]);
        let mut expected = vec![vec![BELOW]; SECTORS as usize];
        for (sector, content) in over().flat_map(|step| &step.changed) {
            expected[*sector] = vec![*content];
        }
        for step in begun().filter(|step| step.ended > at) {
            for (sector, content) in &step.changed {
                expected[*sector].push(*content);
            }
        }
        check(folder.path(), &stack, &expected, || {
            format!(
                "{kind:?}, seed {seed}: killed at {at} of {}: {:?}",
                log.len(),
                log.get(at)
            )
        });

        // The next process dies as well, before it has even begun to serve.
        if at % 5 == 0 {
            for again in die_while_opening(folder_after(&log[..at]).path(), &stack) {
                check(again.path(), &stack, &expected, || {
                    format!("{kind:?}, seed {seed}: killed at {at}, and again while opening")
                });
            }
        }

        // The power fails: what was flushed is there; of what came later, anything may be.
        let flush = over()
            .filter(|step| step.is_flush)
            .map(|step| step.began)
            .max();
        let flushed = |step: &&Step| flush.is_some_and(|flush| step.ended <= flush);
        let mut expected = vec![vec![BELOW]; SECTORS as usize];
        for step in begun() {
            for (sector, content) in &step.changed {
                match flushed(&step) {
                    true => expected[*sector] = vec![*content],
                    false => expected[*sector].push(*content),
                }
            }
        }
        for luck in 0..4 {
            let folder = leftovers();
            after_power_loss(&log[..at], folder.path(), || match luck {
                0 => false,
                1 => true,
                _ => random.below(2) == 0,
            });
            for file in fs::read_dir(folder.path()).unwrap() {
                let path = file.unwrap().path();
                if path
                    .extension()
                    .unwrap_or_default()
                    .to_string_lossy()
                    .starts_with("journal")
                {
                    // The name of the running system is another one.
                    let file = File::options().write(true).open(path).unwrap();
                    file.write_all_at(b"another start", 8).unwrap();
                }
            }
            check(folder.path(), &stack, &expected, || {
                format!(
                    "{kind:?}, seed {seed}: no power at {at} of {}, luck {luck}",
                    log.len()
                )
            });
        }
    }
}

fn check(folder: &Path, stack: &Stack, expected: &[Vec<Content>], when: impl Fn() -> String) {
    for (sector, (found, possible)) in found(folder, stack).iter().zip(expected).enumerate() {
        assert!(
            possible.contains(found),
            "{}: sector {sector} holds {:?}, files {:?}",
            when(),
            &found[..8],
            fs::read_dir(folder)
                .unwrap()
                .map(|file| file.unwrap().file_name())
                .collect::<Vec<_>>()
        );
    }
}

#[test]
fn append() {
    (1..4).for_each(|seed| crash_everywhere(Kind::Append, seed));
}

#[test]
fn sparse() {
    (11..14).for_each(|seed| crash_everywhere(Kind::Sparse, seed));
}

#[test]
fn hybrid() {
    (21..24).for_each(|seed| crash_everywhere(Kind::Hybrid, seed));
}
