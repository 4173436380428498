//! `ovbd trace show`: the reads of a prefetch trace.

use std::fmt;

use serde::Serialize;

use super::table::{Align, Table};
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
