//! Description of a disk for clients.

use serde_json::{Map, Value, json};

use super::super::entry::Entry;
use super::super::spec::DiskSpec;
use super::{Disk, State};
use crate::engine::stats::DiskCell;
use crate::engine::stats::figures::Figures;

impl Disk {
    /// Returns the description for clients, with the values of the statistics page `figures`.
    pub fn view(&self, figures: &Figures) -> Value {
        let status = self.status();
        let process = self.process();
        let pid = process.as_ref().map(|process| process.identity().pid);
        let serves = status.state == State::Listening;
        let mut view = json!({
            "id": self.id,
            "state": status.state,
            "error": status.error,
            "pid": pid,
            "size_bytes": status.known.size,
            "restarts": self.restarts(),
            // The page of a disk that is not served is that of a process that has ended.
            "front_end": if serves { figures.front_end() } else { Value::Null },
            "queues_active": if serves { figures.disk(DiskCell::QueuesActive) } else { 0 },
        });
        if let (Some(entry), Some(fields)) = (&status.entry, view.as_object_mut()) {
            add_entry(fields, entry);
            let serial = entry.spec.serial.as_ref().or(status.known.serial.as_ref());
            fields.insert("serial".into(), json!(serial));
        }
        view
    }
}

fn add_entry(fields: &mut Map<String, Value>, entry: &Entry) {
    let spec = entry.spec.with_defaults();
    let mut add = |name: &str, value: Value| drop(fields.insert(name.to_owned(), value));
    add("generation", json!(entry.generation));
    add("socket", json!(entry.socket));
    add("image", json!(entry.content.key()));
    add("content", json!(entry.content));
    add("upper", json!(entry.upper));
    add("created", json!(entry.created));
    let DiskSpec {
        upper_limit,
        socket_mode,
        socket_owner,
        labels,
        limits,
        prefetch,
        num_queues,
        queue_size,
        poll_us,
        block_cache,
        on_full,
        takeover,
        // Resolved in the fields above, or by the process.
        image: _,
        config: _,
        layers: _,
        from: _,
        upper: _,
        socket: _,
        serial: _,
    } = spec;
    add("upper_limit", json!(upper_limit));
    add("socket_mode", json!(socket_mode));
    add("socket_owner", json!(socket_owner));
    add("labels", json!(labels));
    add("limits", json!(limits));
    add("prefetch", json!(prefetch));
    add("num_queues", json!(num_queues));
    add("queue_size", json!(queue_size));
    add("poll_us", json!(poll_us));
    add("block_cache", json!(block_cache));
    add("on_full", json!(on_full));
    add("takeover", json!(takeover));
}
