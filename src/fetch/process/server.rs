//! The main thread of the fetcher's process: takes the orders of its owner.

use std::io::{self, Write};
use std::net::Shutdown;
use std::os::fd::OwnedFd;
use std::os::unix::net::UnixStream;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::thread;
use std::time::Duration;

use super::message::{Listed, Order, OwnerMessage};
use super::{Config, ProcessError, TICK, ignore_signals};
use crate::cache::{Cache, Limits};
use crate::fetch::blob::Offer;
use crate::fetch::fetcher::{Fetcher, Options};
use crate::fetch::image_lookup;
use crate::fetch::registry_blob::RegistryBlob;
use crate::ratelimited_log;
use crate::reason::reason;
use crate::registry::blob::BlobRef;
use crate::registry::client::Client;
use crate::registry::repository::Repository;
use crate::registry::service_config::ServiceConfig;
use crate::source::link::{Link, Turn};

/// Images that are resolved at a time.
const MAX_RESOLVING: usize = 16;

/// How long the owner may take to read an answer.
const PATIENCE: Duration = Duration::from_secs(2);

struct Server {
    fetcher: Fetcher,
    client: Arc<Client>,
    cache: Cache,
    /// Images that are being resolved.
    resolving: Arc<AtomicUsize>,
}

/// Serves disk processes until the keeper closes the control socket.
pub(super) fn run(control: OwnedFd) -> Result<(), ProcessError> {
    ignore_signals();
    let control = Link::new(control)?;
    let mut messages = Vec::new();
    let mut turn = Turn::Open;
    while messages.is_empty() && turn == Turn::Open {
        turn = control.turn(TICK, |packet| messages.extend(OwnerMessage::new(packet)))?;
    }
    let mut messages = messages.into_iter();
    let Some(first) = messages.next() else {
        return Ok(());
    };
    let server = Server::start(&first.read()?)?;
    let mut waiting: Vec<_> = messages.collect();
    loop {
        for message in waiting.drain(..) {
            if let Err(error) = server.take(message) {
                ratelimited_log::error(format_args!(
                    "the fetcher cannot serve a disk: {}",
                    reason(&error)
                ));
            }
        }
        let turn = control.turn(TICK, |packet| waiting.extend(OwnerMessage::new(packet)))?;
        if turn == Turn::Ended {
            break;
        }
    }
    // Keeper and standby may have been killed: the disks do not suffer from it.
    while server.fetcher.has_connections() {
        thread::sleep(TICK);
    }
    server.fetcher.leave();
    Ok(())
}

impl Server {
    fn start(config: &Config) -> Result<Self, ProcessError> {
        let access = config.open()?;
        access.confine()?;
        let client = Arc::new(access.client);
        let statuses = Arc::clone(client.statuses());
        let cache = access.cache.clone();
        let fetcher = Fetcher::start(access.cache, options(&access.service), statuses)?;
        Ok(Self {
            fetcher,
            client,
            cache,
            resolving: Arc::default(),
        })
    }

    fn take(&self, message: OwnerMessage) -> Result<(), ProcessError> {
        let order = message.read()?;
        let Some(socket) = message.socket else {
            return Ok(());
        };
        match order {
            Order::Attach { blobs, download } => {
                let offers = blobs.into_iter().map(|blob| self.offer(blob));
                let offers = offers.collect::<Result<_, _>>()?;
                Ok(self.fetcher.attach(socket, offers, download)?)
            }
            Order::Resolve {
                reference,
                patience,
            } => self.resolve(reference, patience, socket.into()),
        }
    }

    fn offer(&self, blob: Listed) -> Result<Offer, ProcessError> {
        let malformed = |error: &dyn std::error::Error| {
            ProcessError::Start(io::Error::other(error.to_string()))
        };
        let digest = blob.digest.parse().map_err(|error| malformed(&error))?;
        let found = BlobRef {
            repository: Repository::from_blob_url(&blob.blobs_url)?,
            digest,
            size: blob.size,
        };
        Ok(Offer {
            digest,
            len: blob.size,
            origin: Arc::new(RegistryBlob::new(Arc::clone(&self.client), found)),
        })
    }

    /// Finds an image on a thread of its own, and writes what is found to `answer`.
    fn resolve(
        &self,
        reference: String,
        patience: Duration,
        mut answer: UnixStream,
    ) -> Result<(), ProcessError> {
        let resolving = Arc::clone(&self.resolving);
        if resolving.fetch_add(1, Ordering::Relaxed) >= MAX_RESOLVING {
            resolving.fetch_sub(1, Ordering::Relaxed);
            let reason = format!("more than {MAX_RESOLVING} images are resolved at once");
            return Err(ProcessError::Start(io::Error::other(reason)));
        }
        let (cache, client) = (self.cache.clone(), Arc::clone(&self.client));
        let run = move || {
            let found = image_lookup::find(&cache, &client, &reference, patience);
            resolving.fetch_sub(1, Ordering::Relaxed);
            let written = answer
                .set_write_timeout(Some(PATIENCE))
                .and_then(|()| answer.write_all(&serde_json::to_vec(&found)?))
                // The keeper holds the socket open for the next fetcher.
                .and_then(|()| answer.shutdown(Shutdown::Write));
            if let Err(error) = written {
                log::debug!("an owner does not read the layers of an image: {error}");
            }
        };
        thread::Builder::new()
            .name("fetch-resolve".to_owned())
            .spawn(run)?;
        Ok(())
    }
}

/// Options of a fetcher as the service configuration has them.
fn options(service: &ServiceConfig) -> Options {
    let default = Options::default();
    let concurrency = service.prefetch_concurrency.map(|count| count as usize);
    Options {
        limits: Limits {
            bytes: service.cache_size.unwrap_or(u64::MAX),
            ..Limits::default()
        },
        // The threads of a replay are those of all that nothing waits for.
        other_threads: concurrency.unwrap_or(default.other_threads),
        first_request: service.refill_size,
        ..default
    }
}
