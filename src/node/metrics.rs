//! `GET /metrics`: figures of the node and its disks as OpenMetrics text.
//!
//! Figures of disks are computed at each scrape from the state of the node, without asking disk processes.

use std::fmt;
use std::sync::atomic::AtomicU64;

use prometheus_client::encoding::EncodeLabelSet;
use prometheus_client::encoding::text::encode;
use prometheus_client::metrics::counter::{ConstCounter, Counter};
use prometheus_client::metrics::family::Family;
use prometheus_client::metrics::gauge::Gauge;
use prometheus_client::metrics::info::Info;
use prometheus_client::registry::Registry;

use super::disk::State;
use super::disks::Disks;
use crate::version::VERSION;

/// Type of the text.
pub const CONTENT_TYPE: &str = "application/openmetrics-text; version=1.0.0; charset=utf-8";

/// Labels of a counted request.
#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
pub struct RequestLabels {
    /// Method of the request.
    pub method: String,
    /// Pattern of its route, never the path itself.
    pub route: String,
    /// Status of its answer.
    pub code: u16,
}

#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
struct DiskLabels {
    disk: String,
}

#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
struct StateLabels {
    state: &'static str,
}

/// Counters of the node itself.
#[derive(Debug, Default)]
pub struct Metrics {
    requests: Family<RequestLabels, Counter>,
}

impl Metrics {
    /// Counts an answered request.
    pub fn count(&self, labels: &RequestLabels) {
        self.requests.get_or_create(labels).inc();
    }

    /// Returns all figures as text.
    ///
    /// # Errors
    /// None in practice: writing to a string cannot fail.
    pub fn text(&self, disks: &Disks) -> Result<String, fmt::Error> {
        let mut registry = Registry::default();
        registry.register(
            "ovbd_api_requests",
            "Requests answered",
            self.requests.clone(),
        );
        let build = Info::new(vec![("version", VERSION)]);
        registry.register("ovbd_build", "Version of the node", build);
        let states = Family::<StateLabels, Gauge>::default();
        for state in State::ALL {
            drop(states.get_or_create(&StateLabels {
                state: state.word(),
            }));
        }
        let sizes = Family::<DiskLabels, Gauge<u64, AtomicU64>>::default();
        let restarts = Family::<DiskLabels, Counter>::default();
        for disk in disks.all() {
            let labels = DiskLabels {
                disk: disk.id().to_string(),
            };
            states
                .get_or_create(&StateLabels {
                    state: disk.state().word(),
                })
                .inc();
            if let Some(size) = disk.size() {
                sizes.get_or_create(&labels).set(size);
            }
            restarts.get_or_create(&labels).inc_by(disk.restarts());
        }
        registry.register("ovbd_disks", "Disks by state", states);
        registry.register("ovbd_disk_size_bytes", "Size of the disk", sizes);
        registry.register(
            "ovbd_disk_restarts",
            "Restarts of the disk's process",
            restarts,
        );
        let events = ConstCounter::new(disks.events().count());
        registry.register("ovbd_events", "Events since the node's start", events);
        let mut text = String::new();
        encode(&mut text, &registry)?;
        Ok(text)
    }
}
