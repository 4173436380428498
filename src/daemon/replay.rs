//! Replay of a prefetch trace: suggests its runs to the fetcher until all of them are local.
//!
//! A suggestion is not answered, and can be lost: a registry refuses it, the fetcher ends, or its queue is
//! full. So a run is suggested again, after a pause without progress, as long as a unit of it is absent.

use std::collections::VecDeque;
use std::sync::{Arc, Weak};
use std::thread;
use std::time::{Duration, Instant};

use super::device::Device;
use crate::image::{Image, TracedRun};

/// Most runs that are suggested and not local.
const WINDOW: usize = 1024;

/// How often the presence of suggested runs is checked.
const TICK: Duration = Duration::from_millis(50);

/// Pauses without progress before runs are suggested again.
const FIRST_PAUSE: Duration = Duration::from_millis(500);
const LONGEST_PAUSE: Duration = Duration::from_secs(30);

/// Time without progress after which the rest of a trace is left to the guest's reads.
const PATIENCE: Duration = Duration::from_secs(600);

/// How a replay ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Outcome {
    /// All runs are local.
    Local,
    /// So many runs are not; nothing arrived for [`PATIENCE`].
    GivenUp(usize),
    /// The disk is gone.
    Stopped,
}

/// The runs of a trace that are not known to be local.
#[derive(Debug)]
struct Replay {
    runs: VecDeque<TracedRun>,
    /// Runs at the front that were suggested.
    suggested: usize,
    /// When a run became local last, or runs were suggested again.
    since: Instant,
    /// The same without the latter.
    progress: Instant,
    pause: Duration,
}

/// Suggests the runs until all are local. Holds the disk for moments only.
pub(super) fn run(device: Arc<Device>, runs: Vec<TracedRun>) -> Outcome {
    let disk = Arc::downgrade(&device);
    drop(device);
    let mut replay = Replay::new(runs, Instant::now());
    loop {
        let Some(device) = Weak::upgrade(&disk) else {
            return Outcome::Stopped;
        };
        let outcome = replay.step(Instant::now(), &OfImage(device.volume().image()));
        drop(device);
        match outcome {
            Some(outcome) => return outcome,
            None => thread::sleep(TICK),
        }
    }
}

/// Where runs are fetched to.
trait Target {
    fn is_local(&self, run: &TracedRun) -> bool;
    fn suggest(&self, run: &TracedRun);
}

struct OfImage<'a>(&'a Image);

impl Target for OfImage<'_> {
    fn is_local(&self, run: &TracedRun) -> bool {
        self.0.absent_bytes(run) == 0
    }

    fn suggest(&self, run: &TracedRun) {
        self.0.replay(run);
    }
}

impl Replay {
    fn new(runs: Vec<TracedRun>, now: Instant) -> Self {
        Self {
            runs: runs.into(),
            suggested: 0,
            since: now,
            progress: now,
            pause: FIRST_PAUSE,
        }
    }

    /// Drops the runs that are local, and suggests others. Returns the outcome at the end.
    fn step(&mut self, now: Instant, target: &impl Target) -> Option<Outcome> {
        self.drop_local(now, target);
        if self.runs.is_empty() {
            return Some(Outcome::Local);
        }
        if now.saturating_duration_since(self.progress) >= PATIENCE {
            return Some(Outcome::GivenUp(self.runs.len()));
        }
        if now.saturating_duration_since(self.since) >= self.pause {
            self.suggest_again(now, target);
        }
        let end = self.runs.len().min(WINDOW);
        for run in self.runs.range(self.suggested.min(end)..end) {
            target.suggest(run);
        }
        self.suggested = end;
        None
    }

    fn drop_local(&mut self, now: Instant, target: &impl Target) {
        let before = self.runs.len();
        let rest = self.runs.split_off(self.suggested);
        self.runs.retain(|run| !target.is_local(run));
        self.suggested = self.runs.len();
        self.runs.extend(rest);
        if self.runs.len() < before {
            (self.since, self.progress) = (now, now);
            self.pause = FIRST_PAUSE;
        }
    }

    /// Suggests what was lost. If nothing has arrived since the last time, the registry may be away or
    /// overloaded: one run is enough to find out.
    fn suggest_again(&mut self, now: Instant, target: &impl Target) {
        let count = match self.pause == FIRST_PAUSE {
            true => self.suggested,
            false => 1,
        };
        self.runs
            .iter()
            .take(count)
            .for_each(|run| target.suggest(run));
        self.since = now;
        self.pause = (self.pause * 2).min(LONGEST_PAUSE);
    }
}

#[cfg(test)]
mod tests {
    use std::cell::{Cell, RefCell};
    use std::collections::BTreeSet;

    use super::*;
    use crate::format::presence::UnitRange;

    /// Runs that become local when they are suggested, unless the registry is away.
    #[derive(Default)]
    struct Fake {
        is_away: Cell<bool>,
        loses: Cell<usize>,
        suggested: RefCell<Vec<u64>>,
        local: RefCell<BTreeSet<u64>>,
    }

    impl Target for Fake {
        fn is_local(&self, run: &TracedRun) -> bool {
            self.local.borrow().contains(&run.units().start())
        }

        fn suggest(&self, run: &TracedRun) {
            let mut suggested = self.suggested.borrow_mut();
            suggested.push(run.units().start());
            let is_lost = self.loses.get() > 0 && suggested.len().is_multiple_of(self.loses.get());
            if !self.is_away.get() && !is_lost {
                self.local.borrow_mut().insert(run.units().start());
            }
        }
    }

    fn runs(count: u64) -> Vec<TracedRun> {
        (0..count)
            .map(|start| TracedRun::new(0, UnitRange::one(start)))
            .collect()
    }

    #[test]
    fn lost_suggestions_are_repeated_until_all_runs_are_local() {
        let (fake, start) = (Fake::default(), Instant::now());
        fake.loses.set(3);
        let mut replay = Replay::new(runs(3000), start);
        let mut now = start;
        let outcome = loop {
            if let Some(outcome) = replay.step(now, &fake) {
                break outcome;
            }
            now += TICK;
        };
        assert_eq!(outcome, Outcome::Local);
        assert_eq!(fake.local.borrow().len(), 3000);
        let count = fake.suggested.borrow().len();
        assert!((4000..5000).contains(&count), "{count}");
    }

    #[test]
    fn a_registry_that_is_away_gets_few_suggestions_until_it_is_back() {
        let (fake, start) = (Fake::default(), Instant::now());
        fake.is_away.set(true);
        let mut replay = Replay::new(runs(100), start);
        let mut now = start;
        while now < start + PATIENCE - TICK {
            assert_eq!(replay.step(now, &fake), None);
            now += TICK;
        }
        let count = fake.suggested.borrow().len();
        assert!(count < 100 + 100 + 30, "{count}");
        let mut other = Replay::new(runs(100), start);
        assert_eq!(other.step(start, &fake), None);
        let late = start + PATIENCE;
        assert_eq!(other.step(late, &fake), Some(Outcome::GivenUp(100)));
        fake.is_away.set(false);
        while replay.step(now, &fake).is_none() {
            now += TICK;
        }
        assert!(now < start + PATIENCE + LONGEST_PAUSE + Duration::from_secs(2));
    }

    #[test]
    fn only_a_window_of_runs_is_under_way() {
        let (fake, start) = (Fake::default(), Instant::now());
        fake.is_away.set(true);
        let mut replay = Replay::new(runs(3 * WINDOW as u64), start);
        replay.step(start, &fake);
        replay.step(start + TICK, &fake);
        assert_eq!(fake.suggested.borrow().len(), WINDOW);
    }
}
