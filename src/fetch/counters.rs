//! Counters of the fetcher.

use std::sync::atomic::{AtomicU64, Ordering};

use serde::Serialize;

use crate::registry::statuses::CLASSES;
use crate::source::counts::Counts;
use crate::source::protocol::Cause;

/// Running counts, shared by all threads.
#[derive(Debug, Default)]
pub struct Counters {
    bytes: [AtomicU64; Cause::ALL.len()],
    requests: AtomicU64,
    failures: AtomicU64,
    refusals: AtomicU64,
    published: AtomicU64,
    mismatches: AtomicU64,
}

/// The counts at one moment.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize)]
pub struct CountersSnapshot {
    /// Bytes fetched because a layer was opened.
    pub start_bytes: u64,
    /// Bytes fetched because a guest or a tool waited.
    pub demand_bytes: u64,
    /// Bytes fetched again because they were damaged.
    pub repair_bytes: u64,
    /// Bytes fetched because a trace said so.
    pub replay_bytes: u64,
    /// Bytes fetched ahead of a sequential reader.
    pub read_ahead_bytes: u64,
    /// Bytes fetched to complete blobs.
    pub background_bytes: u64,
    /// Requests to origins.
    pub requests: u64,
    /// Requests that failed and were repeated.
    pub retries: u64,
    /// Requests that failed for good.
    pub refusals: u64,
    /// Blobs completed and verified.
    pub published: u64,
    /// Blobs that were fetched whole and had another digest.
    pub mismatches: u64,
    /// Fetches that wait at this moment.
    pub waiting: u64,
}

impl CountersSnapshot {
    /// The numbers in the order of [`NAMES`](crate::source::counts::NAMES), with the answers of
    /// servers by status.
    pub(super) fn with_answers(&self, answers: [u64; CLASSES]) -> Counts {
        let mut counts = Counts::default();
        let own = [
            self.start_bytes,
            self.demand_bytes,
            self.repair_bytes,
            self.replay_bytes,
            self.read_ahead_bytes,
            self.background_bytes,
            self.requests,
            self.retries,
            self.refusals,
            self.published,
            self.mismatches,
            self.waiting,
        ];
        let all = own.into_iter().chain(answers);
        counts
            .iter_mut()
            .zip(all)
            .for_each(|(place, count)| *place = count);
        counts
    }
}

impl Counters {
    pub(super) fn add_bytes(&self, cause: Cause, bytes: u64) {
        self.bytes[cause as usize].fetch_add(bytes, Ordering::Relaxed);
    }

    pub(super) fn add_request(&self) {
        self.requests.fetch_add(1, Ordering::Relaxed);
    }

    pub(super) fn add_failure(&self, definite: bool) {
        let count = if definite {
            &self.refusals
        } else {
            &self.failures
        };
        count.fetch_add(1, Ordering::Relaxed);
    }

    pub(super) fn add_published(&self) {
        self.published.fetch_add(1, Ordering::Relaxed);
    }

    pub(super) fn add_mismatch(&self) {
        self.mismatches.fetch_add(1, Ordering::Relaxed);
    }

    pub(super) fn snapshot(&self, waiting: u64) -> CountersSnapshot {
        let load = |count: &AtomicU64| count.load(Ordering::Relaxed);
        let bytes = |cause: Cause| load(&self.bytes[cause as usize]);
        CountersSnapshot {
            start_bytes: bytes(Cause::Start),
            demand_bytes: bytes(Cause::Demand) + bytes(Cause::Read),
            repair_bytes: bytes(Cause::Repair) + bytes(Cause::RepairRead),
            replay_bytes: bytes(Cause::Replay),
            read_ahead_bytes: bytes(Cause::ReadAhead),
            background_bytes: bytes(Cause::Background),
            requests: load(&self.requests),
            retries: load(&self.failures),
            refusals: load(&self.refusals),
            published: load(&self.published),
            mismatches: load(&self.mismatches),
            waiting,
        }
    }
}
