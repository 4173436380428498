//! Everything a writable layer does to its files, recorded; then a crash after each single step of
//! it, by a killed process or by a power loss, and what the next process finds. Now and then there
//! is no room for the index.

mod order;

use std::fs::{self, File};
use std::path::Path;
use std::sync::Arc;
use std::thread;
use std::time::Duration;

use common::content::Random;
use common::recorder::{Call, Op, Recorder, after_power_loss};
use fuser::Errno;
use ovbd_vhost::format::lsmt::writable::Kind;
use ovbd_vhost::image::Image;
use ovbd_vhost::image::config::Stack;
use ovbd_vhost::tool::seal::seal;
use ovbd_vhost::units::Sector;
use ovbd_vhost::writable::{Bounds, Error, Options, Snapshots, Volume, resize};
use tempfile::TempDir;

use super::disk::{
    BELOW, Content, assert_holds, below, content, folder_after, leftovers, make, paths,
    start_machine, write,
};

const SECTORS: u64 = 96;

/// Small, so that flushes by themselves and new logs happen.
const OPTIONS: Options = Options {
    limit: u64::MAX,
    bounds: Bounds {
        max_pending: 9,
        index_slack: 4,
        max_index_entries: 1 << 20,
    },
};

/// One thing the guest did.
struct Step {
    /// When it began and ended, by the recorder's count.
    began: usize,
    ended: usize,
    /// What the sectors it touched hold afterwards.
    changed: Vec<(usize, Content)>,
    is_flush: bool,
    /// The name of the snapshot that was taken, and what it holds.
    snapshot: Option<(String, Vec<Content>)>,
}

fn open(folder: &Path, stack: &Stack) -> (Arc<Volume>, Snapshots) {
    common::volume::open(stack, &paths(folder), OPTIONS).unwrap()
}

/// From now on there is no room for a longer index of any writable layer.
fn fill(recorder: &Recorder) {
    for name in recorder.names() {
        let name = name.to_str().unwrap();
        if name.starts_with("index") && !name.contains("journal") {
            recorder.fail(Call::Write, name, Errno::ENOSPC);
            recorder.fail(Call::Create, &format!("{name}.new"), Errno::ENOSPC);
        }
    }
}

/// Makes a writable layer and works on it; returns what was done.
fn work(recorder: &Recorder, stack: &Stack, kind: Kind, random: &mut Random) -> Vec<Step> {
    make(recorder, kind, SECTORS);
    let mut device = open(recorder.path(), stack);
    let mut steps = Vec::new();
    let mut full = false;
    for number in 0..80_u32 {
        let start = random.below(SECTORS);
        let sectors = (1 + random.below(12)).min(SECTORS - start);
        let range = start as usize..(start + sectors) as usize;
        let began = recorder.position();
        let mut zeros = Vec::new();
        zeros.extend(range.clone().map(|sector| (sector, [0; 512])));
        let (volume, snapshots) = &device;
        let part = common::sectors(start, sectors);
        let start = Sector(start);
        let mut is_flush = false;
        let mut snapshot = None;
        let mut changed = Vec::new();
        let done = match random.below(24) {
            0..=3 => {
                let flushed = volume.flush();
                is_flush = flushed.is_ok();
                flushed
            }
            4 | 5 => {
                changed = zeros;
                volume.discard(part)
            }
            6 | 7 => {
                changed = zeros;
                volume.write_zeroes(part, false)
            }
            8 => {
                drop(device);
                device = open(recorder.path(), stack);
                is_flush = !full;
                Ok(())
            }
            9 => {
                let name = format!("snapshot {number}");
                snapshots.take(&name).map(|taken| {
                    assert_eq!(snapshots.take(&name).unwrap(), taken);
                    snapshot = Some((name, content(volume)));
                    is_flush = true;
                })
            }
            10 | 11 => {
                full = !full;
                match full {
                    true => fill(recorder),
                    false => recorder.heal(),
                }
                Ok(())
            }
            12 | 13 => snapshots.seal(),
            _ => {
                let mut content = Vec::new();
                for sector in range.clone() {
                    let mut bytes = [sector as u8; 512];
                    bytes[..4].copy_from_slice(&(number + 1).to_le_bytes());
                    content.push(bytes);
                }
                let written = write(volume, start, &mut content);
                changed = range.zip(content).collect();
                written
            }
        };
        assert!(full || done.is_ok(), "{done:?}");
        if done.is_err() {
            // Old or new, from now on it is what it is.
            let now = content(&device.0);
            changed
                .iter_mut()
                .for_each(|(sector, content)| *content = now[*sector]);
        }
        steps.push(Step {
            began,
            ended: recorder.position(),
            changed,
            is_flush,
            snapshot,
        });
    }
    steps
}

/// What is left when a process that opens what is in `folder`, with room or without, dies at each
/// step of that.
fn die_while_opening(folder: &Path, stack: &Stack, full: bool) -> Vec<TempDir> {
    let recorder = Recorder::mount();
    for file in fs::read_dir(folder).unwrap() {
        let path = file.unwrap().path();
        let name = path.file_name().unwrap();
        fs::write(recorder.path().join(name), fs::read(&path).unwrap()).unwrap();
    }
    let began = recorder.position();
    if full {
        fill(&recorder);
    }
    drop(open(recorder.path(), stack));
    let log = recorder.log();
    (began..=log.len())
        .map(|at| folder_after(&log[..at]))
        .collect()
}

fn crash_everywhere(kind: Kind, seed: u64) {
    let recorder = Recorder::mount();
    let mut random = Random::new(seed);
    let (_folder, stack) = below(SECTORS);
    let steps = work(&recorder, &stack, kind, &mut random);
    let log = recorder.log();
    for at in steps[0].began..=log.len() {
        let begun = || steps.iter().filter(|step| step.began < at);
        let over = || steps.iter().filter(|step| step.ended <= at);
        let snapshot = over().filter_map(|step| step.snapshot.as_ref()).next_back();

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
        check(folder.path(), &stack, &expected, snapshot, || {
            format!(
                "{kind:?}, seed {seed}: killed at {at} of {}: {:?}",
                log.len(),
                log.get(at)
            )
        });

        // The next process dies as well, before it has even begun to serve.
        if at % 5 == 0 {
            let full = at % 10 == 0;
            for again in die_while_opening(folder_after(&log[..at]).path(), &stack, full) {
                check(again.path(), &stack, &expected, snapshot, || {
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
                _ => random.coin(),
            });
            start_machine(folder.path());
            check(folder.path(), &stack, &expected, snapshot, || {
                format!(
                    "{kind:?}, seed {seed}: no power at {at} of {}, luck {luck}",
                    log.len()
                )
            });
        }
    }
}

/// Asserts that the next process finds in `folder` what is `expected`, and the last snapshot that
/// was answered.
fn check(
    folder: &Path,
    stack: &Stack,
    expected: &[Vec<Content>],
    snapshot: Option<&(String, Vec<Content>)>,
    when: impl Fn() -> String,
) {
    let (volume, snapshots) = open(folder, stack);
    if let Some((name, held)) = snapshot {
        assert_holds(&snapshots, name, held, &when);
    }
    for (sector, (found, possible)) in content(&volume).iter().zip(expected).enumerate() {
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
