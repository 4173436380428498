//! Spares a server that keeps failing: after several failures in a row it is asked now and then,
//! by one request at a time, instead of by all threads.

use std::collections::HashMap;
use std::sync::{Mutex, PoisonError};
use std::time::{Duration, Instant};

/// Failures in a row from which on a server is spared.
const LIMIT: u32 = 8;

/// First pause; doubled after each further failure.
const FIRST_PAUSE: Duration = Duration::from_millis(100);

/// Longest pause.
const MAX_PAUSE: Duration = Duration::from_secs(30);

/// Most hosts that are remembered; redirect targets are among them.
const MAX_HOSTS: usize = 1024;

/// What is known of each server that failed last time.
#[derive(Debug, Default)]
pub(super) struct Breakers(Mutex<HashMap<String, Record>>);

#[derive(Debug)]
struct Record {
    failures: u32,
    next: Instant,
}

impl Breakers {
    /// Lets a request pass.
    ///
    /// # Errors
    /// The time until the next attempt: the server is spared.
    pub(super) fn admit(&self, host: &str, now: Instant) -> Result<(), Duration> {
        let mut records = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        let Some(record) = records
            .get_mut(host)
            .filter(|record| record.failures >= LIMIT)
        else {
            return Ok(());
        };
        if now < record.next {
            return Err(record.next - now);
        }
        // This request is the attempt; the others wait for what it finds.
        record.next = now + pause(record.failures);
        Ok(())
    }

    /// Records an answer; `true` if the server had stopped answering.
    pub(super) fn succeeded(&self, host: &str) -> bool {
        let mut records = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        records
            .remove(host)
            .is_some_and(|record| record.failures >= LIMIT)
    }

    /// Records a failure; `true` if from now on the server is spared.
    pub(super) fn failed(&self, host: &str, now: Instant) -> bool {
        let mut records = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        if records.len() >= MAX_HOSTS && !records.contains_key(host) {
            records.clear();
        }
        let record = records.entry(host.to_owned()).or_insert(Record {
            failures: 0,
            next: now,
        });
        record.failures = record.failures.saturating_add(1);
        if record.failures >= LIMIT {
            record.next = now + pause(record.failures);
        }
        record.failures == LIMIT
    }
}

fn pause(failures: u32) -> Duration {
    let doublings = failures.saturating_sub(LIMIT).min(16);
    (FIRST_PAUSE * (1 << doublings)).min(MAX_PAUSE)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_failing_server_is_asked_now_and_then() {
        let breakers = Breakers::default();
        let start = Instant::now();
        for failure in 1..=LIMIT {
            assert_eq!(breakers.admit("h", start), Ok(()));
            assert_eq!(breakers.failed("h", start), failure == LIMIT);
        }
        assert_eq!(breakers.admit("h", start), Err(FIRST_PAUSE));
        assert_eq!(breakers.admit("other", start), Ok(()));

        let later = start + FIRST_PAUSE;
        assert_eq!(breakers.admit("h", later), Ok(()), "one attempt");
        assert!(breakers.admit("h", later).is_err(), "and no other");
        assert!(!breakers.failed("h", later));
        assert_eq!(breakers.admit("h", later), Err(2 * FIRST_PAUSE));

        let mut now = later;
        for _ in 0..100 {
            now += MAX_PAUSE;
            assert_eq!(breakers.admit("h", now), Ok(()));
            breakers.failed("h", now);
            assert!(breakers.admit("h", now).unwrap_err() <= MAX_PAUSE);
        }
        assert!(breakers.succeeded("h"));
        assert_eq!(breakers.admit("h", now), Ok(()));
        assert!(!breakers.succeeded("h"));
    }

    #[test]
    fn the_memory_is_bounded() {
        let breakers = Breakers::default();
        for number in 0..3 * MAX_HOSTS {
            breakers.failed(&number.to_string(), Instant::now());
        }
        assert!(breakers.0.lock().unwrap().len() <= MAX_HOSTS);
    }
}
