//! The commands with their options, and the tasks that they describe.

use std::path::PathBuf;

use clap::error::ErrorKind;
use clap::{Args, CommandFactory, Parser, Subcommand, ValueEnum};
use ovbd_vhost::format::lsmt::writable::Kind;
use ovbd_vhost::image::config::ImageConfig;
use ovbd_vhost::tool::commit::Commit;
use ovbd_vhost::tool::create::Create;
use ovbd_vhost::tool::ctl::Ask;
use ovbd_vhost::tool::merge::Merge;
use ovbd_vhost::tool::raw_image::Input;
use ovbd_vhost::tool::upper::CreateUpper;
use ovbd_vhost::units::parse_size;
use ovbd_vhost::version::VERSION;
use ovbd_vhost::writable::Paths;
use uuid::Uuid;

use super::node::NodeArgs;
use super::options::{
    FilesArgs, FormatArgs, JsonArgs, Opened, ParentArgs, SandboxArgs, ThreadArgs, UpperArgs,
};
use super::registry::{CacheCommand, PullArgs};
use super::snapshot::SnapshotCommand;
use super::trace::TraceCommand;
use super::values::pair;

/// Make, examine and change OverlayBD layers.
#[derive(Parser)]
#[command(name = "ovbd", version = VERSION, max_term_width = 100)]
pub struct Cli {
    #[command(subcommand)]
    pub command: Command,
}

#[derive(Subcommand)]
pub enum Command {
    Create(CreateArgs),
    Inspect(InspectArgs),
    Check(CheckArgs),
    Export(ExportArgs),
    #[command(subcommand)]
    Upper(UpperCommand),
    Commit(CommitArgs),
    Seal(SealArgs),
    Merge(MergeArgs),
    Resize(ResizeArgs),
    #[command(subcommand)]
    Snapshot(SnapshotCommand),
    Ctl(CtlArgs),
    Node(NodeArgs),
    Pull(PullArgs),
    #[command(subcommand)]
    Trace(TraceCommand),
    #[command(subcommand)]
    Cache(CacheCommand),
}

/// Make writable layers.
#[derive(Subcommand)]
pub enum UpperCommand {
    Create(CreateUpperArgs),
}

/// Make a sealed layer from a raw disk image.
///
/// Zeros and holes take no space. The output replaces a file of that name once it is complete. The
/// number of threads does not change the output.
#[derive(Args)]
pub struct CreateArgs {
    /// Raw image: a file, block device or named pipe; `-` for standard input
    #[arg(long, value_name = "RAW")]
    from: PathBuf,
    /// Layer to write
    #[arg(value_name = "OUT")]
    pub to: PathBuf,
    /// Take the input as a raw image even if it starts like an image of another format
    #[arg(long)]
    raw: bool,
    #[command(flatten)]
    parent: ParentArgs,
    #[command(flatten)]
    format: FormatArgs,
    /// Uuid of the layer [default: derived from the parent's uuid, the message and the image]
    #[arg(long)]
    uuid: Option<Uuid>,
    #[command(flatten)]
    threads: ThreadArgs,
    #[command(flatten)]
    pub json: JsonArgs,
    #[command(flatten)]
    pub sandbox: SandboxArgs,
}

/// List the format, sizes and mappings of layers, and each layer's share of the disk.
#[derive(Args)]
pub struct InspectArgs {
    #[command(flatten)]
    pub files: FilesArgs,
    #[command(flatten)]
    pub json: JsonArgs,
    #[command(flatten)]
    pub sandbox: SandboxArgs,
}

/// Verify every checksum, block and mapping of every layer.
///
/// Prints one line per finding to standard output. The exit code is 1 if a layer is damaged. Lines
/// that start with `note:` are not damage.
#[derive(Args)]
pub struct CheckArgs {
    #[command(flatten)]
    pub files: FilesArgs,
    /// Exit with 1 for notes too
    #[arg(long)]
    pub strict: bool,
    #[command(flatten)]
    pub json: JsonArgs,
    #[command(flatten)]
    pub threads: ThreadArgs,
    #[command(flatten)]
    pub sandbox: SandboxArgs,
}

/// Write the merged disk of layers as a raw image.
///
/// Zeros become holes. The output replaces a file of that name once it is complete.
#[derive(Args)]
pub struct ExportArgs {
    #[command(flatten)]
    pub files: FilesArgs,
    /// Raw image to write; `-` for standard output
    #[arg(short, long, value_name = "RAW")]
    pub output: PathBuf,
    #[command(flatten)]
    pub threads: ThreadArgs,
    #[command(flatten)]
    pub json: JsonArgs,
    #[command(flatten)]
    pub sandbox: SandboxArgs,
}

/// Make an empty writable layer.
///
/// The topmost layer below becomes the parent.
#[derive(Args)]
pub struct CreateUpperArgs {
    /// Files to create, as data=FILE,index=FILE [default: the `upper` of the config]
    #[arg(value_name = "FILES", value_parser = pair(), required_unless_present_any = ["config", "upper_auto"])]
    upper: Option<Paths>,
    /// Existing directory in which to create the files, as the daemon's --upper-auto; replaces FILES
    #[arg(long, value_name = "DIR", conflicts_with = "upper")]
    upper_auto: Option<PathBuf>,
    /// Size of the disk in bytes, also as 512M, 10G or 1T; a multiple of 512 [default: the size of the
    /// layers below]
    #[arg(long, value_name = "N", value_parser = parse_size, required_unless_present_any = ["parent", "parent_layer", "parent_image", "config"])]
    size: Option<u64>,
    #[command(flatten)]
    parent: ParentArgs,
    /// OverlayBD image config that names the layers below, and optionally the files to create
    #[arg(long, value_name = "FILE", conflicts_with_all = ["parent", "parent_layer", "parent_image"])]
    config: Option<PathBuf>,
    /// Placement of data in the data file
    #[arg(long = "type", value_name = "TYPE", value_enum, default_value_t = KindArg::Hybrid)]
    kind: KindArg,
    /// Uuid of the layer [default: random]
    #[arg(long)]
    uuid: Option<Uuid>,
    #[command(flatten)]
    pub json: JsonArgs,
    #[command(flatten)]
    pub sandbox: SandboxArgs,
}

/// Make a sealed layer from a writable layer.
///
/// The writable layer does not change and must not be in use. The output replaces a file of that
/// name once it is complete. The number of threads does not change the output.
#[derive(Args)]
pub struct CommitArgs {
    #[command(flatten)]
    pub upper: UpperArgs,
    /// Layer to write
    #[arg(short, long, value_name = "LAYER")]
    pub output: PathBuf,
    #[command(flatten)]
    format: FormatArgs,
    /// Uuid of the layer [default: that of the writable layer]
    #[arg(long)]
    uuid: Option<Uuid>,
    /// Uuid of the parent layer [default: that of the writable layer's parent]
    #[arg(long, value_name = "UUID")]
    parent_uuid: Option<Uuid>,
    #[command(flatten)]
    threads: ThreadArgs,
    #[command(flatten)]
    pub json: JsonArgs,
    #[command(flatten)]
    pub sandbox: SandboxArgs,
}

/// Seal a writable layer in place.
///
/// The data file becomes an uncompressed layer; index file and journal are removed. No data is
/// copied. Crash-safe: an interrupted run leaves the layer unchanged or sealed; run it again to
/// finish.
#[derive(Args)]
pub struct SealArgs {
    #[command(flatten)]
    pub upper: UpperArgs,
    #[command(flatten)]
    pub json: JsonArgs,
}

/// Send a request to a running daemon through its control socket.
///
/// Prints the JSON of the daemon, for scripts of version 0.1, or text with `--text`.
#[derive(Args)]
pub struct CtlArgs {
    /// Control socket of the daemon: the PATH of its --control
    #[arg(value_name = "SOCKET")]
    pub socket: PathBuf,
    /// Write text in place of JSON
    #[arg(long, global = true, conflicts_with = "json")]
    pub text: bool,
    /// Write JSON, which is the default
    #[arg(long, global = true)]
    json: bool,
    #[command(subcommand)]
    pub ask: CtlCommand,
}

/// The request.
#[derive(Subcommand)]
pub enum CtlCommand {
    /// Show the disk: size, layers, writable layer
    Device,
    /// List the snapshots of the disk
    Snapshots,
    /// Freeze the content of the disk as a layer; the guest continues to write above it
    Snapshot {
        /// Name of the snapshot; a second request with the same name returns the same snapshot
        name: String,
        /// Wait until the layer is sealed; required before copying its file. A daemon that opens the
        /// layer waits for the seal itself, up to 10 seconds
        #[arg(long)]
        wait: bool,
    },
    /// Grow a disk with a writable layer while its guest runs
    Resize {
        /// New size of the disk in bytes, also as 512M, 10G or 1T; at least the present size
        #[arg(value_name = "SIZE", value_parser = parse_size)]
        size: u64,
    },
}

impl From<CtlCommand> for Ask {
    fn from(command: CtlCommand) -> Self {
        match command {
            CtlCommand::Device => Ask::Device,
            CtlCommand::Snapshots => Ask::Snapshots,
            CtlCommand::Snapshot { name, wait } => Ask::Snapshot { name, wait },
            CtlCommand::Resize { size } => Ask::Resize { size },
        }
    }
}

/// Make one sealed layer from several layers and an optional writable layer above them.
///
/// The result can replace the layers in any stack. The output replaces a file of that name once it
/// is complete. The number of threads does not change the output.
#[derive(Args)]
pub struct MergeArgs {
    #[command(flatten)]
    pub files: FilesArgs,
    /// Layer to write
    #[arg(short, long, value_name = "LAYER")]
    pub output: PathBuf,
    #[command(flatten)]
    format: FormatArgs,
    /// Uuid of the layer [default: that of the topmost layer, or derived from the message]
    #[arg(long)]
    uuid: Option<Uuid>,
    #[command(flatten)]
    threads: ThreadArgs,
    #[command(flatten)]
    pub json: JsonArgs,
    #[command(flatten)]
    pub sandbox: SandboxArgs,
}

/// Set the disk size of a writable layer.
#[derive(Args)]
pub struct ResizeArgs {
    #[command(flatten)]
    pub upper: UpperArgs,
    /// New size of the disk in bytes, also as 512M, 10G or 1T; a multiple of 512
    #[arg(value_name = "SIZE", value_parser = parse_size)]
    pub size: u64,
    /// Drop data beyond the new end; without this option, a layer with such data is refused
    #[arg(long, alias = "force")] // its name in version 0.1
    pub drop_data: bool,
    #[command(flatten)]
    pub json: JsonArgs,
}

#[derive(Clone, Copy, PartialEq, Eq, ValueEnum)]
enum KindArg {
    /// New data at the end of the data file
    Append,
    /// Each sector at its own position; the data file is as long as the disk, with holes
    Sparse,
    /// New data at the end of the data file; existing data is overwritten in place
    Hybrid,
}

impl CreateArgs {
    pub fn input(&self) -> Input {
        match self.from.as_os_str() == "-" {
            true => Input::Stdin,
            false => Input::Path(self.from.clone()),
        }
    }

    /// Opens the layers below the new one; `None`: there are none.
    ///
    /// # Errors
    /// The image in a registry cannot be found; a layer or a fetcher cannot be used.
    pub fn parent(&self) -> Result<Option<Opened>, Box<dyn std::error::Error>> {
        let stack = self.parent.stack()?;
        match stack.layers().is_empty() {
            true => Ok(None),
            false => self.parent.open(stack).map(Some),
        }
    }

    pub fn task(&self) -> Result<Create, clap::Error> {
        Ok(Create {
            raw: self.raw,
            blocks: self.format.blocks()?,
            tar: self.format.tar,
            uuid: self.uuid,
            message: self.format.message.clone(),
            threads: self.threads.count(),
        })
    }
}

impl CreateUpperArgs {
    /// The layer to create, and the layers below it.
    ///
    /// # Errors
    /// The config or the image in a registry cannot be used, or something is not named.
    pub fn task(self) -> Result<(CreateUpper, Opened), Box<dyn std::error::Error>> {
        let lineage = self.parent.lineage();
        let (stack, configured) = match self.config {
            Some(path) => {
                let (stack, upper) = ImageConfig::load(&path)?.stack_and_upper()?;
                (stack.with_lineage(lineage), upper)
            }
            None => (self.parent.stack()?, None),
        };
        let missing = |what| Cli::command().error(ErrorKind::MissingRequiredArgument, what);
        if stack.layers().is_empty() && self.size.is_none() {
            return Err(missing("the config names no layers: add --size").into());
        }
        let automatic = self.upper_auto.as_deref().map(Paths::in_directory);
        let paths = self.upper.or(automatic).or(configured);
        let task = CreateUpper {
            paths: paths.ok_or_else(|| {
                missing("the config names no `upper`: add the files as data=FILE,index=FILE")
            })?,
            kind: match self.kind {
                KindArg::Append => Kind::Append,
                KindArg::Sparse => Kind::Sparse,
                KindArg::Hybrid => Kind::Hybrid,
            },
            size: self.size,
            uuid: self.uuid.unwrap_or_else(Uuid::new_v4),
        };
        Ok((task, self.parent.open(stack)?))
    }
}

impl CommitArgs {
    pub fn task(&self) -> Result<Commit, clap::Error> {
        Ok(Commit {
            upper: self.upper.paths(),
            blocks: self.format.blocks()?,
            tar: self.format.tar,
            uuid: self.uuid,
            parent_uuid: self.parent_uuid,
            message: self.format.message.clone(),
            threads: self.threads.count(),
        })
    }
}

impl MergeArgs {
    pub fn task(&self) -> Result<Merge, clap::Error> {
        Ok(Merge {
            blocks: self.format.blocks()?,
            tar: self.format.tar,
            uuid: self.uuid,
            message: self.format.message.clone(),
            threads: self.threads.count(),
        })
    }
}
