//! The main thread of the fetcher's process: takes the orders of its owner.

use std::io;
use std::os::fd::OwnedFd;
use std::sync::Arc;
use std::thread;

use rustix::process::Resource;

use super::message::{Listed, Order, OwnerMessage};
use super::resolver::{Job, Resolver};
use super::{Config, ProcessError, TICK, ignore_signals};
use crate::cache::Limits;
use crate::fetch::blob::Offer;
use crate::fetch::fetcher::{Fetcher, Options};
use crate::fetch::registry_blob::RegistryBlob;
use crate::io::rlimit;
use crate::ratelimited_log;
use crate::reason::reason;
use crate::registry::blob::BlobRef;
use crate::registry::client::Client;
use crate::registry::repository::Repository;
use crate::registry::service_config::ServiceConfig;
use crate::source::link::{Link, Turn};

struct Server {
    fetcher: Fetcher,
    client: Arc<Client>,
    resolver: Arc<Resolver>,
}

/// Serves disk processes until the keeper closes the control socket.
pub(super) fn run(control: OwnedFd) -> Result<(), ProcessError> {
    ignore_signals();
    // A few for each disk, and for each of their blobs.
    rlimit::raise(Resource::Nofile, u64::MAX);
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
            resolver: Resolver::new(cache, Arc::clone(&client)),
            client,
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
            } => {
                let answer = socket.into();
                let job = Job {
                    reference,
                    patience,
                    answer,
                };
                Ok(self.resolver.resolve(job)?)
            }
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
