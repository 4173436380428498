//! Rate limits of a disk: operations and bytes per time, which all its queues share.
//!
//! A [`bucket::TokenBucket`] holds the tokens of one limit. [`RateLimiter`] holds the buckets of a disk and replaces
//! them while the disk runs. Each queue worker has a [`throttle::Throttle`], which takes tokens for the worker's
//! requests and says how long the worker sleeps when there are none.

pub mod bucket;
pub mod throttle;

use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Instant;

use serde::{Deserialize, Serialize};

use bucket::{BucketSpec, TokenBucket};

/// Rate limits of a disk, in the words of Firecracker's API.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct LimitsSpec {
    /// Requests. `None`: no limit.
    #[serde(default)]
    pub ops: Option<BucketSpec>,
    /// Bytes that are read and written. `None`: no limit.
    #[serde(default)]
    pub bandwidth: Option<BucketSpec>,
}

impl LimitsSpec {
    /// Returns whether there is no limit.
    pub fn is_unlimited(&self) -> bool {
        *self == Self::default()
    }
}

/// The buckets of one [`LimitsSpec`] that limits something.
#[derive(Debug)]
struct Buckets {
    ops: Option<TokenBucket>,
    bandwidth: Option<TokenBucket>,
}

impl Buckets {
    fn new(spec: &LimitsSpec) -> Option<Self> {
        let bucket = |spec: Option<BucketSpec>| spec.map(TokenBucket::new);
        (spec.ops.is_some() || spec.bandwidth.is_some()).then(|| Self {
            ops: bucket(spec.ops),
            bandwidth: bucket(spec.bandwidth),
        })
    }
}

/// Current limits of a disk.
#[derive(Debug)]
struct Current {
    spec: LimitsSpec,
    buckets: Option<Arc<Buckets>>,
}

/// Rate limits of a disk, which can be replaced while its queues run.
#[derive(Debug)]
pub struct RateLimiter {
    current: Mutex<Current>,
    /// Counts replacements. Workers read only this number as long as it stays the same.
    version: AtomicU32,
    /// Zero of the buckets' clock.
    start: Instant,
}

impl RateLimiter {
    /// Limits as `spec` says, with full buckets.
    pub fn new(spec: LimitsSpec) -> Self {
        let buckets = Buckets::new(&spec).map(Arc::new);
        Self {
            current: Mutex::new(Current { spec, buckets }),
            version: AtomicU32::new(0),
            start: Instant::now(),
        }
    }

    /// Returns the current limits.
    pub fn spec(&self) -> LimitsSpec {
        self.lock().spec
    }

    /// Replaces the limits; the new buckets are full. Limits that stay the same keep their buckets.
    pub fn replace(&self, spec: LimitsSpec) {
        let mut current = self.lock();
        if current.spec == spec {
            return;
        }
        let buckets = Buckets::new(&spec).map(Arc::new);
        *current = Current { spec, buckets };
        // Within the lock, so that a worker that sees the new number finds the new buckets.
        self.version.fetch_add(1, Ordering::Release);
    }

    /// Returns the current buckets and their version.
    fn buckets(&self) -> (u32, Option<Arc<Buckets>>) {
        let current = self.lock();
        (self.version(), current.buckets.clone())
    }

    #[inline]
    fn version(&self) -> u32 {
        self.version.load(Ordering::Acquire)
    }

    /// Returns the time of the buckets' clock, in nanoseconds.
    fn now(&self) -> u64 {
        // 2^64 ns are 584 years.
        self.start.elapsed().as_nanos() as u64
    }

    fn lock(&self) -> std::sync::MutexGuard<'_, Current> {
        self.current.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Default for RateLimiter {
    /// No limits.
    fn default() -> Self {
        Self::new(LimitsSpec::default())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn limits_have_the_words_of_firecracker() {
        let text = r#"{"ops":{"size":5000,"refill_time":1000},
            "bandwidth":{"size":1048576,"one_time_burst":4096,"refill_time":100}}"#;
        let spec: LimitsSpec = serde_json::from_str(text).unwrap();
        assert_eq!(spec.ops, Some(BucketSpec::new(5000, 0, 1000).unwrap()));
        let again = serde_json::to_string(&spec).unwrap();
        assert_eq!(serde_json::from_str::<LimitsSpec>(&again).unwrap(), spec);
        for text in [
            r#"{"op":{"size":1,"refill_time":1}}"#,
            r#"{"ops":{"size":1}}"#,
            r#"{"ops":{"size":0,"refill_time":100}}"#,
            r#"{"ops":{"size":1,"refill_time":0}}"#,
            r#"{"ops":{"size":-1,"refill_time":1}}"#,
            r#"{"ops":{"size":1,"refill_time":1,"burst":1}}"#,
            r#"{"ops":{"size":1,"refill_time":86400001}}"#,
        ] {
            assert!(serde_json::from_str::<LimitsSpec>(text).is_err(), "{text}");
        }
    }

    #[test]
    fn the_same_limits_keep_their_buckets() {
        let spec = LimitsSpec {
            ops: BucketSpec::new(10, 0, 10).ok(),
            bandwidth: None,
        };
        let limiter = RateLimiter::new(spec);
        let (version, buckets) = limiter.buckets();
        limiter.replace(spec);
        let (same, kept) = limiter.buckets();
        assert!(same == version && Arc::ptr_eq(&buckets.unwrap(), &kept.unwrap()));
        limiter.replace(LimitsSpec::default());
        let (other, none) = limiter.buckets();
        assert!(other != version && none.is_none());
    }
}
