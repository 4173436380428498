//! The `ovbd` image tool: arguments only.

use std::error::Error;
use std::io::{self, Write};
use std::num::NonZero;
use std::path::PathBuf;
use std::process::ExitCode;
use std::thread;

use clap::error::ErrorKind;
use clap::{Args, CommandFactory, Parser, Subcommand, ValueEnum};
use ovbd_vhost::format::zfile::{Algorithm, BLOCK_SIZES, BlockFormat};
use ovbd_vhost::image::spec::{self, Config, Stack};
use ovbd_vhost::tool::check::{Finding, check};
use ovbd_vhost::tool::create::{Create, create};
use ovbd_vhost::tool::inspect::inspect;
use ovbd_vhost::tool::raw_image::Input;
use ovbd_vhost::tool::{self, chain, export, progress};
use uuid::Uuid;

/// Exit code for a command line that makes no sense.
const WRONG_USAGE: u8 = 2;

/// Most threads that may be asked for.
const MAX_THREADS: usize = 256;

/// Makes and examines OverlayBD layers.
#[derive(Parser)]
#[command(name = "ovbd", version)]
struct Cli {
    #[command(subcommand)]
    command: Command,
}

#[derive(Subcommand)]
enum Command {
    Create(CreateArgs),
    Inspect(InspectArgs),
    Check(CheckArgs),
    Export(ExportArgs),
}

/// Make a sealed layer from a raw disk image.
///
/// Zeros and holes take no space. The output appears when it is whole, in place of a file of that
/// name, and is the same for any number of threads.
#[derive(Args)]
struct CreateArgs {
    /// Raw image: a file, block device or named pipe; `-` for standard input
    #[arg(long, value_name = "RAW")]
    from: PathBuf,
    /// Layer to be written
    #[arg(value_name = "OUT")]
    to: PathBuf,
    /// Store only what differs from this stack (bottom first; a comma list, and repeatable)
    #[arg(long, value_name = "LAYERS", value_delimiter = ',')]
    parent: Vec<PathBuf>,
    /// Compression
    #[arg(long, value_enum, default_value_t = Compression::Lz4)]
    algorithm: Compression,
    /// Bytes compressed at a time, a power of two from 4096 to 65536 (or 4K to 64K) [default: 4096]
    #[arg(long, value_name = "N", value_parser = block_size)]
    block_size: Option<u32>,
    /// Store no checksums after the compressed blocks
    #[arg(long)]
    no_checksum: bool,
    /// Wrap the layer in a tar file, as registries carry it
    #[arg(long)]
    tar: bool,
    /// Name of the layer [default: derived from the parent's, the message and the first MiB]
    #[arg(long)]
    uuid: Option<Uuid>,
    /// Commit message, at most 256 bytes
    #[arg(long, default_value = "", hide_default_value = true, value_parser = message)]
    message: String,
    /// Threads that compress [default: one per core]
    #[arg(long, value_name = "N", value_parser = threads)]
    threads: Option<NonZero<usize>>,
}

/// Show what layers are made of.
#[derive(Args)]
struct InspectArgs {
    #[command(flatten)]
    stack: StackArgs,
    /// Write JSON in place of a table
    #[arg(long)]
    json: bool,
}

/// Verify every checksum, block and mapping of every layer.
///
/// Says on standard output what is broken and where, a line each. The exit code is 1 if anything
/// is; notes are no damage.
#[derive(Args)]
struct CheckArgs {
    #[command(flatten)]
    stack: StackArgs,
    /// Threads that read and decode [default: one per core]
    #[arg(long, value_name = "N", value_parser = threads)]
    threads: Option<NonZero<usize>>,
}

/// Write the disk that layers make up as a raw image.
///
/// Zeros become holes. The output appears when it is whole, in place of a file of that name.
#[derive(Args)]
struct ExportArgs {
    #[command(flatten)]
    stack: StackArgs,
    /// Raw image to be written; `-` for standard output
    #[arg(short, long, value_name = "RAW")]
    output: PathBuf,
    /// Threads that read and decode [default: one per core]
    #[arg(long, value_name = "N", value_parser = threads)]
    threads: Option<NonZero<usize>>,
}

/// The layers to look at.
#[derive(Args)]
struct StackArgs {
    /// Layers, bottom first: a comma list, and repeatable
    #[arg(
        value_name = "LAYERS",
        value_delimiter = ',',
        required_unless_present = "config"
    )]
    layers: Vec<PathBuf>,
    /// An OverlayBD image config (config.v1.json) in place of a list
    #[arg(long, value_name = "FILE", conflicts_with = "layers")]
    config: Option<PathBuf>,
}

impl StackArgs {
    fn stack(self) -> Result<Stack, spec::Error> {
        match self.config {
            Some(path) => Config::load(&path)?.stack(),
            None => Ok(Stack::new(self.layers)),
        }
    }
}

#[derive(Clone, Copy, PartialEq, Eq, ValueEnum)]
enum Compression {
    Lz4,
    Zstd,
    None,
}

fn block_size(text: &str) -> Result<u32, String> {
    let (number, unit) = match text.strip_suffix(['k', 'K']) {
        Some(number) => (number, 1024),
        None => (text, 1),
    };
    let size = number.parse().ok().and_then(|n: u32| n.checked_mul(unit));
    size.filter(|size| size.is_power_of_two() && BLOCK_SIZES.contains(size))
        .ok_or_else(|| "expected a power of two from 4096 to 65536".to_owned())
}

fn message(text: &str) -> Result<String, String> {
    match text.len() {
        0..=256 => Ok(text.to_owned()),
        len => Err(format!("{len} bytes; expected at most 256")),
    }
}

fn threads(text: &str) -> Result<NonZero<usize>, String> {
    let number = text
        .parse()
        .ok()
        .filter(|n: &NonZero<usize>| n.get() <= MAX_THREADS);
    number.ok_or_else(|| format!("expected a number from 1 to {MAX_THREADS}"))
}

impl CreateArgs {
    fn task(self) -> Result<Create, clap::Error> {
        let algorithm = match self.algorithm {
            Compression::Lz4 => Some(Algorithm::Lz4),
            Compression::Zstd => Some(Algorithm::Zstd),
            Compression::None => None,
        };
        if algorithm.is_none() && (self.block_size.is_some() || self.no_checksum) {
            return Err(Cli::command().error(
                ErrorKind::ArgumentConflict,
                "--algorithm none has no blocks: leave out --block-size and --no-checksum",
            ));
        }
        let from = match self.from.as_os_str() == "-" {
            true => Input::Stdin,
            false => Input::Path(self.from),
        };
        Ok(Create {
            from,
            to: self.to,
            parent: (!self.parent.is_empty()).then(|| Stack::new(self.parent)),
            blocks: algorithm.map(|algorithm| BlockFormat {
                algorithm,
                block_size: self.block_size.unwrap_or(*BLOCK_SIZES.start()),
                checksum: !self.no_checksum,
                dictionary_len: 0,
            }),
            tar: self.tar,
            uuid: self.uuid,
            message: self.message,
            threads: self.threads.unwrap_or_else(cores),
        })
    }
}

fn cores() -> NonZero<usize> {
    thread::available_parallelism().unwrap_or(NonZero::<usize>::MIN)
}

fn main() -> ExitCode {
    env_logger::Builder::from_env(env_logger::Env::default().default_filter_or("warn")).init();
    let result = Cli::try_parse().map_err(Into::into).and_then(run);
    let error = match result {
        Ok(code) => return code,
        Err(error) => error,
    };
    match error.downcast_ref() {
        Some(usage) => wrong_usage(usage),
        None => {
            say(&chain(&*error));
            ExitCode::FAILURE
        }
    }
}

fn run(cli: Cli) -> Result<ExitCode, Box<dyn Error>> {
    match cli.command {
        Command::Create(args) => {
            create(&args.task()?, &progress::bar("creating"))?;
        }
        Command::Inspect(args) => {
            let inspection = inspect(&args.stack.stack()?)?;
            let text = match args.json {
                true => serde_json::to_string_pretty(&inspection)? + "\n",
                false => inspection.to_string(),
            };
            print(&text)?;
        }
        Command::Check(args) => {
            let bar = progress::bar("checking");
            let mut tell = |finding: &Finding| bar.suspend(|| print(&format!("{finding}\n")));
            let stack = args.stack.stack()?;
            let threads = args.threads.unwrap_or_else(cores);
            let outcome = check(&stack, threads, &bar, &mut tell)?;
            print(&format!("{outcome}\n"))?;
            if outcome.broken > 0 {
                return Ok(ExitCode::FAILURE);
            }
        }
        Command::Export(args) => {
            let to = match args.output.as_os_str() == "-" {
                true => export::Output::Stdout,
                false => export::Output::Path(args.output),
            };
            let threads = args.threads.unwrap_or_else(cores);
            let stack = args.stack.stack()?;
            export::export(&stack, &to, threads, &progress::bar("exporting"))?;
        }
    }
    Ok(ExitCode::SUCCESS)
}

/// Writes a result. A reader who has seen enough is no error.
fn print(text: &str) -> Result<(), tool::Error> {
    match io::stdout().write_all(text.as_bytes()) {
        Err(error) if error.kind() != io::ErrorKind::BrokenPipe => Err(tool::Error::Stdout(error)),
        _ => Ok(()),
    }
}

/// Shows the help that was asked for, or says on one line what is wrong with the arguments.
fn wrong_usage(error: &clap::Error) -> ExitCode {
    let is_help = match error.kind() {
        ErrorKind::DisplayHelpOnMissingArgumentOrSubcommand => true,
        _ => !error.use_stderr(),
    };
    if is_help {
        // Nobody is there to be told that this failed.
        let _ = error.print();
    } else {
        let text = error.to_string();
        let text = text.trim_start_matches("error: ");
        let end = text.find("\n\nUsage:").unwrap_or(text.len());
        let end = text[..end].find("\n\nFor more").unwrap_or(end);
        let words: Vec<_> = text[..end].split_whitespace().collect();
        say(&format!("{}; see ovbd --help", words.join(" ")));
    }
    match error.use_stderr() {
        true => ExitCode::from(WRONG_USAGE),
        false => ExitCode::SUCCESS,
    }
}

fn say(line: &str) {
    // Nobody is there to be told that this failed.
    let _ = writeln!(io::stderr(), "ovbd: {line}");
}
