//! How long an emulated guest takes from the start of the daemon to the files that it reads.

use std::fs;
use std::path::Path;
use std::process::{Command, Stdio};
use std::sync::Arc;
use std::time::{Duration, Instant};

use common::daemon::Daemon;
use common::delay::Link;
use common::programs;

use crate::bars::Group;
use crate::front::{Host, Named};
use crate::origin::{Image, Origin};
use crate::{Result, Table, median, rate, round_trip};

/// Kernel and initial file system, which `contrib/bench/registry --boot` builds.
const GUEST: &str = "target/bench-guest";

/// Files of the image.
const FILES: &str = "/usr/bin";

/// An ext4 image of [`FILES`], compressed.
fn image() -> Result<Arc<Image>> {
    let dir = tempfile::tempdir()?;
    let (raw, layer) = (dir.path().join("raw"), dir.path().join("layer"));
    let options = [
        "-q",
        "-t",
        "ext4",
        "-O",
        "^has_journal",
        "-b",
        "4096",
        "-d",
        FILES,
    ];
    finish(Command::new("mke2fs").args(options).arg(&raw).arg("512M"))?;
    let mut create = Command::new(programs::path("ovbd"));
    finish(
        create
            .args(["create", "--tar", "--from"])
            .args([&raw, &layer]),
    )?;
    Ok(Image::new(&[fs::read(&layer)?]))
}

fn finish(command: &mut Command) -> Result<()> {
    match command.stdout(Stdio::null()).status()?.success() {
        true => Ok(()),
        false => Err(format!("{command:?} failed").into()),
    }
}

/// Boots a guest, and waits until it has switched itself off.
fn boot(daemon: &Daemon) -> Result<()> {
    let socket = daemon.socket().display().to_string();
    let file = |name: &str| Path::new(GUEST).join(name).display().to_string();
    let output = Command::new("qemu-system-x86_64")
        .args([
            "-M", "q35", "-accel", "tcg", "-cpu", "max", "-smp", "2", "-m", "512",
        ])
        .args(["-object", "memory-backend-memfd,id=mem,size=512M,share=on"])
        .args(["-numa", "node,memdev=mem", "-chardev"])
        .arg(format!("socket,id=disk,path={socket}"))
        .args(["-device", "vhost-user-blk-pci,chardev=disk,num-queues=2"])
        .args(["-kernel", &file("vmlinuz"), "-initrd", &file("initrd.gz")])
        .args(["-append", "console=ttyS0 quiet panic=-1 no_timer_check"])
        .args([
            "-nodefaults",
            "-display",
            "none",
            "-serial",
            "stdio",
            "-no-reboot",
        ])
        .stdin(Stdio::null())
        .output()?;
    let said = String::from_utf8_lossy(&output.stdout);
    let read = said.lines().find(|line| line.contains("guest> read "));
    match read {
        Some(line) if !line.contains("read 0 bytes") => Ok(()),
        _ => Err(format!("the guest did not read: {said}").into()),
    }
}

/// What the starts over one link took, and fetched.
#[derive(Default)]
struct Starts {
    pulled: Vec<Duration>,
    cold: Vec<Duration>,
    traced: Vec<Duration>,
    warm: Vec<Duration>,
    /// Bytes fetched by a cold start, and by one with a trace.
    bytes: [u64; 2],
}

impl Starts {
    /// One start of each kind.
    fn round(&mut self, origin: &Origin) -> Result<()> {
        let run = |host: &Host, more: &[&str]| -> Result<(Duration, u64)> {
            let (before, start) = (origin.bytes(), Instant::now());
            let (mut daemon, _) = host.serve(origin, Named::Config, more);
            boot(&daemon)?;
            let took = start.elapsed();
            daemon.terminate();
            Ok((took, origin.bytes() - before))
        };
        let host = Host::new(origin)?;
        let (cold, bytes) = run(&host, &[])?;
        self.cold.push(cold);
        self.bytes[0] = bytes;
        self.warm.push(run(&host, &[])?.0);
        let trace = host.path("trace");
        run(&host, &["--record-trace", &trace])?;
        let (traced, bytes) = run(&Host::new(origin)?, &["--prefetch", &trace])?;
        self.traced.push(traced);
        self.bytes[1] = bytes;
        let host = Host::new(origin)?;
        let pulled = host.pull(origin)?;
        self.pulled.push(pulled + run(&host, &[])?.0);
        Ok(())
    }

    /// The middle time of each kind of start.
    fn times(self) -> [(&'static str, Duration); 4] {
        [
            ("pull first", self.pulled),
            ("cold", self.cold),
            ("trace", self.traced),
            ("warm", self.warm),
        ]
        .map(|(kind, times)| (kind, median(times)))
    }
}

/// The table over links.
pub fn table(links: &[Link], rounds: usize) -> Result<Table> {
    let image = image()?;
    let mut text = format!(
        "| guest that reads a fifth of {:.0} MB | link | pull everything, then boot | cold | with a trace | \
         warm | fetched: cold | with a trace |\n|--:|--:|--:|--:|--:|--:|--:|--:|\n",
        image.bytes() as f64 / 1e6
    );
    let mut bars = Vec::new();
    for link in links {
        let origin = Origin::start(&image, *link);
        let mut starts = Starts::default();
        for _ in 0..rounds {
            starts.round(&origin)?;
        }
        let [cold, traced] = starts.bytes.map(|bytes| bytes as f64 / 1e6);
        let times = starts.times();
        let cells = times.map(|(_, time)| format!("{:.1} s", time.as_secs_f64()));
        text += &format!(
            "| {} | {} | {} | {cold:.0} MB | {traced:.0} MB |\n",
            round_trip(*link),
            rate(*link),
            cells.join(" | "),
        );
        for (kind, time) in times {
            let name = format!("{}, {}, {kind}", round_trip(*link), rate(*link));
            bars.push((name, time.as_secs_f64()));
        }
    }
    Ok(Table {
        name: "boot",
        text,
        charts: vec![Group::new("start of a guest, s", bars)],
    })
}
