//! The commands about prefetch traces.

use std::error::Error;
use std::fs::File;
use std::io::Read;
use std::path::PathBuf;

use clap::{Args, Subcommand};
use ovbd_vhost::format::trace::{MAX_TRACE_LEN, parse};
use ovbd_vhost::tool::trace::Reads;

use super::options::JsonArgs;

/// Examine prefetch traces.
#[derive(Subcommand)]
pub enum TraceCommand {
    Show(ShowArgs),
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

impl TraceCommand {
    /// Runs the command, and returns what to print.
    pub fn run(self) -> Result<String, Box<dyn Error>> {
        let Self::Show(args) = self;
        let name = args.trace.display();
        let mut bytes = Vec::new();
        File::open(&args.trace)
            .and_then(|file| file.take(MAX_TRACE_LEN + 1).read_to_end(&mut bytes))
            .map_err(|error| format!("cannot read {name}: {error}"))?;
        let reads = parse(&bytes).map_err(|error| format!("{name}: {error}"))?;
        Ok(args.json.text(&Reads::from(reads))?)
    }
}
