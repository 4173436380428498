//! Groups of options that several commands have.

use std::cell::OnceCell;
use std::fmt::Display;
use std::num::NonZero;
use std::path::{Path, PathBuf};
use std::thread;
use std::time::Duration;

use clap::error::ErrorKind;
use clap::{Args, CommandFactory, ValueEnum, value_parser};
use ovbd_vhost::fetch::process::Control;
use ovbd_vhost::format::zfile::{Algorithm, BLOCK_SIZES, BlockFormat};
use ovbd_vhost::image::Lineage;
use ovbd_vhost::image::config::{ImageConfig, Stack};
use ovbd_vhost::registry::args::RegistryArgs;
use ovbd_vhost::registry::reference::Reference;
use ovbd_vhost::registry::service_config::ServiceConfig;
use ovbd_vhost::tool::open_files::{OpenFiles, StackFiles};
use ovbd_vhost::tool::remote::Registries;
use ovbd_vhost::tool::sources::Sources;
use ovbd_vhost::writable::Paths;
use serde::Serialize;

use super::args::Cli;
use super::values::{block_size, message, names_registry, pair, threads};

/// A writable layer.
#[derive(Args)]
#[group(required = true, multiple = false)]
pub struct UpperArgs {
    /// Writable layer, as data=FILE,index=FILE
    #[arg(long, value_name = "FILES", value_parser = pair())]
    upper: Option<Paths>,
    /// Directory of the writable layer, as the daemon's --upper-auto
    #[arg(long, value_name = "DIR")]
    upper_auto: Option<PathBuf>,
}

impl UpperArgs {
    /// The files.
    pub fn paths(&self) -> Paths {
        match (&self.upper, &self.upper_auto) {
            (Some(paths), _) => paths.clone(),
            (None, directory) => {
                Paths::in_directory(directory.as_deref().unwrap_or(Path::new(".")))
            }
        }
    }
}

/// Form of the output.
#[derive(Clone, Copy, Args)]
pub struct JsonArgs {
    /// Write JSON in place of text; sizes are in bytes
    #[arg(long)]
    pub json: bool,
}

impl JsonArgs {
    /// Returns the output for `value`, as JSON or as text.
    ///
    /// # Errors
    /// `value` cannot be JSON.
    pub fn text<T: Serialize + Display>(self, value: &T) -> Result<String, serde_json::Error> {
        Ok(match self.json {
            true => serde_json::to_string_pretty(value)? + "\n",
            false => value.to_string(),
        })
    }
}

/// The layers to read.
#[derive(Args)]
pub struct FilesArgs {
    /// Layers, bottom first; comma-separated, repeatable
    #[arg(
        value_name = "LAYERS",
        value_delimiter = ',',
        required_unless_present_any = ["config", "upper", "upper_auto", "layer", "image"]
    )]
    layers: Vec<PathBuf>,
    /// One layer, whose path may contain a comma; repeatable, bottom first; replaces LAYERS
    #[arg(long, value_name = "FILE", conflicts_with = "layers")]
    layer: Vec<PathBuf>,
    /// OverlayBD image config (config.v1.json); replaces LAYERS
    #[arg(long, value_name = "FILE", conflicts_with_all = ["layers", "layer"])]
    config: Option<PathBuf>,
    /// OverlayBD image in a registry, as REGISTRY/REPOSITORY[:TAG][@DIGEST]; replaces LAYERS
    #[arg(long, value_name = "REF", conflicts_with_all = ["layers", "layer", "config"])]
    image: Option<Reference>,
    #[command(flatten)]
    remote: RemoteArgs,
    /// Writable layer above the layers, as data=FILE,index=FILE. After snapshots, name the first
    /// pair of files; the snapshot manifest leads to the later ones
    #[arg(long, value_name = "FILES", value_parser = pair())]
    upper: Option<Paths>,
    /// Directory of the writable layer, as the daemon's --upper-auto; replaces --upper
    #[arg(long, value_name = "DIR", conflicts_with = "upper")]
    upper_auto: Option<PathBuf>,
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
    /// OverlayBD image in a registry below the new layer; replaces --parent
    #[arg(long, value_name = "REF", conflicts_with_all = ["parent", "parent_layer"])]
    parent_image: Option<Reference>,
    #[command(flatten)]
    remote: RemoteArgs,
    #[command(flatten)]
    force: ForceArgs,
}

/// Layers in registries.
#[derive(Args)]
#[command(next_help_heading = "Registries")]
struct RemoteArgs {
    /// Cache directory of layers from registries; created if missing [default: the one of
    /// --service-config]
    #[arg(long, value_name = "DIR")]
    cache: Option<PathBuf>,
    /// Fail if a read has waited N seconds for a registry
    #[arg(long, value_name = "N", default_value_t = 120, value_parser = value_parser!(u64).range(1..=31_536_000))]
    fetch_deadline: u64,
    #[command(flatten)]
    registry: RegistryArgs,
    /// The registries, once they are needed.
    #[arg(skip)]
    registries: OnceCell<Registries>,
}

/// The files of a disk before the sandbox.
pub struct Opened {
    /// The files.
    pub sources: Sources,
    /// The fetcher of layers in registries; it ends when this is dropped.
    pub fetcher: Option<Control>,
}

/// The files of a disk, of which layers may be in a registry.
pub struct NamedFiles {
    files: StackFiles,
    remote: RemoteArgs,
}

impl RemoteArgs {
    /// The registries, for layers that need them.
    ///
    /// # Errors
    /// There is no cache.
    fn registries(&self) -> Result<&Registries, Box<dyn std::error::Error>> {
        if let Some(registries) = self.registries.get() {
            return Ok(registries);
        }
        let configured = self.registry.service_config.as_deref();
        let configured = configured.map(ServiceConfig::load).transpose()?;
        let cache = self.cache.clone();
        let Some(cache) = cache.or_else(|| configured?.our_cache()) else {
            let text = "some layers are in a registry: name a cache directory with --cache";
            return Err(Cli::command()
                .error(ErrorKind::MissingRequiredArgument, text)
                .into());
        };
        let registry = self.registry.clone();
        let deadline = Duration::from_secs(self.fetch_deadline);
        let registries = Registries::new(cache, registry, deadline);
        Ok(self.registries.get_or_init(|| registries))
    }

    /// The layers at `paths`. A single path that names no file, but an image in a registry, is that
    /// image.
    fn stack(&self, paths: &[PathBuf]) -> Result<Stack, Box<dyn std::error::Error>> {
        let has_cache = self.cache.is_some() || self.registry.service_config.is_some();
        if let ([path], true) = (paths, has_cache)
            && let Some(text) = path.to_str()
            && names_registry(text)
            && !path.exists()
        {
            return self.resolve(&text.parse()?);
        }
        Ok(Stack::new(paths))
    }

    /// The layers of an image in a registry.
    fn resolve(&self, reference: &Reference) -> Result<Stack, Box<dyn std::error::Error>> {
        Ok(self.registries()?.resolve(reference)?)
    }

    /// Starts a fetcher, if layers are in registries.
    fn attach(&self, files: OpenFiles) -> Result<Opened, Box<dyn std::error::Error>> {
        if !files.is_remote() {
            return Ok(Opened {
                sources: Sources::local(files),
                fetcher: None,
            });
        }
        let (sources, fetcher) = self.registries()?.attach(files)?;
        Ok(Opened {
            sources,
            fetcher: Some(fetcher),
        })
    }
}

impl NamedFiles {
    /// The same files, which may be the upper part of an image.
    #[must_use]
    pub fn into_part(self) -> Self {
        let files = self.files.as_part();
        Self { files, ..self }
    }

    /// Opens what is local, and starts a fetcher if layers are in registries.
    ///
    /// # Errors
    /// There is no cache, it cannot be used, or no fetcher can be started.
    pub fn open(self) -> Result<Opened, Box<dyn std::error::Error>> {
        self.remote.attach(self.files.open()?)
    }
}

/// Whether the order of layers is checked.
#[derive(Args)]
struct ForceArgs {
    /// Accept layers that were made above other layers than those below them; a warning names each
    #[arg(long)]
    force: bool,
}

/// How a layer is stored.
#[derive(Args)]
#[command(next_help_heading = "Format")]
pub struct FormatArgs {
    /// Compression of the layer's blocks
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
    /// Commit message of the layer, at most 256 bytes [default: none]
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
#[derive(Clone, Copy, Args)]
pub struct SandboxArgs {
    /// Drop privileges before reading layers (seccomp, Landlock, capabilities)
    #[arg(long, value_name = "MODE", value_enum, default_value_t = Switch::On)]
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

impl ParentArgs {
    /// The layers below a new one; there may be none.
    ///
    /// # Errors
    /// The image in a registry cannot be found.
    pub fn stack(&self) -> Result<Stack, Box<dyn std::error::Error>> {
        let stack = match (&self.parent_image, &self.parent[..]) {
            (Some(reference), _) => self.remote.resolve(reference)?,
            (None, []) => Stack::new(&self.parent_layer),
            (None, paths) => self.remote.stack(paths)?,
        };
        Ok(stack.with_lineage(self.lineage()))
    }

    /// Opens the layers of `stack` as [`NamedFiles::open`] does.
    ///
    /// # Errors
    /// Those of [`NamedFiles::open`].
    pub fn open(&self, stack: Stack) -> Result<Opened, Box<dyn std::error::Error>> {
        let files = StackFiles { stack, upper: None };
        self.remote.attach(files.open()?)
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
    /// The config cannot be used; config and command line both name a writable layer; or the image in
    /// a registry cannot be found.
    pub fn files(self) -> Result<NamedFiles, Box<dyn std::error::Error>> {
        let lineage = self.force.lineage();
        let remote = self.remote;
        let named = self.upper_auto.as_deref().map(Paths::in_directory);
        let named = self.upper.or(named);
        let Some(path) = self.config else {
            let stack = match (&self.image, &self.layers[..]) {
                (Some(reference), _) => remote.resolve(reference)?,
                (None, []) => Stack::new(&self.layer),
                (None, paths) => remote.stack(paths)?,
            };
            let files = StackFiles {
                stack: stack.with_lineage(lineage),
                upper: named,
            };
            return Ok(NamedFiles { files, remote });
        };
        let (stack, upper) = ImageConfig::load(&path)?.stack_and_upper()?;
        if upper.is_some() && named.is_some() {
            let text =
                "two writable layers: the config names an `upper`; omit --upper and --upper-auto";
            return Err(conflict(text).into());
        }
        let files = StackFiles {
            stack: stack.with_lineage(lineage),
            upper: named.or(upper),
        };
        Ok(NamedFiles { files, remote })
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
