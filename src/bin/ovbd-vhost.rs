//! The `ovbd-vhost` daemon: arguments only.
#![cfg_attr(
    not(test),
    deny(
        clippy::unwrap_used,
        clippy::expect_used,
        clippy::panic,
        clippy::unreachable,
        clippy::todo,
        clippy::unimplemented
    )
)]

use std::path::PathBuf;
use std::process::ExitCode;
use std::time::Duration;

use clap::error::ErrorKind;
use clap::{CommandFactory, Parser};
use ovbd_vhost::daemon::config::{Config, ImageSource, MAX_QUEUES, UpperSource};
use ovbd_vhost::daemon::{self, activation};
use ovbd_vhost::engine::Tuning;
use ovbd_vhost::fetch::process;
use ovbd_vhost::image::Lineage;
use ovbd_vhost::reason::reason;
use ovbd_vhost::units::parse_size;
use ovbd_vhost::virtio::queue::MAX_QUEUE_SIZE;
use ovbd_vhost::virtio::request::SERIAL_LEN;
use ovbd_vhost::writable;

/// Serves a stack of OverlayBD layers to a virtual machine as a vhost-user-blk device.
#[derive(Parser)]
#[command(version, about)]
struct Args {
    /// Path of the socket the virtual machine's monitor connects to [default: the socket the
    /// service manager passes].
    #[arg(long, value_name = "PATH")]
    socket: Option<PathBuf>,

    /// Permissions of the socket, in octal.
    #[arg(long, value_name = "MODE", default_value = "600", value_parser = parse_mode)]
    socket_mode: u32,

    /// Path of a socket to be asked for snapshots and figures, over HTTP [default: none].
    #[arg(long, value_name = "PATH")]
    control: Option<PathBuf>,

    /// User to become, by name or number, once the layers are open.
    #[arg(long, value_name = "USER")]
    user: Option<String>,

    /// Group to become a member of, by name or number [default: the user's own].
    #[arg(long, value_name = "GROUP", requires = "user")]
    group: Option<String>,

    /// Whether to give up, before serving, all that serving does not need.
    #[arg(long, value_name = "WHETHER", value_enum, default_value_t = Switch::On)]
    sandbox: Switch,

    /// Layers, bottom first: a comma-separated list, and repeatable.
    #[arg(
        long,
        value_name = "FILE",
        value_delimiter = ',',
        required_unless_present_any = ["config", "upper"]
    )]
    layers: Vec<PathBuf>,

    /// An OverlayBD image config (config.v1.json) in place of --layers.
    #[arg(long, value_name = "FILE", conflicts_with = "layers")]
    config: Option<PathBuf>,

    /// Use layers that do not lie upon the layers they were made upon.
    #[arg(long)]
    force: bool,

    /// Writable layer above them, or alone: its two files.
    #[arg(
        long,
        value_name = "data=FILE,index=FILE",
        conflicts_with = "upper_auto"
    )]
    upper: Option<writable::Paths>,

    /// Folder of the writable layer, which is made there unless it is there.
    #[arg(long, value_name = "DIR")]
    upper_auto: Option<PathBuf>,

    /// Bytes of data the writable layer may hold, as 10G [default: as storage has room]. Counts
    /// sectors of 512 bytes, not the blocks that storage keeps them in, and neither index nor
    /// journal; and each layer by itself that a snapshot puts above another.
    #[arg(long, value_name = "SIZE", value_parser = parse_bytes)]
    upper_limit: Option<u64>,

    /// Number of virtqueues offered, each with an io_uring ring of its own (15 KiB of kernel
    /// memory). [default: 256, with a ring for one queue per processor, at least 4, at most 16]
    #[arg(long, value_name = "N",
          value_parser = clap::value_parser!(u16).range(1..=i64::from(MAX_QUEUES)))]
    num_queues: Option<u16>,

    /// Largest queue a front-end may set up, a power of two.
    #[arg(long, value_name = "N", default_value = "1024", value_parser = parse_queue_size)]
    queue_size: u16,

    /// Serial of the disk, up to 20 bytes [default: derived from the image].
    #[arg(long, value_name = "TEXT", value_parser = parse_serial)]
    serial: Option<[u8; SERIAL_LEN]>,

    /// Microseconds a worker looks for more requests before it sleeps.
    #[arg(long, value_name = "N", default_value_t = 0,
          value_parser = clap::value_parser!(u64).range(..=1_000_000))]
    poll_us: u64,

    /// Processors to bind workers to, one after the other: a comma-separated list.
    #[arg(long, value_name = "N", value_delimiter = ',', value_parser = parse_cpu)]
    cpus: Vec<usize>,

    /// Bytes of decoded blocks to keep for all queues, as 64M or 1G; 0 keeps none.
    #[arg(long, value_name = "SIZE", default_value = "0", value_parser = parse_bytes)]
    block_cache: u64,

    /// Bytes to read ahead of a guest that reads in order, as 1M; 0 leaves it to the kernel.
    #[arg(long, value_name = "SIZE", default_value = "0", value_parser = parse_bytes)]
    readahead: u64,

    /// Drop compressed bytes from the page cache once they are decompressed.
    #[arg(long)]
    drop_cache: bool,

    /// How bytes that are not in memory are read.
    #[arg(long, value_name = "WAY", value_enum, default_value_t = Io::Uring)]
    io: Io,
}

#[derive(Clone, Copy, PartialEq, clap::ValueEnum)]
enum Switch {
    On,
    /// For debuggers and profilers.
    Off,
}

#[derive(Clone, Copy, PartialEq, clap::ValueEnum)]
enum Io {
    /// By io_uring, where the kernel has it.
    Uring,
    /// By pread: one slow read holds its queue up.
    Pread,
}

/// A number of bytes up to 64 TiB, which is more than there is of memory or storage.
fn parse_bytes(text: &str) -> Result<u64, String> {
    let size = parse_size(text).map_err(|error| error.to_string())?;
    match size <= 64 << 40 {
        true => Ok(size),
        false => Err("expected at most 64T".to_owned()),
    }
}

fn parse_mode(text: &str) -> Result<u32, String> {
    u32::from_str_radix(text, 8)
        .ok()
        .filter(|mode| *mode <= 0o777)
        .ok_or_else(|| "expected an octal number up to 777".to_owned())
}

fn parse_cpu(text: &str) -> Result<usize, String> {
    let most = rustix::thread::CpuSet::MAX_CPU;
    let cpu = text.parse().ok().filter(|cpu| *cpu < most);
    cpu.ok_or_else(|| format!("expected the number of a processor, below {most}"))
}

fn parse_queue_size(text: &str) -> Result<u16, String> {
    text.parse()
        .ok()
        .filter(|size: &u16| size.is_power_of_two() && (2..=MAX_QUEUE_SIZE).contains(size))
        .ok_or_else(|| format!("expected a power of two from 2 to {MAX_QUEUE_SIZE}"))
}

fn parse_serial(text: &str) -> Result<[u8; SERIAL_LEN], String> {
    let mut serial = [0; SERIAL_LEN];
    let printable = text
        .bytes()
        .all(|byte| byte.is_ascii_graphic() || byte == b' ');
    match serial.get_mut(..text.len()) {
        Some(start) if printable && !text.is_empty() => {
            start.copy_from_slice(text.as_bytes());
            Ok(serial)
        }
        _ => Err(format!(
            "expected 1 to {SERIAL_LEN} printable ASCII characters"
        )),
    }
}

impl From<Args> for Config {
    fn from(args: Args) -> Self {
        Config {
            socket: args.socket,
            socket_mode: args.socket_mode,
            control: args.control,
            user: args.user,
            group: args.group,
            sandbox: args.sandbox == Switch::On,
            image: match args.config {
                Some(path) => ImageSource::Config(path),
                None => ImageSource::Layers(args.layers),
            },
            lineage: match args.force {
                true => Lineage::Ignored,
                false => Lineage::Checked,
            },
            upper: match (args.upper, args.upper_auto) {
                (Some(paths), _) => Some(UpperSource::Files(paths)),
                (None, folder) => folder.map(UpperSource::Folder),
            },
            upper_limit: args.upper_limit,
            num_queues: args.num_queues,
            io_uring: args.io == Io::Uring,
            queue_size: args.queue_size,
            serial: args.serial,
            block_cache: args.block_cache,
            tuning: Tuning {
                poll: Duration::from_micros(args.poll_us),
                readahead: args.readahead,
                drop_cache: args.drop_cache,
                cpus: args.cpus,
            },
        }
    }
}

#[expect(clippy::print_stderr, reason = "the one line that says why")]
fn main() -> ExitCode {
    let environment = env_logger::Env::default().default_filter_or("info");
    env_logger::Builder::from_env(environment).init();
    if let Some(code) = process::run_if_asked() {
        return code;
    }
    let args = Args::parse();
    if args.socket.is_none() && !activation::is_offered() {
        let text = "--socket is missing, and no service manager passes a socket";
        Args::command()
            .error(ErrorKind::MissingRequiredArgument, text)
            .exit();
    }
    match daemon::run(args.into()) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("ovbd-vhost: {}", reason(&error));
            ExitCode::FAILURE
        }
    }
}
