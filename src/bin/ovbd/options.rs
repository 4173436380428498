//! Groups of options that several commands have.

use std::fmt::Display;
use std::num::NonZero;
use std::path::PathBuf;
use std::thread;

use clap::error::ErrorKind;
use clap::{Args, CommandFactory, ValueEnum};
use ovbd_vhost::format::zfile::{Algorithm, BLOCK_SIZES, BlockFormat};
use ovbd_vhost::image::Lineage;
use ovbd_vhost::image::config::{Config, Stack, UpperFiles};
use ovbd_vhost::tool::disk::Files;
use ovbd_vhost::writable::Paths;

use super::args::Cli;
use super::values::{block_size, message, threads};

/// A writable layer.
#[derive(Args)]
pub struct UpperArgs {
    /// Writable layer, as data=FILE,index=FILE
    #[arg(long, value_name = "FILES")]
    pub upper: Paths,
}

/// The layers to read.
#[derive(Args)]
pub struct FilesArgs {
    /// Layers, bottom first; comma-separated, repeatable
    #[arg(
        value_name = "LAYERS",
        value_delimiter = ',',
        required_unless_present_any = ["config", "upper", "layer"]
    )]
    layers: Vec<PathBuf>,
    /// One layer, whose path may contain a comma; repeatable, bottom first; replaces LAYERS
    #[arg(long, value_name = "FILE", conflicts_with = "layers")]
    layer: Vec<PathBuf>,
    /// OverlayBD image config (config.v1.json); replaces LAYERS
    #[arg(long, value_name = "FILE", conflicts_with_all = ["layers", "layer"])]
    config: Option<PathBuf>,
    /// Writable layer above the layers, as data=FILE,index=FILE. After snapshots: the pair that the
    /// daemon was first started with
    #[arg(long, value_name = "FILES")]
    upper: Option<Paths>,
    #[command(flatten)]
    force: ForceArgs,
}

/// The layers below a new one.
#[derive(Args)]
pub struct ParentArgs {
    /// Layers below the new one, bottom first; comma-separated, repeatable
    #[arg(long, value_name = "LAYERS", value_delimiter = ',')]
    parent: Vec<PathBuf>,
    /// One layer below the new one, whose path may contain a comma; repeatable, bottom first; replaces
    /// --parent
    #[arg(long, value_name = "FILE", conflicts_with = "parent")]
    parent_layer: Vec<PathBuf>,
    #[command(flatten)]
    force: ForceArgs,
}

/// Whether the order of layers is checked.
#[derive(Args)]
struct ForceArgs {
    /// Accept layers whose parent is not the layer below them
    #[arg(long)]
    force: bool,
}

/// How a layer is stored.
#[derive(Args)]
pub struct FormatArgs {
    /// Compression
    #[arg(long, value_enum, default_value_t = Compression::Lz4)]
    algorithm: Compression,
    /// Bytes per compressed block: a power of two from 4096 to 65536, also as 4K to 64K [default:
    /// 4096]
    #[arg(long, value_name = "N", value_parser = block_size)]
    block_size: Option<u32>,
    /// Omit the checksum of each compressed block
    #[arg(long)]
    no_checksum: bool,
    /// Wrap the layer in tar, as registries store it
    #[arg(long)]
    pub tar: bool,
    /// Commit message, at most 256 bytes
    #[arg(long, default_value = "", hide_default_value = true, value_parser = message)]
    pub message: String,
}

/// How much of the machine to use.
#[derive(Args)]
pub struct ThreadArgs {
    /// Number of threads [default: one per processor]
    #[arg(long, value_name = "N", value_parser = threads)]
    threads: Option<NonZero<usize>>,
}

/// Whether layers are read in a sandbox.
#[derive(Args)]
pub struct SandboxArgs {
    /// Drop privileges before reading layers (seccomp, Landlock, capabilities)
    #[arg(long, value_name = "WHETHER", value_enum, default_value_t = Switch::On)]
    sandbox: Switch,
}

#[derive(Clone, Copy, PartialEq, Eq, ValueEnum)]
enum Switch {
    /// For layers of any origin
    On,
    /// For debuggers and profilers
    Off,
}

#[derive(Clone, Copy, PartialEq, Eq, ValueEnum)]
enum Compression {
    Lz4,
    Zstd,
    None,
}

/// The files of a writable layer that a config names.
pub fn paths(UpperFiles { data, index }: UpperFiles) -> Paths {
    Paths { data, index }
}

/// The error of options that exclude each other.
fn conflict(what: impl Display) -> clap::Error {
    Cli::command().error(ErrorKind::ArgumentConflict, what)
}

impl ThreadArgs {
    /// The number of threads. Finding out the number of processors opens files, so call it before the
    /// sandbox is entered.
    pub fn count(&self) -> NonZero<usize> {
        let cores = || thread::available_parallelism().unwrap_or(NonZero::<usize>::MIN);
        self.threads.unwrap_or_else(cores)
    }
}

impl SandboxArgs {
    /// Whether the sandbox is entered.
    pub fn is_on(&self) -> bool {
        self.sandbox == Switch::On
    }
}

impl ForceArgs {
    fn lineage(&self) -> Lineage {
        match self.force {
            true => Lineage::Ignored,
            false => Lineage::Checked,
        }
    }
}

/// The one of two ways to name layers that was used.
fn either(list: Vec<PathBuf>, single: Vec<PathBuf>) -> Vec<PathBuf> {
    match single.is_empty() {
        true => list,
        false => single,
    }
}

impl ParentArgs {
    /// The stack below a new layer; it may have no layers.
    pub fn stack(self) -> Stack {
        let lineage = self.lineage();
        Stack::new(either(self.parent, self.parent_layer)).with_lineage(lineage)
    }

    /// What to do about layers in a wrong order.
    pub fn lineage(&self) -> Lineage {
        self.force.lineage()
    }
}

impl FilesArgs {
    /// The files of a disk. Reads the config, if one is named.
    ///
    /// # Errors
    /// The config cannot be used; or config and command line both name a writable layer.
    pub fn files(self) -> Result<Files, Box<dyn std::error::Error>> {
        let lineage = self.force.lineage();
        let Some(path) = self.config else {
            return Ok(Files {
                stack: Stack::new(either(self.layers, self.layer)).with_lineage(lineage),
                upper: self.upper,
            });
        };
        let (stack, upper) = Config::load(&path)?.stack_and_upper()?;
        if upper.is_some() && self.upper.is_some() {
            return Err(
                conflict("two writable layers: the config names an `upper`; omit --upper").into(),
            );
        }
        Ok(Files {
            stack: stack.with_lineage(lineage),
            upper: self.upper.or(upper.map(paths)),
        })
    }
}

impl FormatArgs {
    /// The format of compressed blocks; `None` for an uncompressed layer.
    ///
    /// # Errors
    /// Options for blocks, and no compression.
    pub fn blocks(&self) -> Result<Option<BlockFormat>, clap::Error> {
        let algorithm = match self.algorithm {
            Compression::Lz4 => Algorithm::Lz4,
            Compression::Zstd => Algorithm::Zstd,
            Compression::None if self.block_size.is_some() || self.no_checksum => {
                return Err(conflict(
                    "--algorithm none has no blocks: leave out --block-size and --no-checksum",
                ));
            }
            Compression::None => return Ok(None),
        };
        Ok(Some(BlockFormat {
            algorithm,
            block_size: self.block_size.unwrap_or(*BLOCK_SIZES.start()),
            checksum: !self.no_checksum,
            dictionary_len: 0,
        }))
    }
}
