//! Measures a node with 1, 50 and 500 disks: see `contrib/bench/README.md`.
#![allow(clippy::print_stdout, clippy::print_stderr)] // Results, and progress.

#[path = "../bars.rs"]
mod bars;
mod figures;

use std::fs;
use std::path::PathBuf;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use clap::Parser;
use common::layers::LayerBuilder;
use common::node::NodeProcess;
use ovbd_vhost::tool::node::client::{Content, Node, Properties};
use rustix::process::{Signal, kill_process};

use bars::Group;
use figures::{Figures, memory_of, quantile};

/// Requests that are sent at a time; the node serves 64 connections.
const PARALLEL: usize = 50;

/// Measures a node with many disks.
#[derive(Parser)]
struct Args {
    /// Numbers of disks
    #[arg(
        long,
        value_name = "N",
        value_delimiter = ',',
        default_value = "1,50,500"
    )]
    disks: Vec<usize>,
    /// Directory for state, sockets and layers: the storage that is measured
    #[arg(long, value_name = "DIR", default_value = "/tmp")]
    dir: PathBuf,
    /// Picture of the results
    #[arg(long, value_name = "FILE", default_value = "target/bench-node.svg")]
    svg: PathBuf,
    /// Cargo adds this
    #[arg(long, hide = true)]
    bench: bool,
}

fn main() {
    let args = Args::parse();
    let results: Vec<_> = args
        .disks
        .iter()
        .map(|count| {
            eprintln!("{count} disks");
            measure(&args, *count)
        })
        .collect();
    println!("{}", figures::table(&results));
    let charts: Vec<Group> = figures::charts(&results);
    let picture = bars::svg(&charts);
    fs::write(&args.svg, picture).expect("picture");
}

fn measure(args: &Args, count: usize) -> Figures {
    let mut node = NodeProcess::start(&args.dir);
    let layer = node.images().join("base.obd");
    let bytes = LayerBuilder::new(64 << 20).data(0, &[7; 512]).lsmt();
    fs::write(&layer, bytes).expect("layer");
    let layer = layer.to_str().expect("UTF-8").to_owned();
    let content = Content::Layers(vec![layer]);
    let client = node.client();
    // The image tables and the page cache are warm from here on.
    add(&client, "warm", &content);
    client.remove("warm", false).expect("removal");

    let adds = one_by_one(count, |id| add(&client, id, &content));
    let (private, descriptors, threads) = memory_of(&node.disk_processes());
    let scrapes = one_by_one(20, |_| drop(client.metrics().expect("metrics")));
    let scrape_bytes = client.metrics().expect("metrics").len();

    let start = Instant::now();
    node.kill();
    node.start_again();
    until_all_listen(&client, count);
    let node_restart = start.elapsed();

    let start = Instant::now();
    for process in node.disk_processes() {
        kill_process(process, Signal::KILL).expect("kill");
    }
    thread::sleep(Duration::from_millis(1));
    until_all_serve(&node, &client, count);
    let disks_restart = start.elapsed();

    let removals = one_by_one(count, |id| client.remove(id, true).expect("removal"));
    let all_added = all_at_once(count, |id| add(&client, id, &content));
    let all_removed = all_at_once(count, |id| client.remove(id, true).expect("removal"));
    Figures {
        disks: count,
        add: [quantile(&adds, 0.5), quantile(&adds, 0.99)],
        all_added,
        remove: [quantile(&removals, 0.5), quantile(&removals, 0.99)],
        all_removed,
        private,
        descriptors,
        threads,
        scrape: quantile(&scrapes, 0.5),
        scrape_bytes,
        node_restart,
        disks_restart,
    }
}

fn add(client: &Node, id: &str, content: &Content) {
    let added = client.add(id, content, &Properties::default());
    added.expect("the disk is made");
}

fn name(number: usize) -> String {
    format!("disk{number}")
}

/// Does `work` for each disk, one after the other; returns the times.
fn one_by_one(count: usize, work: impl Fn(&str)) -> Vec<Duration> {
    let each = (0..count).map(|number| {
        let start = Instant::now();
        work(&name(number));
        start.elapsed()
    });
    each.collect()
}

/// Does `work` for all disks, many at a time; returns the time for all.
fn all_at_once(count: usize, work: impl Fn(&str) + Sync) -> Duration {
    let start = Instant::now();
    let next = AtomicUsize::new(0);
    let worker = || {
        loop {
            let number = next.fetch_add(1, Ordering::Relaxed);
            if number >= count {
                break;
            }
            work(&name(number));
        }
    };
    thread::scope(|scope| {
        for _ in 0..PARALLEL.min(count) {
            scope.spawn(worker);
        }
    });
    start.elapsed()
}

fn until_all_listen(client: &Node, count: usize) {
    loop {
        let disks = client.disks(None).expect("disks");
        let listening = disks.iter().filter(|disk| disk["state"] == "listening");
        if listening.count() == count {
            return;
        }
        thread::sleep(Duration::from_millis(2));
    }
}

/// Waits until each disk has a process again, after all were killed.
fn until_all_serve(node: &NodeProcess, client: &Node, count: usize) {
    loop {
        until_all_listen(client, count);
        let runs = |process: &rustix::process::Pid| {
            let state = fs::read_to_string(format!("/proc/{process}/stat"));
            state.is_ok_and(|text| !text.contains(") Z"))
        };
        if node
            .disk_processes()
            .iter()
            .filter(|process| runs(process))
            .count()
            == count
        {
            return;
        }
        thread::sleep(Duration::from_millis(2));
    }
}
