//! The origins of a blob: which one is asked next, when to try again, and whether it serves ranges.

use std::sync::Arc;
use std::time::{Duration, Instant};

use super::jitter::jitter;
use super::malformed::MalformedAnswers;
use super::origin::{Failure, Origin};

/// Most origins that are remembered.
const MAX_ORIGINS: usize = 16;

/// How long a server is taken for one that serves no ranges.
const WITHOUT_RANGES: Duration = Duration::from_secs(600);

/// A server that serves no ranges is asked again after this pause, before it is taken for such a one.
const COLD_PROXY: Duration = Duration::from_millis(1000);

/// Pause after a first failure, and the longest one after many.
const FIRST_PAUSE: Duration = Duration::from_millis(100);
const MAX_PAUSE: Duration = Duration::from_secs(8);

/// Longest pause after a refusal.
const REFUSED_PAUSE: Duration = Duration::from_secs(30);

/// Longest pause when no request was made: looking again costs none.
const RESTING_PAUSE: Duration = Duration::from_secs(1);

/// Longest pause that a server may ask for.
const MAX_RETRY_AFTER: Duration = Duration::from_secs(300);

/// A repository that is said to have the blob.
#[derive(Debug)]
struct Source {
    origin: Arc<dyn Origin>,
    /// Failures since bytes came from it last.
    failures: u32,
    /// When to try again after the last counted failure. Requests that were under way together fail
    /// together, and before this they count as one failure.
    again: Option<Instant>,
}

/// The origins of one blob, and their failures.
#[derive(Debug)]
pub(super) struct Sources {
    /// Never empty.
    sources: Vec<Source>,
    /// Whether the last definite answer was a refusal.
    is_refused: bool,
    ranges: Ranges,
    malformed: MalformedAnswers,
}

/// Whether a blob's server serves ranges.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Ranges {
    Served,
    /// A range was answered with the whole blob, as by a proxy that does not have the blob yet. A range is
    /// requested again at this time.
    Doubted(Instant),
    /// Another one was. Until this time, the blob is streamed.
    Refused(Instant),
}

/// What bytes that come put an end to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Recovery {
    /// The server did not answer for a while: several waves of requests had failed. One range that
    /// always fails among others that come is none: it would be repeated with each of them.
    pub(super) was_away: bool,
    /// The last definite answer was a refusal.
    pub(super) was_refused: bool,
}

impl Source {
    fn new(origin: Arc<dyn Origin>) -> Self {
        Self {
            origin,
            failures: 0,
            again: None,
        }
    }

    /// Notes a failure, and returns when to try again.
    fn failed(&mut self, failure: &Failure, now: Instant) -> Instant {
        let asked = failure.retry_after.unwrap_or_default();
        if failure.resting {
            // Others have failed often enough for the server to be spared.
            self.failures = self.failures.max(2);
            let again = now + asked.min(RESTING_PAUSE);
            self.again = Some(again);
            return again;
        }
        let asked = now + asked.min(MAX_RETRY_AFTER);
        if let Some(again) = self.again.filter(|again| now < *again && !failure.definite) {
            let again = again.max(asked);
            self.again = Some(again);
            return again;
        }
        let failures = self.failures.min(16);
        self.failures = self.failures.saturating_add(1);
        let most = match failure.definite {
            true => REFUSED_PAUSE,
            false => MAX_PAUSE.min(FIRST_PAUSE * (1 << failures)),
        };
        let again = asked.max(now + most.mul_f64(jitter()));
        self.again = Some(again);
        again
    }
}

impl Sources {
    pub(super) fn new(origin: Arc<dyn Origin>) -> Self {
        Self {
            sources: vec![Source::new(origin)],
            is_refused: false,
            ranges: Ranges::Served,
            malformed: MalformedAnswers::default(),
        }
    }

    /// Adds a place that is said to have the blob.
    pub(super) fn add(&mut self, origin: &Arc<dyn Origin>) {
        if self.sources.len() < MAX_ORIGINS && self.source(origin).is_none() {
            self.sources.push(Source::new(Arc::clone(origin)));
        }
    }

    fn source(&mut self, origin: &Arc<dyn Origin>) -> Option<&mut Source> {
        let mut sources = self.sources.iter_mut();
        sources.find(|source| Arc::ptr_eq(&source.origin, origin))
    }

    /// The origin to ask: one that need not be spared now, with the fewest failures. A disk does not wait for
    /// the registry of another one that has the same blob.
    pub(super) fn current(&self) -> Option<Arc<dyn Origin>> {
        let now = Instant::now();
        let sources = self.sources.iter();
        let best = sources
            .min_by_key(|source| (source.again.filter(|again| now < *again), source.failures));
        best.map(|source| Arc::clone(&source.origin))
    }

    /// Notes that bytes came from `origin`.
    pub(super) fn succeeded(&mut self, origin: &Arc<dyn Origin>) -> Recovery {
        self.malformed.end();
        let failures = self.source(origin).map(|source| {
            source.again = None;
            std::mem::take(&mut source.failures)
        });
        Recovery {
            was_away: failures > Some(1),
            was_refused: std::mem::take(&mut self.is_refused),
        }
    }

    /// Notes a definite refusal, and returns whether it is the first since bytes came.
    pub(super) fn is_first_refusal(&mut self) -> bool {
        !std::mem::replace(&mut self.is_refused, true)
    }

    /// The failure, as one that ends a start if the servers have given malformed answers only for a while.
    pub(super) fn judge(&mut self, failure: &Failure) -> Failure {
        self.malformed.judge(failure, Instant::now())
    }

    /// Notes a failure of `origin`, or of the system if that is `None`. Returns when to try again: at once
    /// if another origin may be asked.
    pub(super) fn failed(
        &mut self,
        origin: Option<&Arc<dyn Origin>>,
        failure: &Failure,
    ) -> Instant {
        let now = Instant::now();
        if failure.without_ranges {
            return self.range_refused(now);
        }
        let failed = match origin {
            Some(origin) => self.source(origin),
            None => self.sources.first_mut(),
        };
        let again = failed.map_or(now, |source| source.failed(failure, now));
        let others = self
            .sources
            .iter()
            .map(|source| source.again.unwrap_or(now));
        others.fold(again, Instant::min).max(now)
    }

    /// Notes that a range was answered with the whole blob, and returns when to try again. Requests that
    /// were under way together count once.
    fn range_refused(&mut self, now: Instant) -> Instant {
        match self.ranges {
            Ranges::Served => {
                let again = now + COLD_PROXY;
                self.ranges = Ranges::Doubted(again);
                again
            }
            Ranges::Doubted(again) if now < again => again,
            Ranges::Doubted(_) | Ranges::Refused(_) => {
                self.ranges = Ranges::Refused(now + WITHOUT_RANGES);
                now
            }
        }
    }

    /// Whether the whole blob must be streamed.
    pub(super) fn needs_whole(&self) -> bool {
        matches!(self.ranges, Ranges::Refused(until) if Instant::now() < until)
    }

    /// Notes that a range was served.
    pub(super) fn serves_ranges(&mut self) {
        self.ranges = Ranges::Served;
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::fetch::origin::{Body, From};
    use crate::source::FetchErrorKind;

    #[derive(Debug)]
    struct Nowhere;

    impl Origin for Nowhere {
        fn read(&self, _: u64, _: u64, _: From) -> Result<Body, Failure> {
            Err(passing())
        }

        fn read_whole(&self) -> Result<Body, Failure> {
            Err(passing())
        }

        fn blob_len(&self) -> Result<u64, Failure> {
            Err(passing())
        }
    }

    fn passing() -> Failure {
        Failure::passing(FetchErrorKind::Unreachable, "not now")
    }

    #[test]
    fn a_blob_is_streamed_after_the_second_range_that_is_refused() {
        let mut sources = Sources::new(Arc::new(Nowhere));
        let now = Instant::now();
        let again = sources.range_refused(now);
        assert_eq!(again, now + COLD_PROXY);
        assert_eq!(sources.range_refused(now), again, "under way together");
        assert!(!sources.needs_whole(), "a cold proxy serves ranges later");
        sources.serves_ranges();
        let again = sources.range_refused(again) + Duration::from_millis(1);
        assert!(!sources.needs_whole());
        assert_eq!(sources.range_refused(again), again);
        assert!(sources.needs_whole());
    }

    #[test]
    fn requests_that_fail_together_count_once() {
        let origin: Arc<dyn Origin> = Arc::new(Nowhere);
        let mut sources = Sources::new(Arc::clone(&origin));
        let first = sources.failed(Some(&origin), &passing());
        for _ in 0..100 {
            assert_eq!(sources.failed(Some(&origin), &passing()), first);
        }
        assert_eq!(sources.sources[0].failures, 1);
        let once = Recovery {
            was_away: false,
            was_refused: false,
        };
        assert_eq!(sources.succeeded(&origin), once, "its pause is short");
        let resting = Failure {
            resting: true,
            retry_after: Some(Duration::from_millis(1)),
            ..passing()
        };
        for _ in 0..100 {
            sources.failed(Some(&origin), &resting);
        }
        assert_eq!(sources.sources[0].failures, 2, "no request was made");
        let away = Recovery {
            was_away: true,
            ..once
        };
        assert_eq!(sources.succeeded(&origin), away);
        assert_eq!(sources.succeeded(&origin), once);
    }

    /// Two disks with one blob, of two registries.
    #[test]
    fn another_origin_is_asked_while_one_does_not_answer() {
        let [first, second]: [Arc<dyn Origin>; 2] = [Arc::new(Nowhere), Arc::new(Nowhere)];
        let mut sources = Sources::new(Arc::clone(&first));
        sources.add(&second);
        sources.add(&first);
        let is = |sources: &Sources, origin| Arc::ptr_eq(&sources.current().unwrap(), origin);
        for failure in [passing(), Failure::definite(FetchErrorKind::NotFound, "no")] {
            assert!(is(&sources, &first));
            let again = sources.failed(Some(&first), &failure);
            assert!(again <= Instant::now(), "the other one is asked at once");
            assert!(is(&sources, &second));
            // Also when the pause of the first one is over, as long as the second one answers.
            sources.source(&first).unwrap().again = None;
            assert!(is(&sources, &second));
            sources.succeeded(&second);
            assert!(is(&sources, &second));
            assert!(sources.failed(Some(&second), &passing()) <= Instant::now());
            assert!(is(&sources, &first));
            assert!(
                sources.failed(Some(&first), &passing()) > Instant::now(),
                "both failed"
            );
            sources.succeeded(&second);
            sources.succeeded(&first);
        }
    }
}
