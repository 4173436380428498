//! Soaks a node: see `contrib/stress/README.md`.
#![allow(clippy::print_stdout)] // The summary.

mod soak;

use std::time::Duration;

use clap::Parser;

/// Read and write on many disks while the node and the disk processes are killed, stopped and replaced.
#[derive(Parser)]
struct Args {
    /// Duration in minutes
    #[arg(long, value_name = "N", default_value_t = 20.0)]
    minutes: f64,
    /// Number of disks
    #[arg(long, value_name = "N", default_value_t = 50)]
    disks: usize,
    /// Seed of the random operations
    #[arg(long, value_name = "N", default_value_t = 1)]
    seed: u64,
    /// Passed by cargo.
    #[arg(long, hide = true)]
    bench: bool,
}

fn main() {
    let args = Args::parse();
    let time = Duration::from_secs_f64(args.minutes.max(0.0) * 60.0);
    println!(
        "{} minutes, {} disks, seed {}",
        args.minutes, args.disks, args.seed
    );
    let summary = soak::run(time, args.disks, args.seed);
    println!("{summary}; {} kinds of trouble", summary.kinds());
}
