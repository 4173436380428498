//! What a snapshot costs the guest, by how much the upper holds: `cargo bench --bench snapshot`.
//!
//! An upper is filled with blocks of 4 KiB, every other one, so that each has an extent of its own.
//! Then a thread writes on, block after block, while the snapshot is taken and sealed, and another
//! device opens it: the longest of its writes is what the guest notices. The same is measured beside
//! it for as long without a snapshot. Each round makes new files.
#![allow(clippy::print_stdout)] // its result

use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use clap::Parser;
use ovbd_vhost::format::lsmt::writable::Kind;
use ovbd_vhost::format::lsmt::{HEADER_LEN, Header, Part};
use ovbd_vhost::image::Image;
use ovbd_vhost::image::spec::Stack;
use ovbd_vhost::scatter::Scatter;
use ovbd_vhost::units::Sector;
use ovbd_vhost::upper::{self, Options, Paths, Snapshots, Volume};
use uuid::Uuid;
use vm_memory::VolatileSlice;

/// Sectors of a block.
const BLOCK: u64 = 8;

#[derive(Parser)]
struct Args {
    /// Where the files go: on the storage to be measured
    #[arg(long, default_value = "target")]
    dir: PathBuf,
    /// Extents of the upper
    #[arg(long, value_delimiter = ',', default_value = "1000,100000,1000000")]
    extents: Vec<u64>,
    #[arg(long, default_value_t = 5)]
    rounds: usize,
    /// Given by cargo
    #[arg(long, hide = true)]
    bench: bool,
}

/// Milliseconds of one round.
struct Round {
    /// From the question to the answer: what the disk held is durable, and has its name.
    answer: f64,
    /// From the question until another device has the layer open, which waits until it is sealed.
    open: f64,
    /// The longest write meanwhile.
    wait: f64,
    /// The longest write in as much time without a snapshot.
    usual: f64,
}

fn main() {
    let args = Args::parse();
    println!(
        "| extents | answer ms | open elsewhere ms | longest write ms | without a snapshot ms |\n|--:|--:|--:|--:|--:|"
    );
    for extents in &args.extents {
        let rounds: Vec<_> = (0..args.rounds)
            .map(|_| round(&args.dir, *extents))
            .collect();
        let median = |figure: fn(&Round) -> f64| {
            let mut figures: Vec<_> = rounds.iter().map(figure).collect();
            figures.sort_by(f64::total_cmp);
            figures[figures.len() / 2]
        };
        println!(
            "| {extents} | {:.1} | {:.1} | {:.2} | {:.2} |",
            median(|round| round.answer),
            median(|round| round.open),
            median(|round| round.wait),
            median(|round| round.usual)
        );
    }
}

fn round(dir: &Path, extents: u64) -> Round {
    let folder = tempfile::tempdir_in(dir).expect("a folder");
    let header = Header {
        index_offset: HEADER_LEN as u64,
        index_entries: 0,
        virtual_size: extents * 2 * BLOCK * 512,
        uuid: Uuid::new_v4(),
        parent_uuid: Uuid::nil(),
        message: Vec::new(),
    };
    let lower = folder.path().join("lower");
    let layer = [Part::Header, Part::Trailer].map(|part| header.encode(part));
    std::fs::write(&lower, layer.as_flattened()).expect("a lower layer");
    let paths = Paths {
        data: folder.path().join("data"),
        index: folder.path().join("index"),
    };
    upper::create(&paths, Kind::Hybrid, &header).expect("an upper");
    let opened = Snapshots::open(&Stack::new([lower]), &paths, Options::default());
    let (volume, snapshots) = opened.expect("a disk");
    for block in 0..extents {
        write(&volume, block * 2);
    }
    volume.flush().expect("a flush");

    let took = Instant::now();
    let (mut answer, mut open) = (Duration::ZERO, Duration::ZERO);
    let wait = beside(&volume, extents, || {
        let snapshot = snapshots.take(&volume, "one").expect("a snapshot");
        answer = took.elapsed();
        thread::scope(|scope| {
            scope.spawn(|| snapshots.seal(&volume).expect("a layer"));
            Image::open(&Stack::new(snapshot.layers)).expect("an image");
            open = took.elapsed();
        });
    });
    let usual = beside(&volume, extents, || thread::sleep(open));
    let ms = |time: Duration| time.as_secs_f64() * 1e3;
    Round {
        answer: ms(answer),
        open: ms(open),
        wait: ms(wait),
        usual: ms(usual),
    }
}

/// The longest write of a thread that writes while `what` is done.
fn beside(volume: &Volume, extents: u64, what: impl FnOnce()) -> Duration {
    let done = AtomicBool::new(false);
    thread::scope(|scope| {
        let writer = scope.spawn(|| {
            let mut longest = Duration::ZERO;
            for block in (0..extents).cycle() {
                if done.load(Ordering::Relaxed) {
                    break;
                }
                let start = Instant::now();
                write(volume, block * 2);
                longest = longest.max(start.elapsed());
                // A guest at a thousand writes a second, rather than one that fills the storage.
                thread::sleep(Duration::from_millis(1));
            }
            longest
        });
        what();
        done.store(true, Ordering::Relaxed);
        writer.join().expect("the writer")
    })
}

fn write(volume: &Volume, block: u64) {
    let mut data = [block as u8 | 1; (BLOCK * 512) as usize];
    let mut scatter = Scatter::new();
    scatter.push(VolatileSlice::from(&mut data[..]));
    let written = volume.write(Sector(block * BLOCK), BLOCK, scatter.cursor(0));
    written.expect("a write");
}
