//! How long it takes from the start of our daemon to a socket that listens.

use std::time::Instant;

use crate::Result;
use crate::process::Process;
use crate::report::median;
use crate::subjects::Build;
use crate::wide;

/// Layers of the stack.
const LAYERS: u64 = 255;

/// Mappings in all of them together.
const MAPPINGS: [u64; 3] = [10_000, 100_000, 1_000_000];

/// Starts that a median is taken of.
const STARTS: usize = 9;

/// A table in Markdown, of milliseconds by builds and mappings.
pub fn table(builds: &[Build]) -> Result<String> {
    let mut out =
        format!("| {LAYERS} layers | mappings | ms to a listening socket |\n|---|--:|--:|\n");
    for mappings in MAPPINGS {
        let dir = tempfile::tempdir()?;
        let files = wide::write(dir.path(), LAYERS, mappings);
        for build in builds {
            let mut times = Vec::new();
            for _ in 0..STARTS {
                let start = Instant::now();
                Process::start(|socket| build.command(&files, socket))?.connect()?;
                times.push(start.elapsed().as_secs_f64() * 1000.0);
            }
            let time = median(times.into_iter());
            out += &format!("| {} | {mappings} | {time:.1} |\n", build.name("wide"));
        }
    }
    Ok(out)
}
