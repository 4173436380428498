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
const MAX_PAUSE: Duration = Duration::from_secs(30);

/// Longest pause that a server may ask for.
const MAX_RETRY_AFTER: Duration = Duration::from_secs(300);

/// The origins of one blob, and their failures since bytes came last.
#[derive(Debug)]
pub(super) struct Sources {
    /// The repositories that are said to have the blob; the first is asked.
    origins: Vec<Arc<dyn Origin>>,
    failures: u32,
    /// When to try again after the last counted failure. Requests that were under way together fail
    /// together, and before this they count as one failure.
    again: Option<Instant>,
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

impl Sources {
    pub(super) fn new(origin: Arc<dyn Origin>) -> Self {
        Self {
            origins: vec![origin],
            failures: 0,
            again: None,
            is_refused: false,
            ranges: Ranges::Served,
            malformed: MalformedAnswers::default(),
        }
    }

    /// Adds a place that is said to have the blob.
    pub(super) fn add(&mut self, origin: &Arc<dyn Origin>) {
        let is_known = self.origins.iter().any(|known| Arc::ptr_eq(known, origin));
        if self.origins.len() < MAX_ORIGINS && !is_known {
            self.origins.push(Arc::clone(origin));
        }
    }

    /// The origin to ask.
    pub(super) fn current(&self) -> Option<Arc<dyn Origin>> {
        self.origins.first().cloned()
    }

    /// Notes that bytes came.
    pub(super) fn succeeded(&mut self) -> Recovery {
        self.again = None;
        self.malformed.end();
        Recovery {
            was_away: std::mem::take(&mut self.failures) > 1,
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

    /// Notes a failure, and returns when to try again. A definite refusal moves the next origin to
    /// the front.
    pub(super) fn failed(&mut self, failure: &Failure) -> Instant {
        let now = Instant::now();
        if failure.definite {
            self.origins.rotate_left(1);
        }
        if failure.without_ranges {
            return self.range_refused(now);
        }
        let asked = failure.retry_after.unwrap_or_default();
        let asked = now + asked.min(MAX_RETRY_AFTER);
        if failure.resting {
            // Others have failed often enough for the server to be spared.
            self.failures = self.failures.max(2);
            return asked;
        }
        if let Some(again) = self.again.filter(|again| now < *again && !failure.definite) {
            return again.max(asked);
        }
        let failures = self.failures.min(16);
        self.failures = self.failures.saturating_add(1);
        let most = match failure.definite {
            true => MAX_PAUSE,
            false => MAX_PAUSE.min(FIRST_PAUSE * (1 << failures)),
        };
        let again = now + most.mul_f64(jitter());
        self.again = Some(again);
        again.max(asked)
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
        let mut sources = Sources::new(Arc::new(Nowhere));
        let first = sources.failed(&passing());
        for _ in 0..100 {
            assert_eq!(sources.failed(&passing()), first);
        }
        assert_eq!(sources.failures, 1);
        let once = Recovery {
            was_away: false,
            was_refused: false,
        };
        assert_eq!(sources.succeeded(), once, "its pause is short");
        let resting = Failure {
            resting: true,
            retry_after: Some(Duration::from_millis(1)),
            ..passing()
        };
        for _ in 0..100 {
            sources.failed(&resting);
        }
        assert_eq!(sources.failures, 2, "no request was made");
        let away = Recovery {
            was_away: true,
            ..once
        };
        assert_eq!(sources.succeeded(), away);
        assert_eq!(sources.succeeded(), once);
    }
}
