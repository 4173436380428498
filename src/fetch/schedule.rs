//! The schedule: wanted units by cause, queues by urgency, and the waiters. No I/O.
//!
//! ```text
//! want -> Wanted(cause) --next--> InFlight --arrived--> (gone)     waiters whose units all arrived
//!            ^                        |
//!            '-- wake -- Delayed <----'   failed, if something still waits; postponed
//! ```

#[cfg(test)]
mod tests;

use std::collections::{BTreeMap, BTreeSet, HashMap, HashSet};
use std::time::{Duration, Instant};

use super::blob::BlobId;
use super::fair_queue::{ClientId, FairQueue};
use super::origin::Failure;
use crate::format::presence::UnitRange;
use crate::source::protocol::Cause;

/// Queues by urgency: those that are waited for share the first.
const QUEUES: usize = 4;

/// How long a read waits for a registry that fails, if no guest depends on it.
const PATIENCE: Duration = Duration::from_secs(45);

/// Time that an attempt may take: none begins that would end after [`PATIENCE`].
const ATTEMPT: Duration = Duration::from_secs(10);

/// Hints of a client that may wait; more are dropped.
const MAX_HINTS: usize = 4096;

/// Demands of a client that are under way at a time: servers that do not answer one disk leave threads for others.
pub(super) const MAX_IN_FLIGHT: usize = 16;

/// A gap of so many present units is fetched as well, to save a request that nothing waits for.
const MAX_GAP: u64 = 1;

/// Class of urgency, the most urgent first.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(super) enum Urgency {
    /// Something waits.
    Demand,
    Replay,
    ReadAhead,
    Background,
}

impl Urgency {
    pub(super) const ALL: [Self; QUEUES] = [
        Self::Demand,
        Self::Replay,
        Self::ReadAhead,
        Self::Background,
    ];

    pub(super) const fn of(cause: Cause) -> Self {
        match cause {
            Cause::Start | Cause::Demand | Cause::Read => Self::Demand,
            Cause::Repair | Cause::RepairRead => Self::Demand,
            Cause::Replay => Self::Replay,
            Cause::ReadAhead => Self::ReadAhead,
            Cause::Background => Self::Background,
        }
    }

    /// Units that may be fetched although they are present. None for a demand: each reader gets its
    /// unit sooner, and each unit is fetched once.
    pub(super) const fn max_gap(self) -> u64 {
        match self {
            Self::Demand => 0,
            Self::Replay | Self::ReadAhead | Self::Background => MAX_GAP,
        }
    }
}

/// Units of one blob to be fetched by one request.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct RangeFetch {
    /// The client that wants them.
    pub(super) client: ClientId,
    pub(super) blob: BlobId,
    pub(super) units: UnitRange,
    pub(super) cause: Cause,
    /// Set while another process fetches some of the units.
    pub(super) elsewhere: Option<Elsewhere>,
}

/// Progress of another process that fetches units.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Elsewhere {
    /// Number of the units that are present.
    pub(super) present: u64,
    /// When it was first found to be so.
    pub(super) since: Instant,
}

impl RangeFetch {
    /// Whether units that are present are fetched and overwritten.
    pub(super) fn overwrites(&self) -> bool {
        self.cause.repairs()
    }

    /// Whether it is as urgent as units that are wanted for this cause, and fetches them in the same way.
    fn serves(&self, cause: Cause) -> bool {
        let is_as_urgent = Urgency::of(self.cause) == Urgency::of(cause);
        is_as_urgent && self.overwrites() == cause.repairs()
    }
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Status {
    Wanted(Cause),
    InFlight,
    /// Fetched after a pause.
    Delayed(Cause),
}

#[derive(Debug)]
struct Waiting<W> {
    missing: BTreeSet<u64>,
    cause: Cause,
    /// Fails with what is wrong then, before its client gives up without a reason.
    until: Option<Instant>,
    name: W,
}

#[derive(Debug)]
struct Units<W> {
    status: BTreeMap<u64, Status>,
    waiters: Vec<Waiting<W>>,
}

/// A fetch that is repeated later.
#[derive(Debug)]
struct Delayed {
    fetch: RangeFetch,
    /// Whether it is repeated at once when its server answers another request.
    is_hurried: bool,
}

/// The queues. `W` names a waiter.
#[derive(Debug)]
pub(super) struct Schedule<W> {
    blobs: HashMap<BlobId, Units<W>>,
    queues: [FairQueue<RangeFetch>; QUEUES],
    /// Demands under way.
    in_flight: HashMap<ClientId, usize>,
    /// By when they are repeated. The number tells apart those of one instant.
    delayed: BTreeMap<(Instant, u64), Delayed>,
    number: u64,
}

impl<W> Default for Schedule<W> {
    fn default() -> Self {
        Self {
            blobs: HashMap::new(),
            queues: Default::default(),
            in_flight: HashMap::new(),
            delayed: BTreeMap::new(),
            number: 0,
        }
    }
}

impl<W> Schedule<W> {
    /// Wants `runs` of a blob's units, none of them present unless they are to be repaired. The
    /// waiter, if any, is returned by [`Schedule::arrived`] when all have arrived. Returns whether that was
    /// noted: a hint is dropped if too many wait.
    pub(super) fn want(
        &mut self,
        client: ClientId,
        blob: BlobId,
        runs: &[UnitRange],
        cause: Cause,
        waiter: Option<W>,
    ) -> bool {
        let queue = &mut self.queues[Urgency::of(cause) as usize];
        if waiter.is_none() && queue.len_of(client) >= MAX_HINTS {
            return false;
        }
        let units = self.blobs.entry(blob).or_insert_with(|| Units {
            status: BTreeMap::new(),
            waiters: Vec::new(),
        });
        for run in runs {
            let mut is_new = false;
            for unit in run.numbers() {
                match units.status.get(&unit) {
                    Some(Status::InFlight) => continue,
                    Some(Status::Delayed(before)) if cause >= *before => continue,
                    // In the queue of this client as well: that of the other may be long.
                    Some(Status::Wanted(before)) if cause >= *before => {
                        is_new |= waiter.is_some() && Urgency::of(cause) == Urgency::of(*before);
                        continue;
                    }
                    Some(Status::Wanted(_) | Status::Delayed(_)) | None => {}
                }
                units.status.insert(unit, Status::Wanted(cause));
                is_new = true;
            }
            if is_new {
                let fetch = RangeFetch {
                    client,
                    blob,
                    units: *run,
                    cause,
                    elsewhere: None,
                };
                queue.push_back(client, fetch);
            }
        }
        if let Some(name) = waiter {
            units.waiters.push(Waiting {
                missing: runs.iter().flat_map(|run| run.numbers()).collect(),
                cause,
                until: cause.has_deadline().then(|| Instant::now() + PATIENCE),
                name,
            });
        }
        true
    }

    /// Takes the most urgent fetch of those in `urgencies`. A fetch is grown over the wanted units
    /// behind it, to `size(blob, cause)` units.
    pub(super) fn next(
        &mut self,
        urgencies: &[Urgency],
        size: impl Fn(BlobId, Cause) -> u64,
        absent: impl Fn(BlobId, u64) -> bool,
    ) -> Option<RangeFetch> {
        for urgency in urgencies {
            let in_flight = &self.in_flight;
            let under_way = |client| in_flight.get(&client).copied().unwrap_or_default();
            let may = |client| *urgency != Urgency::Demand || under_way(client) < MAX_IN_FLIGHT;
            while let Some(queued) = self.queues[*urgency as usize].pop(may) {
                let Some(units) = self.blobs.get_mut(&queued.blob) else {
                    continue;
                };
                let (blob, cause) = (queued.blob, queued.cause);
                let Some(start) = units.first_wanted(&queued) else {
                    continue;
                };
                let most = size(blob, cause).max(1);
                let range = units.grow(start, most, cause, |unit| absent(blob, unit));
                for unit in range.numbers() {
                    let fetched =
                        cause.repairs() || units.status.contains_key(&unit) || absent(blob, unit);
                    if fetched {
                        units.status.insert(unit, Status::InFlight);
                    }
                }
                let units = UnitRange::new(range.end(), queued.units.end());
                if !units.is_empty() {
                    let rest = RangeFetch { units, ..queued };
                    self.queues[*urgency as usize].push_front(queued.client, rest);
                }
                if *urgency == Urgency::Demand {
                    *self.in_flight.entry(queued.client).or_default() += 1;
                }
                return Some(RangeFetch {
                    units: range,
                    ..queued
                });
            }
        }
        None
    }

    /// Notes that a fetch is no longer under way.
    pub(super) fn ended(&mut self, client: ClientId, cause: Cause) {
        if Urgency::of(cause) != Urgency::Demand {
            return;
        }
        if let Some(count) = self.in_flight.get_mut(&client) {
            *count -= 1;
            if *count == 0 {
                self.in_flight.remove(&client);
            }
        }
    }

    /// Notes that units are present, and returns the waiters that wait for nothing more.
    pub(super) fn arrived(&mut self, blob: BlobId, arrived: UnitRange) -> Vec<W> {
        let Some(units) = self.blobs.get_mut(&blob) else {
            return Vec::new();
        };
        for unit in arrived.numbers() {
            units.status.remove(&unit);
        }
        let done = units.waiters.extract_if(.., |waiter| {
            for unit in arrived.numbers() {
                waiter.missing.remove(&unit);
            }
            waiter.missing.is_empty()
        });
        let done = done.map(|waiter| waiter.name).collect();
        if units.status.is_empty() && units.waiters.is_empty() {
            self.blobs.remove(&blob);
        }
        done
    }

    /// Notes that the rest of a fetch failed, and repeats what something waits for after `at`. Returns
    /// the waiters that give up: those that the failure ends, and those for which `at` is too late.
    pub(super) fn failed(&mut self, fetch: &RangeFetch, failure: &Failure, at: Instant) -> Vec<W> {
        let Some(units) = self.blobs.get_mut(&fetch.blob) else {
            return Vec::new();
        };
        let touches =
            |missing: &BTreeSet<u64>| missing.range(fetch.units.numbers()).next().is_some();
        let failed = units.waiters.extract_if(.., |waiter| {
            let over = waiter.until.is_some_and(|until| until < at + ATTEMPT);
            (waiter.is_ended_by(failure) || over) && touches(&waiter.missing)
        });
        let failed = failed.map(|waiter| waiter.name).collect();
        for unit in fetch.units.numbers() {
            if units
                .waiters
                .iter()
                .any(|waiter| waiter.missing.contains(&unit))
            {
                units.status.insert(unit, Status::Delayed(fetch.cause));
            } else {
                units.status.remove(&unit);
            }
        }
        // A pause that the server asks for is kept in any case.
        let is_hurried = !failure.definite && (failure.resting || failure.retry_after.is_none());
        self.delay(fetch.clone(), at, is_hurried);
        failed
    }

    /// Puts a fetch back for later, as another process fetches some of its units.
    pub(super) fn postpone(&mut self, fetch: &RangeFetch, at: Instant) {
        if let Some(units) = self.blobs.get_mut(&fetch.blob) {
            for unit in fetch.units.numbers() {
                if let Some(status) = units.status.get_mut(&unit) {
                    *status = Status::Delayed(fetch.cause);
                }
            }
        }
        self.delay(fetch.clone(), at, false);
    }

    fn delay(&mut self, fetch: RangeFetch, at: Instant, is_hurried: bool) {
        self.number += 1;
        let delayed = Delayed { fetch, is_hurried };
        self.delayed.insert((at, self.number), delayed);
    }

    /// Ends the pauses of a blob's failed fetches.
    pub(super) fn hurry(&mut self, blob: BlobId, now: Instant) {
        let is_hurried = |delayed: &Delayed| delayed.is_hurried && delayed.fetch.blob == blob;
        let later = self.delayed.range((now, u64::MAX)..);
        let later = later.filter(|(_, delayed)| is_hurried(delayed));
        let keys: Vec<_> = later.map(|(key, _)| *key).collect();
        for key in keys {
            if let Some(delayed) = self.delayed.remove(&key) {
                self.delayed.insert((now, key.1), delayed);
            }
        }
    }

    /// Queues the fetches whose pause is over, and returns when the next one's will be.
    pub(super) fn wake(&mut self, now: Instant) -> Option<Instant> {
        while let Some(entry) = self.delayed.first_entry() {
            let at = entry.key().0;
            if at > now {
                return Some(at);
            }
            let fetch = entry.remove().fetch;
            let units = self.blobs.get_mut(&fetch.blob);
            let inside = units.map(|units| units.status.range_mut(fetch.units.numbers()));
            for (_, status) in inside.into_iter().flatten() {
                if let Status::Delayed(cause) = *status {
                    *status = Status::Wanted(cause);
                }
            }
            // Before what came meanwhile: it has waited longest.
            self.queues[Urgency::of(fetch.cause) as usize].push_front(fetch.client, fetch);
        }
        None
    }

    /// Drops the waiters of which `is_gone` holds, and what their `client` wants and no other waits for.
    pub(super) fn forget(&mut self, client: ClientId, is_gone: impl Fn(&W) -> bool) {
        for units in self.blobs.values_mut() {
            units.waiters.retain(|waiter| !is_gone(&waiter.name));
        }
        let fetches = self
            .queues
            .iter_mut()
            .flat_map(|queue| queue.remove(client));
        let mut dropped: HashMap<BlobId, Vec<UnitRange>> = HashMap::new();
        for fetch in fetches {
            dropped.entry(fetch.blob).or_default().push(fetch.units);
        }
        for (blob, runs) in dropped {
            let Some(units) = self.blobs.get_mut(&blob) else {
                continue;
            };
            let missing = units.waiters.iter().flat_map(|waiter| &waiter.missing);
            let missing: HashSet<u64> = missing.copied().collect();
            for unit in runs.iter().flat_map(|run| run.numbers()) {
                let is_wanted = matches!(units.status.get(&unit), Some(Status::Wanted(_)));
                if is_wanted && !missing.contains(&unit) {
                    units.status.remove(&unit);
                }
            }
            if units.status.is_empty() && units.waiters.is_empty() {
                self.blobs.remove(&blob);
            }
        }
    }

    /// Takes all waiters of a blob, and forgets what is wanted of it.
    pub(super) fn abandon(&mut self, blob: BlobId) -> Vec<W> {
        let units = self.blobs.remove(&blob);
        let waiters = units.into_iter().flat_map(|units| units.waiters);
        waiters.map(|waiter| waiter.name).collect()
    }

    /// Whether something waits for units of the blob that no refusal ends.
    pub(super) fn is_waited_for_long(&self, blob: BlobId) -> bool {
        let units = self.blobs.get(&blob);
        let is_of_guest = |waiter: &Waiting<W>| waiter.cause.is_of_guest();
        units.is_some_and(|units| units.waiters.iter().any(is_of_guest))
    }

    /// Number of waiters.
    pub(super) fn waiting(&self) -> usize {
        self.blobs.values().map(|units| units.waiters.len()).sum()
    }

    /// Whether a fetch that something waits for is queued.
    pub(super) fn has_demand(&self) -> bool {
        !self.queues[Urgency::Demand as usize].is_empty()
    }
}

impl<W> Waiting<W> {
    fn is_ended_by(&self, failure: &Failure) -> bool {
        match self.cause {
            Cause::Start | Cause::RepairRead => failure.ends_start,
            cause => failure.definite && !cause.is_of_guest(),
        }
    }
}

impl<W> Units<W> {
    /// First unit of a queued fetch that is still wanted, as urgently.
    fn first_wanted(&self, fetch: &RangeFetch) -> Option<u64> {
        let mut inside = self.status.range(fetch.units.numbers());
        inside
            .find(|(_, status)| match status {
                Status::Wanted(cause) => fetch.serves(*cause),
                Status::InFlight | Status::Delayed(_) => false,
            })
            .map(|(unit, _)| *unit)
    }

    /// Units from `start` on for one request.
    fn grow(&self, start: u64, most: u64, cause: Cause, absent: impl Fn(u64) -> bool) -> UnitRange {
        // A unit to be repaired is present; it must not come with a request that skips those.
        let joins = |unit| match self.status.get(&unit) {
            Some(Status::Wanted(other)) => other.repairs() == cause.repairs(),
            Some(Status::InFlight | Status::Delayed(_)) | None => false,
        };
        let is_gap = |unit| !self.status.contains_key(&unit) && !absent(unit);
        let gap = Urgency::of(cause).max_gap();
        let mut end = start + 1;
        while end - start < most {
            if joins(end) {
                end += 1;
            } else if gap > 0 && is_gap(end) && end + gap - start < most && joins(end + gap) {
                end += gap + 1;
            } else {
                break;
            }
        }
        UnitRange::new(start, end)
    }
}
