//! One queue worker's use of the disk's rate limits.
//!
//! A chain is taken from the queue only if every bucket has a token. Otherwise it stays in the available ring, so that
//! a stopping queue has nothing to wait for, and the worker sleeps until the tokens have arrived.
#![cfg_attr(
    not(test),
    warn(clippy::indexing_slicing, clippy::arithmetic_side_effects)
)]

use std::sync::Arc;

use super::bucket::TokenBucket;
use super::{Buckets, RateLimiter};
use crate::engine::stats::queue::{QueueStats, cell};

const NANOS_PER_MILLI: u64 = 1_000_000;

/// Longest sleep of a throttled worker in milliseconds, after which it looks for changed limits.
const LONGEST_SLEEP: u64 = 50;

/// Delay of a wake-up that does not lower the rate, in nanoseconds. Tokens of a small bucket would overflow during the
/// delay, although a chain waited for them.
const FORGIVEN_DELAY: u64 = 20 * NANOS_PER_MILLI;

/// The limits as one worker knows them.
#[derive(Debug)]
pub struct Throttle<'a> {
    limiter: &'a RateLimiter,
    version: u32,
    /// `None` without limits.
    buckets: Option<Arc<Buckets>>,
    /// Time of the turn.
    now: u64,
    /// Time at which tokens are taken: `now`, or the earlier time from which on a chain could have been taken.
    at: u64,
    /// Time at which the chain that waits for tokens can be taken.
    waiting_until: Option<u64>,
    /// Since when a chain waits, and the number of the bucket that it waits for.
    waiting_since: Option<(u64, usize)>,
    stats: QueueStats<'a>,
}

impl<'a> Throttle<'a> {
    /// Follows the limits of `limiter`, and counts the waits in `stats`.
    pub fn new(limiter: &'a RateLimiter, stats: QueueStats<'a>) -> Self {
        let (version, buckets) = limiter.buckets();
        Self {
            limiter,
            version,
            buckets,
            now: 0,
            at: 0,
            waiting_until: None,
            waiting_since: None,
            stats,
        }
    }

    /// Begins a turn of the worker: follows changed limits and reads the clock, if there are limits.
    #[inline]
    pub fn begin_turn(&mut self) {
        if self.version != self.limiter.version() {
            self.follow();
        }
        if self.buckets.is_some() {
            self.begin_turn_at(self.limiter.now());
        }
    }

    #[cold]
    fn follow(&mut self) {
        (self.version, self.buckets) = self.limiter.buckets();
        self.waiting_until = None;
    }

    fn begin_turn_at(&mut self, now: u64) {
        self.now = now;
        let waited = self.waiting_until.take();
        self.at = waited.map_or(now, |until| {
            until.clamp(now.saturating_sub(FORGIVEN_DELAY), now)
        });
    }

    /// Returns whether a chain may be taken now.
    #[inline]
    pub fn admits(&self) -> bool {
        match &self.buckets {
            None => true,
            Some(buckets) => ready_at(buckets) <= self.now,
        }
    }

    /// Takes the token of an operation.
    #[inline]
    pub fn take_operation(&mut self) {
        if self.buckets.is_some() || self.waiting_since.is_some() {
            self.take_token();
        }
    }

    fn take_token(&mut self) {
        if let Some((since, bucket)) = self.waiting_since.take() {
            let waited = self.now.saturating_sub(since);
            self.stats
                .add(cell::THROTTLED_NANOS.saturating_add(bucket), waited);
        }
        if let Some(bucket) = self.buckets.as_ref().and_then(|all| all.ops.as_ref()) {
            bucket.take(1, self.at);
        }
    }

    /// Takes the tokens of `bytes` that are read or written.
    #[inline]
    pub fn take_bytes(&self, bytes: u64) {
        if let Some(bucket) = self.buckets.as_ref().and_then(|all| all.bandwidth.as_ref()) {
            bucket.take(bytes, self.at);
        }
    }

    /// Records that a chain waits for tokens.
    pub fn wait(&mut self) {
        let Some(buckets) = &self.buckets else {
            return;
        };
        let until = ready_at(buckets);
        self.waiting_until = Some(until);
        if self.waiting_since.is_none() {
            let operations = buckets.ops.as_ref().map(TokenBucket::ready_at);
            let bucket = usize::from(operations != Some(until));
            self.waiting_since = Some((self.now, bucket));
            self.stats
                .add(cell::THROTTLED_REQUESTS.saturating_add(bucket), 1);
        }
    }

    /// Returns how long the worker may sleep, in milliseconds; `None` if no chain waits for tokens.
    #[inline]
    pub fn sleep(&self) -> Option<i32> {
        let until = self.waiting_until?;
        let millis = until.saturating_sub(self.now).div_ceil(NANOS_PER_MILLI);
        // At most `LONGEST_SLEEP`.
        Some(millis.clamp(1, LONGEST_SLEEP) as i32)
    }
}

/// Time from which on all buckets have a token.
fn ready_at(buckets: &Buckets) -> u64 {
    let ready = |bucket: &Option<TokenBucket>| bucket.as_ref().map_or(0, |b| b.ready_at());
    ready(&buckets.ops).max(ready(&buckets.bandwidth))
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::super::LimitsSpec;
    use super::super::bucket::BucketSpec;
    use super::*;
    use crate::engine::stats::StatsPage;

    const SECOND: u64 = 1_000_000_000;

    fn limits(ops: Option<(u64, u64)>, bandwidth: Option<(u64, u64)>) -> RateLimiter {
        let bucket = |limit: Option<(u64, u64)>| {
            limit.map(|(size, refill)| BucketSpec::new(size, 0, refill).unwrap())
        };
        RateLimiter::new(LimitsSpec {
            ops: bucket(ops),
            bandwidth: bucket(bandwidth),
        })
    }

    /// Workers that always have chains waiting, on a clock of the test; each wake-up is late by what `late` returns.
    /// Returns the number of requests taken within `seconds`.
    fn backlogged(
        limiter: &RateLimiter,
        workers: u16,
        bytes: u64,
        seconds: u64,
        mut late: impl FnMut() -> u64,
    ) -> u64 {
        let page = StatsPage::anonymous().unwrap();
        let mut workers: Vec<_> = (0..workers)
            .map(|index| {
                (
                    SECOND,
                    Throttle::new(limiter, QueueStats::new(&page, index)),
                )
            })
            .collect();
        let mut taken = 0;
        loop {
            let (now, throttle) = workers.iter_mut().min_by_key(|(now, _)| *now).unwrap();
            if *now >= (1 + seconds) * SECOND {
                return taken;
            }
            throttle.begin_turn_at(*now);
            while throttle.admits() {
                throttle.take_operation();
                throttle.take_bytes(bytes);
                taken += 1;
            }
            throttle.wait();
            *now += u64::try_from(throttle.sleep().unwrap()).unwrap() * NANOS_PER_MILLI + late();
        }
    }

    fn assert_near(taken: u64, expected: u64, what: &str) {
        let (taken, expected) = (taken as f64, expected as f64);
        assert!(
            (taken - expected).abs() <= expected * 0.02,
            "{what}: {taken}, not {expected}"
        );
    }

    #[test]
    fn ten_seconds_are_exact_within_two_percent() {
        for (size, refill) in [(1, 1), (10, 10), (100, 100), (5000, 1000), (50_000, 500)] {
            for workers in [1, 4] {
                let limiter = limits(Some((size, refill)), None);
                let taken = backlogged(&limiter, workers, 0, 10, || 300_000);
                let expected = size + 10_000 * size / refill;
                assert_near(taken, expected, &format!("{size} per {refill} ms"));
            }
        }
    }

    #[test]
    fn bytes_and_operations_limit_together() {
        let limiter = limits(Some((1000, 1000)), Some((1 << 20, 100)));
        // 4 KiB requests: the operations are the limit. 64 KiB requests: the bytes are.
        assert_near(backlogged(&limiter, 2, 4096, 10, || 0), 11_000, "4 KiB");
        let limiter = limits(Some((1000, 1000)), Some((1 << 20, 100)));
        assert_near(
            backlogged(&limiter, 2, 64 << 10, 10, || 0),
            16 * 101,
            "64 KiB",
        );
    }

    #[test]
    fn limits_that_change_end_a_wait() {
        let limiter = limits(Some((1, 86_400_000)), None);
        let page = StatsPage::anonymous().unwrap();
        let mut throttle = Throttle::new(&limiter, QueueStats::new(&page, 0));
        throttle.begin_turn();
        throttle.take_operation();
        assert!(!throttle.admits());
        throttle.wait();
        assert_eq!(throttle.sleep(), Some(LONGEST_SLEEP as i32));
        limiter.replace(LimitsSpec::default());
        throttle.begin_turn();
        assert!(throttle.admits() && throttle.sleep().is_none());
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(32))]

        /// Late wake-ups neither lower the rate nor let more through than has arrived.
        #[test]
        fn the_rate_holds_whatever_the_wake_ups(
            size in 1u64..2000,
            refill in 1u64..200,
            workers in 1u16..5,
            delays in prop::collection::vec(0u64..5 * NANOS_PER_MILLI, 1..50),
        ) {
            let limiter = limits(Some((size, refill)), None);
            let mut delays = delays.into_iter().cycle();
            let taken = backlogged(&limiter, workers, 0, 10, || delays.next().unwrap()) as f64;
            let arrived = (10_000 * size) as f64 / refill as f64;
            let most = (arrived + size as f64) * 1.001 + f64::from(workers);
            // The last sleep may end behind the tenth second.
            let least = arrived * 0.98 - size as f64 * (56.0 / refill as f64).max(1.0);
            prop_assert!(taken <= most && taken >= least, "{taken}, not {least} to {most}");
        }
    }
}
