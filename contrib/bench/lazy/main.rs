//! Serves disks whose layers are in a registry behind a slow link, and measures opening, random reads,
//! sequential reads, replays of a trace and the start of a guest: see `contrib/bench/README.md`.
#![allow(clippy::print_stdout, clippy::print_stderr)] // Results, and progress.

#[path = "../bars.rs"]
mod bars;

mod boot;
mod front;
mod open;
mod origin;
mod rates;
mod replay;

use std::error::Error;
use std::fs;
use std::path::PathBuf;
use std::process::ExitCode;
use std::time::Duration;

use clap::Parser;
use common::delay::Link;

use bars::Group;

/// Any failure ends the run, with a message.
type Result<T> = std::result::Result<T, Box<dyn Error + Send + Sync>>;

/// Measures disks whose layers are in a registry.
#[derive(Parser)]
struct Args {
    /// A short run: fewer links, less data
    #[arg(long)]
    quick: bool,
    /// Round trips in milliseconds [default: 0,1,5,20,100; with --quick 0,20]
    #[arg(long, value_name = "MS", value_delimiter = ',')]
    round_trips: Vec<u64>,
    /// Rates of the link in Mbit/s; 0: no limit [default: 25,100,1000,0; with --quick 100,0]
    #[arg(long, value_name = "MBIT", value_delimiter = ',')]
    rates: Vec<u64>,
    /// Tables to make: open, random, sequential, replay [default: all]
    #[arg(long, value_name = "NAME", value_delimiter = ',')]
    only: Vec<String>,
    /// Also boot a guest from the image: cold, with a trace, warm
    #[arg(long)]
    boot: bool,
    /// Picture of the results
    #[arg(long, value_name = "FILE", default_value = "target/bench-registry.svg")]
    svg: PathBuf,
    /// Cargo adds this
    #[arg(long, hide = true)]
    bench: bool,
}

/// A table in Markdown with its charts.
pub struct Table {
    /// Name on the command line.
    name: &'static str,
    text: String,
    charts: Vec<Group>,
}

impl Args {
    fn round_trips(&self) -> Vec<Duration> {
        let times = match (&self.round_trips[..], self.quick) {
            ([], true) => &[0, 20],
            ([], false) => &[0, 1, 5, 20, 100][..],
            (named, _) => named,
        };
        times.iter().copied().map(Duration::from_millis).collect()
    }

    fn links(&self) -> Vec<Link> {
        let rates = match (&self.rates[..], self.quick) {
            ([], true) => &[100, 0],
            ([], false) => &[25, 100, 1000, 0][..],
            (named, _) => named,
        };
        let links = self.round_trips().into_iter().flat_map(|round_trip| {
            rates.iter().map(move |mbit| Link {
                round_trip,
                handshake: true,
                rate: Some(mbit * 1_000_000 / 8).filter(|rate| *rate > 0),
            })
        });
        links.collect()
    }

    fn wants(&self, name: &str) -> bool {
        self.only.is_empty() || self.only.iter().any(|only| only == name)
    }
}

/// Round trip of a link in words.
fn round_trip(link: Link) -> String {
    format!("{} ms", link.round_trip.as_millis())
}

/// Rate of a link in words.
fn rate(link: Link) -> String {
    link.rate.map_or("no limit".to_owned(), |rate| {
        format!("{} Mbit/s", rate * 8 / 1_000_000)
    })
}

/// The middle one of some times.
fn median(mut times: Vec<Duration>) -> Duration {
    times.sort();
    times.get(times.len() / 2).copied().unwrap_or_default()
}

fn milliseconds(time: Duration) -> String {
    format!("{:.0}", time.as_secs_f64() * 1000.0)
}

fn run(args: &Args) -> Result<()> {
    let (round_trips, links) = (args.round_trips(), args.links());
    let mut tables = Vec::new();
    let mut add = |name: &str, make: &dyn Fn() -> Result<Table>| -> Result<()> {
        if args.wants(name) {
            let table = make()?;
            println!("{}:\n\n{}", table.name, table.text);
            tables.push(table);
        }
        Ok(())
    };
    add("open", &|| {
        open::table(&round_trips, if args.quick { 3 } else { 7 })
    })?;
    add("random", &|| rates::random(&links, args.quick))?;
    add("sequential", &|| rates::sequential(&links, args.quick))?;
    add("replay", &|| replay::table(&links, args.quick))?;
    if args.boot {
        add("boot", &|| {
            boot::table(&links, if args.quick { 1 } else { 3 })
        })?;
    }
    let charts = tables.iter().flat_map(|table| &table.charts);
    fs::write(&args.svg, bars::svg(charts))?;
    eprintln!("wrote {}", args.svg.display());
    Ok(())
}

fn main() -> ExitCode {
    match run(&Args::parse()) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("{error}");
            ExitCode::FAILURE
        }
    }
}
