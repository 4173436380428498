//! Circuit breakers: after several failures of a server in a row, one request at a time probes it, at growing
//! intervals. All other requests to it fail at once.
//!
//! Requests that were under way together fail together. Once a breaker is open, only the probe's failure makes
//! the pause longer: a short outage under many requests is followed by short pauses.

use std::collections::HashMap;
use std::sync::{Mutex, PoisonError};
use std::time::{Duration, Instant};

use super::error::Error;

/// Policy of a circuit breaker.
#[derive(Clone, Copy, Debug)]
pub(super) struct Policy {
    /// Failures in a row after which the breaker opens.
    pub(super) limit: u32,
    /// First pause; doubled after each further failure.
    pub(super) first_pause: Duration,
    /// Longest pause.
    pub(super) max_pause: Duration,
}

/// Policy for registries and the targets of their redirects.
pub(super) const SERVERS: Policy = Policy {
    limit: 8,
    first_pause: Duration::from_millis(100),
    max_pause: Duration::from_secs(8),
};

/// Most hosts that are remembered; redirect targets are among them.
const MAX_HOSTS: usize = 1024;

/// The breakers of all servers whose last request failed.
#[derive(Debug)]
pub(super) struct Breakers {
    policy: Policy,
    records: Mutex<HashMap<String, Record>>,
}

#[derive(Debug)]
struct Record {
    /// Failures until the breaker opened.
    failures: u32,
    /// Probes that failed since.
    failed_probes: u32,
    /// Whether a probe is under way.
    is_probed: bool,
    next: Instant,
    /// The last failure.
    error: Error,
}

/// The breaker of a server is open.
#[derive(Debug)]
pub(super) struct Spared {
    /// Time until the next attempt.
    pub(super) retry_after: Duration,
    /// Its last failure.
    pub(super) error: Error,
}

impl Breakers {
    pub(super) fn new(policy: Policy) -> Breakers {
        let records = Mutex::default();
        Breakers { policy, records }
    }

    /// Lets a request pass.
    ///
    /// # Errors
    /// [`Spared`]: the server failed too often, and the next attempt is not due yet.
    pub(super) fn admit(&self, host: &str, now: Instant) -> Result<(), Spared> {
        let mut records = self.records.lock().unwrap_or_else(PoisonError::into_inner);
        let Some(record) = records
            .get_mut(host)
            .filter(|record| record.failures >= self.policy.limit)
        else {
            return Ok(());
        };
        if now < record.next {
            return Err(Spared {
                retry_after: record.next - now,
                error: record.error.clone(),
            });
        }
        // This request is the probe; the others wait for what it finds.
        record.is_probed = true;
        record.next = now + self.policy.pause(record.failed_probes.saturating_add(1));
        Ok(())
    }

    /// Records an answer. Returns `true` if the breaker was open.
    pub(super) fn succeeded(&self, host: &str) -> bool {
        let mut records = self.records.lock().unwrap_or_else(PoisonError::into_inner);
        records
            .remove(host)
            .is_some_and(|record| record.failures >= self.policy.limit)
    }

    /// Records a failure. Returns `true` if it opened the breaker.
    pub(super) fn failed(&self, host: &str, now: Instant, error: Error) -> bool {
        self.add_failures(host, now, error, 1)
    }

    /// Records a failure and opens the breaker. Returns `true` if it was closed.
    pub(super) fn open(&self, host: &str, now: Instant, error: Error) -> bool {
        self.add_failures(host, now, error, self.policy.limit)
    }

    fn add_failures(&self, host: &str, now: Instant, error: Error, count: u32) -> bool {
        let mut records = self.records.lock().unwrap_or_else(PoisonError::into_inner);
        if records.len() >= MAX_HOSTS && !records.contains_key(host) {
            records.clear();
        }
        let record = records.entry(host.to_owned()).or_insert(Record {
            failures: 0,
            failed_probes: 0,
            is_probed: false,
            next: now,
            error: error.clone(),
        });
        record.error = error;
        let was_open = record.failures >= self.policy.limit;
        record.failures = record.failures.saturating_add(count);
        let is_open = record.failures >= self.policy.limit;
        if std::mem::take(&mut record.is_probed) {
            record.failed_probes = record.failed_probes.saturating_add(1);
            record.next = now + self.policy.pause(record.failed_probes);
        } else if is_open && !was_open {
            record.next = now + self.policy.pause(0);
        }
        is_open && !was_open
    }
}

impl Policy {
    fn pause(&self, failed_probes: u32) -> Duration {
        (self.first_pause * (1 << failed_probes.min(16))).min(self.max_pause)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn error(number: usize) -> Error {
        Error::Timeout {
            host: "h".parse().unwrap(),
            phase: number.to_string(),
        }
    }

    /// Time until the next attempt, if the breaker is open.
    fn pause(breakers: &Breakers, host: &str, now: Instant) -> Option<Duration> {
        breakers
            .admit(host, now)
            .err()
            .map(|spared| spared.retry_after)
    }

    #[test]
    fn a_failing_server_is_asked_now_and_then() {
        let breakers = Breakers::new(SERVERS);
        let start = Instant::now();
        for failure in 1..=SERVERS.limit {
            assert_eq!(pause(&breakers, "h", start), None);
            let is_last = failure == SERVERS.limit;
            assert_eq!(
                breakers.failed("h", start, error(failure as usize)),
                is_last
            );
        }
        let spared = breakers.admit("h", start).unwrap_err();
        assert_eq!(spared.retry_after, SERVERS.first_pause);
        let last = error(SERVERS.limit as usize).to_string();
        assert_eq!(spared.error.to_string(), last);
        assert_eq!(pause(&breakers, "other", start), None);

        let later = start + SERVERS.first_pause;
        assert_eq!(pause(&breakers, "h", later), None, "one attempt");
        assert!(breakers.admit("h", later).is_err(), "and no other");
        assert!(!breakers.failed("h", later, error(0)));
        assert_eq!(pause(&breakers, "h", later), Some(2 * SERVERS.first_pause));

        let mut now = later;
        for _ in 0..100 {
            now += SERVERS.max_pause;
            assert_eq!(pause(&breakers, "h", now), None);
            breakers.failed("h", now, error(0));
            assert!(pause(&breakers, "h", now) <= Some(SERVERS.max_pause));
        }
        assert!(breakers.succeeded("h"));
        assert_eq!(pause(&breakers, "h", now), None);
        assert!(!breakers.succeeded("h"));
    }

    #[test]
    fn requests_that_fail_together_count_once() {
        let breakers = Breakers::new(SERVERS);
        let start = Instant::now();
        for number in 0..100 {
            breakers.failed("h", start, error(number));
        }
        assert_eq!(pause(&breakers, "h", start), Some(SERVERS.first_pause));
        let later = start + SERVERS.first_pause;
        assert_eq!(pause(&breakers, "h", later), None, "the probe");
        for number in 0..100 {
            breakers.failed("h", later, error(number));
        }
        assert_eq!(pause(&breakers, "h", later), Some(2 * SERVERS.first_pause));
    }

    #[test]
    fn one_bad_failure_opens_it() {
        let breakers = Breakers::new(SERVERS);
        let start = Instant::now();
        assert!(breakers.open("h", start, error(0)));
        assert!(!breakers.open("h", start, error(1)));
        assert_eq!(pause(&breakers, "h", start), Some(SERVERS.first_pause));
    }

    #[test]
    fn the_memory_is_bounded() {
        let breakers = Breakers::new(SERVERS);
        for number in 0..3 * MAX_HOSTS {
            breakers.failed(&number.to_string(), Instant::now(), error(number));
        }
        assert!(breakers.records.lock().unwrap().len() <= MAX_HOSTS);
    }
}
