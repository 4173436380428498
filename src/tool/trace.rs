//! `ovbd trace`: the reads of a prefetch trace, recording one from a running disk, and packing one as a layer.

use std::fmt;
use std::path::{Path, PathBuf};

use serde::Serialize;
use thiserror::Error;

use super::ctl::{self, Ask, ask};
use super::table::{Align, Table};
use crate::format::digest::Digest;
use crate::format::tar;
use crate::format::trace::TracedRead;

/// The reads of a trace, in their order.
#[derive(Debug, Serialize)]
#[serde(transparent)]
pub struct Reads(Vec<Row>);

#[derive(Debug, Serialize)]
struct Row {
    layer: u32,
    offset: u64,
    bytes: u64,
}

impl From<Vec<TracedRead>> for Reads {
    fn from(reads: Vec<TracedRead>) -> Self {
        let row = |read: TracedRead| Row {
            layer: read.layer,
            offset: read.offset,
            bytes: read.len,
        };
        Self(reads.into_iter().map(row).collect())
    }
}

impl fmt::Display for Reads {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let columns = ["layer", "offset", "bytes"].map(|name| (name, Align::Right));
        let mut table = Table::new(columns);
        for row in &self.0 {
            table.add([row.layer.into(), row.offset, row.bytes].map(|number| number.to_string()));
        }
        write!(f, "{table}")
    }
}

/// What a recording brought.
#[derive(Debug, Serialize)]
pub struct Recorded {
    reads: usize,
    bytes: u64,
}

impl From<&[TracedRead]> for Recorded {
    fn from(reads: &[TracedRead]) -> Self {
        let bytes = reads
            .iter()
            .fold(0_u64, |sum, read| sum.saturating_add(read.len));
        Self {
            reads: reads.len(),
            bytes,
        }
    }
}

impl fmt::Display for Recorded {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        writeln!(f, "recorded {} reads of {} bytes", self.reads, self.bytes)
    }
}

/// A trace as a layer of an image: its descriptor in a manifest has these.
#[derive(Debug, Serialize)]
pub struct TraceLayer {
    digest: String,
    bytes: usize,
}

impl From<&[u8]> for TraceLayer {
    fn from(layer: &[u8]) -> Self {
        Self {
            digest: Digest::of(layer).to_string(),
            bytes: layer.len(),
        }
    }
}

impl fmt::Display for TraceLayer {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        writeln!(f, "{} {}", self.digest, self.bytes)
    }
}

/// Why a trace cannot be recorded.
#[derive(Debug, Error)]
pub enum RecordError {
    /// The daemon does not record.
    #[error("cannot record a trace")]
    Daemon(#[from] ctl::Error),
    /// The daemon's answer has no reads.
    #[error("{}: the answer has no list of reads; expected the control socket of ovbd-vhost", .0.display())]
    Answer(PathBuf),
}

/// Records the reads of the guest whose daemon has its control socket at `socket`, until `wait` returns.
///
/// # Errors
/// [`RecordError::Daemon`] if the daemon cannot be reached, or records to a file already;
/// [`RecordError::Answer`] if the socket is another program's.
pub fn record(socket: &Path, wait: impl FnOnce()) -> Result<Vec<TracedRead>, RecordError> {
    ask(socket, &Ask::StartTrace)?;
    wait();
    let answer = ask(socket, &Ask::EndTrace)?;
    let malformed = || RecordError::Answer(socket.to_owned());
    let reads: Vec<(u32, u64, u64)> =
        serde_json::from_value(answer["reads"].clone()).map_err(|_| malformed())?;
    let read = |(layer, offset, len)| TracedRead { layer, offset, len };
    Ok(reads.into_iter().map(read).collect())
}

/// Packs a trace as a layer of an image: an archive with the member `trace`.
pub fn layer(trace: &[u8]) -> Vec<u8> {
    tar::archive("trace", trace)
}
