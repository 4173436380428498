//! The fetcher: its threads, and the disk processes that it serves.

use std::io;
use std::ops::ControlFlow;
use std::os::fd::OwnedFd;
use std::sync::Arc;
use std::thread::{self, JoinHandle};

use super::blob::Offer;
use super::counters::CountersSnapshot;
use super::dispatcher::Dispatcher;
use super::download::Download;
use super::fill::{self, FillError, FillOptions};
use super::locks::{Rank, RankedMutex};
use super::schedule::Urgency;
use super::space::Space;
use super::{session, upkeep, worker};
use crate::cache::{Cache, Limits};
use crate::registry::statuses::Statuses;
use crate::source::link::Link;

/// Disks for which there are threads of their own. More share those, and servers that do not answer are asked
/// again after pauses only.
const MAX_DISKS: usize = 16;

/// How the fetcher works.
#[derive(Clone, Copy, Debug)]
pub struct Options {
    /// Threads for what something waits for: that many requests of a disk are under way.
    pub demand_threads: usize,
    /// Threads for the rest.
    pub other_threads: usize,
    /// How large the cache may grow.
    pub limits: Limits,
    /// Bytes that a reader's first request asks for, before round trip and rate are known; `None`: the
    /// default.
    pub first_request: Option<u64>,
}

impl Default for Options {
    fn default() -> Self {
        Self {
            demand_threads: 16,
            other_threads: 8,
            limits: Limits::default(),
            first_request: None,
        }
    }
}

/// Fetches blobs into a cache, until dropped.
#[derive(Debug)]
pub struct Fetcher {
    dispatcher: Arc<Dispatcher>,
    options: Options,
    threads: RankedMutex<Threads>,
}

/// The threads of a fetcher.
#[derive(Debug, Default)]
struct Threads {
    /// Those that fetch, and the upkeep.
    workers: Vec<JoinHandle<()>>,
    /// Disks for which there are workers.
    disks: usize,
    /// Connections to disk processes.
    connections: Vec<JoinHandle<()>>,
}

impl Fetcher {
    /// Starts the threads of a fetcher for `cache`. `statuses` counts the answers that its origins
    /// get.
    ///
    /// # Errors
    /// The process has no thread left.
    pub fn start(cache: Cache, options: Options, statuses: Arc<Statuses>) -> io::Result<Self> {
        let space = Space::new(cache, options.limits);
        let dispatcher = Dispatcher::new(space, options.first_request, statuses);
        let fetcher = Self {
            dispatcher: Arc::new(dispatcher),
            options,
            threads: RankedMutex::new(Rank::Threads, Threads::default()),
        };
        let mut threads = fetcher.threads.lock();
        let upkeep: [(_, fn(&Dispatcher)); 3] = [
            ("fetch-upkeep", upkeep::run),
            ("fetch-verify", upkeep::verify),
            ("fetch-damage", upkeep::look_at_damage),
        ];
        for (name, run) in upkeep {
            threads.workers.push(fetcher.spawn(name, run)?);
        }
        for _ in 0..options.other_threads.max(1) {
            let worker = fetcher.spawn("fetch-ahead", |dispatcher| {
                worker::run(dispatcher, &Urgency::ALL[1..]);
            })?;
            threads.workers.push(worker);
        }
        fetcher.add_demand_threads(&mut threads)?;
        drop(threads);
        Ok(fetcher)
    }

    /// Starts the threads for the demands of one more disk.
    fn add_demand_threads(&self, threads: &mut Threads) -> io::Result<()> {
        for _ in 0..self.options.demand_threads.max(1) {
            let worker = self.spawn("fetch-demand", |dispatcher| {
                worker::run(dispatcher, &Urgency::ALL[..1]);
            })?;
            threads.workers.push(worker);
        }
        threads.disks += 1;
        Ok(())
    }

    fn spawn(
        &self,
        name: &str,
        run: impl FnOnce(&Dispatcher) + Send + 'static,
    ) -> io::Result<JoinHandle<()>> {
        let dispatcher = Arc::clone(&self.dispatcher);
        let builder = thread::Builder::new().name(name.to_owned());
        builder.spawn(move || run(&dispatcher))
    }

    /// Serves a disk process on the other end of `socket`, which may ask for the offered blobs by
    /// their numbers, until it closes its end. Until then, the blobs are downloaded in the
    /// background, if that is asked for. Returns at once.
    ///
    /// # Errors
    /// The process has no descriptor or no thread left.
    pub fn attach(
        &self,
        socket: OwnedFd,
        offers: Vec<Offer>,
        download: Option<Download>,
    ) -> io::Result<()> {
        let link = Arc::new(Link::new(socket)?);
        let mut threads = self.threads.lock();
        threads.connections.retain(|thread| !thread.is_finished());
        if !threads.connections.is_empty() && threads.disks < MAX_DISKS {
            self.add_demand_threads(&mut threads)?;
        }
        let connections = &mut threads.connections;
        if let Some(download) = download {
            let alive = Arc::downgrade(&link);
            let dispatcher = Arc::clone(&self.dispatcher);
            connections.push(download.start(dispatcher, offers.clone(), alive)?);
        }
        connections.push(session::start(Arc::clone(&self.dispatcher), link, offers)?);
        Ok(())
    }

    /// Whether a disk process is connected, or was a moment ago.
    pub fn has_connections(&self) -> bool {
        let threads = self.threads.lock();
        threads
            .connections
            .iter()
            .any(|thread| !thread.is_finished())
    }

    /// Fetches all of a blob and verifies it. Calls `progress` with the number of bytes that are
    /// present now and then, and stops when that breaks.
    ///
    /// # Errors
    /// A [`FillError`]. What was fetched stays.
    pub fn fill(
        &self,
        offer: &Offer,
        options: FillOptions,
        progress: &mut dyn FnMut(u64) -> ControlFlow<()>,
    ) -> Result<(), FillError> {
        fill::fill(&self.dispatcher, offer, options, progress)
    }

    /// Makes durable what is there and ends at once, as the process does: threads that wait for a
    /// server are left alone.
    pub fn leave(self) {
        self.dispatcher.stop();
        for blob in self.dispatcher.blobs() {
            blob.sync(1);
        }
        std::mem::forget(self);
    }

    /// The state that the threads share.
    #[cfg(test)]
    pub(super) fn dispatcher(&self) -> &Arc<Dispatcher> {
        &self.dispatcher
    }

    /// The counts at this moment.
    pub fn counters(&self) -> CountersSnapshot {
        self.dispatcher.snapshot()
    }
}

impl Drop for Fetcher {
    fn drop(&mut self) {
        self.dispatcher.stop();
        // A session that still ran would read what is meant for the successor on its socket.
        let threads = std::mem::take(&mut *self.threads.lock());
        for thread in threads.workers.into_iter().chain(threads.connections) {
            let _ = thread.join();
        }
    }
}
