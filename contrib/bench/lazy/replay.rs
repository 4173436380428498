//! How fast the bytes of a trace arrive.

use std::fs;

use common::delay::Link;
use ovbd_vhost::format::trace::{self, TracedRead};

use crate::bars::Group;
use crate::front::Host;
use crate::origin::Origin;
use crate::rates::incompressible;
use crate::{Result, Table, rate, round_trip};

/// Bytes of a read of the trace. The trace has every other piece of the image, last first.
const PIECE: u64 = 256 << 10;

/// The table over links.
pub fn table(links: &[Link], quick: bool) -> Result<Table> {
    let mib: usize = if quick { 64 } else { 256 };
    let image = incompressible(mib);
    let pieces = ((mib as u64) << 20) / PIECE;
    let reads = (0..pieces).rev().step_by(2).map(|piece| TracedRead {
        layer: 0,
        offset: piece * PIECE,
        len: PIECE,
    });
    let reads: Vec<_> = reads.collect();
    let bytes = reads.len() as u64 * PIECE;
    let mut text = format!(
        "| trace of {:.0} MB in pieces of 256 KiB | link | s | MB/s | of the link | requests |\n\
         |--:|--:|--:|--:|--:|--:|\n",
        bytes as f64 / 1e6
    );
    let mut bars = Vec::new();
    for link in links {
        let origin = Origin::start(&image, *link);
        let host = Host::new(&origin)?;
        let path = host.path("trace");
        fs::write(&path, trace::encode(&reads))?;
        let seconds = host.replay(&origin, &path, bytes).as_secs_f64();
        let speed = bytes as f64 / seconds / 1e6;
        let share = link.rate.map_or("-".to_owned(), |rate| {
            format!("{:.0} %", speed * 1e8 / rate as f64)
        });
        text += &format!(
            "| {} | {} | {seconds:.2} | {speed:.1} | {share} | {} |\n",
            round_trip(*link),
            rate(*link),
            origin.requests()
        );
        bars.push((format!("{}, {}", round_trip(*link), rate(*link)), speed));
    }
    Ok(Table {
        name: "replay",
        text,
        charts: vec![Group::new("replay of a trace, MB/s, by link", bars)],
    })
}
