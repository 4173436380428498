//! A disk at work on a recorder's files, and what must be found of it after a crash.

use std::path::Path;
use std::sync::Arc;

use common::content::Random;
use common::recorder::{Op, Recorder, after_kill, after_power_loss};
use ovbd_vhost::format::lsmt::writable::Kind;
use ovbd_vhost::image::config::Stack;
use ovbd_vhost::units::Sector;
use ovbd_vhost::writable::{Bounds, Error, Options, Snapshots, Volume};

use super::expected::{Expected, Possible, add, lost_data, place, size_as_content, state};
use crate::disk::{Content, assert_holds, content, leftovers, make, paths, start_machine, write};

/// Sectors of the disk at first.
pub(super) const SECTORS: u64 = 24;

/// Sectors that the disk can grow to, and by how many at a time.
pub(super) const MOST_SECTORS: u64 = 48;
pub(super) const GROWTH: u64 = 8;

/// Small, so that flushes by themselves and new index files happen.
pub(super) const OPTIONS: Options = Options {
    limit: u64::MAX,
    bounds: Bounds {
        max_pending: 7,
        index_slack: 2,
        max_index_entries: 1 << 20,
    },
};

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Operation {
    /// So many sectors from the first on.
    Write(u64, u64),
    Discard(u64, u64),
    WriteZeroes(u64, u64),
    Flush,
    /// The process ends without a flush, and another opens the layer.
    Restart,
    Snapshot,
    Seal,
    /// By [`GROWTH`] sectors.
    Grow,
}

/// One operation.
pub(super) struct Step {
    operation: Operation,
    outcome: String,
    /// When it began and ended, by the recorder's count.
    began: usize,
    ended: usize,
    before: Expected,
    /// What the sectors it touches may hold from its first moment on.
    new: Vec<(usize, Content)>,
    after: Expected,
    /// The last snapshot there is for certain, and what it holds.
    snapshot: Option<(String, Vec<Content>)>,
}

/// What was done before a point of the log, and how it ended.
pub(super) fn history(steps: &[Step], at: usize) -> String {
    let begun = steps.iter().filter(|step| step.began < at);
    begun
        .map(|step| {
            format!(
                "\n{}..{}: {:?} {}",
                step.began, step.ended, step.operation, step.outcome
            )
        })
        .collect()
}

/// A device at work on a recorder's files, and what must be found.
pub(super) struct Session<'a> {
    recorder: &'a Recorder,
    stack: &'a Stack,
    device: Option<(Arc<Volume>, Snapshots)>,
    expected: Expected,
    snapshot: Option<(String, Vec<Content>)>,
    /// Whether anything failed so far.
    faulty: bool,
    /// Whether storage lost data since the device was started.
    lost: bool,
    steps: Vec<Step>,
    /// Operations that failed, with their numbers.
    failed: Vec<(Operation, u32)>,
}

pub(super) fn open(folder: &Path, stack: &Stack) -> Result<(Arc<Volume>, Snapshots), Error> {
    common::volume::open(stack, &paths(folder), OPTIONS)
}

impl<'a> Session<'a> {
    pub(super) fn begin(recorder: &'a Recorder, stack: &'a Stack, kind: Kind) -> Self {
        recorder.clear();
        make(recorder, kind, SECTORS);
        let device = open(recorder.path(), stack).unwrap();
        let mut now: Possible = state(&device.0).into_iter().map(|now| vec![now]).collect();
        // Nothing is below what it grows by.
        now.resize(place(MOST_SECTORS), vec![[0; 512]]);
        Self {
            recorder,
            stack,
            device: Some(device),
            expected: Expected {
                killed: now.clone(),
                no_power: now,
            },
            snapshot: None,
            faulty: false,
            lost: false,
            steps: Vec::new(),
            failed: Vec::new(),
        }
    }

    /// Present sectors of the disk.
    pub(super) fn sectors(&self) -> u64 {
        self.device().0.sectors().0
    }

    pub(super) fn device(&self) -> &(Arc<Volume>, Snapshots) {
        self.device.as_ref().unwrap()
    }

    pub(super) fn apply(&mut self, operation: Operation) {
        self.apply_as(operation, self.steps.len() as u32 + 1);
    }

    /// Repeats the changes and flushes that failed, in their order, as the daemon does for requests that wait for space.
    pub(super) fn repeat_failed(&mut self) {
        for (operation, number) in std::mem::take(&mut self.failed) {
            if matches!(
                operation,
                Operation::Write(..)
                    | Operation::Discard(..)
                    | Operation::WriteZeroes(..)
                    | Operation::Flush
            ) {
                self.apply_as(operation, number);
            }
        }
    }

    /// Applies an operation; what it writes has `number` in it.
    pub(super) fn apply_as(&mut self, operation: Operation, number: u32) {
        let (before, began) = (self.expected.clone(), self.recorder.position());
        let new = match operation {
            Operation::Write(start, sectors) => (start..start + sectors)
                .map(|sector| {
                    let mut bytes = [sector as u8; 512];
                    bytes[..4].copy_from_slice(&number.to_le_bytes());
                    (place(sector), bytes)
                })
                .collect(),
            Operation::Discard(start, sectors) | Operation::WriteZeroes(start, sectors) => (start
                ..start + sectors)
                .map(|sector| (place(sector), [0; 512]))
                .collect(),
            Operation::Grow => vec![(0, size_as_content(self.sectors() + GROWTH))],
            _ => Vec::new(),
        };
        let failures = self.recorder.failures();
        let done = self.act(operation, number, &new);
        let failed = self.recorder.failures() > failures;
        self.faulty |= failed;
        let excused = matches!(
            done,
            Err(Error::Broken { .. } | Error::ManifestMayRevert { .. })
        );
        assert!(
            failed || done.is_ok() || excused && self.faulty,
            "{operation:?}: {done:?}"
        );
        if done.is_err() {
            self.failed.push((operation, number));
        }
        let (log, ended) = (self.recorder.log(), self.recorder.position());
        let lost = lost_data(&log, began..ended);
        if lost {
            self.expected.lose();
        }
        self.expect(operation, &new, done.is_ok(), failed);
        if lost {
            self.expected.lose();
            self.lost = operation != Operation::Restart;
        } else if operation == Operation::Restart {
            self.lost = false;
        }
        // Until it starts again, the device may read what storage has let go of.
        let now = state(&self.device().0).into_iter();
        for (sector, content) in now.enumerate().filter(|_| !self.lost) {
            let possible = &self.expected.killed[sector];
            assert!(
                possible.contains(&content),
                "{operation:?}: sector {sector}"
            );
        }
        self.steps.push(Step {
            operation,
            outcome: done.map_or_else(|error| error.to_string(), |()| String::new()),
            began,
            ended,
            before,
            new,
            after: self.expected.clone(),
            snapshot: self.snapshot.clone(),
        });
    }

    pub(super) fn act(
        &mut self,
        operation: Operation,
        number: u32,
        new: &[(usize, Content)],
    ) -> Result<(), Error> {
        if operation == Operation::Restart {
            self.device = None;
            let mut opened = open(self.recorder.path(), self.stack);
            if opened.is_err() && self.recorder.failures() > 0 {
                self.recorder.heal();
                opened = open(self.recorder.path(), self.stack);
            }
            self.device = Some(opened.unwrap());
            return Ok(());
        }
        let (volume, snapshots) = self.device();
        match operation {
            Operation::Write(start, _) => {
                let mut content: Vec<_> = new.iter().map(|(_, content)| *content).collect();
                write(volume, Sector(start), &mut content)
            }
            Operation::Discard(start, sectors) => volume.discard(common::sectors(start, sectors)),
            Operation::WriteZeroes(start, sectors) => {
                volume.write_zeroes(common::sectors(start, sectors), false)
            }
            Operation::Flush => volume.flush(),
            Operation::Grow => snapshots.grow_disk((volume.sectors().0 + GROWTH) * 512),
            Operation::Seal => snapshots.seal(),
            Operation::Snapshot => {
                let name = format!("snapshot {number}");
                snapshots.take(&name)?;
                let held = content(volume);
                self.snapshot = Some((name, held));
                Ok(())
            }
            Operation::Restart => Ok(()),
        }
    }

    /// What must be found from now on.
    pub(super) fn expect(
        &mut self,
        operation: Operation,
        new: &[(usize, Content)],
        done: bool,
        failed: bool,
    ) {
        let Expected { killed, no_power } = &mut self.expected;
        for (sector, content) in new {
            match done {
                true => killed[*sector] = vec![*content],
                // It may have come to that, or come to it later: at the next start.
                false => add(killed, *sector, *content),
            }
            match operation {
                Operation::Grow if done => no_power[*sector] = vec![*content],
                _ => add(no_power, *sector, *content),
            }
        }
        match operation {
            Operation::Flush | Operation::Snapshot if done => no_power.clone_from(killed),
            Operation::Restart => {
                let (volume, _) = self.device.as_ref().unwrap();
                for (sector, content) in state(volume).into_iter().enumerate() {
                    assert!(
                        killed[sector].contains(&content),
                        "restart: sector {sector} holds {:?}, not one of {:?}, after {}",
                        &content[..5],
                        killed[sector]
                            .iter()
                            .map(|content| &content[..5])
                            .collect::<Vec<_>>(),
                        history(&self.steps, usize::MAX)
                    );
                    killed[sector] = vec![content];
                    add(no_power, sector, content);
                }
                if !failed {
                    no_power.clone_from(killed);
                }
            }
            _ => {}
        }
    }

    /// What must be found after a crash at this point of the log.
    pub(super) fn expected_at(
        &self,
        log: &[Op],
        at: usize,
    ) -> (Expected, Option<&(String, Vec<Content>)>) {
        let over = self.steps.iter().rev().find(|step| step.ended <= at);
        let snapshot = over.and_then(|step| step.snapshot.as_ref());
        let under_way = |step: &&Step| step.began < at && at < step.ended;
        let Some(step) = self.steps.iter().find(under_way) else {
            let first = || self.steps[0].before.clone();
            return (over.map_or_else(first, |step| step.after.clone()), snapshot);
        };
        let mut expected = step.before.clone();
        for (sector, content) in &step.new {
            add(&mut expected.killed, *sector, *content);
            add(&mut expected.no_power, *sector, *content);
        }
        // A step may flush by itself; and what came with it is flushed as well.
        if lost_data(log, step.began..at) {
            expected.lose();
        }
        (expected, snapshot)
    }

    /// Crashes at each point of the log from `from` on that `chosen` takes.
    pub(super) fn crash(
        &self,
        from: usize,
        random: &mut Random,
        when: &dyn Fn() -> String,
        every: u64,
    ) {
        let log = self.recorder.log();
        for at in from..=log.len() {
            if every > 1 && random.below(every) > 0 {
                continue;
            }
            let (expected, snapshot) = self.expected_at(&log, at);
            let when = |what: &str| {
                let last = history(&self.steps, at);
                format!("{}: {what} at {at} of {}, after {last}", when(), log.len())
            };
            // A process that dies before it can note what storage lost leaves nothing that tells.
            let noted = at == 0 || !lost_data(&log, at - 1..at);
            let folder = leftovers();
            after_kill(&log[..at], folder.path());
            if noted {
                check(
                    folder.path(),
                    self.stack,
                    &expected.killed,
                    snapshot,
                    &|| when("killed"),
                );
            }
            for luck in 0..2 {
                let folder = leftovers();
                let survives = || luck == 1 && random.below(2) == 0;
                after_power_loss(&log[..at], folder.path(), survives);
                start_machine(folder.path());
                check(
                    folder.path(),
                    self.stack,
                    &expected.no_power,
                    snapshot,
                    &|| when("no power"),
                );
            }
        }
    }
}

/// Asserts that the next process finds what is possible, and the last snapshot that was answered.
pub(super) fn check(
    folder: &Path,
    stack: &Stack,
    possible: &Possible,
    snapshot: Option<&(String, Vec<Content>)>,
    when: &dyn Fn() -> String,
) {
    let (volume, snapshots) =
        open(folder, stack).unwrap_or_else(|error| panic!("{}: {error:?}", when()));
    if let Some((name, held)) = snapshot {
        assert_holds(&snapshots, name, held, when);
    }
    for (sector, (found, possible)) in state(&volume).iter().zip(possible).enumerate() {
        assert!(
            possible.contains(found),
            "{}: sector {sector}, counted from 1, holds {:?}, not one of {:?}",
            when(),
            &found[..5],
            possible
                .iter()
                .map(|content| &content[..5])
                .collect::<Vec<_>>()
        );
    }
}
