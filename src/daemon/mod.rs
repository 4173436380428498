//! The `ovbd-vhost` daemon: from command line to running device.
//!
//! [`run`] opens the image, binds the socket ([`listener`]), says that it is ready and serves one
//! front-end after the other ([`server`]) until a signal ends it.

pub mod config;
pub mod error;
pub mod listener;
pub mod server;

use std::os::unix::net::UnixStream;
use std::sync::Arc;

use signal_hook::consts::{SIGINT, SIGTERM};

pub use config::Config;
pub use error::Error;

use sd_notify::NotifyState;

use crate::engine::Disk;
use crate::image::Image;
use crate::image::block_cache::BlockCache;
use crate::image::spec::{self, Stack};
use crate::virtio::config::DeviceConfig;
use crate::virtio::request::SERIAL_LEN;
use config::ImageSource;
use listener::Listener;

/// Serves one device until SIGTERM or SIGINT.
///
/// # Errors
///
/// The image cannot be opened or the socket not be bound; [`Error`] says which and why.
pub fn run(config: Config) -> Result<(), Error> {
    let opened = match &config.image {
        ImageSource::Layers(layers) => open(&config, &Stack::new(layers)),
        ImageSource::Config(path) => {
            let image = spec::Config::load(path).map_err(Error::ImageConfig)?;
            let stack = image.stack().map_err(Error::ImageConfig);
            let opened = stack.and_then(|stack| open(&config, &stack));
            if let Some(path) = image.result_file() {
                report(&path, opened.as_ref().err())?;
            }
            opened
        }
    };
    let (disk, listener) = opened?;
    let signals = signals()?;
    if let Err(error) = sd_notify::notify(&[NotifyState::Ready]) {
        log::warn!("the service manager cannot be told that we are ready: {error}");
    }
    log::info!(
        "serving {} layers, {} bytes, {} segments on {}",
        disk.image.layers().len(),
        disk.image.size(),
        disk.image.index().len(),
        config.socket.display()
    );
    server::serve(&listener, &disk, &signals)
}

fn open(config: &Config, stack: &Stack) -> Result<(Arc<Disk>, Listener), Error> {
    let image = Image::open(stack).map_err(Error::Image)?;
    let serial = config.serial.unwrap_or_else(|| {
        let mut bytes = [0; SERIAL_LEN];
        let text = image.serial();
        bytes
            .iter_mut()
            .zip(text.bytes())
            .for_each(|(byte, text)| *byte = text);
        bytes
    });
    let disk = Disk {
        config: DeviceConfig {
            capacity: image.sectors(),
            queues: config.num_queues,
            queue_size: config.queue_size,
            optimal_io: image.block_size(),
        },
        serial,
        cache: (config.block_cache > 0)
            .then(|| Arc::new(BlockCache::new(config.block_cache, image.block_size()))),
        tuning: config.tuning.clone(),
        image,
    };
    // Bound last: who can connect will be served.
    let listener = Listener::bind(&config.socket, config.socket_mode)?;
    Ok((Arc::new(disk), listener))
}

/// A stream that becomes readable when a signal asks the daemon to end.
fn signals() -> Result<UnixStream, Error> {
    let pipe = || -> std::io::Result<UnixStream> {
        let (read, write) = UnixStream::pair()?;
        for signal in [SIGTERM, SIGINT] {
            signal_hook::low_level::pipe::register(signal, write.try_clone()?)?;
        }
        Ok(read)
    };
    pipe().map_err(Error::Signals)
}

/// Writes what an image config's `resultFile` asks for: `success` or `failed:<reason>`.
fn report(path: &std::path::Path, failure: Option<&Error>) -> Result<(), Error> {
    let text = match failure {
        None => "success".to_owned(),
        Some(error) => format!("failed:{}", error::chain(error)),
    };
    std::fs::write(path, text).map_err(|source| Error::ResultFile {
        path: path.to_owned(),
        source,
    })
}
