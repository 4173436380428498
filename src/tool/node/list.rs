//! Disks and snapshots as text.

use std::fmt::Write;
use std::time::{SystemTime, UNIX_EPOCH};

use serde_json::Value;

use crate::tool::table::{Align, Table, printable, size, span};

const ABSENT: &str = "-";

/// Returns the disks as a table, and the reasons of failed ones.
pub fn disks(disks: &[Value]) -> String {
    use Align::{Left, Right};
    let mut table = Table::new([
        ("DISK", Left),
        ("STATE", Left),
        ("SIZE", Right),
        ("AGE", Right),
        ("PID", Right),
        ("RESTARTS", Right),
        ("FRONT-END", Right),
        ("CONTENT", Left),
        ("SOCKET", Left),
    ]);
    let mut reasons = String::new();
    for disk in disks {
        let text = |field: &str| disk[field].as_str().unwrap_or(ABSENT).to_owned();
        let number = |value: &Value| {
            value
                .as_u64()
                .map_or(ABSENT.into(), |value| value.to_string())
        };
        let age = disk["created"]
            .as_u64()
            .map(|created| span(now().saturating_sub(created)));
        table.add([
            text("id"),
            text("state"),
            disk["size_bytes"].as_u64().map_or(ABSENT.into(), size),
            age.unwrap_or_else(|| ABSENT.into()),
            number(&disk["pid"]),
            number(&disk["restarts"]),
            number(&disk["front_end"]["pid"]),
            content(disk),
            text("socket"),
        ]);
        if let Some(error) = disk["error"].as_str() {
            // Writing to a string cannot fail.
            let _ = writeln!(reasons, "{}: {}", text("id"), printable(error));
        }
    }
    table.to_string() + &reasons
}

/// What a disk was made of, in a few words.
fn content(disk: &Value) -> String {
    let content = &disk["content"];
    let base = match (content["layers"].as_array(), content["config"].as_str()) {
        (Some(layers), _) if layers.len() == 1 => "1 layer".to_owned(),
        (Some(layers), _) => format!("{} layers", layers.len()),
        (_, Some(config)) => config.to_owned(),
        _ => content["image"].as_str().unwrap_or(ABSENT).to_owned(),
    };
    match disk["upper"].is_null() {
        true => base,
        false => base + ", writable",
    }
}

/// Returns one line about a disk that was made or changed.
pub fn one(disk: &Value) -> String {
    let text = |field: &str| printable(disk[field].as_str().unwrap_or(ABSENT));
    let size = disk["size_bytes"].as_u64().map_or(ABSENT.into(), size);
    format!(
        "{}: {}, {size}, {}\n",
        text("id"),
        text("state"),
        text("socket")
    )
}

/// Returns the snapshots as a table.
pub fn snapshots(snapshots: &[Value]) -> String {
    let mut table = Table::new([
        ("SNAPSHOT", Align::Left),
        ("SEALED", Align::Left),
        ("UUID", Align::Left),
        ("LAYER", Align::Left),
    ]);
    for snapshot in snapshots {
        let text = |field: &str| snapshot[field].as_str().unwrap_or(ABSENT).to_owned();
        let sealed = match snapshot["sealed"].as_bool() {
            Some(true) => "yes",
            _ => "no",
        };
        table.add([text("name"), sealed.to_owned(), text("uuid"), text("layer")]);
    }
    table.to_string()
}

/// Returns the rate limits of a disk as a table.
pub fn limits(disk: &Value) -> String {
    let mut table = Table::new([
        ("LIMIT", Align::Left),
        ("RATE", Align::Right),
        ("BURST", Align::Right),
    ]);
    for (name, in_bytes) in [("ops", false), ("bandwidth", true)] {
        let bucket = &disk["limits"][name];
        let amount = |tokens: u64| match in_bytes {
            true => size(tokens),
            false => tokens.to_string(),
        };
        let tokens = bucket["size"].as_u64();
        let period = bucket["refill_time"].as_u64().unwrap_or(0);
        let rate = match (tokens, period) {
            (None, _) | (_, 0) => "none".to_owned(),
            (Some(tokens), 1000) => amount(tokens) + "/s",
            (Some(tokens), period) => format!("{}/{period} ms", amount(tokens)),
        };
        let burst = bucket["one_time_burst"].as_u64();
        table.add([name.to_owned(), rate, burst.map_or(ABSENT.into(), amount)]);
    }
    table.to_string()
}

fn now() -> u64 {
    let now = SystemTime::now().duration_since(UNIX_EPOCH);
    now.unwrap_or_default().as_secs()
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn a_failed_disk_is_listed_with_its_reason() {
        let failed =
            json!({ "id": "a", "state": "failed", "error": "no\nlayer", "size_bytes": null });
        let writable = json!({
            "id": "longer", "state": "listening", "size_bytes": 10_u64 << 30, "created": now() - 61, "pid": 7,
            "restarts": 0, "front_end": { "pid": 9 }, "content": { "layers": ["/a", "/b"] },
            "upper": { "dir": "/u" }, "socket": "/run/longer.sock",
        });
        let text = disks(&[failed, writable]);
        let lines: Vec<_> = text.lines().collect();
        assert_eq!(lines.len(), 4, "{text}");
        assert!(
            lines[2].starts_with("longer  listening  10.00 GiB  1m1s"),
            "{text}"
        );
        assert!(
            lines[2].ends_with("2 layers, writable  /run/longer.sock"),
            "{text}"
        );
        assert_eq!(lines[3], "a: no\\nlayer");
    }

    #[test]
    fn limits_have_units() {
        let disk = json!({ "limits": { "ops": null, "bandwidth": { "size": 1 << 20, "refill_time": 100 } } });
        let text = limits(&disk);
        let words: Vec<_> = text.split_whitespace().collect();
        let expected = [
            "LIMIT",
            "RATE",
            "BURST",
            "ops",
            "none",
            "-",
            "bandwidth",
            "1.00",
            "MiB/100",
            "ms",
            "-",
        ];
        assert_eq!(words, expected);
    }
}
