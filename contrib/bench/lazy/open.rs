//! How long it takes from the start of the daemon to a socket that listens, and how many requests.

use std::sync::Arc;
use std::time::Duration;

use common::content::Random;
use common::delay::Link;
use common::layers::{LayerBuilder, Pack, wrap_tar, zfile};

use crate::bars::Group;
use crate::front::{Host, Named};
use crate::origin::{Image, Origin};
use crate::{Result, Table, median, milliseconds, round_trip};

/// Layers of the image.
const LAYERS: u128 = 8;

/// Bytes of data of each layer.
const LEN: usize = 700 << 10;

/// What one way to open cost.
#[derive(Default)]
struct Cost {
    times: Vec<Duration>,
    requests: u64,
}

impl Cost {
    fn cell(&self) -> String {
        let time = milliseconds(median(self.times.clone()));
        format!("{time} ms, {} requests", self.requests)
    }

    fn time(&self) -> f64 {
        median(self.times.clone()).as_secs_f64() * 1000.0
    }
}

/// An image whose layers cannot be compressed.
fn image() -> Arc<Image> {
    let layers = (0..LAYERS).map(|number| {
        let mut random = Random::new(number as u64);
        let words = (0..LEN / 8).flat_map(|_| random.any().to_le_bytes());
        let layer = LayerBuilder::new(LAYERS as u64 * LEN as u64)
            .uuids(number + 1, number)
            .data(number as u64 * LEN as u64 / 512, &words.collect::<Vec<_>>());
        wrap_tar(&zfile(&layer.lsmt(), Pack::default()))
    });
    Image::new(&layers.collect::<Vec<_>>())
}

/// Opens on a new host, or again on the same one.
fn open(host: &Host, origin: &Origin, named: Named, cost: &mut Cost) {
    let before = origin.requests();
    let (daemon, time) = host.serve(origin, named, &[]);
    cost.requests = origin.requests() - before;
    cost.times.push(time);
    drop(daemon);
}

/// The table over round trips.
pub fn table(round_trips: &[Duration], rounds: usize) -> Result<Table> {
    let image = image();
    let mut text = format!(
        "| {LAYERS} layers, {:.1} MB each | config: first | again | tag: first | again | digest: again | \
         pull everything, then open |\n|--:|--:|--:|--:|--:|--:|--:|\n",
        image.bytes() as f64 / LAYERS as f64 / 1e6
    );
    let (mut first, mut whole) = (Vec::new(), Vec::new());
    for round_trip_time in round_trips {
        let link = Link {
            round_trip: *round_trip_time,
            ..Link::default()
        };
        let origin = Origin::start(&image, link);
        let mut costs: [Cost; 6] = Default::default();
        for _ in 0..rounds {
            let host = Host::new(&origin)?;
            open(&host, &origin, Named::Config, &mut costs[0]);
            open(&host, &origin, Named::Config, &mut costs[1]);
            let host = Host::new(&origin)?;
            open(&host, &origin, Named::Tag, &mut costs[2]);
            open(&host, &origin, Named::Tag, &mut costs[3]);
            open(&host, &origin, Named::Digest, &mut Cost::default());
            open(&host, &origin, Named::Digest, &mut costs[4]);
            let host = Host::new(&origin)?;
            let before = origin.requests();
            let pulled = host.pull(&origin)?;
            let (_daemon, opened) = host.serve(&origin, Named::Config, &[]);
            costs[5].times.push(pulled + opened);
            costs[5].requests = origin.requests() - before;
        }
        let cells: Vec<_> = costs.iter().map(Cost::cell).collect();
        text += &format!("| {} | {} |\n", round_trip(link), cells.join(" | "));
        first.push((round_trip(link), costs[0].time()));
        whole.push((round_trip(link), costs[5].time()));
    }
    Ok(Table {
        name: "open",
        text,
        charts: vec![
            Group::new("first open by config, ms, by round trip", first),
            Group::new("pull everything, then open, ms, by round trip", whole),
        ],
    })
}
