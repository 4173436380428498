//! The fetcher's state, shared by its threads.

use std::collections::HashMap;
use std::io;
use std::ops::Range;
use std::os::fd::OwnedFd;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::mpsc::Sender;
use std::sync::{Arc, Condvar, Mutex, Weak};
use std::thread::{self, JoinHandle};

use super::blob::{Blob, BlobId, Offer, lock};
use super::counters::{Counters, CountersSnapshot};
use super::download::Download;
use super::origin::Failure;
use super::pace::Pace;
use super::schedule::{Schedule, Urgency};
use super::{keeper, session, worker};
use crate::cache::{self, Cache, Entry, Limits};
use crate::format::presence::{Identity, UNIT, UnitRange};
use crate::registry::statuses::Statuses;
use crate::source::FetchErrorKind;
use crate::source::counts::Counts;
use crate::source::link::Link;
use crate::source::protocol::{Cause, Reply, Subject};

/// Units of one request that something waits for, at most: the last waiter must not wait for long.
const MAX_DEMAND: u64 = (4 << 20) / UNIT;

/// Units of one request that nothing waits for.
const MAX_AHEAD: u64 = (4 << 20) / UNIT;

/// Units of one request of a background download.
const MAX_BACKGROUND: u64 = (16 << 20) / UNIT;

/// How the fetcher works.
#[derive(Clone, Copy, Debug)]
pub struct Options {
    /// Threads for what something waits for: that many requests are under way.
    pub demand_threads: usize,
    /// Threads for the rest.
    pub other_threads: usize,
    /// How large the cache may grow.
    pub limits: Limits,
    /// Bytes that a reader's first request asks for, before round trip and rate are known; `None`: the
    /// default.
    pub first_request: Option<u64>,
}

impl Default for Options {
    fn default() -> Self {
        Self {
            demand_threads: 16,
            other_threads: 8,
            limits: Limits::default(),
            first_request: None,
        }
    }
}

/// Receivers of the news that units are present.
#[derive(Debug)]
pub(super) enum Waiter {
    /// A disk process.
    Session {
        link: Arc<Link>,
        ticket: u64,
        /// Answers that it still waits for.
        outstanding: Arc<AtomicUsize>,
    },
    /// A thread of this process.
    Local { sender: Sender<Result<(), Failure>> },
}

impl Waiter {
    pub(super) fn answer(self, result: Result<(), &Failure>) {
        match self {
            Self::Session {
                link,
                ticket,
                outstanding,
            } => {
                outstanding.fetch_sub(1, Ordering::Relaxed);
                let reply = match result {
                    Ok(()) => Reply::Ready { ticket },
                    Err(failure) => Reply::Failed {
                        subject: Subject::Ticket(ticket),
                        kind: failure.kind,
                        reason: failure.reason.clone(),
                    },
                };
                link.send(reply.encode(), Vec::new());
            }
            // A thread that is gone needs no answer.
            Self::Local { sender } => _ = sender.send(result.map_err(Clone::clone)),
        }
    }
}

/// Units of a complete blob that a reader found to be damaged.
#[derive(Debug)]
pub(super) struct Suspect {
    pub(super) blob: Arc<Blob>,
    pub(super) units: UnitRange,
    pub(super) waiter: Option<Waiter>,
}

/// The blobs that a connection has open.
#[derive(Debug, Default)]
pub(super) struct Blobs {
    by_id: HashMap<BlobId, Weak<Blob>>,
    by_identity: HashMap<Identity, BlobId>,
    next_id: u64,
}

impl Blobs {
    pub(super) fn get(&self, id: BlobId) -> Option<Arc<Blob>> {
        self.by_id.get(&id)?.upgrade()
    }

    fn add(&mut self, identity: Identity, entry: Entry, offer: &Offer, pace: Pace) -> Arc<Blob> {
        let id = BlobId(self.next_id);
        self.next_id += 1;
        let origin = Arc::clone(&offer.origin);
        let blob = Arc::new(Blob::new(id, identity, entry, origin, pace));
        self.by_id.retain(|_, blob| blob.strong_count() > 0);
        self.by_id.insert(id, Arc::downgrade(&blob));
        let by_id = &self.by_id;
        self.by_identity.retain(|_, id| by_id.contains_key(id));
        self.by_identity.insert(identity, id);
        blob
    }
}

#[derive(Debug, Default)]
pub(super) struct State {
    pub(super) schedule: Schedule<Waiter>,
    pub(super) blobs: Blobs,
}

#[derive(Debug)]
pub(super) struct Shared {
    pub(super) cache: Cache,
    pub(super) options: Options,
    state: Mutex<State>,
    /// Signalled when something is wanted that a thread of either kind may take.
    demand: Condvar,
    others: Condvar,
    /// Held while a blob is opened, so that it is opened once.
    opening: Mutex<()>,
    pub(super) counters: Counters,
    /// Answers that origins got.
    statuses: Arc<Statuses>,
    pub(super) stopping: AtomicBool,
    /// Complete blobs that a reader found to be damaged.
    pub(super) suspects: Mutex<Vec<Suspect>>,
    /// Whether the last store found no space.
    pub(super) is_full: AtomicBool,
    /// Whether the cache is over a limit, although what is not in use was evicted.
    pub(super) is_over: AtomicBool,
    /// Whether downloads paused for that when one last asked.
    pub(super) was_paused: AtomicBool,
}

/// Fetches blobs into a cache, until dropped.
#[derive(Debug)]
pub struct Fetcher {
    pub(super) shared: Arc<Shared>,
    threads: Vec<JoinHandle<()>>,
    /// Threads of connections to disk processes.
    connections: Mutex<Vec<JoinHandle<()>>>,
}

impl Fetcher {
    /// Starts the threads of a fetcher for `cache`. `statuses` counts the answers that its origins
    /// get.
    ///
    /// # Errors
    /// The process has no thread left.
    pub fn start(cache: Cache, options: Options, statuses: Arc<Statuses>) -> io::Result<Self> {
        // A cache that cannot be measured is no reason not to serve.
        let is_over = cache.is_over(options.limits).is_ok_and(|is_over| is_over);
        let shared = Arc::new(Shared {
            cache,
            options,
            state: Mutex::default(),
            demand: Condvar::new(),
            others: Condvar::new(),
            opening: Mutex::new(()),
            counters: Counters::default(),
            statuses,
            stopping: AtomicBool::new(false),
            suspects: Mutex::default(),
            is_full: AtomicBool::new(false),
            is_over: AtomicBool::new(is_over),
            was_paused: AtomicBool::new(false),
        });
        let mut fetcher = Self {
            shared,
            threads: Vec::new(),
            connections: Mutex::default(),
        };
        for _ in 0..options.demand_threads.max(1) {
            fetcher.spawn("fetch-demand", |shared| {
                worker::run(shared, &Urgency::ALL[..1]);
            })?;
        }
        for _ in 0..options.other_threads.max(1) {
            fetcher.spawn("fetch-ahead", |shared| {
                worker::run(shared, &Urgency::ALL[1..]);
            })?;
        }
        fetcher.spawn("fetch-keeper", keeper::run)?;
        Ok(fetcher)
    }

    fn spawn(&mut self, name: &str, run: impl FnOnce(&Shared) + Send + 'static) -> io::Result<()> {
        let shared = Arc::clone(&self.shared);
        let builder = thread::Builder::new().name(name.to_owned());
        self.threads.push(builder.spawn(move || run(&shared))?);
        Ok(())
    }

    /// Serves a disk process on the other end of `socket`, which may ask for the offered blobs by
    /// their numbers, until it closes its end. Until then, the blobs are downloaded in the
    /// background, if that is asked for. Returns at once.
    ///
    /// # Errors
    /// The process has no descriptor or no thread left.
    pub fn attach(
        &self,
        socket: OwnedFd,
        offers: Vec<Offer>,
        download: Option<Download>,
    ) -> io::Result<()> {
        let link = Arc::new(Link::new(socket)?);
        let mut connections = lock(&self.connections);
        connections.retain(|thread| !thread.is_finished());
        if let Some(download) = download {
            let alive = Arc::downgrade(&link);
            connections.push(download.start(Arc::clone(&self.shared), offers.clone(), alive)?);
        }
        connections.push(session::start(Arc::clone(&self.shared), link, offers)?);
        Ok(())
    }

    /// Whether a disk process is connected, or was a moment ago.
    pub fn has_connections(&self) -> bool {
        lock(&self.connections)
            .iter()
            .any(|thread| !thread.is_finished())
    }

    /// Makes durable what is there and ends at once, as the process does: threads that wait for a
    /// server are left alone.
    pub fn leave(self) {
        self.shared.stopping.store(true, Ordering::Release);
        for blob in self.shared.blobs() {
            keeper::sync(&blob, 1);
        }
        std::mem::forget(self);
    }

    /// The counts at this moment.
    pub fn counters(&self) -> CountersSnapshot {
        self.shared.counters()
    }
}

impl Drop for Fetcher {
    fn drop(&mut self) {
        self.shared.stopping.store(true, Ordering::Release);
        {
            // A thread that read the flag before it was set waits by now.
            let _state = lock(&self.shared.state);
            self.shared.demand.notify_all();
            self.shared.others.notify_all();
        }
        // A session that still ran would read what is meant for the successor on its socket.
        let connections = std::mem::take(&mut *lock(&self.connections));
        for thread in self.threads.drain(..).chain(connections) {
            let _ = thread.join();
        }
    }
}

impl Shared {
    pub(super) fn counters(&self) -> CountersSnapshot {
        let waiting = self.state().schedule.waiting() as u64;
        self.counters.snapshot(waiting)
    }

    /// As [`Shared::counters`], with the answers of servers.
    pub(super) fn counts(&self) -> Counts {
        self.counters().with_answers(self.statuses.snapshot())
    }

    pub(super) fn state(&self) -> std::sync::MutexGuard<'_, State> {
        lock(&self.state)
    }

    pub(super) fn is_stopping(&self) -> bool {
        self.stopping.load(Ordering::Acquire)
    }

    /// What threads of these urgencies wait for.
    pub(super) fn condvar(&self, urgencies: &[Urgency]) -> &Condvar {
        match urgencies.contains(&Urgency::Demand) {
            true => &self.demand,
            false => &self.others,
        }
    }

    /// Opens a blob that is offered, or finds it open.
    pub(super) fn open(&self, offer: &Offer) -> Result<Arc<Blob>, Failure> {
        let system = |error: &dyn std::error::Error| {
            Failure::definite(FetchErrorKind::System, crate::reason::reason(error))
        };
        let len = match offer.len {
            Some(len) => len,
            None => match self.cache.complete_len(&offer.digest) {
                Some(len) => len,
                None => offer.origin.blob_len()?,
            },
        };
        let identity = Identity::new(offer.digest, len).map_err(|error| system(&error))?;
        let _opening = lock(&self.opening);
        if let Some(blob) = self.find(&identity) {
            blob.add_origin(&offer.origin);
            return Ok(blob);
        }
        let entry = match self.cache.entry(identity) {
            Err(error) if error.is_full() => {
                // What another process may free as well is tried once.
                let _ = self.cache.free(worker::MAKE_ROOM);
                self.cache.entry(identity)
            }
            entry => entry,
        };
        let entry = entry.map_err(|error| match error {
            cache::Error::Length { .. } => {
                Failure::definite(FetchErrorKind::Damaged, error.to_string())
            }
            error => system(&error),
        })?;
        let first = self.options.first_request;
        let pace = first.map_or_else(Pace::default, Pace::starting_with);
        let blob = self.state().blobs.add(identity, entry, offer, pace);
        Ok(blob)
    }

    fn find(&self, identity: &Identity) -> Option<Arc<Blob>> {
        let state = self.state();
        state.blobs.get(*state.blobs.by_identity.get(identity)?)
    }

    /// Forgets an open blob whose entry is bad: the next one to open it gets a new entry.
    pub(super) fn retire(&self, blob: &Blob) {
        self.state().blobs.by_identity.remove(&blob.identity);
    }

    /// All open blobs.
    pub(super) fn blobs(&self) -> Vec<Arc<Blob>> {
        let state = self.state();
        state
            .blobs
            .by_id
            .values()
            .filter_map(Weak::upgrade)
            .collect()
    }

    /// Wants bytes of a blob. The waiter, if any, is answered once they are present.
    pub(super) fn want(
        &self,
        blob: &Arc<Blob>,
        bytes: Range<u64>,
        cause: Cause,
        waiter: Option<Waiter>,
    ) {
        let answer = |waiter: Option<Waiter>, result: Result<(), &Failure>| {
            if let Some(waiter) = waiter {
                waiter.answer(result);
            }
        };
        let len = bytes.end.saturating_sub(bytes.start);
        let Some(units) = blob.identity.units_of(bytes.start, len) else {
            let reason = format!(
                "range {}-{} is past the end of the blob ({} bytes)",
                bytes.start,
                bytes.end,
                blob.identity.len()
            );
            let failure = Failure::definite(FetchErrorKind::System, reason);
            return answer(waiter, Err(&failure));
        };
        if cause == Cause::Repair && blob.is_final() {
            // The keeper looks; it takes a while, and others must not wait for it.
            let blob = Arc::clone(blob);
            return lock(&self.suspects).push(Suspect {
                blob,
                units,
                waiter,
            });
        }
        let Some(partial) = blob.partial() else {
            return answer(waiter, Ok(()));
        };
        // Under the lock: what arrives from now on is reported after this waiter is known.
        let mut state = self.state();
        let runs = match cause {
            Cause::Repair => vec![units],
            _ => partial.map().absent(units),
        };
        if runs.is_empty() {
            drop(state);
            return answer(waiter, Ok(()));
        }
        state.schedule.want(blob.id, &runs, cause, waiter);
        if matches!(cause, Cause::Demand | Cause::Read) {
            let all = blob.identity.units();
            let mut readers = lock(&blob.ahead);
            let (near, ahead) = (readers.is_near(units), readers.wanted(units, all));
            drop(readers);
            let end = units.start() + lock(&blob.pace).demand_units();
            if near && end > units.end() {
                let runs = partial
                    .map()
                    .absent(UnitRange::new(units.end(), end.min(all)));
                state.schedule.want(blob.id, &runs, cause, None);
            }
            let runs = partial.map().absent(ahead);
            state.schedule.want(blob.id, &runs, Cause::ReadAhead, None);
            self.others.notify_one();
        }
        drop(state);
        match Urgency::of(cause) {
            Urgency::Demand => self.demand.notify_one(),
            _ => self.others.notify_one(),
        }
    }

    /// Units that one request of this cause may have.
    pub(super) fn size(&self, blobs: &Blobs, blob: BlobId, cause: Cause) -> u64 {
        match Urgency::of(cause) {
            // Never more than is wanted: all that loading a layer needs is one request.
            Urgency::Demand if cause == Cause::Start => MAX_DEMAND,
            Urgency::Demand => {
                let blob = blobs.get(blob);
                let pace = blob.map(|blob| lock(&blob.pace).demand_units());
                pace.unwrap_or(1).min(MAX_DEMAND)
            }
            Urgency::Replay | Urgency::ReadAhead => MAX_AHEAD,
            // As large as they were asked for, unless neighbours are asked for at once.
            Urgency::Background => MAX_BACKGROUND,
        }
    }

    /// Tells the waiters of units that they are present.
    pub(super) fn arrived(&self, blob: &Blob, units: UnitRange) {
        let done = self.state().schedule.arrived(blob.id, units);
        done.into_iter().for_each(|waiter| waiter.answer(Ok(())));
    }
}
