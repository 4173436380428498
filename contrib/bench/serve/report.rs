//! What was measured, as tables and as JSON.

use std::fmt::Write;

use serde_json::{Value, json};

use crate::subjects::{Kind, Subject};

/// One run of one subject.
#[derive(Clone, Copy)]
pub struct Sample {
    /// Reads per second.
    pub rate: f64,
    /// Microseconds of processor time of the daemon for each read.
    pub cpu: f64,
    /// The same of the front-end; zero where there is none.
    pub front: f64,
    /// Microseconds half of the reads took at most; zero where there is no such thing.
    pub p50: f64,
    /// The same for 99 of 100.
    pub p99: f64,
    /// Bytes the daemon had to read from storage.
    pub stored: u64,
}

/// All runs of one subject.
pub struct Row {
    /// Its name.
    pub name: String,
    /// Its sort; none for a bare loop.
    pub kind: Option<Kind>,
    /// One for each round.
    pub samples: Vec<Sample>,
}

/// All runs of one workload with one number of queues.
pub struct Table {
    /// Whether the page cache held nothing of the files.
    pub cold: bool,
    /// Name of the workload.
    pub workload: &'static str,
    /// Bytes of a read.
    pub len: usize,
    /// Number of queues.
    pub queues: usize,
    /// The subjects.
    pub rows: Vec<Row>,
}

/// The middle of some numbers.
pub fn median(numbers: impl Iterator<Item = f64>) -> f64 {
    let mut numbers: Vec<_> = numbers.filter(|number| number.is_finite()).collect();
    numbers.sort_by(f64::total_cmp);
    match numbers.len() {
        0 => f64::NAN,
        len => (numbers[(len - 1) / 2] + numbers[len / 2]) / 2.0,
    }
}

impl Row {
    /// The row of a subject, without samples.
    pub fn new(subject: &Subject<'_>) -> Self {
        Self {
            name: subject.name.clone(),
            kind: Some(subject.kind),
            samples: Vec::new(),
        }
    }

    /// The median over the rounds of one figure.
    pub fn median(&self, figure: impl Fn(&Sample) -> f64) -> f64 {
        median(self.samples.iter().map(figure))
    }

    /// The median over the rounds of one figure against the same of another row in that round.
    fn against(&self, other: &Row, figure: impl Fn(&Sample) -> f64) -> f64 {
        let rounds = self.samples.iter().zip(&other.samples);
        median(rounds.map(|(own, other)| figure(own) / figure(other)))
    }
}

impl Table {
    /// The peer with the best median of all that serve uncompressed data.
    fn best_peer(&self) -> Option<&Row> {
        let peers = self.rows.iter().filter(|row| row.kind == Some(Kind::Peer));
        peers.max_by(|a, b| a.median(|s| s.rate).total_cmp(&b.median(|s| s.rate)))
    }

    /// What the table is about.
    pub fn title(&self) -> String {
        let queues = if self.queues == 1 {
            "one queue"
        } else {
            "two queues"
        };
        let cold = if self.cold { "cold " } else { "" };
        format!("{cold}{}, {queues}", self.workload)
    }

    /// The table in Markdown.
    pub fn markdown(&self) -> String {
        let best = self.best_peer();
        let mut out = self.title();
        if let Some(best) = best {
            let _ = write!(out, "; ratios are to {}", best.name);
        }
        out += "\n\n| image | reads/s | MB/s | ratio | CPU us/read | ratio | p50 us | p99 us | front-end us/read | processors |\n";
        out += "|---|--:|--:|--:|--:|--:|--:|--:|--:|--:|\n";
        for row in &self.rows {
            let rate = row.median(|sample| sample.rate);
            let ratio = |figure: fn(&Sample) -> f64| match best {
                Some(best) => format!("{:.2}", row.against(best, figure)),
                None => String::new(),
            };
            let time = |figure: fn(&Sample) -> f64| match row.median(figure) {
                0.0 => String::new(),
                time => format!("{time:.1}"),
            };
            let busy = match row.median(|sample| sample.front) {
                0.0 => String::new(),
                front => format!(
                    "{:.2}",
                    rate * (row.median(|sample| sample.cpu) + front) / 1e6
                ),
            };
            let _ = writeln!(
                out,
                "| {} | {rate:.0} | {:.0} | {} | {:.2} | {} | {} | {} | {} | {busy} |",
                row.name,
                rate * self.len as f64 / 1e6,
                ratio(|sample| sample.rate),
                row.median(|sample| sample.cpu),
                ratio(|sample| sample.cpu),
                time(|sample| sample.p50),
                time(|sample| sample.p99),
                time(|sample| sample.front),
            );
        }
        out += "\n";
        for row in &self.rows {
            self.notes(row, &mut out);
        }
        out
    }

    /// How the rows compare with those of the same workload with another number of queues.
    pub fn against(&self, other: &Table) -> String {
        let mut out = format!(
            "{} to {}: reads/s, CPU us/read\n",
            self.title(),
            other.title()
        );
        for row in &self.rows {
            let Some(basis) = other.rows.iter().find(|basis| basis.name == row.name) else {
                continue;
            };
            let ratio = |figure: fn(&Sample) -> f64| row.median(figure) / basis.median(figure);
            let (rate, cpu) = (ratio(|sample| sample.rate), ratio(|sample| sample.cpu));
            let _ = writeln!(out, "{}: {rate:.2}, {cpu:.2}", row.name);
        }
        out
    }

    /// What else there is to say of a row: how it compares with what it varies, and whether it was
    /// as warm as it should be.
    fn notes(&self, row: &Row, out: &mut String) {
        let stem = row.name.rsplit_once(['@', '+']).map(|(stem, _)| stem);
        let basis = self
            .rows
            .iter()
            .find(|other| Some(other.name.as_str()) == stem);
        if let Some(basis) = basis {
            let (rate, cpu) = (
                row.against(basis, |sample| sample.rate),
                row.against(basis, |sample| sample.cpu),
            );
            let _ = writeln!(
                out,
                "{} to {}: reads/s {rate:.2}, CPU {cpu:.2}",
                row.name, basis.name
            );
        }
        let stored = row.median(|sample| sample.stored as f64) / 1e6;
        if stored > 0.0 && !self.cold {
            let _ = writeln!(
                out,
                "{} read {stored:.1} MB from storage in a turn",
                row.name
            );
        }
    }

    /// All samples.
    pub fn json(&self) -> Value {
        let rows = self.rows.iter().map(|row| {
            let all =
                |figure: fn(&Sample) -> f64| row.samples.iter().map(figure).collect::<Vec<_>>();
            json!({
                "image": row.name,
                "reads_per_second": all(|sample| sample.rate),
                "cpu_us_per_read": all(|sample| sample.cpu),
                "front_end_cpu_us_per_read": all(|sample| sample.front),
                "p50_us": all(|sample| sample.p50),
                "p99_us": all(|sample| sample.p99),
                "bytes_from_storage": all(|sample| sample.stored as f64),
            })
        });
        json!({
            "cold": self.cold,
            "workload": self.workload,
            "bytes_per_read": self.len,
            "queues": self.queues,
            "images": rows.collect::<Vec<_>>(),
        })
    }
}
