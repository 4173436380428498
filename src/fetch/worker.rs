//! One request after the other: claim units, ask the origin, store what streams in.

use std::io::Read;
use std::ops::Range;
use std::sync::Arc;
use std::time::{Duration, Instant};

use super::blob::Blob;
use super::dispatcher::Dispatcher;
use super::origin::{Body, Failure, From, Origin};
use super::schedule::{Elsewhere, RangeFetch, Urgency};
use crate::cache::{Claim, Error, Partial};
use crate::format::presence::{UNIT, UnitRange};
use crate::ratelimited_log;
use crate::reason::reason;
use crate::source::FetchErrorKind;
use crate::source::presence::Bitmap;

/// Pause before units that another process fetches are looked at again: a range, and a whole blob.
const ELSEWHERE: Duration = Duration::from_millis(20);
const STREAMED_ELSEWHERE: Duration = Duration::from_millis(200);

/// How long another process may store none of the units that it fetches, before they are fetched by this one as
/// well: it may be stopped, or wait for a server of its own.
const STUCK: Duration = Duration::from_secs(5);

/// Why a fetch did not end.
enum Interrupted {
    /// Another thread streams the whole blob.
    Streamed,
    /// Another process fetches these units.
    Elsewhere(Elsewhere),
    /// The units from here on did not come from this origin; without one, the system failed.
    Failed(u64, Failure, Option<Arc<dyn Origin>>),
}

/// One fetch under way.
struct Attempt<'a> {
    dispatcher: &'a Dispatcher,
    fetch: &'a RangeFetch,
    blob: &'a Arc<Blob>,
}

/// Fetches what is of these urgencies until the fetcher stops.
pub(super) fn run(dispatcher: &Dispatcher, urgencies: &[Urgency]) {
    let mut buffer = vec![0; UNIT as usize];
    while let Some((fetch, blob)) = dispatcher.next(urgencies) {
        let (client, cause) = (fetch.client, fetch.cause);
        let attempt = Attempt {
            dispatcher,
            fetch: &fetch,
            blob: &blob,
        };
        match attempt.run(&mut buffer) {
            Ok(()) => {}
            Err(Interrupted::Streamed) => {
                dispatcher.postpone(&fetch, Instant::now() + ELSEWHERE);
            }
            Err(Interrupted::Elsewhere(found)) => {
                let pause = match blob.sources().needs_whole() {
                    true => STREAMED_ELSEWHERE,
                    false => ELSEWHERE,
                };
                let elsewhere = Some(found);
                dispatcher.postpone(&RangeFetch { elsewhere, ..fetch }, Instant::now() + pause);
            }
            Err(Interrupted::Failed(from, failure, origin)) => {
                let units = UnitRange::new(from, fetch.units.end());
                dispatcher.failed(
                    &RangeFetch { units, ..fetch },
                    &blob,
                    origin.as_ref(),
                    &failure,
                );
            }
        }
        dispatcher.ended(client, cause);
    }
}

impl Attempt<'_> {
    fn run(&self, buffer: &mut [u8]) -> Result<(), Interrupted> {
        let (blob, units) = (self.blob, self.fetch.units);
        let Some(partial) = blob.partial() else {
            self.dispatcher.arrived(blob, units);
            return Ok(());
        };
        self.report_present(&partial);
        let whole = blob.sources().needs_whole();
        let streaming = whole.then(|| blob.try_streaming().ok_or(Interrupted::Streamed));
        let _streaming = streaming.transpose()?;
        let claimed = match whole {
            true => blob.identity().all_units(),
            false => units,
        };
        let claim = self.claim(&partial, claimed)?;
        // Only now: this or another process may have verified it meanwhile.
        if blob.is_final() {
            self.dispatcher.arrived(blob, units);
            return Ok(());
        }
        if whole || self.fetch.overwrites() {
            return self.request(&claim, claimed, whole, buffer);
        }
        // Only now: another process may have stored some meanwhile.
        self.report_present(&partial);
        let gap = Urgency::of(self.fetch.cause).max_gap();
        for run in merged(partial.map().absent(units), gap) {
            self.request(&claim, run, false, buffer)?;
        }
        Ok(())
    }

    fn claim(&self, partial: &Arc<Partial>, units: UnitRange) -> Result<Claim, Interrupted> {
        let failed = |error: Error| {
            let failure = Failure::passing(FetchErrorKind::System, reason(&error));
            Interrupted::Failed(self.fetch.units.start(), failure, None)
        };
        if let Some(claim) = partial.claim(units).map_err(failed)? {
            return Ok(claim);
        }
        if self.blob.is_stuck_elsewhere() {
            return Ok(partial.claim_anyway(units));
        }
        let present = partial.map().count_in(Bitmap::Live, units);
        let before = self
            .fetch
            .elsewhere
            .filter(|before| before.present == present);
        let since = before.map_or_else(Instant::now, |before| before.since);
        if since.elapsed() < STUCK {
            return Err(Interrupted::Elsewhere(Elsewhere { since, present }));
        }
        self.blob.note_stuck();
        ratelimited_log::warn(format_args!(
            "another process has fetched a part of blob {} for {} s and stored nothing; fetching it here \
             as well",
            self.blob.digest(),
            STUCK.as_secs()
        ));
        Ok(partial.claim_anyway(units))
    }

    /// Makes one request, for `units` or without a range for the whole blob, and stores what comes.
    fn request(
        &self,
        claim: &Claim,
        units: UnitRange,
        whole: bool,
        buffer: &mut [u8],
    ) -> Result<(), Interrupted> {
        let identity = self.blob.identity();
        let first = self.fetch.units.start();
        let bytes = identity.bytes_of(units);
        let asked = Instant::now();
        let from = match self.fetch.overwrites() || claim.partial().is_restarted() {
            true => From::Registry,
            false => From::Nearest,
        };
        let origin = self.blob.sources().current();
        let failed =
            |unit: u64, failure| Interrupted::Failed(unit.max(first), failure, origin.clone());
        let none = || {
            Failure::definite(
                FetchErrorKind::NotFound,
                "no repository is known for the blob",
            )
        };
        let asked_of = origin
            .as_ref()
            .ok_or_else(|| failed(units.start(), none()))?;
        let body = self.ask(asked_of, &bytes, (!whole).then_some(from));
        let body = body.map_err(|failure| failed(units.start(), failure))?;
        let first_byte = asked.elapsed();
        let mut stream = Stream {
            attempt: self,
            claim,
            origin: asked_of,
            units,
        };
        let result = stream.store(body, buffer);
        let next = stream.units.start();
        let stored = identity.bytes_of(UnitRange::new(units.start(), next));
        let stored = stored.end.saturating_sub(bytes.start);
        if stored > 0 && !whole {
            let transfer = asked.elapsed().saturating_sub(first_byte);
            self.blob.observe(first_byte, stored, transfer);
        }
        result.map_err(|failure| failed(next, failure))
    }

    /// Asks for a range, or without a place for the whole blob.
    fn ask(
        &self,
        origin: &Arc<dyn Origin>,
        bytes: &Range<u64>,
        from: Option<From>,
    ) -> Result<Body, Failure> {
        let len = bytes.end - bytes.start;
        let answer = match from {
            Some(from) => origin.read(bytes.start, len, from),
            None => origin.read_whole(),
        };
        if !matches!(&answer, Err(failure) if failure.resting) {
            self.dispatcher.counters().add_request();
        }
        let body = answer?;
        if from.is_none() {
            if body.len == len {
                return Ok(body);
            }
            let reason = format!("the server's blob has {} bytes, expected {len}", body.len);
            return Err(Failure::definite(FetchErrorKind::Damaged, reason));
        }
        // From its start on, the whole blob serves as well.
        if bytes.start > 0 {
            self.blob.sources().serves_ranges();
        }
        Ok(body)
    }

    /// Tells the waiters of the fetch's units about those that are present.
    fn report_present(&self, partial: &Partial) {
        if self.fetch.overwrites() {
            return;
        }
        let arrived = |start, end| {
            if start < end {
                self.dispatcher
                    .arrived(self.blob, UnitRange::new(start, end));
            }
        };
        let units = self.fetch.units;
        let mut next = units.start();
        for run in partial.map().absent(units) {
            arrived(next, run.start());
            next = run.end();
        }
        arrived(next, units.end());
    }
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

/// A body on its way into the cache.
struct Stream<'a> {
    attempt: &'a Attempt<'a>,
    claim: &'a Claim,
    origin: &'a Arc<dyn Origin>,
    /// Units that are still to come.
    units: UnitRange,
}

impl Stream<'_> {
    /// Stores unit after unit, and wakes their waiters at once.
    fn store(&mut self, mut body: Body, buffer: &mut [u8]) -> Result<(), Failure> {
        let Attempt {
            dispatcher,
            fetch,
            blob,
        } = *self.attempt;
        let mut left = body.len;
        while !self.units.is_empty() {
            let unit = self.units.start();
            let bytes = blob.identity().bytes_of(UnitRange::one(unit));
            let len = bytes.end - bytes.start;
            if left < len {
                let sent = body.len;
                let reason = format!(
                    "the server sent only {sent} bytes; unit {unit} has {len} and is incomplete"
                );
                return Err(Failure {
                    malformed: true,
                    ..Failure::passing(FetchErrorKind::Unexpected, reason)
                });
            }
            let buffer = &mut buffer[..len as usize];
            body.reader.read_exact(buffer).map_err(body_failure)?;
            left -= len;
            dispatcher.counters().add_bytes(fetch.cause, len);
            if fetch.overwrites() {
                let replace = || self.claim.replace(unit, buffer);
                dispatcher.space().store(replace)?;
            } else if !self.is_present(unit) {
                dispatcher
                    .space()
                    .store(|| self.claim.store(unit, buffer))?;
            }
            self.units = UnitRange::new(unit + 1, self.units.end());
            let recovery = blob.sources().succeeded(self.origin);
            if recovery.was_refused {
                ratelimited_log::info(format_args!(
                    "fetching blob {} succeeds again",
                    blob.digest()
                ));
            }
            if recovery.was_away {
                dispatcher.hurry(blob);
            }
            dispatcher.arrived(blob, UnitRange::one(unit));
            if dispatcher.is_stopping() {
                return Err(Failure::passing(
                    FetchErrorKind::System,
                    "the fetcher is stopping",
                ));
            }
        }
        Ok(())
    }

    fn is_present(&self, unit: u64) -> bool {
        let map = self.claim.partial().map();
        map.holds(Bitmap::Live, UnitRange::one(unit))
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
