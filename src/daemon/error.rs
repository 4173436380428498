//! Errors of the daemon.

use std::io;
use std::path::PathBuf;

use crate::fetch::open::OpenError;
use crate::fetch::process::ProcessError;
use crate::fetch::resolve::ResolveError;
use crate::registry::service_config;
use crate::source::{FetchError, FetchErrorKind};

/// The daemon cannot start, or cannot end cleanly.
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
    /// A layer is in a registry, and no cache directory is named.
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
        /// Error of the system.
        source: io::Error,
    },
    /// The prefetch trace cannot be opened.
    #[error("cannot open the trace {}", path.display())]
    Trace {
        /// Its path.
        path: PathBuf,
        /// Error of the system.
        source: io::Error,
    },
    /// The recorded trace cannot be written.
    #[error("cannot write the trace {}", path.display())]
    Record {
        /// Its path.
        path: PathBuf,
        /// Error of the system.
        source: io::Error,
    },
    /// The statistics page cannot be set up.
    #[error(transparent)]
    Stats(#[from] crate::engine::stats::PageError),
    /// The service configuration cannot be used.
    #[error("cannot use the service configuration")]
    ServiceConfig(#[source] service_config::Error),
    /// The image config does not describe an image.
    #[error("cannot use the image config")]
    ImageConfig(#[source] crate::image::config::Error),
    /// The writable layer cannot be opened or created.
    #[error("cannot open the writable layer")]
    Writable(#[source] crate::writable::Error),
    /// The command line and the image config both name a writable layer.
    #[error(
        "two writable layers: the image config names an `upper`; omit --upper and --upper-auto, \
         or remove `upper` from the config"
    )]
    TwoUppers,
    /// A limit for the writable layer, without a writable layer.
    #[error(
        "--upper-limit needs a writable layer: add --upper, --upper-auto, or an `upper` to the \
         image config"
    )]
    NothingToLimit,
    /// The socket cannot be bound.
    #[error("cannot listen on {}", path.display())]
    Socket {
        /// Path of the socket.
        path: PathBuf,
        /// Error of the system.
        source: io::Error,
    },
    /// The path of the socket is longer than the system accepts.
    #[error("cannot listen on {}: socket path has {len} bytes; the limit is {limit}", path.display())]
    SocketPath {
        /// Path of the socket.
        path: PathBuf,
        /// Length of the path in bytes.
        len: usize,
        /// Longest path that the system accepts.
        limit: usize,
    },
    /// Another daemon listens on the socket.
    #[error("{} is in use by a running daemon: choose another path or stop that daemon", path.display())]
    SocketInUse {
        /// Path of the socket.
        path: PathBuf,
    },
    /// The path exists and is not a socket.
    #[error("{} exists and is not a socket: choose another path or remove it", path.display())]
    NotASocket {
        /// The path.
        path: PathBuf,
    },
    /// The image config's `resultFile` cannot be written.
    #[error("cannot write the result file {}", path.display())]
    ResultFile {
        /// Path of the file.
        path: PathBuf,
        /// Error of the system.
        source: io::Error,
    },
    /// The service manager passed something other than one listening socket.
    #[error("cannot use the socket that the service manager passed")]
    Activation(#[from] super::activation::Error),
    /// The service manager passed another socket than the command line names.
    #[error("the socket that the service manager passed is not {}: omit --socket", path.display())]
    OtherSocket {
        /// Path on the command line.
        path: PathBuf,
    },
    /// Neither the command line nor the service manager gives a socket.
    #[error("no socket: add --socket, or start the daemon by socket activation (systemd)")]
    NoSocket,
    /// The user of the command line does not exist, or the daemon may not switch to it.
    #[error("cannot change the user")]
    Identity(#[from] super::sandbox::privileges::IdentityError),
    /// The sandbox cannot be entered.
    #[error("cannot enter the sandbox; --sandbox off disables it")]
    Sandbox(#[from] super::sandbox::Error),
    /// A limit of the system is smaller than the needs of all queues.
    #[error("cannot serve all queues")]
    Limits(#[from] super::limits::Shortage),
    /// Reads did not end in time after the stop signal.
    #[error(
        "reads still wait for storage {seconds} s after the stop signal; the daemon exits \
         without answering them"
    )]
    Drain {
        /// Time limit.
        seconds: u64,
    },
    /// The final flush failed.
    #[error("final flush failed: data written since the last flush may not be durable")]
    Flush(#[source] crate::writable::Error),
    /// The final flush timed out; durability unknown.
    #[error(
        "final flush timed out after {seconds} s: data written since the last flush may not be durable"
    )]
    FlushLate {
        /// Time limit.
        seconds: u64,
    },
    /// The node did not pass a listening socket.
    #[error("cannot take the socket from the node: --started-by-node is for ovbd-node only")]
    Handover(#[source] io::Error),
    /// The node that started the daemon has ended.
    #[error("cannot report to the node that started this disk; the next node starts it again")]
    NoNode(#[source] io::Error),
    /// Signals cannot be caught.
    #[error("cannot catch signals")]
    Signals(#[source] io::Error),
    /// The daemon cannot wait for connections.
    #[error("cannot wait for connections")]
    Wait(#[source] io::Error),
}

impl Error {
    /// Returns upstream's words for the same class of error, if a registry is the cause.
    pub fn upstream_words(&self) -> Option<&'static str> {
        let mut cause: Option<&(dyn std::error::Error + 'static)> = Some(self);
        while let Some(error) = cause {
            if let Some(crate::image::Error::Served { .. }) = error.downcast_ref() {
                return Some(FetchErrorKind::Damaged.upstream_words());
            }
            if let Some(error) = error.downcast_ref::<FetchError>() {
                return Some(error.kind().upstream_words());
            }
            cause = error.source();
        }
        None
    }
}
