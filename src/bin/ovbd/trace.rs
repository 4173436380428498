//! The commands about prefetch traces.

use std::error::Error;
use std::fs::{self, File};
use std::io::Read;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use clap::{Args, Subcommand};
use ovbd_vhost::format::trace::{MAX_TRACE_LEN, TracedRead, encode, parse};
use ovbd_vhost::tool::trace::{Reads, Recorded, TraceLayer, layer, record};
use signal_hook::consts::{SIGINT, SIGTERM};

use super::options::JsonArgs;

/// How often a recording looks whether it is to end.
const TICK: Duration = Duration::from_millis(50);

/// Record, examine and pack prefetch traces.
#[derive(Subcommand)]
pub enum TraceCommand {
    Show(ShowArgs),
    Record(RecordArgs),
    Layer(LayerArgs),
}

/// List the reads of a trace in their order: layer, offset and length in bytes.
#[derive(Args)]
pub struct ShowArgs {
    /// Trace file in upstream's format
    #[arg(value_name = "TRACE")]
    trace: PathBuf,
    #[command(flatten)]
    json: JsonArgs,
}

/// Record the reads of a running guest, from now until Ctrl-C.
///
/// The trace holds what the guest reads of the layers meanwhile; reads that the guest's own page cache
/// answers are not part of it. To record a whole start, use the option `--record-trace` of ovbd-vhost.
#[derive(Args)]
pub struct RecordArgs {
    /// Control socket of the daemon
    #[arg(value_name = "SOCKET")]
    socket: PathBuf,
    /// Trace file to write
    #[arg(value_name = "TRACE")]
    trace: PathBuf,
    /// End after this many seconds
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u64).range(1..=86_400))]
    seconds: Option<u64>,
    #[command(flatten)]
    json: JsonArgs,
}

/// Pack a trace as the topmost layer of an image, and print the layer's digest and size.
///
/// The layer is an uncompressed tar file with the member `trace`. In the manifest, its descriptor has the
/// annotation `containerd.io/snapshot/overlaybd/acceleration-layer: yes`.
#[derive(Args)]
pub struct LayerArgs {
    /// Trace file in upstream's format
    #[arg(value_name = "TRACE")]
    trace: PathBuf,
    /// Layer to write
    #[arg(value_name = "OUT")]
    to: PathBuf,
    #[command(flatten)]
    json: JsonArgs,
}

impl TraceCommand {
    /// Runs the command, and returns what to print.
    pub fn run(self) -> Result<String, Box<dyn Error>> {
        match self {
            Self::Show(args) => Ok(args.json.text(&Reads::from(read(&args.trace)?.1))?),
            Self::Record(args) => args.run(),
            Self::Layer(args) => {
                let (bytes, _) = read(&args.trace)?;
                let layer = layer(&bytes);
                write(&args.to, &layer)?;
                Ok(args.json.text(&TraceLayer::from(&layer[..]))?)
            }
        }
    }
}

impl RecordArgs {
    fn run(self) -> Result<String, Box<dyn Error>> {
        let stop = Arc::<AtomicBool>::default();
        for signal in [SIGINT, SIGTERM] {
            signal_hook::flag::register(signal, Arc::clone(&stop))?;
        }
        // A path that cannot be written is noticed now, not after the recording.
        let is_new = !self.trace.exists();
        let file = File::options().append(true).create(true).open(&self.trace);
        file.map_err(|error| format!("cannot write {}: {error}", self.trace.display()))?;
        let end = self
            .seconds
            .map(|seconds| Instant::now() + Duration::from_secs(seconds));
        let reads = record(&self.socket, || {
            let is_over = || end.is_some_and(|end| Instant::now() >= end);
            while !stop.load(Ordering::Relaxed) && !is_over() {
                thread::sleep(TICK);
            }
        });
        if reads.is_err() && is_new {
            let _ = fs::remove_file(&self.trace);
        }
        let reads = reads?;
        write(&self.trace, &encode(&reads))?;
        Ok(self.json.text(&Recorded::from(&reads[..]))?)
    }
}

/// The bytes and the reads of a trace.
fn read(path: &Path) -> Result<(Vec<u8>, Vec<TracedRead>), String> {
    let name = path.display();
    let mut bytes = Vec::new();
    File::open(path)
        .and_then(|file| file.take(MAX_TRACE_LEN + 1).read_to_end(&mut bytes))
        .map_err(|error| format!("cannot read {name}: {error}"))?;
    let reads = parse(&bytes).map_err(|error| format!("{name}: {error}"))?;
    Ok((bytes, reads))
}

fn write(path: &Path, bytes: &[u8]) -> Result<(), String> {
    fs::write(path, bytes).map_err(|error| format!("cannot write {}: {error}", path.display()))
}
