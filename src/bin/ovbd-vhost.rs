//! The `ovbd-vhost` daemon: arguments only.
#![cfg_attr(
    not(test),
    deny(
        clippy::unwrap_used,
        clippy::expect_used,
        clippy::panic,
        clippy::unreachable,
        clippy::todo,
        clippy::unimplemented,
        clippy::too_many_lines
    )
)]

use std::error::Error;
use std::io::{self, Write};
use std::path::PathBuf;
use std::process::ExitCode;
use std::time::Duration;

use clap::builder::{OsStringValueParser, TypedValueParser, UnknownArgumentValueParser};
use clap::error::ErrorKind;
use clap::{CommandFactory, Parser};
use ovbd_vhost::daemon::config::{
    Config, DEFAULT_QUEUE_SIZE, ImageSource, MAX_QUEUES, RemoteConfig, WritableSource,
};
use ovbd_vhost::daemon::{self, activation, limits};
use ovbd_vhost::engine::Tuning;
use ovbd_vhost::engine::rate_limit::{LimitsSpec, bucket::BucketSpec};
use ovbd_vhost::fetch::process;
use ovbd_vhost::image::Lineage;
use ovbd_vhost::io::child_status;
use ovbd_vhost::logging::{self, LogFormat};
use ovbd_vhost::registry::args::RegistryArgs;
use ovbd_vhost::registry::reference::Reference;
use ovbd_vhost::units::parse_size;
use ovbd_vhost::version::VERSION;
use ovbd_vhost::vhost::takeover::Takeover;
use ovbd_vhost::virtio::queue::MAX_QUEUE_SIZE;
use ovbd_vhost::virtio::request::SERIAL_LEN;
use ovbd_vhost::writable;
use rustix::thread::{CpuSet, sched_getaffinity};

/// Serve a stack of OverlayBD layers to a virtual machine as a vhost-user-blk disk.
#[derive(Parser)]
#[command(name = "ovbd-vhost", version = VERSION, max_term_width = 100)]
pub(crate) struct Args {
    /// Unix socket to create, for front-ends (VMMs) to connect to [default: the socket that the service
    /// manager passes]
    #[arg(long, value_name = "PATH")]
    socket: Option<PathBuf>,

    /// Take the socket from ovbd-node, over standard input.
    #[arg(long, hide = true, conflicts_with = "socket")]
    started_by_node: bool,

    /// Permissions of the socket, in octal
    #[arg(long, value_name = "MODE", default_value = "600", value_parser = parse_mode)]
    socket_mode: u32,

    /// Unix socket of the HTTP control API [default: none]
    #[arg(long, value_name = "PATH")]
    control: Option<PathBuf>,

    /// User to switch to once the layers are open, by name or number. The sockets and the writable
    /// layer belong to this user
    #[arg(long, help_heading = "Privileges", value_name = "USER")]
    user: Option<String>,

    /// Group to switch to, by name or number [default: the group of the user]
    #[arg(
        long,
        help_heading = "Privileges",
        value_name = "GROUP",
        requires = "user"
    )]
    group: Option<String>,

    /// Drop privileges before parsing and serving (seccomp, Landlock, capabilities)
    #[arg(long, help_heading = "Privileges", value_name = "MODE", value_enum, default_value_t = Switch::On)]
    sandbox: Switch,

    /// Layers, bottom first, separated by commas; repeatable
    #[arg(
        long,
        help_heading = "Image",
        value_name = "FILE",
        value_delimiter = ','
    )]
    layers: Vec<PathBuf>,

    /// One layer, whose path may contain a comma; repeatable, bottom first, in place of --layers
    #[arg(
        long,
        help_heading = "Image",
        value_name = "FILE",
        conflicts_with = "layers"
    )]
    layer: Vec<PathBuf>,

    /// OverlayBD image config (config.v1.json), in place of --layers. A layer with only a digest
    /// is fetched from its registry on first read
    #[arg(long, help_heading = "Image", value_name = "FILE", conflicts_with_all = ["layers", "layer"])]
    config: Option<PathBuf>,

    /// OverlayBD image in a registry, as REGISTRY/REPOSITORY[:TAG][@DIGEST], in place of --layers.
    /// Layers are fetched on first read
    #[arg(long, help_heading = "Image", value_name = "REF", conflicts_with_all = ["layers", "layer", "config"])]
    image: Option<Reference>,

    /// Cache directory of layers from registries and of image tables, shared by all disks; created if
    /// missing [default: the one of --service-config]
    #[arg(long, help_heading = "Registries", value_name = "DIR")]
    cache: Option<PathBuf>,

    #[command(flatten)]
    registry: RegistryArgs,

    /// Share the fetcher, its tokens and its connections with the disks that name the same DIR and the same
    /// options for registries; created if missing [default: the disk has a fetcher of its own]
    #[arg(long, help_heading = "Registries", value_name = "DIR")]
    shared_fetcher: Option<PathBuf>,

    /// Prefetch the reads recorded in this trace file [default: the trace that the image config names,
    /// or else the trace in the image]
    #[arg(long, help_heading = "Registries", value_name = "TRACE")]
    prefetch: Option<PathBuf>,

    /// Record the guest's reads, and write them to FILE as a prefetch trace when the daemon ends. No
    /// trace is replayed meanwhile, and --prefetch is refused
    #[arg(
        long,
        help_heading = "Registries",
        value_name = "FILE",
        conflicts_with = "prefetch"
    )]
    record_trace: Option<PathBuf>,

    /// Fail a read that has waited N seconds for a registry [default: no limit]
    #[arg(long, help_heading = "Registries", value_name = "N", value_parser = clap::value_parser!(u64).range(1..=31_536_000))]
    fetch_deadline: Option<u64>,

    /// Fetch all layers from registries and verify their digests before serving
    #[arg(long, help_heading = "Image")]
    verify_first: bool,

    /// Accept layers that were made above other layers than those below them; a warning names each
    #[arg(long, help_heading = "Image")]
    force: bool,

    /// Files of an existing writable layer; --layers is then optional
    #[arg(
        long,
        help_heading = "Writable layer",
        value_name = "data=FILE,index=FILE",
        // Paths need not be UTF-8.
        value_parser = OsStringValueParser::new().try_map(writable::Paths::try_from),
        conflicts_with = "upper_auto"
    )]
    upper: Option<writable::Paths>,

    /// Directory of the writable layer; created if missing
    #[arg(long, help_heading = "Writable layer", value_name = "DIR")]
    upper_auto: Option<PathBuf>,

    /// Limit of the data in the writable layer, in bytes, or with K, M, G or T [default: none]. Index
    /// and journal do not count. A snapshot starts a new layer with the whole limit
    #[arg(long, help_heading = "Writable layer", value_name = "SIZE", value_parser = parse_bytes)]
    upper_limit: Option<u64>,

    /// What becomes of writes while the file system of the writable layer is full
    #[arg(long, value_name = "ACTION", value_enum, default_value_t = FullAction::Error)]
    on_full: FullAction,

    /// Number of virtqueues offered; if given, also the number of io_uring rings (15 KiB of kernel
    /// memory each) [default: 256 queues; one ring per processor, 4 to 16]
    #[arg(long, help_heading = "Disk", value_name = "N",
          value_parser = clap::value_parser!(u16).range(1..=i64::from(MAX_QUEUES)))]
    num_queues: Option<u16>,

    /// The name that is most often guessed for --num-queues.
    #[arg(long = "queues", hide = true,
          value_parser = UnknownArgumentValueParser::suggest_arg("--num-queues"))]
    _queues: Option<String>,

    /// Largest size of a virtqueue, in descriptors; a power of two
    #[arg(long, help_heading = "Disk", value_name = "N", default_value_t = DEFAULT_QUEUE_SIZE, value_parser = parse_queue_size)]
    queue_size: u16,

    /// Serial number of the disk, 1 to 20 printable ASCII characters [default: derived from the image]
    #[arg(long, help_heading = "Disk", value_name = "TEXT", value_parser = parse_serial)]
    serial: Option<[u8; SERIAL_LEN]>,

    /// When a front-end that starts a queue takes the disk over from another that is connected
    #[arg(
        long,
        help_heading = "Disk",
        value_name = "POLICY",
        value_enum,
        default_value_t
    )]
    takeover: Takeover,

    /// Print the feature bits that disks of this program offer, as JSON, and exit
    #[arg(long, exclusive = true)]
    print_features: bool,

    /// Busy-poll the virtqueue for N microseconds before sleeping
    #[arg(long, help_heading = "Performance", value_name = "N", default_value_t = 0,
          value_parser = clap::value_parser!(u64).range(..=1_000_000))]
    poll_us: u64,

    /// Numbers of the processors to bind queue workers to, in turn; separated by commas, repeatable
    /// [default: any processor]
    #[arg(long, help_heading = "Performance", value_name = "N", value_delimiter = ',', value_parser = parse_cpu)]
    cpus: Vec<usize>,

    /// Size of the cache of decompressed blocks, in bytes, or with K, M, G or T; all queues share it;
    /// 0 disables the cache
    #[arg(long, help_heading = "Performance", value_name = "SIZE", default_value = "0", value_parser = parse_bytes)]
    block_cache: u64,

    /// Read this far ahead of a guest that reads sequentially, in bytes, or with K, M, G or T; 0 leaves
    /// read-ahead to the kernel
    #[arg(long, help_heading = "Performance", value_name = "SIZE", default_value = "0", value_parser = parse_bytes)]
    readahead: u64,

    /// Drop bytes of layers from the page cache once they are served
    #[arg(long, help_heading = "Performance")]
    drop_cache: bool,

    /// Limit of requests, as size=N,refill_time=MS[,one_time_burst=M]: a token bucket of N requests, which
    /// refills within MS milliseconds; all queues share it. M more requests are served once [default: no
    /// limit]
    #[arg(long, help_heading = "Performance", value_name = "BUCKET")]
    limit_ops: Option<BucketSpec>,

    /// Limit of bytes read and written: a token bucket of N bytes, as for --limit-ops [default: no
    /// limit]
    #[arg(long, help_heading = "Performance", value_name = "BUCKET")]
    limit_bandwidth: Option<BucketSpec>,

    /// File of the counters of the disk, which outlives the daemon; created if missing. `ovbd-node` reads
    /// it [default: counters start at 0, and only the control API shows them]
    #[arg(long, value_name = "FILE")]
    stats: Option<PathBuf>,

    /// Method of reading bytes that are not in the page cache
    #[arg(long, help_heading = "Performance", value_name = "METHOD", value_enum, default_value_t = Io::Uring)]
    io: Io,

    /// Format of log lines on standard error. `RUST_LOG` chooses the levels
    #[arg(
        long,
        value_name = "FORMAT",
        value_enum,
        env = logging::VARIABLE,
        hide_env_values = true,
        default_value_t
    )]
    log_format: LogFormat,
}

#[derive(Clone, Copy, PartialEq, clap::ValueEnum)]
enum Switch {
    /// For production
    On,
    /// For debuggers and profilers
    Off,
}

#[derive(Clone, Copy, PartialEq, clap::ValueEnum)]
enum FullAction {
    /// They fail with an I/O error
    Error,
    /// They wait until there is space; reads continue. Beyond --upper-limit they fail all the same
    Pause,
}

#[derive(Clone, Copy, PartialEq, clap::ValueEnum)]
enum Io {
    /// `io_uring`; falls back to `pread` where the kernel refuses it
    Uring,
    /// `pread`; a slow read delays its queue
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
    let usable = sched_getaffinity(None).map_err(|error| error.to_string())?;
    let is_usable = |cpu: &usize| *cpu < CpuSet::MAX_CPU && usable.is_set(*cpu);
    text.parse().ok().filter(is_usable).ok_or_else(|| {
        let usable = (0..CpuSet::MAX_CPU).filter(is_usable);
        let usable: Vec<_> = usable.map(|cpu| cpu.to_string()).collect();
        format!(
            "expected the number of a processor that this process may use: {}",
            usable.join(", ")
        )
    })
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

impl Args {
    /// Verifies what options need of one another.
    fn check(&self) -> Result<(), (ErrorKind, &'static str)> {
        let has_layers = !self.layers.is_empty() || !self.layer.is_empty();
        let has_image = has_layers || self.config.is_some() || self.image.is_some();
        if !has_image && self.upper.is_none() {
            let text = "an image is required: name it with --layers, --layer, --config, --image or \
                        --upper";
            return Err((ErrorKind::MissingRequiredArgument, text));
        }
        if self.socket.is_none() && !self.started_by_node && !activation::is_offered() {
            let text = "--socket is required unless a service manager passes a socket";
            return Err((ErrorKind::MissingRequiredArgument, text));
        }
        if self.socket.is_some() && self.socket == self.control {
            let text = "--socket and --control name the same path; expected two sockets";
            return Err((ErrorKind::ArgumentConflict, text));
        }
        Ok(())
    }
}

impl From<Args> for Config {
    fn from(args: Args) -> Self {
        Config {
            socket: args.socket,
            started_by_node: args.started_by_node,
            socket_mode: args.socket_mode,
            control: args.control,
            user: args.user,
            group: args.group,
            sandbox: args.sandbox == Switch::On,
            image: match (args.config, args.image) {
                (Some(path), _) => ImageSource::Config(path),
                (None, Some(reference)) => ImageSource::Reference(reference),
                (None, None) if args.layer.is_empty() => ImageSource::Layers(args.layers),
                (None, None) => ImageSource::Layers(args.layer),
            },
            remote: RemoteConfig {
                cache: args.cache,
                registry: args.registry,
                shared_fetcher: args.shared_fetcher,
                prefetch: args.prefetch,
                record: args.record_trace,
                deadline: args.fetch_deadline.map(Duration::from_secs),
                verify_first: args.verify_first,
            },
            lineage: match args.force {
                true => Lineage::Ignored,
                false => Lineage::Checked,
            },
            upper: match (args.upper, args.upper_auto) {
                (Some(paths), _) => Some(WritableSource::Files(paths)),
                (None, folder) => folder.map(WritableSource::Directory),
            },
            upper_limit: args.upper_limit,
            on_full: match args.on_full {
                FullAction::Error => writable::OnFull::Error,
                FullAction::Pause => writable::OnFull::Pause,
            },
            num_queues: args.num_queues,
            io_uring: args.io == Io::Uring,
            queue_size: args.queue_size,
            serial: args.serial,
            takeover: args.takeover,
            block_cache: args.block_cache,
            tuning: Tuning {
                poll: Duration::from_micros(args.poll_us),
                readahead: args.readahead,
                drop_cache: args.drop_cache,
                cpus: args.cpus,
            },
            limits: LimitsSpec {
                ops: args.limit_ops,
                bandwidth: args.limit_bandwidth,
            },
            stats: args.stats,
        }
    }
}

fn main() -> ExitCode {
    child_status::keep();
    match limits::check_stack() {
        Ok(()) => serve(),
        Err(shortage) => fail(&shortage),
    }
}

fn fail(error: &dyn Error) -> ExitCode {
    logging::report("ovbd-vhost", error);
    ExitCode::FAILURE
}

/// The program. Its arguments and configuration need more stack than there may be in `main`.
#[inline(never)]
fn serve() -> ExitCode {
    logging::start("info");
    if let Some(code) = process::run_if_asked() {
        return code;
    }
    let args = Args::parse();
    logging::set_format(args.log_format);
    if args.print_features {
        return match writeln!(io::stdout(), "{}", daemon::offered_features()) {
            Ok(()) => ExitCode::SUCCESS,
            Err(error) => fail(&error),
        };
    }
    if let Err((kind, text)) = args.check() {
        Args::command().error(kind, text).exit();
    }
    match daemon::run(args.into()) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => fail(&error),
    }
}
