//! What a snapshot costs the guest, by how much the upper holds, and what reads cost after many:
//! `cargo bench --bench snapshot`.
//!
//! An upper is filled with blocks of 4 KiB, every other one, so that each has an extent of its own.
//! Then a thread writes on without a pause, block after block, while the snapshot is taken and
//! sealed, and another device opens it: the longest of its writes is what the guest notices. The
//! same is measured beside it for as long without a snapshot. Each round makes new files.
//!
//! Then snapshots are taken of a disk of which a little is written in between, and random reads are
//! looked up: how long it takes to tell which layer has the data.
#![allow(clippy::print_stdout)] // its result

use common::volume::BlockingIo as _;
use std::hint::black_box;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use clap::Parser;
use common::content::Random;
use ovbd_vhost::format::lsmt::writable::Kind;
use ovbd_vhost::format::lsmt::{HEADER_LEN, Header, HeaderKind};
use ovbd_vhost::image::Image;
use ovbd_vhost::image::config::Stack;
use ovbd_vhost::io::scatter::Scatter;
use ovbd_vhost::units::{Sector, SectorRange};
use ovbd_vhost::writable::{self, Lookup, Options, Paths, Snapshots, Volume};
use uuid::Uuid;
use vm_memory::VolatileSlice;

/// Sectors of a block.
const BLOCK: u64 = 8;

/// Blocks of the disk that is looked up in, and those written between two snapshots of it.
const BLOCKS: u64 = 1 << 16;
const WRITES: u64 = 1 << 12;

/// Look-ups that are timed together.
const LOOK_UPS: u64 = 1 << 18;

#[derive(Parser)]
struct Args {
    /// Directory for the files, on the storage to be measured
    #[arg(long, default_value = "target")]
    dir: PathBuf,
    /// Numbers of extents in the writable layer
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
    /// The longest write that ended before the answer.
    wait: f64,
    /// The longest one after it, until the layer is open elsewhere.
    later: f64,
    /// The longest write in as much time without a snapshot.
    usual: f64,
}

fn main() {
    let args = Args::parse();
    println!(
        "| extents | answer ms | open elsewhere ms | longest write until the answer ms | then, ms | without \
         a snapshot ms |\n|--:|--:|--:|--:|--:|--:|"
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
            "| {extents} | {:.1} | {:.1} | {:.2} | {:.2} | {:.2} |",
            median(|round| round.answer),
            median(|round| round.open),
            median(|round| round.wait),
            median(|round| round.later),
            median(|round| round.usual)
        );
    }
    println!("\n| snapshots since the start | look-up of 4 KiB, ns |\n|--:|--:|");
    let rounds: Vec<_> = (0..args.rounds).map(|_| look_ups(&args.dir)).collect();
    for (number, (snapshots, _)) in rounds[0].iter().enumerate() {
        let mut figures: Vec<_> = rounds.iter().map(|round| round[number].1).collect();
        figures.sort_by(f64::total_cmp);
        println!("| {snapshots} | {:.0} |", figures[figures.len() / 2]);
    }
}

fn round(dir: &Path, extents: u64) -> Round {
    let folder = tempfile::tempdir_in(dir).expect("a folder");
    let (volume, snapshots) = disk(folder.path(), extents * 2);
    for block in 0..extents {
        write(&volume, block * 2);
    }
    volume.flush().expect("a flush");

    let took = Instant::now();
    let (mut answer, mut open) = (Duration::ZERO, Duration::ZERO);
    let [wait, later] = beside(&volume, extents, |lap| {
        let snapshot = snapshots.take("one").expect("a snapshot");
        lap();
        answer = took.elapsed();
        thread::scope(|scope| {
            scope.spawn(|| snapshots.seal().expect("a layer"));
            Image::open(&Stack::new(snapshot.layers)).expect("an image");
            open = took.elapsed();
        });
    });
    let [usual, _] = beside(&volume, extents, |_| thread::sleep(open));
    let ms = |time: Duration| time.as_secs_f64() * 1e3;
    Round {
        answer: ms(answer),
        open: ms(open),
        wait: ms(wait),
        later: ms(later),
        usual: ms(usual),
    }
}

/// An empty upper above a layer that holds nothing.
fn disk(folder: &Path, blocks: u64) -> (Arc<Volume>, Snapshots) {
    let header = Header {
        index_offset: HEADER_LEN as u64,
        index_entries: 0,
        virtual_size: blocks * BLOCK * 512,
        uuid: Uuid::new_v4(),
        parent_uuid: Uuid::nil(),
        message: Vec::new(),
    };
    let lower = folder.join("lower");
    let layer = [HeaderKind::Header, HeaderKind::Trailer].map(|part| header.encode(part));
    std::fs::write(&lower, layer.as_flattened()).expect("a lower layer");
    let paths = Paths {
        data: folder.join("data"),
        index: folder.join("index"),
    };
    writable::create(&paths, Kind::Hybrid, &header).expect("an upper");
    let opened = common::volume::open(&Stack::new([lower]), &paths, Options::default());
    opened.expect("a disk")
}

/// Nanoseconds of a look-up after so many snapshots, on a disk whose upper is written to.
fn look_ups(dir: &Path) -> Vec<(u64, f64)> {
    let folder = tempfile::tempdir_in(dir).expect("a folder");
    let (volume, snapshots) = disk(folder.path(), BLOCKS);
    let mut numbers = Random::new(1);
    let mut random = || numbers.below(BLOCKS);
    let mut overlay = Lookup::default();
    let mut figures = Vec::new();
    for number in 0..=100 {
        (0..WRITES).for_each(|_| write(&volume, random()));
        if [0, 1, 10, 100].contains(&number) {
            let start = Instant::now();
            for _ in 0..LOOK_UPS {
                volume.lookup(block_at(random()), &mut overlay);
                black_box(&mut overlay).clear();
            }
            let took = start.elapsed().as_nanos() as f64;
            figures.push((number, took / LOOK_UPS as f64));
        }
        let name = number.to_string();
        snapshots.take(&name).expect("a snapshot");
        snapshots.seal().expect("a layer");
    }
    figures
}

/// The longest writes of a thread that writes while `what` is done: until that says so, and then.
fn beside(volume: &Volume, extents: u64, what: impl FnOnce(&dyn Fn())) -> [Duration; 2] {
    let (laps, done) = (AtomicUsize::new(0), AtomicBool::new(false));
    thread::scope(|scope| {
        let writer = scope.spawn(|| {
            let mut longest = [Duration::ZERO; 2];
            for block in (0..extents).cycle() {
                if done.load(Ordering::Relaxed) {
                    break;
                }
                let start = Instant::now();
                write(volume, block * 2);
                let longest = &mut longest[laps.load(Ordering::Relaxed)];
                *longest = start.elapsed().max(*longest);
            }
            longest
        });
        what(&|| laps.store(1, Ordering::Relaxed));
        done.store(true, Ordering::Relaxed);
        writer.join().expect("the writer")
    })
}

fn write(volume: &Volume, block: u64) {
    let mut data = [block as u8 | 1; (BLOCK * 512) as usize];
    let mut scatter = Scatter::new();
    scatter.push(VolatileSlice::from(&mut data[..]));
    let written = volume.write(block_at(block), scatter.cursor(0));
    written.expect("a write");
}

/// The sectors of a block.
fn block_at(number: u64) -> SectorRange {
    SectorRange::new(Sector(number * BLOCK), Sector((number + 1) * BLOCK))
}
