//! Writes to a disk above a read-only image: `ovbd-vhost` with an upper of each kind, and
//! `qemu-storage-daemon` with a qcow2 file above a raw one. See `contrib/bench/README.md`.
//!
//! All write to files in the page cache and make them durable when the guest flushes: the same
//! promise, at the same moments.
#![allow(clippy::print_stdout, clippy::print_stderr)] // Results, and progress.

#[allow(dead_code)] // the other benchmark uses all of it
#[path = "../serve/histogram.rs"]
mod histogram;
#[allow(dead_code)] // as above
#[path = "../serve/process.rs"]
mod process;

use std::error::Error;
use std::fs::{self, File};
use std::io::{Seek, SeekFrom, Write};
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Instant;

use clap::Parser;

use common::blk;
use common::content::Random;
use common::load::{Load, Shape};
use common::memory::{Memory, Region};
use common::ring::{Addresses, Ring};
use common::session::{Session, Wanted, feature};
use histogram::Histogram;
use process::{Process, bind, processors};

type Result<T> = std::result::Result<T, Box<dyn Error + Send + Sync>>;

/// Bytes of a random write.
const SMALL: u32 = 4096;
/// Bytes of a write in order.
const LARGE: u32 = 128 << 10;
/// Random writes in flight.
const DEPTH: u16 = 32;
/// Writes in order in flight.
const DEPTH_IN_ORDER: u16 = 8;

/// Compares ways to write above an image over vhost-user.
#[derive(Parser)]
struct Args {
    /// Number of rounds; each round measures every disk once.
    #[arg(long, default_value_t = 5)]
    rounds: usize,
    /// Size of the image in MiB; a pass of random writes covers a quarter of it.
    #[arg(long, default_value_t = 512)]
    size: u64,
    /// Disks to measure, by name [default: all]
    #[arg(long, value_delimiter = ',')]
    only: Vec<String>,
    /// Directory for the files, on the storage to be measured.
    #[arg(long, default_value = "target/bench-write")]
    dir: PathBuf,
    /// The daemon.
    #[arg(long, default_value = env!("CARGO_BIN_EXE_ovbd-vhost"))]
    daemon: PathBuf,
    /// The image tool.
    #[arg(long, default_value = env!("CARGO_BIN_EXE_ovbd"))]
    tool: PathBuf,
    /// Cargo adds this.
    #[arg(long, hide = true)]
    bench: bool,
}

/// What is written above the image.
#[derive(Clone, Copy, PartialEq)]
enum Disk {
    Ours(&'static str),
    Qcow2(&'static str),
}

const DISKS: [Disk; 5] = [
    Disk::Ours("hybrid"),
    Disk::Ours("append"),
    Disk::Ours("sparse"),
    Disk::Qcow2("threads"),
    Disk::Qcow2("io_uring"),
];

/// One thing that is measured on a disk, in this order, each after the one before.
struct Pass {
    name: &'static str,
    /// Whether writes are random, of [`SMALL`], or in order, of [`LARGE`].
    random: bool,
    /// Writes between two flushes; they are all answered before the flush is sent.
    flush_every: u64,
}

const PASSES: [Pass; 7] = [
    Pass {
        name: "random, first, flush every 32",
        random: true,
        flush_every: 32,
    },
    Pass {
        name: "random, first, flush every 1024",
        random: true,
        flush_every: 1024,
    },
    Pass {
        name: "random, again, flush every 32",
        random: true,
        flush_every: 32,
    },
    Pass {
        name: "random, again, flush every 1024",
        random: true,
        flush_every: 1024,
    },
    Pass {
        name: "in order, first, flush every 256",
        random: false,
        flush_every: 256,
    },
    Pass {
        name: "in order, again, flush every 256",
        random: false,
        flush_every: 256,
    },
    Pass {
        name: "in order over random writes, flush every 256",
        random: false,
        flush_every: 256,
    },
];

impl Disk {
    fn name(self) -> String {
        match self {
            Disk::Ours(kind) => format!("ovbd-{kind}"),
            Disk::Qcow2(aio) => format!("qcow2:{aio}"),
        }
    }

    /// Makes an empty one in `dir` and returns the command that serves it.
    fn command(self, args: &Args, dir: &Path, socket: &Path) -> Result<Command> {
        let text = |name: &str| dir.join(name).display().to_string();
        for name in [
            "upper.data",
            "upper.index",
            "upper.index.journal0",
            "upper.index.journal1",
        ] {
            let _ = fs::remove_file(dir.join(name));
        }
        Ok(match self {
            Disk::Ours(kind) => {
                let upper = format!("data={},index={}", text("upper.data"), text("upper.index"));
                let size = (args.size << 20).to_string();
                let mut create = Command::new(&args.tool);
                create.args(["upper", "create", &upper, "--size", &size, "--type", kind]);
                run(&mut create)?;
                let mut command = Command::new(&args.daemon);
                command
                    .arg("--socket")
                    .arg(socket)
                    .arg("--layers")
                    .arg(dir.join("base.obd"));
                command.args(["--upper", &upper]);
                command
            }
            Disk::Qcow2(aio) => {
                let overlay = text("overlay.qcow2");
                let raw = text("base.raw");
                let raw = fs::canonicalize(raw)?.display().to_string();
                let _ = fs::remove_file(&overlay);
                run(Command::new("qemu-img").args([
                    "create", "-q", "-f", "qcow2", "-F", "raw", "-b", &raw, &overlay,
                ]))?;
                let mut command = Command::new("qemu-storage-daemon");
                let blockdev = |options: String| ["--blockdev".to_owned(), options];
                command.args(["--object", "iothread,id=thread"]);
                command.args(blockdev(format!(
                    "driver=file,node-name=below,filename={raw},read-only=on,aio={aio}"
                )));
                command.args(blockdev(format!(
                    "driver=file,node-name=file,filename={overlay},aio={aio},discard=unmap"
                )));
                command.args(blockdev(
                    "driver=qcow2,node-name=disk,file=file,backing=below".to_owned(),
                ));
                command.arg("--export").arg(format!(
                    "type=vhost-user-blk,id=export,node-name=disk,writable=on,num-queues=2,iothread=thread,\
                     addr.type=unix,addr.path={}",
                    socket.display()
                ));
                command
            }
        })
    }
}

fn run(command: &mut Command) -> Result<()> {
    match command.status()?.success() {
        true => Ok(()),
        false => Err(format!("{command:?} failed").into()),
    }
}

/// Makes the image below: half of it data that compresses by half, half of it holes.
fn prepare(args: &Args) -> Result<()> {
    fs::create_dir_all(&args.dir)?;
    let (raw, layer) = (args.dir.join("base.raw"), args.dir.join("base.obd"));
    let mut file = File::create(&raw)?;
    file.set_len(args.size << 20)?;
    let mut random = Random::new(1);
    for mebibyte in (0..args.size).step_by(2) {
        let mut bytes = vec![0; 1 << 20];
        for word in bytes.chunks_exact_mut(16) {
            word[..8].copy_from_slice(&random.any().to_le_bytes());
        }
        file.seek(SeekFrom::Start(mebibyte << 20))?;
        file.write_all(&bytes)?;
    }
    file.sync_all()?;
    run(Command::new(&args.tool)
        .args(["create", "--from"])
        .arg(&raw)
        .arg(&layer))
}

/// What came of one pass.
struct Sample {
    disk: usize,
    pass: usize,
    writes_per_second: f64,
    cpu_microseconds: f64,
    p50: f64,
    p99: f64,
}

/// A queue of writes, and one of flushes.
struct Guest {
    writes: Load,
    flushes: Load,
    _session: Session,
}

impl Guest {
    fn connect(process: &Process, len: u32, depth: u16) -> Result<Self> {
        let mut session = Session::negotiate(process.connect()?, Wanted::all())?;
        let memory = Memory {
            regions: vec![Region::new(0x1_0000_0000, 16 << 20, 0)],
        };
        session.share(&memory)?;
        // One ring for both would do; two keep their slots apart.
        let mut load = |index: usize, kind: u32, depth: u16, len: u32| -> Result<Load> {
            let size = (3 * depth).next_power_of_two();
            let at = Addresses::alloc(&memory, size, [0, 0, 0]);
            let ring = Ring::new(&memory, at, size, session.has(feature::EVENT_IDX));
            session.start_queue(index, &ring.vring, 0)?;
            let segments = u32::from(len > 0);
            let indirect = false;
            let shape = Shape {
                depth,
                len,
                segments,
                indirect,
            };
            Ok(Load::of_kind(kind, ring, &memory, 0, shape))
        };
        let writes = load(0, blk::OUT, depth, len)?;
        let flushes = load(1, blk::FLUSH, 1, 0)?;
        for slot in 0..depth {
            let noise: Vec<_> = (0..len).map(|n| (n * 31 + u32::from(slot)) as u8).collect();
            writes.data(slot).copy_from(&noise);
        }
        Ok(Self {
            writes,
            flushes,
            _session: session,
        })
    }

    /// Writes at `sectors`, and flushes after every `flush_every` and at the end.
    fn write(&mut self, sectors: &[u64], flush_every: u64, times: &mut Histogram) -> Result<()> {
        for part in sectors.chunks(flush_every as usize) {
            let mut next = part.iter().copied();
            let mut failed = 0;
            let mut began = vec![Instant::now(); usize::from(self.writes.shape().depth)];
            self.writes.run(
                || next.next(),
                |done| {
                    failed += u64::from(done.status != blk::OK);
                    let slot = usize::from(done.slot);
                    times.record(began[slot].elapsed().as_nanos() as u64);
                    began[slot] = Instant::now();
                },
            );
            let mut once = Some(0);
            self.flushes.run(
                || once.take(),
                |done| failed += u64::from(done.status != blk::OK),
            );
            if failed > 0 {
                return Err(format!("{failed} requests failed").into());
            }
        }
        Ok(())
    }
}

/// The sectors of a pass: at random and each once, every other 4 KiB of the first half of the disk; or
/// in order, a quarter of it from byte `start` on.
fn sectors(args: &Args, random: bool, start: u64) -> Vec<u64> {
    let len = if random { SMALL } else { LARGE };
    let count = (args.size << 20) / 4 / u64::from(len);
    let step = if random { 2 } else { 1 };
    let mut sectors: Vec<_> = (0..count)
        .map(|n| (start + n * step * u64::from(len)) / blk::SECTOR)
        .collect();
    if random {
        Random::new(7).shuffle(&mut sectors);
    }
    sectors
}

/// Runs all passes over one disk.
fn measure(args: &Args, disk: usize) -> Result<Vec<Sample>> {
    let mut samples = Vec::new();
    let (random, over) = (sectors(args, true, 0), sectors(args, false, 0));
    let in_order = sectors(args, false, args.size << 19);
    let (first, second) = random.split_at(random.len() / 2);
    let mut command = None;
    let process = Process::start(|socket| {
        let made = DISKS[disk].command(args, &args.dir, socket);
        made.unwrap_or_else(|error| {
            command = Some(error);
            Command::new("false")
        })
    })?;
    if let Some(error) = command {
        return Err(error);
    }
    let all = processors()?;
    process.bind(&all[..1])?;
    bind(None, &all[all.len() - 1..])?;
    for (number, pass) in PASSES.iter().enumerate() {
        let (len, depth) = match pass.random {
            true => (SMALL, DEPTH),
            false => (LARGE, DEPTH_IN_ORDER),
        };
        let sectors = match (pass.random, pass.flush_every) {
            (false, _) if number + 1 == PASSES.len() => &over[..],
            (false, _) => &in_order[..],
            (true, 32) => first,
            (true, _) => second,
        };
        let mut guest = Guest::connect(&process, len, depth)?;
        let mut times = Histogram::default();
        let cpu = process.cpu()?;
        let start = Instant::now();
        guest.write(sectors, pass.flush_every, &mut times)?;
        let seconds = start.elapsed().as_secs_f64();
        samples.push(Sample {
            disk,
            pass: number,
            writes_per_second: sectors.len() as f64 / seconds,
            cpu_microseconds: (process.cpu()? - cpu) as f64 / 1000.0 / sectors.len() as f64,
            p50: times.quantile(0.5),
            p99: times.quantile(0.99),
        });
    }
    Ok(samples)
}

fn median(mut values: Vec<f64>) -> f64 {
    values.sort_by(f64::total_cmp);
    values.get(values.len() / 2).copied().unwrap_or(f64::NAN)
}

fn main() -> Result<()> {
    let args = Args::parse();
    prepare(&args)?;
    let chosen: Vec<_> = (0..DISKS.len())
        .filter(|disk| args.only.is_empty() || args.only.contains(&DISKS[*disk].name()))
        .collect();
    let mut samples = Vec::new();
    for round in 0..args.rounds {
        for disk in &chosen {
            eprintln!("round {}: {}", round + 1, DISKS[*disk].name());
            samples.extend(measure(&args, *disk)?);
        }
    }
    let figure = |disk: usize, pass: usize, of: &dyn Fn(&Sample) -> f64| {
        let found = samples.iter();
        let found = found.filter(|sample| (sample.disk, sample.pass) == (disk, pass));
        median(found.map(of).collect())
    };
    for (number, pass) in PASSES.iter().enumerate() {
        println!("\n{}", pass.name);
        println!("| disk | writes/s | to qcow2 | CPU us | p50 us | p99 us |");
        println!("|---|--:|--:|--:|--:|--:|");
        let rate = |disk: usize| figure(disk, number, &|sample| sample.writes_per_second);
        let peers = chosen
            .iter()
            .filter(|disk| matches!(DISKS[**disk], Disk::Qcow2(_)));
        let best = peers.map(|disk| rate(*disk)).fold(f64::NAN, f64::max);
        for disk in &chosen {
            println!(
                "| {} | {:.0} | {:.2} | {:.1} | {:.0} | {:.0} |",
                DISKS[*disk].name(),
                rate(*disk),
                rate(*disk) / best,
                figure(*disk, number, &|sample| sample.cpu_microseconds),
                figure(*disk, number, &|sample| sample.p50),
                figure(*disk, number, &|sample| sample.p99),
            );
        }
    }
    Ok(())
}
