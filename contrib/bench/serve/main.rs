//! Serves one disk in many forms by `ovbd-vhost` and by `qemu-storage-daemon`, reads it through
//! vhost-user with one front-end, and compares what that took. See `contrib/bench/README.md`.
#![allow(clippy::print_stdout, clippy::print_stderr)] // Results, and progress.

#[path = "../bars.rs"]
mod bars;
#[path = "../wide.rs"]
mod wide;

mod bare;
mod cached;
mod content;
mod data;
mod drive;
mod histogram;
mod mapped;
mod opening;
mod plot;
mod process;
mod report;
mod subjects;

use std::error::Error;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::time::Duration;

use clap::Parser;

use bare::Bare;
use cached::Registry;
use content::Content;
use data::{Data, FORMS};
use drive::{Connection, Limit, Outcome, WORKLOADS, Workload};
use mapped::Mapped;
use process::{Process, bind};
use report::{Row, Sample, Table};
use subjects::{Build, Kind, Source, Subject};

/// Longest cold run of one image.
const COLD_TIME: Duration = Duration::from_secs(3);

/// Most rounds of cold runs.
const COLD_ROUNDS: usize = 3;

/// Any failure ends the run, with a message.
type Result<T> = std::result::Result<T, Box<dyn Error + Send + Sync>>;

/// Compares ways to serve a disk over vhost-user.
#[derive(Parser)]
struct Args {
    /// Run for about two minutes only: 256 MiB, fewer images, short rounds.
    #[arg(long)]
    quick: bool,
    /// Images to measure, by name, or by the part of the name before the colon [default: all]
    #[arg(long, value_name = "NAME", value_delimiter = ',')]
    only: Vec<String>,
    /// Workloads: rand32, rand1, seq8 [default: all]
    #[arg(long, value_name = "NAME", value_delimiter = ',')]
    workloads: Vec<String>,
    /// Numbers of queues.
    #[arg(long, value_name = "N", value_delimiter = ',', default_value = "1,2")]
    queues: Vec<usize>,
    /// Number of rounds; each round measures every image once.
    #[arg(long, value_name = "N", default_value_t = 5)]
    rounds: usize,
    /// Seconds for which a round measures each image [default: 1; 0.3 with --quick]
    #[arg(long, value_name = "S")]
    seconds: Option<f64>,
    /// Size of the disk in MiB [default: 2048; 256 with --quick]
    #[arg(long, value_name = "MIB")]
    size: Option<u64>,
    /// Directory for the images.
    #[arg(long, value_name = "DIR", default_value = "target/bench-data")]
    dir: PathBuf,
    /// Directory whose files fill the disk.
    #[arg(long, value_name = "DIR", default_value = "/usr")]
    source: PathBuf,
    /// The daemon under test.
    #[arg(long, value_name = "PATH", default_value = env!("CARGO_BIN_EXE_ovbd-vhost"))]
    daemon: PathBuf,
    /// More options of the daemon, separated by spaces.
    #[arg(
        long,
        value_name = "ARGS",
        default_value = "",
        allow_hyphen_values = true
    )]
    daemon_args: String,
    /// Another build of the daemon, to compare with.
    #[arg(long, value_name = "PATH")]
    baseline: Option<PathBuf>,
    /// The same build with other options, to compare with; repeatable.
    #[arg(long, value_name = "NAME=ARGS", allow_hyphen_values = true)]
    variant: Vec<String>,
    /// Also serve our images from a registry, once all of them is in the cache: `+filled`, whose
    /// layers were opened while they were absent, and `+cached`, whose layers were opened complete.
    #[arg(long)]
    cached: bool,
    /// Omit the runs with an empty page cache.
    #[arg(long)]
    no_cold: bool,
    /// Measure only the time of a start, and the private memory after the start.
    #[arg(long)]
    opening: bool,
    /// The image tool.
    #[arg(long, value_name = "PATH", default_value = env!("CARGO_BIN_EXE_ovbd"))]
    tool: PathBuf,
    /// File for all samples; a plot of the medians is written beside it, as `.svg`.
    #[arg(long, value_name = "FILE", default_value = "target/bench.json")]
    json: PathBuf,
    /// Cargo adds this.
    #[arg(long, hide = true)]
    bench: bool,
}

impl Args {
    fn builds(&self) -> Result<Vec<Build>> {
        let build = |label: &str, program: &PathBuf, more: &str| Build {
            label: label.to_owned(),
            program: program.clone(),
            arguments: words(&self.daemon_args).chain(words(more)).collect(),
            source: Source::Files,
        };
        let mut builds = vec![build("", &self.daemon, "")];
        if let Some(baseline) = &self.baseline {
            builds.push(build("baseline", baseline, ""));
        }
        for variant in &self.variant {
            let (label, more) = variant
                .split_once('=')
                .ok_or("--variant: expected NAME=ARGS")?;
            builds.push(build(label, &self.daemon, more));
        }
        if self.cached {
            for (label, source) in [("filled", Source::Filled), ("cached", Source::Cached)] {
                let build = build(label, &self.daemon, "");
                builds.push(Build { source, ..build });
            }
        }
        Ok(builds)
    }

    /// The images to compare with each other, set by set.
    fn sets(&self) -> Vec<Vec<String>> {
        let owned = |names: &[&str]| names.iter().map(|name| (*name).to_owned()).collect();
        match (self.quick, self.only.as_slice()) {
            (true, []) => vec![owned(&subjects::QUICK)],
            (false, []) => subjects::SETS.into_iter().map(owned).collect(),
            (_, only) => vec![only.to_vec()],
        }
    }
}

fn words(text: &str) -> impl Iterator<Item = String> + '_ {
    text.split_whitespace().map(str::to_owned)
}

/// What is measured in one round after the other.
enum Runner<'s> {
    /// A daemon with a front-end connected.
    Served(&'s Process, Connection),
    /// A loop in this process.
    Bare(Bare),
    /// Another, and how far it is.
    Mapped(Mapped, usize),
}

impl Runner<'_> {
    fn turn(&mut self, content: &Content, limit: Limit, spin: bool) -> Result<Sample> {
        let (mut stored, mut front) = (0, 0);
        let (outcome, cpu): (Outcome, u64) = match self {
            Runner::Served(process, connection) => {
                let before = process.cpu()?;
                let front_before = process::own_cpu();
                let stored_before = process.read_from_storage()?;
                let outcome = connection.measure(content, limit, spin)?;
                stored = process.read_from_storage()? - stored_before;
                // Spinning is not work.
                front = if spin {
                    0
                } else {
                    process::own_cpu() - front_before
                };
                (outcome, process.cpu()? - before)
            }
            Runner::Bare(bare) => bare.measure(limit.time)?,
            Runner::Mapped(mapped, at) => mapped.measure(limit.time, at)?,
        };
        Ok(Sample {
            rate: outcome.reads as f64 / outcome.seconds,
            cpu: cpu as f64 / 1000.0 / outcome.reads as f64,
            front: front as f64 / 1000.0 / outcome.reads as f64,
            p50: outcome.times.quantile(0.5),
            p99: outcome.times.quantile(0.99),
            stored,
        })
    }
}

/// Which processors the two sides run on.
struct Processors {
    daemon: Vec<usize>,
    front: Vec<usize>,
}

impl Processors {
    /// One processor for each queue and each side, if there are as many.
    fn choose(queues: usize) -> Result<Self> {
        let all = process::processors()?;
        Ok(match all.get(..2 * queues) {
            Some(enough) => Self {
                daemon: enough[..queues].to_vec(),
                front: enough[queues..].to_vec(),
            },
            None => Self {
                daemon: all.to_vec(),
                front: all.to_vec(),
            },
        })
    }

    fn shared(&self) -> bool {
        self.daemon == self.front
    }
}

fn main() -> ExitCode {
    match run(&Args::parse()) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("bench: {error}");
            ExitCode::FAILURE
        }
    }
}

fn run(args: &Args) -> Result<()> {
    let builds = args.builds()?;
    if args.opening {
        println!("{}", opening::table(&builds)?);
        return Ok(());
    }
    let size = args.size.unwrap_or(if args.quick { 256 } else { 2048 });
    let data = Data {
        dir: fs::canonicalize(".")?
            .join(&args.dir)
            .join(format!("{size}MiB")),
        size,
        source: args.source.clone(),
        tool: args.tool.clone(),
    };
    let content = Content::read(&data.raw()?)?;
    let registry = Registry::start();
    let mut tables = Vec::new();
    for set in args.sets() {
        let subjects = subjects::subjects(&data, &builds, &set, &registry)?;
        compare(args, &data, &content, &subjects, &mut tables)?;
    }
    if args.only.is_empty() {
        println!("{}", opening::table(&builds)?);
    }
    fs::create_dir_all(args.json.parent().unwrap_or(Path::new(".")))?;
    fs::write(args.json.with_extension("svg"), plot::svg(&tables))?;
    let json: Vec<_> = tables.iter().map(Table::json).collect();
    fs::write(&args.json, serde_json::to_string_pretty(&json)?)?;
    Ok(())
}

/// Checks and measures some images, prints what came of it, and adds it to `tables`.
fn compare(
    args: &Args,
    data: &Data,
    content: &Content,
    subjects: &[Subject<'_>],
    tables: &mut Vec<Table>,
) -> Result<()> {
    let mut processes = Vec::new();
    for subject in subjects {
        let process = start(subject)?;
        subject.wait_until_local()?;
        if subject.kind != Kind::Null {
            eprintln!("checking {}", subject.name);
            Connection::open(process.connect()?, 1, WORKLOADS[2], true)?
                .compare(content)
                .map_err(|error| format!("{}: {error}", subject.name))?;
        }
        processes.push(process);
    }
    let mut warm: Vec<Table> = Vec::new();
    for queues in &args.queues {
        for workload in WORKLOADS {
            let wanted = args.workloads.iter().any(|name| name == workload.name);
            if wanted || (args.workloads.is_empty() && (*queues == 1 || workload.depth > 1)) {
                let served: Vec<_> = subjects.iter().zip(&processes).collect();
                let table = measure(args, data, content, &served, *queues, workload)?;
                println!("{}", table.markdown());
                if let Some(one) = warm.iter().find(|one| one.workload == table.workload) {
                    println!("{}", table.against(one));
                }
                warm.push(table);
            }
        }
    }
    tables.append(&mut warm);
    println!("| image | private memory, KiB |\n|---|--:|");
    for (subject, process) in subjects.iter().zip(&processes) {
        println!("| {} | {} |", subject.name, process.private()?);
    }
    println!();
    drop(processes);
    if !args.no_cold {
        for workload in [WORKLOADS[0], WORKLOADS[2]] {
            let table = measure_cold(args, content, subjects, workload)?;
            println!("{}", table.markdown());
            tables.push(table);
        }
    }
    Ok(())
}

/// Starts the daemon of a subject on the processor for daemons.
fn start(subject: &Subject) -> Result<Process> {
    let processors = Processors::choose(1)?;
    bind(None, &processors.daemon)?;
    let process = Process::start(|socket| subject.command(socket));
    bind(None, &processors.front)?;
    process
}

/// Reads with a fresh daemon and nothing in the page cache. Most blocks are read for the first time.
fn measure_cold(
    args: &Args,
    content: &Content,
    subjects: &[Subject],
    workload: Workload,
) -> Result<Table> {
    let is_cold = |kind| !matches!(kind, Kind::Null | Kind::Cached);
    let rows = subjects.iter().filter(|subject| is_cold(subject.kind));
    let mut table = Table {
        cold: true,
        workload: workload.name,
        len: workload.len,
        queues: 1,
        rows: rows.clone().map(Row::new).collect(),
    };
    let all = if workload.random {
        content.blocks()
    } else {
        content.windows()
    };
    let limit = Limit {
        time: COLD_TIME,
        count: all.len() as u64 / 8,
    };
    for _ in 0..args.rounds.min(COLD_ROUNDS) {
        for (subject, row) in rows.clone().zip(&mut table.rows) {
            data::forget(&subject.files)?;
            let process = start(subject)?;
            let connection = Connection::open(process.connect()?, 1, workload, true)?;
            let sample = Runner::Served(&process, connection).turn(content, limit, true);
            row.samples
                .push(sample.map_err(|error| format!("{}: {error}", row.name))?);
        }
    }
    Ok(table)
}

fn measure(
    args: &Args,
    data: &Data,
    content: &Content,
    served: &[(&Subject, &Process)],
    queues: usize,
    workload: Workload,
) -> Result<Table> {
    let processors = Processors::choose(queues)?;
    bind(None, &processors.front)?;
    let mut table = Table {
        cold: false,
        workload: workload.name,
        len: workload.len,
        queues,
        rows: Vec::new(),
    };
    let mut runners = Vec::new();
    for (subject, process) in served {
        data::warm(&subject.files)?;
        let connection = Connection::open(
            process.connect()?,
            queues,
            workload,
            subject.kind != Kind::Null,
        )?;
        process.bind(&processors.daemon)?;
        runners.push(Runner::Served(process, connection));
        table.rows.push(Row::new(subject));
    }
    for form in FORMS.iter().filter(|form| form.name != "lz4-32k") {
        let name = format!("bare:{}", form.name);
        if queues == 1 && workload.depth > 1 && served.iter().any(|(s, _)| s.name == form.name) {
            let layer = &data.layers(*form, 1)?[0];
            runners.push(Runner::Bare(Bare::load(layer, content, workload.random)?));
            table.rows.push(Row {
                name,
                kind: None,
                samples: Vec::new(),
            });
        }
    }
    for name in ["plain", "plain@255"] {
        if let Some((subject, _)) = served.iter().find(|(subject, _)| subject.name == name)
            && queues == 1
            && workload.random
            && workload.depth > 1
        {
            let mapped = Mapped::load(&subject.files, content)?;
            runners.push(Runner::Mapped(mapped, 0));
            table.rows.push(Row {
                name: format!("mapped:{name}"),
                kind: None,
                samples: Vec::new(),
            });
        }
    }
    let seconds = args.seconds.unwrap_or(if args.quick { 0.3 } else { 1.0 });
    let time = Duration::from_secs_f64(seconds);
    for round in 0..=args.rounds {
        for (runner, row) in runners.iter_mut().zip(&mut table.rows) {
            let count = u64::MAX;
            let sample = runner.turn(content, Limit { time, count }, !processors.shared());
            let sample = sample.map_err(|error| format!("{}: {error}", row.name))?;
            // The first is for warming up.
            if round > 0 {
                row.samples.push(sample);
            }
        }
    }
    Ok(table)
}
