//! A snapshot is taken, deleted or rolled back to, with a crash after each single step, and with storage that fails
//! before it. The disk is then what it was before or after, with all its snapshots, and the next start removes every
//! file that is not part of it.

mod model;

use std::path::{Path, PathBuf};

use common::recorder::{Failure, Op, Recorder, after_kill, after_power_loss};
use fuser::Errno;
use ovbd_vhost::format::lsmt::writable::Kind;

use super::disk::{leftovers, start_machine};
use common::content::Random;
use model::{Change, Model};

const KINDS: [Kind; 3] = [Kind::Append, Kind::Sparse, Kind::Hybrid];

/// All that is done to the snapshots of a disk with three of them.
const CHANGES: [Change; 7] = [
    Change::Take,
    Change::Delete(0),
    Change::Delete(1),
    Change::Delete(2),
    Change::RollBack(0),
    Change::RollBack(1),
    Change::RollBack(2),
];

/// Checks what a crash after so many steps may leave. All that the disk held before was flushed.
fn crash_at(
    log: &[Op],
    steps: impl IntoIterator<Item = usize>,
    random: &mut Random,
    mut check: impl FnMut(&Path, &dyn Fn() -> String),
) {
    for at in steps {
        let step = |what: &str| format!("{what} at {at} of {}", log.len());
        let folder = leftovers();
        after_kill(&log[..at], folder.path());
        check(folder.path(), &|| step("killed"));
        for luck in [false, true] {
            let folder = leftovers();
            after_power_loss(&log[..at], folder.path(), || luck && random.coin());
            start_machine(folder.path());
            check(folder.path(), &|| step("no power"));
        }
    }
}

/// Names what was done.
fn name(kind: Kind, snapshots: usize, change: Change) -> String {
    format!("{kind:?}, {snapshots} snapshots, {change:?}")
}

fn every_crash(kind: Kind, snapshots: usize, change: Change) {
    let recorder = Recorder::mount();
    let model = Model::make(&recorder, kind, snapshots);
    let after = model.after(change);
    let began = recorder.position();
    change.apply(recorder.path(), &model).unwrap();
    let name = name(kind, snapshots, change);
    after.assert_found(recorder.path(), &|| name.clone());
    let (mut old, mut new) = (0, 0);
    let mut random = Random::new(5);
    let log = recorder.log();
    crash_at(&log, began..=log.len(), &mut random, |folder, at| {
        let when = || format!("{name}, {}", at());
        match model.finish(folder, change, &when) {
            true => new += 1,
            false => old += 1,
        }
    });
    assert!(old > 0 && new > 0, "{name}");
}

#[test]
fn each_change_is_whole_or_not_done() {
    for kind in KINDS {
        for change in CHANGES {
            every_crash(kind, 3, change);
        }
        every_crash(kind, 0, Change::Take);
    }
}

const FAILURES: [(usize, Failure); 3] = [
    (1, Failure::Error(Errno::EIO)),
    (1, Failure::Short),
    // For what is undone after the first failure.
    (3, Failure::Error(Errno::ENOSPC)),
];

/// Fails each step in turn, in each way.
fn every_failure(kind: Kind, change: Change) {
    for failure in FAILURES {
        fail_each_step(kind, change, failure);
    }
}

/// Fails each step in turn, then does the change again, with a crash near the failure, and one in the second attempt.
fn fail_each_step(kind: Kind, change: Change, (steps, failure): (usize, Failure)) {
    let recorder = Recorder::mount();
    let mut random = Random::new(6);
    for after in 0.. {
        recorder.clear();
        let model = Model::make(&recorder, kind, 3);
        let began = recorder.position();
        recorder.fail_steps(after, steps, failure);
        let done = change.apply(recorder.path(), &model);
        if recorder.failures() == 0 {
            done.unwrap();
            break;
        }
        recorder.heal();
        let failed = recorder.position();
        let name = format!(
            "{}, {steps} x {failure:?} after {after}",
            name(kind, 3, change)
        );
        let when = || format!("{name}, {done:?}");
        let is_new = model.finish(recorder.path(), change, &when);
        assert!(is_new || done.is_err(), "{}", when());
        let log = recorder.log();
        let check = |folder: &Path, at: &dyn Fn() -> String| {
            model.finish(folder, change, &|| format!("{}, {}", when(), at()));
        };
        let near = failed.saturating_sub(2).max(began);
        crash_at(&log[..failed], near..=failed, &mut random, check);
        let later = failed + random.below((log.len() - failed) as u64 + 1) as usize;
        crash_at(&log, [later], &mut random, check);
    }
}

#[test]
fn a_failed_snapshot_is_whole_or_not_taken() {
    every_failure(Kind::Hybrid, Change::Take);
}

#[test]
fn a_failed_merge_of_frozen_layers_is_whole_or_not_done() {
    every_failure(Kind::Hybrid, Change::Delete(0));
}

#[test]
fn a_failed_merge_with_the_active_layer_is_whole_or_not_done() {
    every_failure(Kind::Sparse, Change::Delete(2));
}

#[test]
fn a_failed_rollback_is_whole_or_not_done() {
    every_failure(Kind::Append, Change::RollBack(1));
}

/// A file that gets the name of a pair that is gone is not the disk's.
#[test]
fn a_new_file_with_an_old_name_is_kept() {
    let recorder = Recorder::mount();
    let model = Model::make(&recorder, Kind::Hybrid, 3);
    Change::Delete(0).apply(recorder.path(), &model).unwrap();
    let first = recorder.path().join("data");
    assert!(!first.exists());
    std::fs::write(&first, "a copy").unwrap();
    let model = Model::find(recorder.path());
    Change::Take.apply(recorder.path(), &model).unwrap();
    let found = Model::find(recorder.path());
    assert!(found == model.after(Change::Take));
    assert_eq!(std::fs::read_to_string(&first).unwrap(), "a copy");
}

/// Files that are named like pairs of a disk, but are not recorded as its own, are left alone.
#[test]
fn files_of_others_are_kept() {
    for snapshots in [0, 3] {
        let recorder = Recorder::mount();
        let model = Model::make(&recorder, Kind::Hybrid, snapshots);
        let foreign = ["data.9", "index.9", "data.old", "data.99"].map(PathBuf::from);
        for name in &foreign {
            std::fs::write(recorder.path().join(name), "not ours").unwrap();
        }
        for change in [Change::Take, Change::Delete(0)] {
            if snapshots > 0 || change == Change::Take {
                let model = Model::find(recorder.path());
                change.apply(recorder.path(), &model).unwrap();
            }
        }
        drop(model);
        for name in &foreign {
            let text = std::fs::read_to_string(recorder.path().join(name)).unwrap();
            assert_eq!(text, "not ours");
        }
    }
}
