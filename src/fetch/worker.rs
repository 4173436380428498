//! One request after the other: claim units, ask the origin, store what streams in.

use std::io::Read;
use std::ops::Range;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

use super::blob::{Blob, BlobId, lock};
use super::fetcher::{Shared, State};
use super::origin::{Body, Failure, From};
use super::schedule::{Job, Urgency};
use crate::cache::{Claim, Error, Partial};
use crate::format::presence::{UNIT, UnitRange};
use crate::reason::reason;
use crate::source::FetchErrorKind;
use crate::source::presence::Bitmap;

/// How long a thread sleeps when nothing is due.
const IDLE: Duration = Duration::from_secs(60);

/// Pause before units that another process fetches are looked at again.
const ELSEWHERE: Duration = Duration::from_millis(20);

/// Bytes of storage that are freed when a store finds no space.
pub(super) const MAKE_ROOM: u64 = 64 << 20;

/// Why a job did not end.
enum Interrupted {
    /// Another process, or another thread that streams the whole blob, fetches these units.
    Elsewhere,
    /// The units from here on did not come.
    Failed(u64, Failure),
}

/// Takes jobs of these urgencies until the fetcher stops.
pub(super) fn run(shared: &Shared, urgencies: &[Urgency]) {
    let mut buffer = vec![0; UNIT as usize];
    while let Some((job, blob)) = next(shared, urgencies) {
        match attempt(shared, &job, &blob, &mut buffer) {
            Ok(()) => {}
            Err(Interrupted::Elsewhere) => {
                let at = Instant::now() + ELSEWHERE;
                shared.state().schedule.postpone(&job, at);
            }
            Err(Interrupted::Failed(from, failure)) => {
                let units = UnitRange::new(from, job.units.end());
                fail(shared, &Job { units, ..job }, &blob, &failure);
            }
        }
    }
}

/// Waits for a job; `None` when the fetcher stops.
fn next(shared: &Shared, urgencies: &[Urgency]) -> Option<(Job, Arc<Blob>)> {
    let mut guard = shared.state();
    loop {
        if shared.is_stopping() {
            return None;
        }
        let due = guard.schedule.wake(Instant::now());
        let State { schedule, blobs } = &mut *guard;
        let absent = |blob: BlobId, unit| {
            let blob = blobs.get(blob);
            let partial = blob.as_ref().and_then(|blob| blob.partial());
            partial.is_some_and(|partial| {
                let inside = unit < partial.identity().units();
                inside && !partial.map().holds(Bitmap::Live, UnitRange::one(unit))
            })
        };
        let size = |blob, cause| shared.size(blobs, blob, cause);
        if let Some(job) = schedule.next(urgencies, size, absent) {
            match blobs.get(job.blob) {
                Some(blob) => return Some((job, blob)),
                // No connection has it open any more: nothing waits.
                None => drop(schedule.abandon(job.blob)),
            }
            continue;
        }
        let pause = due.map_or(IDLE, |due| due.saturating_duration_since(Instant::now()));
        let waited = shared.condvar(urgencies).wait_timeout(guard, pause);
        guard = waited.unwrap_or_else(std::sync::PoisonError::into_inner).0;
    }
}

fn attempt(shared: &Shared, job: &Job, blob: &Blob, buffer: &mut [u8]) -> Result<(), Interrupted> {
    let Some(partial) = blob.partial() else {
        shared.arrived(blob, job.units);
        return Ok(());
    };
    let failed = |error: &Error| Interrupted::Failed(job.units.start(), store_failure(error));
    report_present(shared, job, blob, &partial);
    // What is verified must not change.
    let _quiet = job.overwrites().then(|| lock(&blob.publishing));
    let whole = blob.needs_whole();
    let streaming = whole.then(|| blob.whole.try_lock());
    if let Some(Err(_)) = streaming {
        return Err(Interrupted::Elsewhere);
    }
    let units = match whole {
        true => blob.identity.all_units(),
        false => job.units,
    };
    let claim = partial.claim(units).map_err(|error| failed(&error))?;
    let claim = claim.ok_or(Interrupted::Elsewhere)?;
    if whole || job.overwrites() {
        return fetch(shared, job, blob, &claim, units, whole, buffer);
    }
    // Only now: another process may have stored some meanwhile.
    report_present(shared, job, blob, &partial);
    let gap = Urgency::of(job.cause).max_gap();
    for run in merged(partial.map().absent(units), gap) {
        fetch(shared, job, blob, &claim, run, false, buffer)?;
    }
    Ok(())
}

/// Makes one request, for `units` or without a range for the whole blob, and stores what comes.
fn fetch(
    shared: &Shared,
    job: &Job,
    blob: &Blob,
    claim: &Claim,
    units: UnitRange,
    whole: bool,
    buffer: &mut [u8],
) -> Result<(), Interrupted> {
    let start = units.start().max(job.units.start());
    let bytes = blob.identity.bytes_of(units);
    let asked = Instant::now();
    let from = match job.overwrites() {
        true => From::Registry,
        false => From::Nearest,
    };
    let body = ask(shared, blob, &bytes, (!whole).then_some(from));
    let body = body.map_err(|failure| Interrupted::Failed(start, failure))?;
    let first_byte = asked.elapsed();
    let first = units.start();
    let mut stream = Stream {
        shared,
        job,
        blob,
        claim,
        units,
    };
    let result = stream.store(body, buffer);
    let stored = UnitRange::new(first, stream.units.start());
    let stored = blob.identity.bytes_of(stored);
    let stored = stored.end.saturating_sub(bytes.start);
    if stored > 0 && !whole {
        let transfer = asked.elapsed().saturating_sub(first_byte);
        lock(&blob.pace).observe(first_byte, stored, transfer);
    }
    let next = stream.units.start().max(job.units.start());
    result.map_err(|failure| Interrupted::Failed(next, failure))
}

/// Tells the waiters of a job's units about those that are present.
fn report_present(shared: &Shared, job: &Job, blob: &Blob, partial: &Partial) {
    if job.overwrites() {
        return;
    }
    let arrived = |start, end| {
        if start < end {
            shared.arrived(blob, UnitRange::new(start, end));
        }
    };
    let mut next = job.units.start();
    for run in partial.map().absent(job.units) {
        arrived(next, run.start());
        next = run.end();
    }
    arrived(next, job.units.end());
}

/// The same runs, with those in one that are at most `gap` units apart.
fn merged(runs: Vec<UnitRange>, gap: u64) -> Vec<UnitRange> {
    let mut merged: Vec<UnitRange> = Vec::new();
    for run in runs {
        match merged.last_mut() {
            Some(last) if run.start() - last.end() <= gap => {
                *last = UnitRange::new(last.start(), run.end());
            }
            _ => merged.push(run),
        }
    }
    merged
}

/// Asks for a range, or without a place for the whole blob.
fn ask(
    shared: &Shared,
    blob: &Blob,
    bytes: &Range<u64>,
    from: Option<From>,
) -> Result<Body, Failure> {
    let origin = blob.origin();
    let origin = origin.ok_or_else(|| {
        Failure::definite(
            FetchErrorKind::NotFound,
            "no repository is known for the blob",
        )
    })?;
    shared.counters.add_request();
    let len = bytes.end - bytes.start;
    let body = match from {
        None => origin.read_whole()?,
        Some(from) => {
            let body = origin.read(bytes.start, len, from)?;
            blob.serves_ranges();
            body
        }
    };
    if from.is_none() && body.len != len {
        let reason = format!("the server's blob has {} bytes, expected {len}", body.len);
        return Err(Failure::definite(FetchErrorKind::Damaged, reason));
    }
    Ok(body)
}

/// A body on its way into the cache.
struct Stream<'a> {
    shared: &'a Shared,
    job: &'a Job,
    blob: &'a Blob,
    claim: &'a Claim,
    /// Units that are still to come.
    units: UnitRange,
}

impl Stream<'_> {
    /// Stores unit after unit, and wakes their waiters at once.
    fn store(&mut self, mut body: Body, buffer: &mut [u8]) -> Result<(), Failure> {
        let mut left = body.len;
        while !self.units.is_empty() {
            let unit = self.units.start();
            let bytes = self.blob.identity.bytes_of(UnitRange::one(unit));
            let len = bytes.end - bytes.start;
            if left < len {
                let reason = "the server sent fewer bytes than requested";
                return Err(Failure::passing(FetchErrorKind::Unreachable, reason));
            }
            let buffer = &mut buffer[..len as usize];
            body.reader.read_exact(buffer).map_err(body_failure)?;
            left -= len;
            self.shared.counters.add_bytes(self.job.cause, len);
            self.keep(unit, buffer)?;
            self.units = UnitRange::new(unit + 1, self.units.end());
            if self.blob.succeeded() {
                log::info!(
                    "fetching blob {} succeeds again",
                    self.blob.identity.digest()
                );
            }
            self.shared.arrived(self.blob, UnitRange::one(unit));
            if self.shared.is_stopping() {
                return Err(Failure::passing(
                    FetchErrorKind::System,
                    "the fetcher is stopping",
                ));
            }
        }
        Ok(())
    }

    fn keep(&self, unit: u64, bytes: &[u8]) -> Result<(), Failure> {
        let present = self.claim.partial().map();
        if !self.job.overwrites() && present.holds(Bitmap::Live, UnitRange::one(unit)) {
            return Ok(());
        }
        match self.claim.store(unit, bytes) {
            Err(error) if error.is_full() => self.make_room_for(unit, bytes),
            Err(error) => Err(store_failure(&error)),
            Ok(()) => {
                if self.shared.is_full.swap(false, Ordering::Relaxed) {
                    log::info!("the cache has space again; waiting reads continue");
                }
                Ok(())
            }
        }
    }

    fn make_room_for(&self, unit: u64, bytes: &[u8]) -> Result<(), Failure> {
        let freed = self.shared.cache.free(MAKE_ROOM);
        if freed.is_ok_and(|freed| freed.bytes > 0) && self.claim.store(unit, bytes).is_ok() {
            return Ok(());
        }
        if !self.shared.is_full.swap(true, Ordering::Relaxed) {
            let root = self.shared.cache.root().display();
            log::error!(
                "no space left for the cache at {root}; reads of bytes that are not cached wait"
            );
        }
        let reason = "no space left in the cache";
        Err(Failure::passing(FetchErrorKind::System, reason))
    }
}

/// The failure inside an error of a body.
fn body_failure(error: std::io::Error) -> Failure {
    let inner = error
        .get_ref()
        .and_then(|inner| inner.downcast_ref::<Failure>());
    inner
        .cloned()
        .unwrap_or_else(|| Failure::passing(FetchErrorKind::Unreachable, reason(&error)))
}

fn store_failure(error: &Error) -> Failure {
    Failure::passing(FetchErrorKind::System, reason(error))
}

/// Counts a failure, tells those that do not wait any longer, and repeats the job later.
fn fail(shared: &Shared, job: &Job, blob: &Blob, failure: &Failure) {
    let at = blob.failed(failure);
    shared.counters.add_failure(failure.definite);
    let digest = blob.identity.digest();
    log::debug!("blob {digest}, units {:?}: {failure}", job.units.numbers());
    let mut state = shared.state();
    let failed = state.schedule.failed(job, failure, at);
    let guest_waits = state.schedule.is_waited_for_long(job.blob);
    drop(state);
    // The others report the refusal themselves.
    if failure.definite && guest_waits && blob.is_first_refusal() {
        log::warn!("cannot fetch blob {digest}: {failure}; uncached reads wait");
    }
    for waiter in failed {
        waiter.answer(Err(failure));
    }
}
