//! What the daemon is to do, checked.

use std::path::PathBuf;

use crate::engine::Tuning;
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
    /// The writable layer above them, unless an image config names it or there is none.
    pub upper: Option<UpperSource>,
    /// Most bytes of data the writable layer may hold, if there is a bound.
    pub upper_limit: Option<u64>,
    /// Queues a front-end may use.
    pub num_queues: u16,
    /// Largest queue it may set up.
    pub queue_size: u16,
    /// The device's serial, padded with zeros; by default one derived from the image.
    pub serial: Option<[u8; SERIAL_LEN]>,
    /// Bytes of decoded blocks to keep; zero: none.
    pub block_cache: u64,
    /// How its workers work.
    pub tuning: Tuning,
}

/// Where the list of layers comes from.
#[derive(Debug)]
pub enum ImageSource {
    /// The command line, bottom first.
    Layers(Vec<PathBuf>),
    /// An image config.
    Config(PathBuf),
}

/// Where the writable layer is.
#[derive(Debug)]
pub enum UpperSource {
    /// In these files.
    Files(writable::Paths),
    /// In this folder, where it is made unless it is there.
    Folder(PathBuf),
}
