//! What random reads fetch, and how fast sequential reads are.

use std::sync::Arc;
use std::time::{Duration, Instant};

use common::content::Random;
use common::delay::Link;
use common::layers::{LayerBuilder, Pack, wrap_tar, zfile};

use crate::bars::Group;
use crate::front::{Host, Named, read};
use crate::origin::{Image, Origin};
use crate::{Result, Table, rate, round_trip};

/// Bytes of a random read.
const BLOCK: u32 = 4096;

/// Bytes of a sequential read.
const WINDOW: u32 = 128 << 10;

/// Longest sequential run: then its rate is known well enough.
const LONGEST: Duration = Duration::from_secs(15);

/// One layer of `mib` MiB that cannot be compressed: its bytes are those of the disk.
pub fn incompressible(mib: usize) -> Arc<Image> {
    let len = mib << 20;
    let mut random = Random::new(7);
    let words = (0..len / 8).flat_map(|_| random.any().to_le_bytes());
    let layer = LayerBuilder::new(len as u64).data(0, &words.collect::<Vec<_>>());
    Image::new(&[wrap_tar(&zfile(&layer.lsmt(), Pack::default()))])
}

/// The table of random reads, one after the other.
pub fn random(links: &[Link], quick: bool) -> Result<Table> {
    let (mib, reads) = if quick { (64, 50) } else { (512, 300) };
    let image = incompressible(mib);
    let mut text = format!(
        "| {reads} reads of 4 KiB at random, one at a time | link | bytes fetched to bytes read | requests | \
         ms for a read |\n|--:|--:|--:|--:|--:|\n"
    );
    let mut bars = Vec::new();
    for link in links {
        let origin = Origin::start(&image, *link);
        let host = Host::new(&origin)?;
        let (daemon, _) = host.serve(&origin, Named::Config, &[]);
        let (bytes, requests) = (origin.bytes(), origin.requests());
        let mut random = Random::new(1);
        let blocks = (mib << 20) as u64 / u64::from(BLOCK);
        let mut left = reads;
        let took = read(&daemon, 1, BLOCK, || {
            left -= 1;
            (left >= 0).then(|| random.below(blocks) * u64::from(BLOCK) / 512)
        })?;
        let fetched = origin.bytes() - bytes;
        let ratio = fetched as f64 / (reads as f64 * f64::from(BLOCK));
        text += &format!(
            "| {} | {} | {ratio:.1} | {} | {:.1} |\n",
            round_trip(*link),
            rate(*link),
            origin.requests() - requests,
            took.as_secs_f64() * 1000.0 / reads as f64
        );
        bars.push((format!("{}, {}", round_trip(*link), rate(*link)), ratio));
    }
    Ok(Table {
        name: "random",
        text,
        charts: vec![Group::new(
            "bytes fetched to bytes read at random, by link",
            bars,
        )],
    })
}

/// The table of sequential reads.
pub fn sequential(links: &[Link], quick: bool) -> Result<Table> {
    let mib = if quick { 128 } else { 1024 };
    let image = incompressible(mib);
    let mut text =
        "| 128 KiB in order, 8 in flight | link | MB/s | of the link | requests | pull: MB/s |\n\
                    |--:|--:|--:|--:|--:|--:|\n"
            .to_owned();
    let mut bars = Vec::new();
    for link in links {
        let origin = Origin::start(&image, *link);
        let host = Host::new(&origin)?;
        let (daemon, _) = host.serve(&origin, Named::Config, &[]);
        let requests = origin.requests();
        let windows = (mib << 20) as u64 / u64::from(WINDOW);
        let start = Instant::now();
        let mut number = 0;
        let took = read(&daemon, 8, WINDOW, || {
            let at = number * u64::from(WINDOW) / 512;
            number += 1;
            (number <= windows && start.elapsed() < LONGEST).then_some(at)
        })?;
        let bytes = (number - 1) * u64::from(WINDOW);
        let requests = origin.requests() - requests;
        drop(daemon);
        let speed = bytes as f64 / took.as_secs_f64() / 1e6;
        let share = link.rate.map_or("-".to_owned(), |rate| {
            format!("{:.0} %", speed * 1e8 / rate as f64)
        });
        // A slow link would take long to carry all.
        let fast = link.rate.is_none_or(|rate| image.bytes() / rate < 30);
        let pulled = fast
            .then(|| Host::new(&origin)?.pull(&origin))
            .transpose()?;
        let pulled = pulled.map_or("-".to_owned(), |time| {
            format!("{:.0}", image.bytes() as f64 / time.as_secs_f64() / 1e6)
        });
        text += &format!(
            "| {} | {} | {speed:.1} | {share} | {requests} | {pulled} |\n",
            round_trip(*link),
            rate(*link),
        );
        bars.push((format!("{}, {}", round_trip(*link), rate(*link)), speed));
    }
    Ok(Table {
        name: "sequential",
        text,
        charts: vec![Group::new("sequential reads, MB/s, by link", bars)],
    })
}
