//! The counters of one disk as JSON: the same cells as in the metrics, in the same words.

use serde_json::{Map, Value, json};

use super::DiskCell;
use super::exposition::seconds;
use super::figures::Figures;
use super::queue::{CODECS, DURATION_BOUNDS, Op, READ_SOURCES, RESULTS, cell};
use super::report::{BY_WORD, DISK_COUNTERS, GAUGES, LIMITS, QUEUE_COUNTERS, WITH_BYTES};

impl Figures {
    /// Describes the values. A field has the name of its metric, without `ovbd_` and `disk_`.
    pub fn describe(&self) -> Value {
        let mut fields = Map::new();
        let mut add = |name: &str, value: Value| drop(fields.insert(field(name).to_owned(), value));
        for (name, _, gauge) in GAUGES {
            let value = self.disk(gauge);
            let limited = gauge != DiskCell::UpperLimit || value != u64::MAX;
            add(name, json!(limited.then_some(value)));
        }
        for (name, _, counter) in DISK_COUNTERS {
            add(name, json!(self.disk(counter)));
        }
        for (name, _, counter) in QUEUE_COUNTERS {
            add(name, json!(self.queue(counter)));
        }
        for ((name, _, _), cells) in BY_WORD {
            let words = cells.map(|(word, counter)| (word.to_owned(), json!(self.disk(counter))));
            add(name, Value::Object(words.into_iter().collect()));
        }
        add("requests", self.described_requests());
        add("throttled", self.described_throttling());
        add("layer_reads", self.described_layer_reads());
        let decoded = CODECS.into_iter().enumerate().map(|(number, codec)| {
            let blocks = self.queue(cell::BLOCKS_DECODED + number);
            (codec.to_owned(), json!(blocks))
        });
        add("blocks_decoded", Value::Object(decoded.collect()));
        add(
            "sigbus_slots_used",
            json!(self.disk(DiskCell::WatchedRanges)),
        );
        add(
            "duration_bounds_seconds",
            json!(DURATION_BOUNDS.map(seconds)),
        );
        Value::Object(fields)
    }

    /// By operation: results, bytes, time, and counts by the bounds of the duration.
    fn described_requests(&self) -> Value {
        let described = Op::ALL.map(|op| {
            let results = RESULTS.into_iter().zip(self.requests(op));
            let mut fields: Map<_, _> = results
                .map(|(word, count)| (word.to_owned(), json!(count)))
                .collect();
            let position = WITH_BYTES.iter().position(|word| *word == op.word());
            if let Some(position) = position {
                fields.insert("bytes".into(), json!(self.queue(cell::BYTES + position)));
            }
            if op != Op::Other {
                let nanos = self.queue(cell::DURATION_NANOS + op as usize);
                fields.insert("duration_seconds".into(), json!(seconds(nanos)));
                fields.insert("durations".into(), json!(self.durations(op)));
            }
            (op.word().to_owned(), Value::Object(fields))
        });
        Value::Object(described.into_iter().collect())
    }

    fn described_throttling(&self) -> Value {
        let described = LIMITS.into_iter().enumerate().map(|(number, bucket)| {
            let waits = self.queue(cell::THROTTLED_REQUESTS + number);
            let nanos = self.queue(cell::THROTTLED_NANOS + number);
            let fields = json!({ "requests": waits, "seconds": seconds(nanos) });
            (bucket.to_owned(), fields)
        });
        Value::Object(described.collect())
    }

    fn described_layer_reads(&self) -> Value {
        let described = READ_SOURCES
            .into_iter()
            .enumerate()
            .map(|(number, source)| {
                let reads = self.queue(cell::LAYER_READS + number);
                let bytes = self.queue(cell::LAYER_READ_BYTES + number);
                (source.to_owned(), json!({ "reads": reads, "bytes": bytes }))
            });
        Value::Object(described.collect())
    }
}

/// The field for a metric.
fn field(name: &str) -> &str {
    let name = name.strip_prefix("ovbd_").unwrap_or(name);
    name.strip_prefix("disk_").unwrap_or(name)
}
