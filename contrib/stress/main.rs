//! Soaks the daemon: see `contrib/stress/README.md`.
#![allow(clippy::print_stdout)] // The summary.

mod soak;

use std::process::ExitCode;
use std::time::Duration;

use clap::Parser;

/// Read six disks and write to two of them under faults of every kind, and check every byte.
#[derive(Parser)]
struct Args {
    /// Duration in minutes
    #[arg(long, value_name = "N", default_value_t = 20.0)]
    minutes: f64,
    /// Seed of the random operations
    #[arg(long, value_name = "N", default_value_t = 1)]
    seed: u64,
    /// Passed by cargo.
    #[arg(long, hide = true)]
    bench: bool,
}

fn main() -> ExitCode {
    let args = Args::parse();
    let time = Duration::from_secs_f64(args.minutes.max(0.0) * 60.0);
    let report = soak::run(time, args.seed);
    println!("{} minutes, seed {}", args.minutes, args.seed);
    println!("{report}");
    ExitCode::from(u8::from(!report.is_good()))
}
