//! `ovbd-node`: many disks on one host, by name.
//!
//! The node starts one `ovbd-vhost` process per disk and watches it. It serves an HTTP API on a unix socket, touches
//! no guest memory and parses no layer. It is expendable: disks keep serving while it is down, and the next node finds
//! them again by the state directory.
//!
//! ```text
//! PUT /disks/{id} ── api ── disks ── disk ──┬─ spec, allow: checked request, paths below the allowed directories
//!                                           ├─ launch: listener bound, process started, READY awaited
//!                                           └─ state_dir: entry durable ── 201
//! process ends ── watch ── disk: started again on the same listener, or `failed` after five ends in a minute
//! ```
//!
//! A module uses only modules below it in this table. `tests/project/architecture.rs` holds the code to that.
//!
//! | module | content |
//! |---|---|
//! | [`api`] | HTTP: routes, bodies, answers |
//! | [`front_ends`] | reports front-ends as events |
//! | [`logs`] | bounds the logs of disk processes |
//! | [`metrics`] | the text of the metrics |
//! | [`inventory`] | lists of disks and images |
//! | [`disks`] | the set of disks, and the operations of requests on it |
//! | [`disk`] | one disk: its entry, its process, its state |
//! | [`launch`] | starts disk processes |
//! | [`fd_store`] | listening sockets that the service manager keeps |
//! | [`state_dir`] | state entries in files |
//! | [`entry`] | the state entry of a disk |
//! | [`spec`] | the specification of a disk |
//! | [`allow`] | paths that requests may name |
//! | [`condition`] | conditions of requests |
//! | [`error`] | errors, and failures of requests |
//! | [`socket`] | listening sockets with a mode and an owner |
//! | [`process`] | holds a process, and ends it |
//! | [`watcher`] | waits for processes to end |
//! | [`crashes`] | when a process is started again, and when given up |
//! | [`counters`] | counters of the node |
//! | [`events`] | numbered changes of disks |
//! | [`shown_label`] | labels of disks in the metrics |
//! | [`id`] | names of disks |
//! | [`clock`] | the time |
//!
//! `docs/node.md` has the states of a disk and what each failure leads to.

pub mod allow;
pub mod api;
pub mod clock;
pub mod condition;
pub mod counters;
pub mod crashes;
pub mod disk;
pub mod disks;
pub mod entry;
pub mod error;
pub mod events;
pub mod fd_store;
mod front_ends;
pub mod id;
pub mod inventory;
pub mod launch;
mod logs;
pub mod metrics;
pub mod process;
pub mod shown_label;
pub mod socket;
pub mod spec;
pub mod state_dir;
pub mod watcher;

use std::collections::BTreeSet;
use std::ffi::OsString;
use std::net::SocketAddr;
use std::path::PathBuf;
use std::sync::Arc;

use rustix::process::Resource;
use sd_notify::NotifyState;
use tokio::signal::unix::{SignalKind, signal};

pub use error::Error;

use crate::daemon::notify::Manager;
use crate::io::rlimit;
use allow::AllowedDirs;
use api::{Access, ControlSocket, exporter};
use disks::Disks;
use fd_store::FdStore;
use launch::Launcher;
use shown_label::ShownLabel;
use state_dir::StateDir;

/// Options of the node.
#[derive(Clone, Debug)]
pub struct Config {
    /// Unix socket of the HTTP API.
    pub control: ControlSocket,
    /// Unix socket of the HTTP API for clients that may only read.
    pub control_ro: Option<ControlSocket>,
    /// Directory of the state entries; created if missing.
    pub state: PathBuf,
    /// Directory of the sockets and logs of disks; created if missing.
    pub run_dir: PathBuf,
    /// Directories below which requests may name files; without one, requests may name none.
    pub allow_dirs: Vec<PathBuf>,
    /// The `ovbd-vhost` program.
    pub program: PathBuf,
    /// Options of `ovbd-vhost` that all disks get: the cache directory, and access to registries.
    pub disk_options: Vec<OsString>,
    /// Labels of disks that the metrics show.
    pub metrics_labels: Vec<ShownLabel>,
    /// Loopback address on which metrics are served over TCP.
    pub metrics_listen: Option<SocketAddr>,
}

/// Serves the API until SIGTERM or SIGINT. Disks keep running afterwards.
///
/// # Errors
/// [`Error`] if a directory or the control socket cannot be set up, or another node uses the state directory.
pub fn run(config: Config) -> Result<(), Error> {
    // A disk takes two descriptors, a client one.
    rlimit::raise(Resource::Nofile, u64::MAX);
    let manager = Arc::new(Manager::connect());
    let fd_store = FdStore::open(manager.clone());
    let runtime = tokio::runtime::Builder::new_multi_thread()
        .worker_threads(2)
        .enable_all()
        .build()
        .map_err(Error::Runtime)?;
    runtime.block_on(serve(config, &manager, fd_store))
}

async fn serve(config: Config, manager: &Manager, fd_store: FdStore) -> Result<(), Error> {
    let mut names = BTreeSet::new();
    for label in &config.metrics_labels {
        if !names.insert(label.name()) {
            return Err(Error::SameLabel(label.name().to_owned()));
        }
    }
    let state = StateDir::open(&config.state)?;
    let launcher = Launcher::new(&config.run_dir, &config.program, config.disk_options)?;
    let allowed = AllowedDirs::open(&config.allow_dirs)?;
    let disks = Arc::new(Disks::new(
        state,
        launcher,
        fd_store,
        allowed,
        config.metrics_labels,
    ));
    let exporter = config.metrics_listen.map(exporter::bind).transpose()?;
    let listener = api::bind(&config.control, api::BIND_LIMIT)?;
    let reading = config.control_ro.as_ref();
    let reading = reading
        .map(|socket| api::bind(socket, api::BIND_LIMIT))
        .transpose()?;
    disks.clone().recover().await?;
    if let Some(exporter) = exporter {
        tokio::spawn(exporter::serve(exporter, disks.clone()));
    }
    if let Some(reading) = reading {
        tokio::spawn(api::serve(reading, Access::ReadOnly, disks.clone()));
    }
    let mut terminate = signal(SignalKind::terminate()).map_err(Error::Runtime)?;
    let mut interrupt = signal(SignalKind::interrupt()).map_err(Error::Runtime)?;
    tokio::spawn(front_ends::report(disks.clone()));
    tokio::spawn(logs::bound(disks.clone()));
    manager.tell(&NotifyState::Ready);
    log::info!("serving the API on {}", config.control.path.display());
    tokio::select! {
        () = api::serve(listener, Access::Full, disks.clone()) => {}
        _ = terminate.recv() => {}
        _ = interrupt.recv() => {}
    }
    manager.tell(&NotifyState::Stopping);
    log::info!("stopping; disks keep running");
    // Removing a path that is gone already is no failure.
    for socket in config.control_ro.iter().chain([&config.control]) {
        let _ = std::fs::remove_file(&socket.path);
    }
    Ok(())
}
