//! How fast layers are made, beside the bare compressor: `contrib/bench/commit`.
//!
//! The same bytes, files of this machine, are compressed in memory by all cores, which is the bare
//! compressor; made a layer from a raw image; and made a layer from an upper, to which they were
//! written in pieces, out of order. Both are in the page cache, where their writers left them, and
//! the layer is durable in the end. It replaces no file: freeing the blocks of an old one is no
//! part of making it.
//!
//! Two more tell what is due to storage: as many bytes as the layer has are written past the page
//! cache and synced, alone, and beside the bare compressor. Speeds are all by the bytes put in.
//! Rounds take turns, and the first one does not count.
#![allow(clippy::print_stdout)] // its result

use std::fs::{self, File};
use std::io::Read;
use std::num::NonZero;
use std::os::unix::fs::{FileExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicUsize, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use clap::Parser;
use indicatif::ProgressBar;
use ovbd_vhost::codec::Encoder;
use ovbd_vhost::format::crc;
use ovbd_vhost::format::lsmt::Header;
use ovbd_vhost::format::lsmt::writable::Kind;
use ovbd_vhost::format::zfile::{Algorithm, BlockFormat};
use ovbd_vhost::io::scatter::Scatter;
use ovbd_vhost::tool::commit::{Commit, commit};
use ovbd_vhost::tool::create::{Create, create};
use ovbd_vhost::tool::output::Unnamed;
use ovbd_vhost::tool::raw_image::{Input, RawImage};
use ovbd_vhost::units::{Sector, SectorRange};
use ovbd_vhost::writable::{self, Options, Paths, WritableLayer};
use rustix::fs::OFlags;
use rustix::time::{ClockId, clock_gettime};
use uuid::Uuid;
use vm_memory::VolatileSlice;

const BLOCK: usize = 4096;
const JOB: usize = 256 * 1024;
/// Most bytes of one write to the upper.
const PIECE: usize = 128 * 1024;

/// A way to make a layer, by its name.
type Subject<'a> = (&'static str, Box<dyn Fn() + 'a>);

#[derive(Parser)]
struct Args {
    /// Directory of the input files
    #[arg(long, default_value = "/usr")]
    from: PathBuf,
    /// Directory for the images; in /dev/shm, storage has no effect on the result
    #[arg(long, default_value = "/var/tmp")]
    dir: PathBuf,
    /// Size of the input in MiB
    #[arg(long, default_value_t = 512)]
    size: usize,
    #[arg(long, default_value_t = 5)]
    rounds: usize,
    #[arg(long)]
    threads: Option<NonZero<usize>>,
    /// Given by cargo
    #[arg(long, hide = true)]
    bench: bool,
}

fn main() {
    let args = Args::parse();
    let cores = || thread::available_parallelism().expect("number of cores");
    let threads = args.threads.unwrap_or_else(cores);
    let dir = tempfile::tempdir_in(&args.dir).expect("a folder");
    let bytes = corpus(&args.from, args.size << 20);
    let raw = dir.path().join("raw");
    fs::write(&raw, &bytes).expect("raw image");
    let upper = write_upper(dir.path(), &bytes);
    println!(
        "{} MiB of {}, {threads} threads, in {}; MB/s of {} rounds: median (CPU)",
        bytes.len() >> 20,
        args.from.display(),
        args.dir.display(),
        args.rounds
    );
    for algorithm in [Some(Algorithm::Lz4), Some(Algorithm::Zstd), None] {
        let blocks = algorithm.map(|algorithm| BlockFormat {
            algorithm,
            block_size: BLOCK as u32,
            checksum: true,
            dictionary_len: 0,
        });
        let bar = ProgressBar::hidden();
        let to = dir.path().join("out");
        let task = Create {
            raw: false,
            blocks,
            tar: false,
            uuid: None,
            message: String::new(),
            threads,
        };
        let hidden = &bar;
        let (from, out) = (Input::Path(raw.clone()), to.clone());
        let run = move || {
            let image = RawImage::open(&from).expect("raw image");
            let file = Unnamed::create(&out).expect("output");
            create(image, None, &task, file.content(), hidden).expect("create");
            file.publish().expect("output");
        };
        let create: Subject<'_> = ("create", Box::new(run));
        let task = Commit {
            upper: upper.clone(),
            blocks,
            tar: false,
            uuid: None,
            parent_uuid: None,
            message: String::new(),
            threads,
        };
        let out = to.clone();
        let run = move || {
            let file = Unnamed::create(&out).expect("output");
            let written = commit(&task, file.content(), hidden).expect("commit");
            file.publish().expect("output");
            written.file_len
        };
        let stored = run();
        let commit: Subject<'_> = (
            "commit",
            Box::new(move || {
                run();
            }),
        );
        let mut subjects: Vec<Subject<'_>> = Vec::new();
        let (bytes, to) = (&bytes, to.as_path());
        if let Some(algorithm) = algorithm {
            subjects.push(("bare", Box::new(move || bare(bytes, algorithm, threads))));
            let both = move || {
                thread::scope(|scope| {
                    scope.spawn(|| store(to, stored));
                    bare(bytes, algorithm, threads);
                });
            };
            subjects.push(("bare, storage", Box::new(both)));
        }
        subjects.extend([create, commit]);
        subjects.push(("storage", Box::new(move || store(to, stored))));
        let name = algorithm.map_or("none".to_owned(), |algorithm| algorithm.to_string());
        report(&name, bytes.len(), args.rounds, to, &subjects);
    }
}

/// Runs all subjects in turn, and prints what they came to, and their ratio to the first one.
fn report(name: &str, len: usize, rounds: usize, to: &Path, subjects: &[Subject<'_>]) {
    let mut samples = vec![Vec::new(); subjects.len()];
    for round in 0..=rounds {
        for ((_, run), samples) in subjects.iter().zip(&mut samples) {
            let _ = fs::remove_file(to);
            let folder = to.parent().map(File::open).expect("a folder");
            folder.and_then(|folder| folder.sync_all()).expect("sync");
            let (start, cpu) = (Instant::now(), cpu_time());
            run();
            if round > 0 {
                samples.push((start.elapsed(), cpu_time() - cpu));
            }
        }
    }
    let speed = |time: Duration| len as f64 / 1e6 / time.as_secs_f64();
    for ((subject, _), samples_of) in subjects.iter().zip(&samples) {
        let wall = median(samples_of.iter().map(|(wall, _)| speed(*wall)));
        let cpu = median(samples_of.iter().map(|(_, cpu)| speed(*cpu)));
        let pairs = samples_of.iter().zip(&samples[0]);
        let ratio = median(pairs.map(|(own, first)| speed(own.0) / speed(first.0)));
        println!("{name:>5} {subject:>13} {wall:7.0} ({cpu:5.0})  x {ratio:.2}");
    }
}

fn median(values: impl Iterator<Item = f64>) -> f64 {
    let mut values: Vec<_> = values.collect();
    values.sort_by(f64::total_cmp);
    values[values.len() / 2]
}

/// Processor time of all threads so far.
fn cpu_time() -> Duration {
    let time = clock_gettime(ClockId::ProcessCPUTime);
    Duration::new(time.tv_sec as u64, time.tv_nsec as u32)
}

/// Compresses blocks and sums them up, on all cores; the output goes nowhere.
fn bare(bytes: &[u8], algorithm: Algorithm, threads: NonZero<usize>) {
    let (next, jobs) = (AtomicUsize::new(0), bytes.chunks(JOB).collect::<Vec<_>>());
    thread::scope(|scope| {
        for _ in 0..threads.get() {
            scope.spawn(|| {
                let (mut encoder, mut stored) = (Encoder::new(), Vec::new());
                while let Some(job) = jobs.get(next.fetch_add(1, Ordering::Relaxed)) {
                    stored.clear();
                    for block in job.chunks(BLOCK) {
                        let start = stored.len();
                        encoder.encode(algorithm, block, &mut stored).expect("room");
                        let sum = crc::raw(crc::BLOCK_SEED, &stored[start..]);
                        stored.extend_from_slice(&sum.to_le_bytes());
                    }
                }
            });
        }
    });
}

/// Writes so many bytes past the page cache, where that can be, and makes them durable.
fn store(to: &Path, len: u64) {
    const WRITE: usize = 2 << 20;
    const PAGE: usize = 4096;
    let mut options = File::options();
    options.write(true).create(true);
    let direct = i32::try_from(OFlags::DIRECT.bits()).expect("a flag");
    let file = options.clone().custom_flags(direct).open(to);
    let file = file.or_else(|_| options.open(to)).expect("an output");
    let bytes = vec![0xa5; WRITE + PAGE];
    let start = bytes.as_ptr().addr().next_multiple_of(PAGE) - bytes.as_ptr().addr();
    for at in (0..len).step_by(WRITE) {
        let part = (len - at).min(WRITE as u64).next_multiple_of(PAGE as u64) as usize;
        let part = &bytes[start..][..part];
        file.write_all_at(part, at).expect("room");
    }
    file.sync_all().expect("sync");
}

/// The contents of files below a folder, each from a new block on, until there are enough.
fn corpus(from: &Path, size: usize) -> Vec<u8> {
    let (mut bytes, mut folders) = (Vec::with_capacity(size), vec![from.to_owned()]);
    while let Some(folder) = folders.pop() {
        let Ok(entries) = fs::read_dir(folder) else {
            continue;
        };
        let mut paths: Vec<_> = entries.flatten().map(|entry| entry.path()).collect();
        paths.sort();
        for path in paths.into_iter().filter(|path| !path.is_symlink()) {
            if path.is_dir() {
                folders.push(path);
            } else if let Ok(file) = File::open(&path) {
                let left = (size - bytes.len()) as u64;
                let _ = file.take(left).read_to_end(&mut bytes);
                bytes.resize(bytes.len().next_multiple_of(BLOCK), 0);
                if bytes.len() >= size {
                    bytes.truncate(size);
                    return bytes;
                }
            }
        }
    }
    assert!(!bytes.is_empty(), "no file below {}", from.display());
    bytes
}

/// An upper that holds these bytes, written as a guest's page cache would: in pieces, not in order.
fn write_upper(dir: &Path, bytes: &[u8]) -> Paths {
    let paths = Paths {
        data: dir.join("data"),
        index: dir.join("index"),
    };
    let header = Header::empty(bytes.len() as u64, Uuid::new_v4(), Uuid::nil());
    writable::create(&paths, Kind::Hybrid, &header).expect("an upper");
    let upper = WritableLayer::open(&paths, None, &Options::default()).expect("the upper");
    let pieces: Vec<_> = bytes.chunks(PIECE).collect();
    // A step that shares no factor with the number of pieces meets each once.
    let step = (pieces.len() / 3..).find(|step| gcd(*step, pieces.len()) == 1 && *step > 0);
    let step = step.expect("there is one");
    for number in (0..pieces.len()).map(|n| n * step % pieces.len()) {
        let mut piece = pieces[number].to_vec();
        let mut scatter = Scatter::new();
        scatter.push(VolatileSlice::from(&mut piece[..]));
        let start = (number * PIECE / 512) as u64;
        let sectors = (pieces[number].len() / 512) as u64;
        let range = SectorRange::new(Sector(start), Sector(start + sectors));
        upper.write(range, scatter.cursor(0)).expect("write");
    }
    upper.flush().expect("flush");
    paths
}

fn gcd(a: usize, b: usize) -> usize {
    match b {
        0 => a,
        _ => gcd(b, a % b),
    }
}
