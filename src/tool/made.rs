//! The last line of a command that makes a file.

use std::fmt;
use std::path::Path;
use std::time::Duration;

use serde::Serialize;

use super::layer_writer::Written;
use super::table::{count, printable, ratio, seconds, size};

/// A file that a command made. Field names are those of the JSON; sizes are in bytes.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Made {
    path: String,
    /// Size of the file.
    file_size: u64,
    /// Bytes of data in it, before compression.
    data_size: u64,
    /// `data_size` divided by `file_size`.
    ratio: f64,
    /// Number of mappings; null for a raw image.
    mappings: Option<u64>,
    seconds: f64,
}

impl Made {
    /// A layer at `path`, made in `time`.
    pub fn layer(path: &Path, written: Written, time: Duration) -> Self {
        Self::new(path, written, Some(written.mappings as u64), time)
    }

    /// A raw image at `path` of a disk of `written.file_len` bytes, made in `time`.
    pub fn raw_image(path: &Path, written: Written, time: Duration) -> Self {
        Self::new(path, written, None, time)
    }

    fn new(path: &Path, written: Written, mappings: Option<u64>, time: Duration) -> Self {
        Self {
            path: path.display().to_string(),
            file_size: written.file_len,
            data_size: written.data_len,
            ratio: written.data_len as f64 / written.file_len.max(1) as f64,
            mappings,
            seconds: time.as_secs_f64(),
        }
    }
}

impl fmt::Display for Made {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let (path, file, data) = (
            printable(&self.path),
            size(self.file_size),
            size(self.data_size),
        );
        let time = seconds(self.seconds);
        match self.mappings {
            Some(mappings) => write!(
                f,
                "{path}: {file} for {data} of data (ratio {}), {} mappings, {time}",
                ratio(self.ratio),
                count(mappings),
            ),
            None => write!(f, "{path}: disk of {file}, {data} of data, {time}"),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn one_line_has_size_ratio_and_seconds() {
        let written = Written {
            file_len: 2 << 20,
            data_len: 5 << 20,
            mappings: 1234,
        };
        let time = Duration::from_millis(1260);
        let path = Path::new("a\nb");
        assert_eq!(
            Made::layer(path, written, time).to_string(),
            "a\\nb: 2.00 MiB for 5.00 MiB of data (ratio 2.50), 1,234 mappings, 1.26 s"
        );
        assert_eq!(
            Made::raw_image(path, written, time).to_string(),
            "a\\nb: disk of 2.00 MiB, 5.00 MiB of data, 1.26 s"
        );
        let json = serde_json::to_value(Made::raw_image(path, written, time)).unwrap();
        assert_eq!(json["file_size"], 2 << 20);
        assert_eq!(json["mappings"], serde_json::Value::Null);
    }
}
