//! Configuration of the daemon, validated.

use std::ops::RangeInclusive;
use std::path::PathBuf;
use std::time::Duration;

use crate::engine::Tuning;
use crate::engine::fetches::MAX_UNDER_WAY;
use crate::engine::rate_limit::LimitsSpec;
use crate::fetch::MAX_OUTSTANDING;
use crate::image::Lineage;
use crate::io::processors;
use crate::registry::args::RegistryArgs;
use crate::registry::reference::Reference;
use crate::source::client::Patience;
use crate::vhost::takeover::Takeover;
use crate::virtio::request::SERIAL_LEN;
use crate::writable::{self, OnFull};

/// Largest number of virtqueues that vhost-user can address.
pub const MAX_QUEUES: u16 = 256;

// The fetcher refuses no read of a guest that uses all queues.
const _: () = assert!(MAX_QUEUES as usize * MAX_UNDER_WAY <= MAX_OUTSTANDING);

/// Largest size of a virtqueue by default, in descriptors.
pub const DEFAULT_QUEUE_SIZE: u16 = 1024;

/// Configuration of one disk.
#[derive(Debug)]
pub struct Config {
    /// Path of the vhost-user socket. `None`: the service manager passes the socket.
    pub socket: Option<PathBuf>,
    /// Whether `ovbd-node` passes the socket over standard input.
    pub started_by_node: bool,
    /// Permissions of the socket at `socket`.
    pub socket_mode: u32,
    /// Path of the control socket. `None`: no control API.
    pub control: Option<PathBuf>,
    /// User to switch to once the layers are open, by name or number.
    pub user: Option<String>,
    /// Group to switch to, by name or number. `None`: the group of the user.
    pub group: Option<String>,
    /// Whether privileges are dropped before layers are parsed.
    pub sandbox: bool,
    /// Where the list of layers comes from.
    pub image: ImageSource,
    /// Access to layers in registries.
    pub remote: RemoteConfig,
    /// Whether a layer above another than its parent is refused.
    pub lineage: Lineage,
    /// Writable layer above the layers. `None`: the image config names one, or there is none.
    pub upper: Option<WritableSource>,
    /// Largest number of data bytes in the writable layer. `None`: no limit.
    pub upper_limit: Option<u64>,
    /// What becomes of writes while the storage of the writable layer is full.
    pub on_full: OnFull,
    /// Number of virtqueues offered. `None`: [`MAX_QUEUES`].
    pub num_queues: Option<u16>,
    /// Whether queue workers read through io_uring where the kernel supports it.
    pub io_uring: bool,
    /// Largest size of a virtqueue, in descriptors.
    pub queue_size: u16,
    /// Serial number of the disk, padded with zeros. `None`: derived from the image.
    pub serial: Option<[u8; SERIAL_LEN]>,
    /// When a front-end takes the disk over from another.
    pub takeover: Takeover,
    /// Size of the cache of decompressed blocks, in bytes; 0 disables it.
    pub block_cache: u64,
    /// Settings of the queue workers.
    pub tuning: Tuning,
    /// Rate limits at the start.
    pub limits: LimitsSpec,
    /// File of the statistics page. `None`: only this process sees the page.
    pub stats: Option<PathBuf>,
}

/// Number of io_uring rings for a disk without a chosen number of queues: one for each processor of the
/// host, within these limits. A ring takes about 15 KiB of kernel memory.
const DEFAULT_RINGS: RangeInclusive<usize> = 4..=16;

impl Config {
    /// Number of virtqueues offered.
    pub fn queues(&self) -> u16 {
        self.num_queues.unwrap_or(MAX_QUEUES)
    }

    /// Number of io_uring rings to create before the sandbox is entered.
    pub fn rings(&self) -> usize {
        match (self.io_uring, self.num_queues) {
            (false, _) => 0,
            (true, Some(queues)) => usize::from(queues),
            (true, None) => {
                processors::available().clamp(*DEFAULT_RINGS.start(), *DEFAULT_RINGS.end())
            }
        }
    }
}

/// Source of the list of layers.
#[derive(Debug)]
pub enum ImageSource {
    /// Layers on the command line, bottom first.
    Layers(Vec<PathBuf>),
    /// Path of an image config.
    Config(PathBuf),
    /// An image in a registry.
    Reference(Reference),
}

/// Access to layers in registries.
#[derive(Clone, Debug, Default)]
pub struct RemoteConfig {
    /// Cache directory. `None`: the service configuration names it.
    pub cache: Option<PathBuf>,
    /// Credentials, certificates and mirrors of the registries.
    pub registry: RegistryArgs,
    /// Directory of the socket of a fetcher that disks share. `None`: the disk has a fetcher of its own.
    pub shared_fetcher: Option<PathBuf>,
    /// Prefetch trace to replay in place of the image's own.
    pub prefetch: Option<PathBuf>,
    /// File to which a trace of the guest's reads is written.
    pub record: Option<PathBuf>,
    /// Longest time that a guest's read waits for absent bytes. `None`: no limit.
    pub deadline: Option<Duration>,
    /// Whether all layers are fetched and compared with their digests before the disk is served.
    pub verify_first: bool,
}

impl RemoteConfig {
    /// Returns how long to wait for absent bytes, at the start and while serving.
    pub fn patience(&self) -> Patience {
        Patience {
            serving: self.deadline,
            ..Patience::default()
        }
    }
}

/// Location of the writable layer.
#[derive(Clone, Debug)]
pub enum WritableSource {
    /// These files.
    Files(writable::Paths),
    /// This directory, in which the layer is created if missing.
    Directory(PathBuf),
}
