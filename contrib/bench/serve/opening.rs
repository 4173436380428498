//! How long it takes from the start of our daemon to a socket that listens, and how much private memory
//! the daemon has then: from the layers, and from the image tables in a cache.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::thread;
use std::time::{Duration, Instant};

use common::PATIENCE;

use crate::Result;
use crate::process::Process;
use crate::report::median;
use crate::subjects::{Build, Source};
use crate::wide;

/// Layers of the stack.
const LAYERS: u64 = 255;

/// Mappings in all of them together.
const MAPPINGS: [u64; 3] = [10_000, 100_000, 1_000_000];

/// Starts that a median is taken of.
const STARTS: usize = 9;

/// A table in Markdown, of milliseconds and KiB by builds and mappings.
pub fn table(builds: &[Build]) -> Result<String> {
    let mut out = format!(
        "| {LAYERS} layers | mappings | ms to a listening socket | private KiB | with tables: ms | private KiB \
         |\n|---|--:|--:|--:|--:|--:|\n"
    );
    for mappings in MAPPINGS {
        let dir = tempfile::tempdir()?;
        let files = wide::write(dir.path(), LAYERS, mappings);
        // Tables are only written of layers that have not changed for a moment.
        thread::sleep(Duration::from_millis(100));
        for build in builds.iter().filter(|build| build.source == Source::Files) {
            let (time, memory) = measure(|socket| build.command(&files, socket))?;
            let cache = tempfile::tempdir()?;
            let cached = |socket: &Path| {
                let mut command = build.command(&files, socket);
                command.arg("--cache").arg(cache.path());
                command
            };
            let first = Process::start(cached)?;
            wait_for_tables(&cache.path().join("tables"))?;
            drop(first);
            let (time_cached, memory_cached) = measure(cached)?;
            let name = build.name("wide");
            out += &format!(
                "| {name} | {mappings} | {time:.1} | {memory:.0} | {time_cached:.1} | {memory_cached:.0} |\n"
            );
        }
    }
    Ok(out)
}

/// Medians of the time to a listening socket, in milliseconds, and of the private memory in KiB.
fn measure(command: impl Fn(&Path) -> Command) -> Result<(f64, f64)> {
    let (mut times, mut memory) = (Vec::new(), Vec::new());
    for _ in 0..STARTS {
        let start = Instant::now();
        let process = Process::start(&command)?;
        process.connect()?;
        times.push(start.elapsed().as_secs_f64() * 1000.0);
        // The daemon returns what its start used once it listens.
        thread::sleep(Duration::from_millis(100));
        memory.push(process.private()? as f64);
    }
    Ok((median(times.into_iter()), median(memory.into_iter())))
}

/// Waits until the directory has a file of tables with a header, which is written last.
fn wait_for_tables(directory: &Path) -> Result<PathBuf> {
    let start = Instant::now();
    while start.elapsed() < PATIENCE {
        for entry in fs::read_dir(directory)?.flatten() {
            let has_header = |bytes: Vec<u8>| bytes.first().is_some_and(|byte| *byte != 0);
            if fs::read(entry.path()).is_ok_and(has_header) {
                return Ok(entry.path());
            }
        }
        thread::sleep(Duration::from_millis(5));
    }
    Err(format!("no tables in {}", directory.display()).into())
}
