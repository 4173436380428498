//! The state that the fetcher's threads share: what is wanted, what workers fetch next, and which waiters
//! are answered.

use std::ops::Range;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Condvar, MutexGuard};
use std::time::{Duration, Instant};

use super::blob::{Blob, BlobId, Offer};
use super::counters::{Counters, CountersSnapshot};
use super::fair_queue::ClientId;
use super::locks::{Rank, RankedMutex};
use super::open_blobs::OpenBlobs;
use super::origin::{Failure, Origin};
use super::pace::Pace;
use super::schedule::{RangeFetch, Schedule, Urgency};
use super::space::Space;
use super::waiter::Waiter;
use crate::cache;
use crate::format::presence::{Identity, UNIT, UnitRange};
use crate::io::ranked_lock::Guard;
use crate::ratelimited_log;
use crate::reason::reason;
use crate::registry::statuses::Statuses;
use crate::source::FetchErrorKind;
use crate::source::counts::Counts;
use crate::source::link::Link;
use crate::source::presence::Bitmap;
use crate::source::protocol::Cause;

/// Most units of one request: the last waiter must not wait for long.
const MAX_REQUEST: u64 = (4 << 20) / UNIT;

/// Longest pause after a failure while a start or a command waits: it gives up after a while, and should
/// not be late for a server that is back.
const PAUSE_OF_START: Duration = Duration::from_secs(2);

/// How long a thread sleeps when nothing is due.
const IDLE: Duration = Duration::from_secs(60);

#[derive(Debug, Default)]
struct State {
    schedule: Schedule<Waiter>,
    blobs: OpenBlobs,
}

/// Damage of a complete blob, to be looked at.
#[derive(Debug)]
pub(super) struct Suspect {
    pub(super) client: ClientId,
    pub(super) blob: Arc<Blob>,
    pub(super) units: UnitRange,
    pub(super) cause: Cause,
    pub(super) waiter: Option<Waiter>,
}

/// Takes what is wanted, and hands it to workers by urgency.
#[derive(Debug)]
pub(super) struct Dispatcher {
    space: Space,
    /// Bytes that a reader's first request asks for; `None`: the default.
    first_request: Option<u64>,
    state: RankedMutex<State>,
    /// Signalled when something is wanted that a thread of either kind may take.
    demand: Condvar,
    others: Condvar,
    /// Held while a blob is opened, so that it is opened once.
    opening: RankedMutex<()>,
    suspects: RankedMutex<Vec<Suspect>>,
    counters: Counters,
    /// Answers that origins got.
    statuses: Arc<Statuses>,
    is_stopping: AtomicBool,
    next_client: AtomicU64,
}

impl Dispatcher {
    pub(super) fn new(space: Space, first_request: Option<u64>, statuses: Arc<Statuses>) -> Self {
        Self {
            space,
            first_request,
            state: RankedMutex::new(Rank::State, State::default()),
            demand: Condvar::new(),
            others: Condvar::new(),
            opening: RankedMutex::new(Rank::Opening, ()),
            suspects: RankedMutex::new(Rank::Suspects, Vec::new()),
            counters: Counters::default(),
            statuses,
            is_stopping: AtomicBool::new(false),
            next_client: AtomicU64::new(0),
        }
    }

    /// The storage of the cache.
    pub(super) fn space(&self) -> &Space {
        &self.space
    }

    /// What threads count.
    pub(super) fn counters(&self) -> &Counters {
        &self.counters
    }

    /// The counts at this moment.
    pub(super) fn snapshot(&self) -> CountersSnapshot {
        let waiting = self.state().schedule.waiting() as u64;
        self.counters.snapshot(waiting)
    }

    /// As [`Dispatcher::snapshot`], with the answers of servers.
    pub(super) fn counts(&self) -> Counts {
        self.snapshot().with_answers(self.statuses.snapshot())
    }

    /// Makes all threads end.
    pub(super) fn stop(&self) {
        self.is_stopping.store(true, Ordering::Release);
        // A thread that read the flag before it was set waits by now.
        let _state = self.state();
        self.demand.notify_all();
        self.others.notify_all();
    }

    pub(super) fn is_stopping(&self) -> bool {
        self.is_stopping.load(Ordering::Acquire)
    }

    /// Opens a blob that is offered, or finds it open.
    pub(super) fn open(&self, offer: &Offer) -> Result<Arc<Blob>, Failure> {
        let system = |error: &dyn std::error::Error| {
            Failure::definite(FetchErrorKind::System, reason(error))
        };
        let known = offer
            .len
            .or_else(|| self.space.cache().complete_len(&offer.digest));
        let len = known.map_or_else(|| offer.origin.blob_len(), Ok)?;
        let identity = Identity::new(offer.digest, len).map_err(|error| system(&error))?;
        let _opening = self.opening.lock();
        let found = self.state().blobs.find(&identity);
        if let Some(blob) = found {
            blob.sources().add(&offer.origin);
            return Ok(blob);
        }
        let entry = self.space.with_room(|cache| cache.entry(identity));
        let entry = entry.map_err(|error| match error {
            cache::Error::Length { .. } => {
                Failure::definite(FetchErrorKind::Damaged, error.to_string())
            }
            error => system(&error),
        })?;
        let pace = self
            .first_request
            .map_or_else(Pace::default, Pace::starting_with);
        Ok(self.state().blobs.add(identity, entry, offer, pace))
    }

    /// A name for another client.
    pub(super) fn new_client(&self) -> ClientId {
        ClientId(self.next_client.fetch_add(1, Ordering::Relaxed))
    }

    /// All open blobs.
    pub(super) fn blobs(&self) -> Vec<Arc<Blob>> {
        self.state().blobs.all()
    }

    /// Wants bytes of a blob. The waiter, if any, is answered once they are present.
    pub(super) fn want(
        &self,
        client: ClientId,
        blob: &Arc<Blob>,
        bytes: Range<u64>,
        cause: Cause,
        waiter: Option<Waiter>,
    ) {
        let len = bytes.end.saturating_sub(bytes.start);
        let Some(units) = blob.identity().units_of(bytes.start, len) else {
            let reason = format!(
                "range {}-{} is past the end of the blob ({} bytes)",
                bytes.start,
                bytes.end,
                blob.identity().len()
            );
            let failure = Failure::definite(FetchErrorKind::System, reason);
            return answer(waiter, Err(&failure));
        };
        if cause.repairs() && blob.is_final() {
            // The upkeep thread looks: that takes a while, and others must not wait for it.
            let blob = Arc::clone(blob);
            return self.suspects.lock().push(Suspect {
                client,
                blob,
                units,
                cause,
                waiter,
            });
        }
        let waiter = self.schedule(client, blob, units, cause, waiter);
        answer(waiter, Ok(()));
        match Urgency::of(cause) {
            Urgency::Demand => self.demand.notify_one(),
            _ => self.others.notify_one(),
        }
    }

    /// Schedules the absent ones of `units`. Gives the waiter back if none is.
    fn schedule(
        &self,
        client: ClientId,
        blob: &Blob,
        units: UnitRange,
        cause: Cause,
        waiter: Option<Waiter>,
    ) -> Option<Waiter> {
        let Some(partial) = blob.partial() else {
            return waiter;
        };
        // Under the lock: what arrives from now on is reported after this waiter is known.
        let mut state = self.state();
        let runs = match cause {
            cause if cause.repairs() => vec![units],
            _ => partial.map().absent(units),
        };
        if runs.is_empty() {
            return waiter;
        }
        let schedule = &mut state.schedule;
        let is_noted = schedule.want(client, blob.id(), &runs, cause, waiter);
        if matches!(cause, Cause::Demand | Cause::Read) {
            let hints = blob.note_read(units);
            for (units, cause) in [(hints.near, cause), (hints.ahead, Cause::ReadAhead)] {
                schedule.want(client, blob.id(), &partial.map().absent(units), cause, None);
            }
            self.others.notify_one();
        }
        drop(state);
        if !is_noted {
            ratelimited_log::info(format_args!(
                "more parts of blob {} are to be prefetched than can wait; they are fetched when they are read",
                blob.digest()
            ));
        }
        None
    }

    /// Damage that readers reported since the last call.
    pub(super) fn take_suspects(&self) -> Vec<Suspect> {
        std::mem::take(&mut *self.suspects.lock())
    }

    /// Waits for something to fetch; `None` when the fetcher stops.
    pub(super) fn next(&self, urgencies: &[Urgency]) -> Option<(RangeFetch, Arc<Blob>)> {
        let mut state = self.state();
        loop {
            if self.is_stopping() {
                return None;
            }
            let due = state.schedule.wake(Instant::now());
            let State { schedule, blobs } = &mut *state;
            let absent = |blob: BlobId, unit| is_absent(blobs, blob, unit);
            let most = |blob, cause| most_units(blobs, blob, cause);
            if let Some(fetch) = schedule.next(urgencies, most, absent) {
                match blobs.get(fetch.blob) {
                    Some(blob) => return Some((fetch, blob)),
                    // No connection has it open any more: nothing waits.
                    None => {
                        schedule.ended(fetch.client, fetch.cause);
                        drop(schedule.abandon(fetch.blob));
                    }
                }
                continue;
            }
            let pause = due.map_or(IDLE, |due| due.saturating_duration_since(Instant::now()));
            let condition = match urgencies.contains(&Urgency::Demand) {
                true => &self.demand,
                false => &self.others,
            };
            state = state.wait_timeout(condition, pause);
        }
    }

    /// Notes that a worker is done with a fetch.
    pub(super) fn ended(&self, client: ClientId, cause: Cause) {
        self.state().schedule.ended(client, cause);
    }

    /// Tells the waiters of units that they are present.
    pub(super) fn arrived(&self, blob: &Blob, units: UnitRange) {
        let done = self.state().schedule.arrived(blob.id(), units);
        done.into_iter().for_each(|waiter| waiter.answer(Ok(())));
    }

    /// Puts a fetch back until `at`, as another process or thread fetches some of its units.
    pub(super) fn postpone(&self, fetch: &RangeFetch, at: Instant) {
        self.state().schedule.postpone(fetch, at);
    }

    /// Repeats the failed fetches of a blob now: its server answers again.
    pub(super) fn hurry(&self, blob: &Blob) {
        self.state().schedule.hurry(blob.id(), Instant::now());
        self.demand.notify_all();
        self.others.notify_all();
    }

    /// Counts a failure, tells those that do not wait any longer, and repeats the fetch later.
    pub(super) fn failed(
        &self,
        fetch: &RangeFetch,
        blob: &Blob,
        origin: Option<&Arc<dyn Origin>>,
        failure: &Failure,
    ) {
        let (mut at, failure) = {
            let mut sources = blob.sources();
            (sources.failed(origin, failure), &sources.judge(failure))
        };
        if fetch.cause.has_deadline() {
            let asked = failure.retry_after.unwrap_or_default();
            at = at.min(Instant::now() + asked.max(PAUSE_OF_START));
        }
        if !failure.resting {
            self.counters.add_failure(failure.definite);
        }
        let digest = blob.digest();
        log::debug!(
            "blob {digest}, units {:?}: {failure}",
            fetch.units.numbers()
        );
        let mut state = self.state();
        let failed = state.schedule.failed(fetch, failure, at);
        let guest_waits = state.schedule.is_waited_for_long(fetch.blob);
        drop(state);
        // The others report the refusal themselves.
        if failure.definite && guest_waits && blob.sources().is_first_refusal() {
            ratelimited_log::warn(format_args!(
                "cannot fetch blob {digest}: {failure}; uncached reads wait"
            ));
        }
        for waiter in failed {
            waiter.answer(Err(failure));
        }
    }

    /// Forgets what a disk process that is gone wants.
    pub(super) fn forget(&self, client: ClientId, link: &Arc<Link>) {
        let mut state = self.state();
        state.schedule.forget(client, |waiter| waiter.is_at(link));
    }

    /// Whether something that is waited for is to be fetched.
    pub(super) fn has_demand(&self) -> bool {
        self.state().schedule.has_demand()
    }

    fn state(&self) -> Guard<MutexGuard<'_, State>> {
        self.state.lock()
    }
}

fn answer(waiter: Option<Waiter>, result: Result<(), &Failure>) {
    if let Some(waiter) = waiter {
        waiter.answer(result);
    }
}

fn is_absent(blobs: &OpenBlobs, blob: BlobId, unit: u64) -> bool {
    let blob = blobs.get(blob);
    let partial = blob.and_then(|blob| blob.partial());
    partial.is_some_and(|partial| {
        let inside = unit < partial.identity().units();
        inside && !partial.map().holds(Bitmap::Live, UnitRange::one(unit))
    })
}

/// Units that one request of this cause may have.
fn most_units(blobs: &OpenBlobs, blob: BlobId, cause: Cause) -> u64 {
    match Urgency::of(cause) {
        Urgency::Demand if cause != Cause::Start => {
            let pace = blobs.get(blob).map(|blob| blob.demand_units());
            pace.unwrap_or(1).min(MAX_REQUEST)
        }
        // Never more than is wanted: all that loading a layer needs is one request.
        _ => MAX_REQUEST,
    }
}
