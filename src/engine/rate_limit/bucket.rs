//! Token bucket without a lock: its level is one time.
//!
//! A bucket starts with `size` tokens and gets `size` tokens per `refill_time`, up to `size`. Instead of a number of
//! tokens, it stores the time at which it will be full if no more tokens are taken. The level follows from that time
//! and the clock, so that nothing has to refill the bucket, and taking tokens is one atomic addition.
//!
//! A request may be taken once there is one token, and then takes as many as it needs. So the level can be negative:
//! the next request waits until the missing tokens have arrived. The bytes of a request are known only after its chain
//! was taken from the queue, and a request may need more tokens than the bucket holds. Over time the rate is exact.
#![cfg_attr(
    not(test),
    warn(clippy::indexing_slicing, clippy::arithmetic_side_effects)
)]

use std::str::FromStr;
use std::sync::atomic::{AtomicU64, Ordering};

use serde::{Deserialize, Serialize};

/// Longest refill time, in milliseconds: a day.
pub const MAX_REFILL_TIME: u64 = 86_400_000;

const NANOS_PER_MILLI: u64 = 1_000_000;

/// Parameters of a token bucket.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(try_from = "Fields", into = "Fields")]
pub struct BucketSpec {
    size: u64,
    one_time_burst: u64,
    /// In milliseconds.
    refill_time: u64,
}

/// [`BucketSpec`] as it is written in JSON.
#[derive(Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct Fields {
    size: u64,
    #[serde(default)]
    one_time_burst: u64,
    refill_time: u64,
}

/// A value of a [`BucketSpec`] is out of its range, or its text has another form.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum SpecError {
    /// No tokens would ever arrive.
    #[error("size is 0; expected at least 1 token; omit the limit to remove it")]
    Size,
    /// The rate would be infinite, or too slow.
    #[error("refill_time is {0} ms; expected 1 to {MAX_REFILL_TIME}")]
    RefillTime(u64),
    /// The text is not `size=N,refill_time=MS[,one_time_burst=N]`.
    #[error("{0}; expected size=N,refill_time=MS[,one_time_burst=N]")]
    Text(String),
}

impl BucketSpec {
    /// A bucket of `size` tokens that refills within `refill_time` milliseconds. `one_time_burst` more tokens are
    /// used first and do not return.
    ///
    /// # Errors
    ///
    /// [`SpecError::Size`] for 0 tokens, [`SpecError::RefillTime`] for less than 1 ms or more than a day.
    pub fn new(size: u64, one_time_burst: u64, refill_time: u64) -> Result<Self, SpecError> {
        if size == 0 {
            return Err(SpecError::Size);
        }
        if !(1..=MAX_REFILL_TIME).contains(&refill_time) {
            return Err(SpecError::RefillTime(refill_time));
        }
        Ok(Self {
            size,
            one_time_burst,
            refill_time,
        })
    }

    /// Time in which `tokens` arrive, in nanoseconds.
    fn nanos_for(&self, tokens: u64) -> u64 {
        let refill = u128::from(self.refill_nanos());
        // `size` is at least 1.
        let nanos = (u128::from(tokens).saturating_mul(refill)).checked_div(u128::from(self.size));
        nanos
            .and_then(|nanos| u64::try_from(nanos).ok())
            .unwrap_or(u64::MAX)
    }

    fn refill_nanos(&self) -> u64 {
        self.refill_time.saturating_mul(NANOS_PER_MILLI)
    }
}

impl TryFrom<Fields> for BucketSpec {
    type Error = SpecError;

    fn try_from(fields: Fields) -> Result<Self, SpecError> {
        Self::new(fields.size, fields.one_time_burst, fields.refill_time)
    }
}

impl From<BucketSpec> for Fields {
    fn from(spec: BucketSpec) -> Self {
        Self {
            size: spec.size,
            one_time_burst: spec.one_time_burst,
            refill_time: spec.refill_time,
        }
    }
}

/// The text of a command line option: `size=N,refill_time=MS[,one_time_burst=N]`.
impl FromStr for BucketSpec {
    type Err = SpecError;

    fn from_str(text: &str) -> Result<Self, SpecError> {
        let (mut size, mut burst, mut refill) = (None, None, None);
        for pair in text.split(',') {
            let bad = || SpecError::Text(format!("found {pair:?}"));
            let (key, value) = pair.split_once('=').ok_or_else(bad)?;
            let field = match key {
                "size" => &mut size,
                "one_time_burst" => &mut burst,
                "refill_time" => &mut refill,
                _ => return Err(bad()),
            };
            let value: u64 = value.parse().map_err(|_| bad())?;
            if field.replace(value).is_some() {
                return Err(SpecError::Text(format!("{key} is given twice")));
            }
        }
        let missing = |name: &str| SpecError::Text(format!("{name} is missing"));
        Self::new(
            size.ok_or_else(|| missing("size"))?,
            burst.unwrap_or(0),
            refill.ok_or_else(|| missing("refill_time"))?,
        )
    }
}

/// Text that [`BucketSpec::from_str`] reads.
impl std::fmt::Display for BucketSpec {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let Self {
            size,
            one_time_burst,
            refill_time,
        } = self;
        write!(
            f,
            "size={size},one_time_burst={one_time_burst},refill_time={refill_time}"
        )
    }
}

/// A token bucket. Times are nanoseconds of any clock that does not go back.
#[derive(Debug)]
pub struct TokenBucket {
    spec: BucketSpec,
    /// Time at which the bucket is full if no more tokens are taken.
    full_at: AtomicU64,
    /// Tokens of the one-time burst that are left.
    burst: AtomicU64,
}

impl TokenBucket {
    /// A full bucket.
    pub fn new(spec: BucketSpec) -> Self {
        Self {
            spec,
            full_at: AtomicU64::new(0),
            burst: AtomicU64::new(spec.one_time_burst),
        }
    }

    /// Returns the time from which on there is at least one token.
    pub fn ready_at(&self) -> u64 {
        if self.burst.load(Ordering::Relaxed) > 0 {
            return 0;
        }
        let full_at = self.full_at.load(Ordering::Relaxed);
        full_at
            .saturating_add(self.spec.nanos_for(1))
            .saturating_sub(self.spec.refill_nanos())
    }

    /// Takes `tokens` at time `now`, whether they are there or not.
    pub fn take(&self, tokens: u64, now: u64) {
        let nanos = self.spec.nanos_for(self.take_burst(tokens));
        let later = |full_at: u64| Some(full_at.max(now).saturating_add(nanos));
        // Never fails: there is a later time for each.
        let _ = self
            .full_at
            .fetch_update(Ordering::Relaxed, Ordering::Relaxed, later);
    }

    /// Takes tokens of the one-time burst; returns how many of `tokens` it did not have.
    fn take_burst(&self, tokens: u64) -> u64 {
        if self.burst.load(Ordering::Relaxed) == 0 {
            return tokens;
        }
        let less = |burst: u64| Some(burst.saturating_sub(tokens));
        let before = self
            .burst
            .fetch_update(Ordering::Relaxed, Ordering::Relaxed, less);
        tokens.saturating_sub(before.unwrap_or(0))
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    const SECOND: u64 = 1_000_000_000;

    /// Takes requests of `tokens` each as soon as the bucket allows, with `late` added to each wait, for `seconds`.
    fn greedy(spec: BucketSpec, tokens: u64, late: u64, seconds: u64) -> u64 {
        let bucket = TokenBucket::new(spec);
        let (mut now, mut taken) = (SECOND, 0);
        let end = now + seconds * SECOND;
        while now < end {
            let ready = bucket.ready_at();
            if ready <= now {
                bucket.take(tokens, now);
                taken += tokens;
            } else {
                now = ready + late;
            }
        }
        taken
    }

    #[test]
    fn the_rate_is_exact_behind_the_first_burst() {
        for (size, burst, refill, tokens) in [
            (5000, 0, 1000, 1),
            (100, 0, 100, 1),
            (10, 0, 10, 1),
            (1_000_000, 0, 1000, 1),
            (10 << 20, 0, 1000, 4096),
            (64 << 10, 0, 10, 1 << 20), // requests larger than the bucket
            (1 << 30, 1 << 20, 1000, 128 << 10),
            (7, 100, 13, 1),
        ] {
            let spec = BucketSpec::new(size, burst, refill).unwrap();
            // No wake-up is later than a third of the bucket.
            let late = (refill * NANOS_PER_MILLI / 3).min(NANOS_PER_MILLI);
            let taken = greedy(spec, tokens, late, 10) as f64;
            let arrived = (size * 10_000 / refill + size + burst) as f64;
            let slack = tokens as f64 + arrived * 0.001;
            assert!(
                (taken - arrived).abs() <= slack,
                "{spec}: {taken} of {arrived}"
            );
        }
    }

    #[test]
    fn a_bucket_that_rested_is_full_and_no_fuller() {
        let bucket = TokenBucket::new(BucketSpec::new(10, 0, 1000).unwrap());
        let now = 3600 * SECOND;
        for _ in 0..10 {
            assert!(bucket.ready_at() <= now);
            bucket.take(1, now);
        }
        assert_eq!(bucket.ready_at(), now + SECOND / 10);
    }

    #[test]
    fn a_large_request_leaves_a_debt() {
        let bucket = TokenBucket::new(BucketSpec::new(1000, 0, 1000).unwrap());
        bucket.take(5000, SECOND);
        assert_eq!(bucket.ready_at(), 5 * SECOND + SECOND / 1000);
    }

    #[test]
    fn a_one_time_burst_is_used_first_and_does_not_return() {
        let bucket = TokenBucket::new(BucketSpec::new(10, 5, 1000).unwrap());
        for _ in 0..15 {
            assert!(bucket.ready_at() <= SECOND);
            bucket.take(1, SECOND);
        }
        assert!(bucket.ready_at() > SECOND);
        let rested = 100 * SECOND;
        bucket.take(10, rested);
        assert!(bucket.ready_at() > rested);
    }

    #[test]
    fn text_is_read_and_refused() {
        let spec = BucketSpec::new(5, 7, 9).unwrap();
        assert_eq!(spec.to_string().parse(), Ok(spec));
        assert_eq!(
            "refill_time=9,size=5".parse(),
            Ok(BucketSpec::new(5, 0, 9).unwrap())
        );
        for text in [
            "",
            "5",
            "size=5",
            "refill_time=5",
            "size=5,refill_time=x",
            "size=5,size=5,refill_time=1",
            "size=5,refill=1",
            "size=0,refill_time=1",
            "size=5,refill_time=0",
        ] {
            assert!(text.parse::<BucketSpec>().is_err(), "{text}");
        }
    }

    proptest! {
        /// Whatever is taken and whenever: no more than what the bucket held and what arrived, and the last request.
        #[test]
        fn no_more_is_taken_than_has_arrived(
            size in 1u64..=u64::MAX,
            burst in 0u64..1 << 40,
            refill in 1u64..=MAX_REFILL_TIME,
            steps in prop::collection::vec((0u64..1 << 26, 0u64..1 << 32), 1..200),
        ) {
            let spec = BucketSpec::new(size, burst, refill).unwrap();
            let bucket = TokenBucket::new(spec);
            let (mut now, mut taken, mut largest) = (SECOND, 0u128, 0u128);
            for (tokens, pause) in steps {
                if bucket.ready_at() <= now {
                    bucket.take(tokens, now);
                    taken += u128::from(tokens);
                    largest = largest.max(u128::from(tokens));
                }
                now += pause;
            }
            let refilled = u128::from(now - SECOND) * u128::from(size)
                / u128::from(refill * NANOS_PER_MILLI);
            // Each step rounds to nanoseconds.
            let rounding = 1 + 200 * (u128::from(size) / u128::from(refill * NANOS_PER_MILLI) + 1);
            let most = u128::from(size) + u128::from(burst) + refilled + largest + rounding;
            prop_assert!(taken <= most, "{taken} of {most}");
        }
    }
}
