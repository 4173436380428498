//! The control API's figures about layers in registries.

use std::time::Duration;

use serde_json::{Map, Value, json};

use super::device::Device;
use crate::source::client::{Client, WAITS};
use crate::source::counts::NAMES;

/// How long the fetcher may take to answer.
const PATIENCE: Duration = Duration::from_millis(500);

impl Device {
    /// Returns the fetcher's counters and the local bytes of each layer; null for a disk without remote layers.
    pub(super) fn fetching(&self) -> Value {
        let Some(client) = self.client() else {
            return Value::Null;
        };
        let image = self.volume().image();
        let layers = image.layers().iter().map(|layer| {
            let blob = layer.container().blob();
            json!({
                "layer": layer.layer_ref(),
                "bytes": blob.len(),
                "local_bytes": blob.local_bytes(),
            })
        });
        json!({
            "layers": layers.collect::<Value>(),
            "waiting_reads": client.waiting(),
            "waits": waits(client),
            "fetcher": client.counts(PATIENCE).map(|counts| {
                let named = NAMES.iter().zip(counts);
                named.map(|(name, count)| ((*name).to_owned(), count.into())).collect::<Map<_, _>>()
            }),
        })
    }
}

/// Returns the number of fetches, by an upper bound of their duration in milliseconds.
fn waits(client: &Client) -> Map<String, Value> {
    let limits = WAITS.iter().map(|limit| limit.as_millis().to_string());
    let names = limits.chain(["longer".to_owned()]);
    names.zip(client.waits().map(Value::from)).collect()
}
