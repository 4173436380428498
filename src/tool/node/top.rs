//! `ovbd node top`: rates of all disks, from two readings of the metrics.

use std::collections::BTreeMap;
use std::time::{Duration, Instant};

use serde::Serialize;

use super::samples::samples;
use crate::tool::table::{Align, Table, size};

/// Counters of a disk.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
struct Counters {
    reads: f64,
    writes: f64,
    read_bytes: f64,
    write_bytes: f64,
    errors: f64,
    throttled: f64,
}

/// A reading of the metrics.
#[derive(Clone, Debug)]
pub struct Reading {
    at: Instant,
    disks: BTreeMap<String, Counters>,
}

/// What a disk did in each second between two readings.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Rates {
    /// The disk.
    pub disk: String,
    /// Read requests.
    pub reads: f64,
    /// Write requests.
    pub writes: f64,
    /// Bytes read.
    pub read_bytes: f64,
    /// Bytes written.
    pub write_bytes: f64,
    /// Requests that failed.
    pub errors: f64,
    /// Share of the time in which a rate limit held requests back, from 0 to 1 for each limit.
    pub throttled: f64,
}

impl Reading {
    /// Reads the metrics in `text`.
    pub fn of(text: &str) -> Self {
        let mut disks = BTreeMap::<_, Counters>::new();
        for sample in samples(text) {
            let label = |name| sample.labels.get(name).map_or("", String::as_str);
            let Some(disk) = sample.labels.get("disk") else {
                continue;
            };
            let counters = disks.entry(disk.clone()).or_default();
            match (sample.name, label("op")) {
                ("ovbd_requests_total", op) => {
                    match op {
                        "read" => counters.reads += sample.value,
                        "write" => counters.writes += sample.value,
                        _ => {}
                    }
                    if label("result") == "ioerr" {
                        counters.errors += sample.value;
                    }
                }
                ("ovbd_request_bytes_total", "read") => counters.read_bytes += sample.value,
                ("ovbd_request_bytes_total", "write") => counters.write_bytes += sample.value,
                ("ovbd_throttled_seconds_total", _) => counters.throttled += sample.value,
                _ => {}
            }
        }
        Self {
            at: Instant::now(),
            disks,
        }
    }

    /// Returns the rates since `earlier`, the busiest disk first. A disk that is new since then is left out.
    pub fn rates_since(&self, earlier: &Self) -> Vec<Rates> {
        self.rates(earlier, self.at.saturating_duration_since(earlier.at))
    }

    fn rates(&self, earlier: &Self, span: Duration) -> Vec<Rates> {
        let seconds = span.as_secs_f64().max(f64::MIN_POSITIVE);
        let rates = self.disks.iter().filter_map(|(disk, now)| {
            let then = earlier.disks.get(disk)?;
            // A counter that went back is that of a new disk of the same name.
            let rate = |now: f64, then: f64| (now - then).max(0.0) / seconds;
            Some(Rates {
                disk: disk.clone(),
                reads: rate(now.reads, then.reads),
                writes: rate(now.writes, then.writes),
                read_bytes: rate(now.read_bytes, then.read_bytes),
                write_bytes: rate(now.write_bytes, then.write_bytes),
                errors: rate(now.errors, then.errors),
                throttled: rate(now.throttled, then.throttled),
            })
        });
        let mut rates: Vec<_> = rates.collect();
        let busy = |rates: &Rates| rates.read_bytes + rates.write_bytes;
        rates.sort_by(|a, b| busy(b).total_cmp(&busy(a)).then(a.disk.cmp(&b.disk)));
        rates
    }
}

/// Returns the rates as a table.
pub fn table(rates: &[Rates]) -> String {
    use Align::{Left, Right};
    let mut table = Table::new([
        ("DISK", Left),
        ("READS/s", Right),
        ("WRITES/s", Right),
        ("READ/s", Right),
        ("WRITTEN/s", Right),
        ("ERRORS/s", Right),
        ("THROTTLED", Right),
    ]);
    for rates in rates {
        table.add([
            rates.disk.clone(),
            format!("{:.0}", rates.reads),
            format!("{:.0}", rates.writes),
            size(rates.read_bytes as u64),
            size(rates.write_bytes as u64),
            format!("{:.0}", rates.errors),
            format!("{:.0} %", rates.throttled * 100.0),
        ]);
    }
    table.to_string()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn rates_are_differences_and_the_busiest_is_first() {
        let earlier = "ovbd_requests_total{disk=\"a\",op=\"read\",result=\"ok\"} 10\n\
                       ovbd_requests_total{disk=\"b\",op=\"read\",result=\"ok\"} 1\n\
                       ovbd_disks{state=\"listening\"} 3\n";
        let later = "ovbd_requests_total{disk=\"a\",op=\"read\",result=\"ok\"} 4\n\
                     ovbd_requests_total{disk=\"b\",op=\"read\",result=\"ok\"} 21\n\
                     ovbd_requests_total{disk=\"b\",op=\"read\",result=\"ioerr\"} 2\n\
                     ovbd_request_bytes_total{disk=\"b\",op=\"read\"} 4096\n\
                     ovbd_throttled_seconds_total{disk=\"b\",bucket=\"ops\"} 1\n\
                     ovbd_requests_total{disk=\"new\",op=\"read\",result=\"ok\"} 9\n";
        let (earlier, later) = (Reading::of(earlier), Reading::of(later));
        let rates = later.rates(&earlier, Duration::from_secs(2));
        let names: Vec<_> = rates.iter().map(|rates| rates.disk.as_str()).collect();
        assert_eq!(names, ["b", "a"]);
        assert_eq!((rates[0].reads, rates[0].errors), (11.0, 1.0));
        assert_eq!((rates[0].read_bytes, rates[0].throttled), (2048.0, 0.5));
        assert_eq!(rates[1].reads, 0.0, "counted anew");
        let text = table(&rates);
        assert!(text.contains("b          11         0  2.00 KiB"), "{text}");
    }
}
