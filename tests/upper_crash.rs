//! Everything an upper does to its files, recorded; then a crash after each single step of it, by a
//! killed process or by a power loss, and what the next process finds.

#[path = "common/recorder.rs"]
mod recorder;

use std::fs::{self, File};
use std::os::unix::fs::FileExt;
use std::path::Path;

use ovbd_vhost::format::lsmt::Header;
use ovbd_vhost::format::lsmt::writable::Kind;
use ovbd_vhost::scatter::Scatter;
use ovbd_vhost::upper::load::{Access, load};
use ovbd_vhost::upper::map::{ExtentMap, Place};
use ovbd_vhost::upper::{Options, Paths, Upper, create, journal};
use recorder::{Recorder, after_kill, after_power_loss};
use uuid::Uuid;
use vm_memory::VolatileSlice;

const SECTORS: u64 = 96;
const OPTIONS: Options = Options {
    limit: u64::MAX,
    default_size: SECTORS * 512,
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

/// Makes an upper and works on it; returns what was done.
fn work(recorder: &Recorder, kind: Kind, random: &mut Random) -> Vec<Step> {
    let paths = paths(recorder.path());
    let header = Header {
        index_offset: 0,
        index_entries: 0,
        virtual_size: SECTORS * 512,
        uuid: Uuid::new_v4(),
        parent_uuid: Uuid::nil(),
        message: Vec::new(),
    };
    create(&paths, kind, &header).unwrap();
    let mut upper = Upper::open(&paths, &OPTIONS).unwrap();
    let mut steps = Vec::new();
    for number in 0..60_u32 {
        let start = random.below(SECTORS);
        let sectors = (1 + random.below(12)).min(SECTORS - start);
        let range = start as usize..(start + sectors) as usize;
        let began = recorder.position();
        let mut zeros = Vec::new();
        zeros.extend(range.clone().map(|sector| (sector, [0; 512])));
        let (changed, is_flush) = match random.below(10) {
            0 | 1 => {
                upper.flush().unwrap();
                (Vec::new(), true)
            }
            2 => {
                upper.discard(start, sectors).unwrap();
                (zeros, false)
            }
            3 => {
                upper.write_zeroes(start, sectors).unwrap();
                (zeros, false)
            }
            4 if number % 2 == 0 => {
                drop(upper);
                upper = Upper::open(&paths, &OPTIONS).unwrap();
                (Vec::new(), true)
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
                upper.write(start, sectors, scatter.cursor(0)).unwrap();
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

/// What an upper found in `folder` holds.
fn found(folder: &Path) -> Vec<Content> {
    drop(Upper::open(&paths(folder), &OPTIONS).unwrap());
    let loaded = load(&paths(folder), Access::Read, ExtentMap::new()).unwrap();
    let mut content = vec![BELOW; SECTORS as usize];
    for extent in loaded.map.iter() {
        for n in 0..extent.len {
            let sector = &mut content[(extent.start + n) as usize];
            match extent.place.moved(n) {
                Place::Zero => sector.fill(0),
                Place::Data(at) => {
                    loaded.data.read_exact_at(sector, at * 512).unwrap();
                }
            }
        }
    }
    content
}

/// Where the crashes' leftovers are written: in memory, for there are thousands.
fn leftovers() -> tempfile::TempDir {
    let memory = Path::new("/dev/shm");
    match memory.is_dir() {
        true => tempfile::tempdir_in(memory).unwrap(),
        false => tempfile::tempdir().unwrap(),
    }
}

fn crash_everywhere(kind: Kind, seed: u64) {
    let recorder = Recorder::mount();
    let mut random = Random(seed);
    let steps = work(&recorder, kind, &mut random);
    let log = recorder.log();
    for at in steps[0].began..=log.len() {
        let begun = || steps.iter().filter(|step| step.began < at);
        let over = || steps.iter().filter(|step| step.ended <= at);

        // The process dies: what was answered is there; what was under way, in part.
        let folder = leftovers();
        after_kill(&log[..at], folder.path());
        let mut expected = vec![vec![BELOW]; SECTORS as usize];
        for (sector, content) in over().flat_map(|step| &step.changed) {
            expected[*sector] = vec![*content];
        }
        for step in begun().filter(|step| step.ended > at) {
            for (sector, content) in &step.changed {
                expected[*sector].push(*content);
            }
        }
        check(folder.path(), &expected, || {
            format!(
                "{kind:?}, seed {seed}: killed at {at} of {}: {:?}",
                log.len(),
                log.get(at)
            )
        });

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
            for path in journal::paths(&paths(folder.path()).index) {
                // The name of the running system is another one.
                if let Ok(file) = File::options().write(true).open(path) {
                    file.write_all_at(b"another start", 8).unwrap();
                }
            }
            check(folder.path(), &expected, || {
                format!(
                    "{kind:?}, seed {seed}: no power at {at} of {}, luck {luck}",
                    log.len()
                )
            });
        }
    }
}

fn check(folder: &Path, expected: &[Vec<Content>], when: impl Fn() -> String) {
    for (sector, (found, possible)) in found(folder).iter().zip(expected).enumerate() {
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
