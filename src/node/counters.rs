//! Counters of the node itself: requests of the API, and what disks that are gone have counted.

use std::collections::BTreeMap;
use std::fs;
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use super::clock;
use crate::engine::stats::exposition::{Exposition, Kind};
use crate::engine::stats::figures::Figures;
use crate::engine::stats::queue::{BUCKETS, DURATION_BOUNDS};

/// Methods that are counted by name; others are counted as `other`, so that a client cannot make series without end.
const METHODS: [&str; 6] = ["GET", "HEAD", "PUT", "POST", "PATCH", "DELETE"];

/// Labels of a counted request.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
struct RequestLabels {
    route: &'static str,
    method: &'static str,
    code: u16,
}

/// Durations: counts by bucket, and their sum.
#[derive(Clone, Copy, Debug, Default)]
struct Durations {
    counts: [u64; BUCKETS],
    nanos: u64,
}

impl Durations {
    fn add(&mut self, took: Duration) {
        let nanos = u64::try_from(took.as_nanos()).unwrap_or(u64::MAX);
        let bucket = DURATION_BOUNDS.iter().position(|bound| nanos <= *bound);
        self.counts[bucket.unwrap_or(BUCKETS - 1)] += 1;
        self.nanos = self.nanos.saturating_add(nanos);
    }
}

/// Counters of the node itself.
#[derive(Debug)]
pub struct Counters {
    requests: Mutex<Requests>,
    /// Counters of disks that are gone.
    retired: Mutex<Figures>,
    /// Start of the node, in seconds since 1970.
    start: u64,
}

#[derive(Debug, Default)]
struct Requests {
    answered: BTreeMap<RequestLabels, u64>,
    durations: BTreeMap<&'static str, Durations>,
    /// Of requests that made a disk.
    adds: Durations,
}

impl Default for Counters {
    fn default() -> Self {
        Self {
            requests: Mutex::default(),
            retired: Mutex::default(),
            start: clock::now(),
        }
    }
}

impl Counters {
    /// Counts an answered request. `route` is the pattern of its path, never the path itself.
    pub fn count(&self, method: &str, route: &'static str, code: u16, took: Duration) {
        let known = METHODS.into_iter().find(|known| *known == method);
        let method = known.unwrap_or("other");
        let labels = RequestLabels {
            route,
            method,
            code,
        };
        let mut requests = self.requests();
        *requests.answered.entry(labels).or_default() += 1;
        requests.durations.entry(route).or_default().add(took);
        if code == 201 {
            requests.adds.add(took);
        }
    }

    /// Keeps the counters of a disk that is removed, for sums over all disks.
    pub fn retire(&self, disk: &Figures) {
        self.gone().add(disk);
    }

    /// Returns the sums over the disks that are gone.
    pub fn retired(&self) -> Figures {
        self.gone().clone()
    }

    /// Adds the metrics of the API and of the node's process.
    pub fn write(&self, text: &mut Exposition) {
        self.api(text);
        self.process(text);
    }

    fn api(&self, text: &mut Exposition) {
        let requests = self.requests();
        text.family("ovbd_api_requests", Kind::Counter, "Requests answered.");
        for (labels, count) in &requests.answered {
            let code = labels.code.to_string();
            let labels = [
                ("method", labels.method),
                ("route", labels.route),
                ("code", &code),
            ];
            text.sample(&labels, count);
        }
        text.family(
            "ovbd_api_request_duration_seconds",
            Kind::Histogram,
            "Time from the head of a request to its answer.",
        );
        for (route, durations) in &requests.durations {
            text.durations(&[("route", route)], &durations.counts, durations.nanos);
        }
        text.family(
            "ovbd_disk_add_duration_seconds",
            Kind::Histogram,
            "Time of requests that made a disk.",
        );
        text.durations(&[], &requests.adds.counts, requests.adds.nanos);
    }

    /// Metrics of the node's process, with their usual names.
    fn process(&self, text: &mut Exposition) {
        text.family(
            "process_start_time_seconds",
            Kind::Gauge,
            "Start of the node, in seconds since 1970.",
        );
        text.sample(&[], self.start);
        if let Ok(open) = fs::read_dir("/proc/self/fd") {
            text.family("process_open_fds", Kind::Gauge, "Open descriptors.");
            text.sample(&[], open.count());
        }
        let limit = rustix::process::getrlimit(rustix::process::Resource::Nofile);
        if let Some(limit) = limit.current {
            text.family("process_max_fds", Kind::Gauge, "Most open descriptors.");
            text.sample(&[], limit);
        }
        if let Some(bytes) = resident_bytes() {
            text.family(
                "process_resident_memory_bytes",
                Kind::Gauge,
                "Resident memory.",
            );
            text.sample(&[], bytes);
        }
    }

    fn requests(&self) -> MutexGuard<'_, Requests> {
        self.requests.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn gone(&self) -> MutexGuard<'_, Figures> {
        self.retired.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

fn resident_bytes() -> Option<u64> {
    let text = fs::read_to_string("/proc/self/statm").ok()?;
    let pages: u64 = text.split(' ').nth(1)?.parse().ok()?;
    pages.checked_mul(rustix::param::page_size() as u64)
}
