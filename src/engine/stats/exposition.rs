//! Text of metrics: the Prometheus text format 0.0.4, or OpenMetrics 1.0 for a scraper that asks for it.
//!
//! Both are lines of `name{label="value"} number` below a description of each family. They differ in the name of a
//! counter's family, in the type of an information metric, and in the last line.

use std::fmt::{Display, Write};

use super::queue::{BUCKETS, DURATION_BOUNDS};

const NANOS_PER_SECOND: f64 = 1e9;

/// Format of the text.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Format {
    /// Prometheus text format 0.0.4.
    Text,
    /// OpenMetrics 1.0.
    OpenMetrics,
}

impl Format {
    /// Returns the format for the value of an `Accept` header.
    pub fn accepted(accept: &str) -> Self {
        match accept.contains("application/openmetrics-text") {
            true => Self::OpenMetrics,
            false => Self::Text,
        }
    }

    /// Returns the value of the `Content-Type` header.
    pub fn content_type(self) -> &'static str {
        match self {
            Self::Text => "text/plain; version=0.0.4; charset=utf-8",
            Self::OpenMetrics => "application/openmetrics-text; version=1.0.0; charset=utf-8",
        }
    }
}

/// Type of a metric family.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    /// Only grows; its samples end in `_total`.
    Counter,
    /// Any value.
    Gauge,
    /// Counts by upper bound.
    Histogram,
    /// A sum and a count.
    Summary,
    /// Always 1; the labels are the information. Its samples end in `_info`.
    Info,
}

/// Labels of a sample.
pub type Labels<'a> = &'a [(&'a str, &'a str)];

/// Text that families and samples are added to. All samples of a family follow its description.
#[derive(Debug)]
pub struct Exposition {
    text: String,
    format: Format,
    /// Name of the current family's samples.
    name: String,
}

impl Exposition {
    /// No metrics.
    pub fn new(format: Format) -> Self {
        Self {
            text: String::new(),
            format,
            name: String::new(),
        }
    }

    /// Begins the family `name`, without the ending of its samples.
    pub fn family(&mut self, name: &str, kind: Kind, help: &str) {
        let ending = match kind {
            Kind::Counter => "_total",
            Kind::Info => "_info",
            Kind::Gauge | Kind::Histogram | Kind::Summary => "",
        };
        self.name = format!("{name}{ending}");
        let family = match self.format {
            Format::Text => &self.name,
            Format::OpenMetrics => name,
        };
        let word = match (kind, self.format) {
            (Kind::Counter, _) => "counter",
            (Kind::Gauge, _) | (Kind::Info, Format::Text) => "gauge",
            (Kind::Histogram, _) => "histogram",
            (Kind::Summary, _) => "summary",
            (Kind::Info, Format::OpenMetrics) => "info",
        };
        self.text += &format!("# HELP {family} {help}\n# TYPE {family} {word}\n");
    }

    /// Adds a sample of the current family.
    pub fn sample(&mut self, labels: Labels<'_>, value: impl Display) {
        self.line("", labels, None, value);
    }

    /// Adds the sum in seconds and the count of a summary or histogram.
    pub fn sum_and_count(&mut self, labels: Labels<'_>, nanos: u64, count: u64) {
        self.line("_sum", labels, None, seconds(nanos));
        self.line("_count", labels, None, count);
    }

    /// Adds a histogram of durations: counts by bucket, and the sum of all durations.
    pub fn durations(&mut self, labels: Labels<'_>, counts: &[u64; BUCKETS], nanos: u64) {
        let mut sum = 0u64;
        let bounds = DURATION_BOUNDS.map(|bound| seconds(bound).to_string());
        let bounds = bounds.iter().map(String::as_str).chain(["+Inf"]);
        for (bound, count) in bounds.zip(counts) {
            sum = sum.saturating_add(*count);
            self.line("_bucket", labels, Some(("le", bound)), sum);
        }
        self.sum_and_count(labels, nanos, sum);
    }

    fn line(
        &mut self,
        ending: &str,
        labels: Labels<'_>,
        last: Option<(&str, &str)>,
        value: impl Display,
    ) {
        self.text.push_str(&self.name);
        self.text.push_str(ending);
        let mut separator = '{';
        for (name, value) in labels.iter().copied().chain(last) {
            self.text.push(separator);
            self.text.push_str(name);
            self.text.push_str("=\"");
            escape(value, &mut self.text);
            self.text.push('"');
            separator = ',';
        }
        if separator == ',' {
            self.text.push('}');
        }
        // Writing to a string cannot fail.
        let _ = writeln!(self.text, " {value}");
    }

    /// Returns the text.
    pub fn finish(mut self) -> String {
        if self.format == Format::OpenMetrics {
            self.text.push_str("# EOF\n");
        }
        self.text
    }
}

/// Nanoseconds as seconds.
pub fn seconds(nanos: u64) -> f64 {
    nanos as f64 / NANOS_PER_SECOND
}

/// Appends the value of a label, with backslashes, quotes and line feeds escaped.
fn escape(value: &str, text: &mut String) {
    for char in value.chars() {
        match char {
            '\\' => text.push_str("\\\\"),
            '"' => text.push_str("\\\""),
            '\n' => text.push_str("\\n"),
            char => text.push(char),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn both_formats_describe_the_same() {
        let text = |format| {
            let mut text = Exposition::new(format);
            text.family("a", Kind::Counter, "Things");
            text.sample(&[("disk", "x\"\\\n")], 5);
            text.family("b", Kind::Info, "Facts");
            text.sample(&[], 1);
            text.finish()
        };
        let samples = "a_total{disk=\"x\\\"\\\\\\n\"} 5\n";
        assert_eq!(
            text(Format::Text),
            format!(
                "# HELP a_total Things\n# TYPE a_total counter\n{samples}\
                 # HELP b_info Facts\n# TYPE b_info gauge\nb_info 1\n"
            )
        );
        assert_eq!(
            text(Format::OpenMetrics),
            format!(
                "# HELP a Things\n# TYPE a counter\n{samples}\
                 # HELP b Facts\n# TYPE b info\nb_info 1\n# EOF\n"
            )
        );
    }

    #[test]
    fn the_buckets_of_a_histogram_are_cumulative() {
        let mut text = Exposition::new(Format::Text);
        text.family("d_seconds", Kind::Histogram, "Durations");
        let mut counts = [0; BUCKETS];
        (counts[0], counts[2], counts[BUCKETS - 1]) = (1, 2, u64::MAX);
        text.durations(&[("op", "read")], &counts, 1_500_000_000);
        let text = text.finish();
        for line in [
            "d_seconds_bucket{op=\"read\",le=\"0.00001\"} 1",
            "d_seconds_bucket{op=\"read\",le=\"0.00016\"} 3",
            "d_seconds_bucket{op=\"read\",le=\"10.48576\"} 3",
            "d_seconds_bucket{op=\"read\",le=\"+Inf\"} 18446744073709551615",
            "d_seconds_sum{op=\"read\"} 1.5",
        ] {
            assert!(text.contains(line), "{line}: {text}");
        }
    }

    #[test]
    fn the_format_follows_the_accept_header() {
        let openmetrics = "application/openmetrics-text;version=1.0.0,text/plain;q=0.5";
        assert_eq!(Format::accepted(openmetrics), Format::OpenMetrics);
        assert_eq!(Format::accepted("*/*"), Format::Text);
        assert_eq!(Format::accepted(""), Format::Text);
    }
}
