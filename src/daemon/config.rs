//! What the daemon is to do, checked.

use std::num::NonZero;
use std::ops::RangeInclusive;
use std::path::PathBuf;
use std::thread;
use std::time::Duration;

use crate::engine::Tuning;
use crate::image::Lineage;
use crate::registry::args::RegistryArgs;
use crate::registry::reference::Reference;
use crate::source::client::Patience;
use crate::virtio::request::SERIAL_LEN;
use crate::writable;

/// Queues the protocol can name.
pub const MAX_QUEUES: u16 = 256;

/// Everything a device needs.
#[derive(Debug)]
pub struct Config {
    /// Path of the socket front-ends connect to; without one, the service manager passes it.
    pub socket: Option<PathBuf>,
    /// Permissions of the socket at that path.
    pub socket_mode: u32,
    /// Path of the control socket, if there is to be one.
    pub control: Option<PathBuf>,
    /// Who to be once the layers are open: a user's name or number.
    pub user: Option<String>,
    /// The group to be of, in place of the user's own.
    pub group: Option<String>,
    /// Whether everything that serving does not need is given up.
    pub sandbox: bool,
    /// The layers.
    pub image: ImageSource,
    /// How layers in registries are reached.
    pub remote: RemoteConfig,
    /// What to do about layers that do not lie upon the layers they were made upon.
    pub lineage: Lineage,
    /// The writable layer above them, unless an image config names it or there is none.
    pub upper: Option<UpperSource>,
    /// Most bytes of data the writable layer may hold, if there is a bound.
    pub upper_limit: Option<u64>,
    /// Queues a front-end may use, if that was chosen: [`MAX_QUEUES`] otherwise.
    pub num_queues: Option<u16>,
    /// Whether workers read through io_uring, where the kernel has it.
    pub io_uring: bool,
    /// Largest queue it may set up.
    pub queue_size: u16,
    /// The device's serial, padded with zeros; by default one derived from the image.
    pub serial: Option<[u8; SERIAL_LEN]>,
    /// Bytes of decoded blocks to keep; zero: none.
    pub block_cache: u64,
    /// How its workers work.
    pub tuning: Tuning,
}

/// io_uring rings made for a device whose number of queues was not chosen: one for each processor of
/// the host, in these limits. A ring takes about 15 KiB of kernel memory.
const DEFAULT_RINGS: RangeInclusive<usize> = 4..=16;

impl Config {
    /// Queues a front-end may use.
    pub fn queues(&self) -> u16 {
        self.num_queues.unwrap_or(MAX_QUEUES)
    }

    /// io_uring rings to make before the sandbox is entered.
    pub fn rings(&self) -> usize {
        match (self.io_uring, self.num_queues) {
            (false, _) => 0,
            (true, Some(queues)) => usize::from(queues),
            (true, None) => {
                let processors = thread::available_parallelism().map_or(1, NonZero::get);
                processors.clamp(*DEFAULT_RINGS.start(), *DEFAULT_RINGS.end())
            }
        }
    }
}

/// Where the list of layers comes from.
#[derive(Debug)]
pub enum ImageSource {
    /// The command line, bottom first.
    Layers(Vec<PathBuf>),
    /// An image config.
    Config(PathBuf),
    /// An image in a registry.
    Reference(Reference),
}

/// How layers in registries are reached.
#[derive(Clone, Debug, Default)]
pub struct RemoteConfig {
    /// The cache directory, unless the service configuration names it.
    pub cache: Option<PathBuf>,
    /// The registries.
    pub registry: RegistryArgs,
    /// How long a guest's read waits for bytes; `None`: until they come.
    pub deadline: Option<Duration>,
}

impl RemoteConfig {
    /// How long bytes are waited for.
    pub fn patience(&self) -> Patience {
        Patience {
            serving: self.deadline,
            ..Patience::default()
        }
    }
}

/// Where the writable layer is.
#[derive(Clone, Debug)]
pub enum UpperSource {
    /// In these files.
    Files(writable::Paths),
    /// In this folder, where it is made unless it is there.
    Folder(PathBuf),
}
