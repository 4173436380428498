//! `GET /metrics`: metrics of the node and its disks.
//!
//! Those of disks come from their statistics pages, without a message to a disk process. A disk that is removed leaves
//! its part of the sums over all disks to the node's counters, so that the sums never shrink.

use std::collections::BTreeSet;
use std::sync::Arc;

use super::disk::{Disk, State};
use super::disks::Disks;
use super::shown_label::ShownLabel;
use crate::engine::stats::exposition::{Exposition, Format, Kind};
use crate::engine::stats::report::{self, DiskFigures};
use crate::version::VERSION;

/// Returns all metrics as text. Reads files.
pub fn text(disks: &Disks, format: Format) -> String {
    let all = disks.all();
    let mut text = Exposition::new(format);
    text.family("ovbd_build", Kind::Info, "Version of the node.");
    text.sample(&[("version", VERSION)], 1);
    states(&mut text, &all, disks.shown_labels());
    let figures: Vec<_> = all
        .iter()
        .map(|disk| DiskFigures {
            id: disk.id().to_string(),
            figures: disks.figures(disk),
        })
        .collect();
    report::write(&mut text, &figures, &disks.counters().retired());
    text.family(
        "ovbd_events",
        Kind::Counter,
        "Events since the node's start.",
    );
    text.sample(&[], disks.events().count());
    disks.counters().write(&mut text);
    text.finish()
}

/// Metrics that follow from the node's own knowledge of its disks.
fn states(text: &mut Exposition, disks: &[Arc<Disk>], shown: &[ShownLabel]) {
    text.family("ovbd_disks", Kind::Gauge, "Disks by state.");
    for state in State::ALL {
        let count = disks.iter().filter(|disk| disk.state() == state).count();
        text.sample(&[("state", state.word())], count);
    }
    text.family(
        "ovbd_images_open",
        Kind::Gauge,
        "Images that disks are made of.",
    );
    let keys = disks
        .iter()
        .filter_map(|disk| Some(disk.entry()?.content.key()));
    text.sample(&[], keys.collect::<BTreeSet<_>>().len());
    text.family("ovbd_disk", Kind::Info, "Content of the disk.");
    for disk in disks {
        let Some(entry) = disk.entry() else { continue };
        let content = entry.content.name();
        let readonly = entry.upper.is_none().to_string();
        let mut labels = vec![
            ("disk", disk.id().as_str()),
            ("image", &content),
            ("readonly", &readonly),
        ];
        // A label without a value is the same as none.
        let values = shown.iter().filter_map(|label| {
            let value = entry.spec.labels.get(label.key())?;
            Some((label.name(), value.as_str()))
        });
        labels.extend(values);
        text.sample(&labels, 1);
    }
    text.family(
        "ovbd_disk_restarts",
        Kind::Counter,
        "Restarts of the disk's process since the node's start.",
    );
    for disk in disks {
        for (reason, count) in disk.restarts_by_reason() {
            text.sample(&[("disk", disk.id().as_str()), ("reason", reason)], count);
        }
    }
}
