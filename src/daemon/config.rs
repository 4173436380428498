//! What the daemon is to do, checked.

use std::path::PathBuf;

use crate::engine::Tuning;
use crate::virtio::request::SERIAL_LEN;

/// Queues the protocol can name.
pub const MAX_QUEUES: u16 = 256;

/// Everything a device needs.
#[derive(Debug)]
pub struct Config {
    /// Path of the socket front-ends connect to.
    pub socket: PathBuf,
    /// Its permissions.
    pub socket_mode: u32,
    /// The layers.
    pub image: ImageSource,
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
