//! Conversion between a prefetch trace, in bytes of layers, and units of the layers' blobs.

use std::collections::BTreeMap;
use std::sync::Arc;

use super::Image;
use crate::format::presence::{UNIT, UnitRange};
use crate::format::trace::{MAX_RECORDS, TracedRead};
use crate::source::recorder::{ReadUnit, Recorder};
use crate::source::{Blob, Located};

/// Most units between two traced ones that are fetched with them, to save a request.
const MAX_GAP: u64 = 1;

/// Most bytes of one record.
const MAX_READ: u64 = 1 << 20;

/// Most units of one request.
const MAX_RUN: u64 = (4 << 20) / UNIT;

/// Units of a layer that a trace lists, to be fetched by one request.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct TracedRun {
    layer: usize,
    units: UnitRange,
}

impl TracedRun {
    /// Units of the layer with this number, counted from the bottom.
    #[cfg(test)]
    pub(crate) fn new(layer: usize, units: UnitRange) -> Self {
        Self { layer, units }
    }

    /// The units.
    #[cfg(test)]
    pub(crate) fn units(&self) -> UnitRange {
        self.units
    }
}

impl Image {
    /// Returns the runs of a trace with an absent unit, in the order of their first reads.
    pub fn traced_runs(&self, reads: &[TracedRead]) -> Vec<TracedRun> {
        let mut runs = runs(&self.first_reads(reads));
        runs.retain(|run| self.absent_bytes(run) > 0);
        runs
    }

    /// Suggests to fetch the absent units of a run. Never waits.
    pub fn replay(&self, run: &TracedRun) {
        if let Some((Located::Absent(range), _)) = self.locate_run(run) {
            range.replay();
        }
    }

    /// Returns the number of bytes of a run with an absent unit; otherwise 0.
    pub fn absent_bytes(&self, run: &TracedRun) -> u64 {
        match self.locate_run(run) {
            Some((Located::Absent(_), len)) => len,
            Some((Located::Present(_), _)) | None => 0,
        }
    }

    fn locate_run(&self, run: &TracedRun) -> Option<(Located<'_>, u64)> {
        let blob = self.layers().get(run.layer)?.container().blob();
        let start = run.units.start() * UNIT;
        let len = (run.units.end() * UNIT)
            .min(blob.len())
            .saturating_sub(start);
        Some((blob.locate(start, len as usize), len))
    }

    /// Records the reads of all layers from now on.
    pub fn start_recording(&self, recorder: &Arc<Recorder>) {
        for (number, layer) in self.layers().iter().enumerate() {
            layer.container().blob().start_recording(recorder, number);
        }
    }

    /// Ends the recording.
    pub fn stop_recording(&self) {
        let blobs = self.layers().iter().map(|layer| layer.container().blob());
        blobs.for_each(Blob::stop_recording);
    }

    /// Converts recorded units to a trace, in the same order.
    pub fn traced(&self, units: &[ReadUnit]) -> Vec<TracedRead> {
        let mut reads = Vec::new();
        for ReadUnit { layer, unit } in units {
            let container = self.layers().get(*layer).map(|layer| layer.container());
            let bytes = unit * UNIT..(unit + 1) * UNIT;
            let Some(held) = container.and_then(|container| container.held(bytes)) else {
                continue;
            };
            // Upstream's replay reads at most `MAX_READ` bytes at once.
            for offset in held.clone().step_by(MAX_READ as usize) {
                reads.push(TracedRead {
                    layer: *layer as u32,
                    offset,
                    len: MAX_READ.min(held.end - offset),
                });
            }
        }
        reads.truncate(MAX_RECORDS);
        reads
    }

    /// Returns the number of the first read of each unit. Skips reads outside a layer: the trace may be of
    /// another image, or hostile.
    fn first_reads(&self, reads: &[TracedRead]) -> BTreeMap<(usize, u64), usize> {
        let mut first = BTreeMap::new();
        for (number, read) in reads.iter().enumerate() {
            let index = read.layer as usize;
            let Some(layer) = self.layers().get(index) else {
                continue;
            };
            let container = layer.container();
            let end = read.offset.saturating_add(read.len).min(container.len());
            if read.offset >= end {
                continue;
            }
            let stored = container.stored(read.offset..end);
            for unit in stored.start / UNIT..stored.end.div_ceil(UNIT) {
                first.entry((index, unit)).or_insert(number);
            }
        }
        first
    }
}

/// Joins units of the same layer to runs, sorted by the first read of each run.
fn runs(first: &BTreeMap<(usize, u64), usize>) -> Vec<TracedRun> {
    let mut runs: Vec<(usize, usize, UnitRange)> = Vec::new();
    for ((layer, unit), number) in first {
        match runs.last_mut() {
            Some((before, earliest, run))
                if before == layer
                    && unit - run.end() <= MAX_GAP
                    && unit - run.start() < MAX_RUN =>
            {
                *run = UnitRange::new(run.start(), unit + 1);
                *earliest = (*earliest).min(*number);
            }
            _ => runs.push((*layer, *number, UnitRange::one(*unit))),
        }
    }
    runs.sort_by_key(|(_, number, _)| *number);
    runs.into_iter()
        .map(|(layer, _, units)| TracedRun { layer, units })
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn neighbours_are_one_run_and_runs_come_by_their_first_read() {
        let first = BTreeMap::from([
            ((0, 5), 9),
            ((0, 6), 3),
            ((0, 8), 7),
            ((0, 11), 1),
            ((1, 12), 0),
        ]);
        let expected = [
            TracedRun::new(1, UnitRange::one(12)),
            TracedRun::new(0, UnitRange::one(11)),
            TracedRun::new(0, UnitRange::new(5, 9)),
        ];
        assert_eq!(runs(&first), expected);
    }

    #[test]
    fn a_run_is_bounded() {
        let first: BTreeMap<_, _> = (0..200).map(|unit| ((0, unit), 0)).collect();
        let runs = runs(&first);
        assert!(runs.iter().all(|run| run.units.len() <= MAX_RUN));
        assert_eq!(runs.len(), 4);
    }
}
