//! Why the daemon cannot serve.

use std::io;
use std::path::PathBuf;

use crate::fetch::open::OpenError;
use crate::fetch::process::ProcessError;
use crate::fetch::resolve::ResolveError;
use crate::registry::service_config;
use crate::source::FetchError;

/// Why the daemon cannot serve.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The layers cannot be opened.
    #[error("cannot open the image")]
    Image(#[source] crate::image::Error),
    /// The image in a registry cannot be found.
    #[error(transparent)]
    Resolve(ResolveError),
    /// The fetcher cannot be started.
    #[error("cannot fetch layers from a registry")]
    Fetcher(#[source] ProcessError),
    /// The layers in a registry cannot be opened.
    #[error("cannot open the image")]
    Layers(#[source] OpenError),
    /// A layer is in a registry, and there is no cache.
    #[error("{wanted} is in a registry: name a cache directory with --cache")]
    NoCache {
        /// The layer or image.
        wanted: String,
    },
    /// The path of the cache cannot be made absolute.
    #[error("cannot find the cache directory {}", path.display())]
    CachePath {
        /// Its path.
        path: PathBuf,
        /// What the system said.
        source: io::Error,
    },
    /// The service configuration cannot be used.
    #[error("cannot use the service configuration")]
    ServiceConfig(#[source] service_config::Error),
    /// The image config does not tell an image.
    #[error("cannot use the image config")]
    ImageConfig(#[source] crate::image::config::Error),
    /// The writable layer cannot be opened or made.
    #[error("cannot open the writable layer")]
    Upper(#[source] crate::writable::Error),
    /// Both the command line and the image config name a writable layer.
    #[error(
        "two writable layers: the image config names an `upper`; omit --upper and --upper-auto, \
         or remove `upper` from the config"
    )]
    TwoUppers,
    /// A limit for what a writable layer may hold, and no such layer.
    #[error(
        "--upper-limit needs a writable layer: add --upper, --upper-auto, or an `upper` to the \
         image config"
    )]
    NothingToLimit,
    /// The socket cannot be bound.
    #[error("cannot listen on {}", path.display())]
    Socket {
        /// The socket's path.
        path: PathBuf,
        /// What the system said.
        source: io::Error,
    },
    /// The socket's path is longer than the system takes.
    #[error("cannot listen on {}: socket path has {len} bytes; the limit is {limit}", path.display())]
    SocketPath {
        /// The socket's path.
        path: PathBuf,
        /// Bytes it has.
        len: usize,
        /// Bytes it may have.
        limit: usize,
    },
    /// Another daemon answers on the socket.
    #[error("{} is in use by a running daemon: choose another path or stop that daemon", path.display())]
    SocketInUse {
        /// The socket's path.
        path: PathBuf,
    },
    /// Something else than a socket is at the path.
    #[error("{} exists and is not a socket: choose another path or remove it", path.display())]
    NotASocket {
        /// The path.
        path: PathBuf,
    },
    /// The image config's `resultFile` cannot be written.
    #[error("cannot write the result file {}", path.display())]
    ResultFile {
        /// Its path.
        path: PathBuf,
        /// What the system said.
        source: io::Error,
    },
    /// The service manager passes something else than one listening socket.
    #[error("cannot use the socket that the service manager passed")]
    Activation(#[from] super::activation::Error),
    /// The service manager passes another socket than the one named.
    #[error("the socket that the service manager passed is not {}: omit --socket", path.display())]
    OtherSocket {
        /// The path that was named.
        path: PathBuf,
    },
    /// Nobody says where to listen.
    #[error("no socket: add --socket, or start the daemon by socket activation (systemd)")]
    NoSocket,
    /// The user to be does not exist, or one may not become it.
    #[error("cannot change the user")]
    Identity(#[from] super::sandbox::privileges::IdentityError),
    /// The sandbox cannot be entered.
    #[error("cannot enter the sandbox; --sandbox off disables it")]
    Sandbox(#[from] super::sandbox::Error),
    /// The queues would need more than the system lets the process have.
    #[error("cannot serve all queues")]
    Limits(#[from] super::limits::Shortage),
    /// Reads did not end in time after a signal.
    #[error(
        "reads still wait for storage {seconds} s after the stop signal; the daemon exits \
         without answering them"
    )]
    Drain {
        /// How long they had.
        seconds: u64,
    },
    /// What was written could not be made durable at the end.
    #[error("final flush failed: data written since the last flush may not be durable")]
    Flush(#[source] crate::writable::Error),
    /// The same, and nobody knows.
    #[error(
        "final flush timed out after {seconds} s: data written since the last flush may not be durable"
    )]
    FlushLate {
        /// How long it had.
        seconds: u64,
    },
    /// Nobody could answer on the control socket.
    #[error("cannot serve the control socket")]
    Control(#[source] io::Error),
    /// Signals cannot be caught.
    #[error("cannot catch signals")]
    Signals(#[source] io::Error),
    /// Waiting for connections failed.
    #[error("cannot wait for connections")]
    Wait(#[source] io::Error),
}

impl Error {
    /// Upstream's words for the same class of error, if a registry is the cause.
    pub fn upstream_words(&self) -> Option<&'static str> {
        let mut cause: Option<&(dyn std::error::Error + 'static)> = Some(self);
        while let Some(error) = cause {
            if let Some(error) = error.downcast_ref::<FetchError>() {
                return Some(error.kind().upstream_words());
            }
            cause = error.source();
        }
        None
    }
}
