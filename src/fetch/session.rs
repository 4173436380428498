//! The fetcher's side of the connection to one disk process.

use std::collections::BTreeSet;
use std::io;
use std::ops::ControlFlow;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::thread::{self, JoinHandle};
use std::time::Duration;

use super::blob::Offer;
use super::dispatcher::Dispatcher;
use super::fair_queue::ClientId;
use super::fill::{FillOptions, fill};
use super::locks::{Rank, RankedMutex};
use super::offered::{Asked, Offered};
use super::origin::Failure;
use super::waiter::Waiter;
use crate::ratelimited_log;
use crate::source::FetchErrorKind;
use crate::source::link::{Link, Message, Turn};
use crate::source::protocol::{Reply, Request, Subject};

/// How often a session looks whether the fetcher stops.
const TICK: Duration = Duration::from_millis(200);

/// Fetches of one disk process that may wait at a time.
pub const MAX_OUTSTANDING: usize = 32_768;

/// Blobs of one disk process that are fetched whole at a time.
const MAX_FILLING: usize = 16;

struct Session {
    client: ClientId,
    dispatcher: Arc<Dispatcher>,
    link: Arc<Link>,
    /// The offered blobs, by their numbers.
    blobs: Vec<Arc<Offered>>,
    outstanding: Arc<AtomicUsize>,
    /// Tickets of the blobs that are fetched whole at this moment.
    filling: Arc<RankedMutex<BTreeSet<u64>>>,
}

/// Starts a thread that serves a disk process until either side ends the connection.
pub(super) fn start(
    dispatcher: Arc<Dispatcher>,
    link: Arc<Link>,
    offers: Vec<Offer>,
) -> io::Result<JoinHandle<()>> {
    let client = dispatcher.new_client();
    let offered = offers.into_iter().zip(0..);
    let offered =
        offered.map(|(offer, number)| Offered::new(client, number, offer, &dispatcher, &link));
    let session = Session {
        client,
        blobs: offered.collect(),
        dispatcher,
        link,
        outstanding: Arc::default(),
        filling: Arc::new(RankedMutex::new(Rank::Filling, BTreeSet::new())),
    };
    thread::Builder::new()
        .name("fetch-session".to_owned())
        .spawn(move || session.run())
}

impl Session {
    fn run(self) {
        let link = Arc::clone(&self.link);
        link.send(Reply::Hello.encode(), Vec::new());
        while !self.dispatcher.is_stopping() {
            match link.turn(TICK, |message| self.take(&message)) {
                Ok(Turn::Open) => {}
                Ok(Turn::Ended) => break,
                Err(error) => {
                    ratelimited_log::warn(format_args!(
                        "the connection to a daemon failed: {error}"
                    ));
                    break;
                }
            }
        }
        self.dispatcher.forget(self.client, &self.link);
        // Threads that fetch whole blobs for it end.
        self.link.end();
        // The upkeep thread no longer sees those that no other connection has open.
        for blob in self.blobs.iter().filter_map(|offered| offered.opened()) {
            blob.sync(1);
        }
    }

    fn take(&self, message: &Message) {
        match Request::decode(&message.bytes) {
            Ok(Request::Open { blob }) => self.open(blob),
            Ok(Request::Fetch {
                ticket,
                blob,
                offset,
                len,
                cause,
            }) => {
                let waiter = cause.is_waited_for().then(|| self.waiter(ticket));
                let end = offset.saturating_add(len);
                match (self.offered(blob), waiter) {
                    (Ok(offered), waiter) if self.has_room() => {
                        let bytes = offset..end;
                        offered.ask(Asked::Bytes {
                            bytes,
                            cause,
                            waiter,
                        });
                    }
                    (Ok(_), Some(waiter)) => {
                        let reason = format!("more than {MAX_OUTSTANDING} fetches wait");
                        let failure = Failure::definite(FetchErrorKind::System, reason);
                        waiter.answer(Err(&failure));
                    }
                    (Err(failure), Some(waiter)) => waiter.answer(Err(&failure)),
                    (_, None) => {}
                }
            }
            Ok(Request::Fill { ticket, blob }) => self.fill(ticket, blob),
            Ok(Request::Count) => {
                let reply = Reply::Counts(self.dispatcher.counts());
                self.link.send(reply.encode(), Vec::new());
            }
            // The other side is at fault, or hostile; this ends its disk, and no other.
            Err(error) => {
                ratelimited_log::warn(format_args!(
                    "a daemon sent a malformed message and is disconnected: {error}"
                ));
                self.link.end();
            }
        }
    }

    fn waiter(&self, ticket: u64) -> Waiter {
        self.outstanding.fetch_add(1, Ordering::Relaxed);
        Waiter::Session {
            link: Arc::clone(&self.link),
            ticket,
            outstanding: Arc::clone(&self.outstanding),
        }
    }

    fn has_room(&self) -> bool {
        self.outstanding.load(Ordering::Relaxed) <= MAX_OUTSTANDING
    }

    /// The offered blob of this number.
    fn offered(&self, number: u32) -> Result<&Arc<Offered>, Failure> {
        self.blobs.get(number as usize).ok_or_else(|| {
            let reason = format!(
                "request for blob {number}; the disk has {} blobs",
                self.blobs.len()
            );
            Failure::definite(FetchErrorKind::NotFound, reason)
        })
    }

    fn open(&self, number: u32) {
        match self.offered(number) {
            Ok(offered) => offered.ask(Asked::Descriptors),
            Err(failure) => {
                let reply = Reply::Failed {
                    subject: Subject::Blob(number),
                    kind: failure.kind,
                    reason: failure.reason,
                };
                self.link.send(reply.encode(), Vec::new());
            }
        }
    }

    /// Fetches and verifies all of a blob, on a thread of its own.
    fn fill(&self, ticket: u64, number: u32) {
        // A client repeats what it asked before it learned that a fetcher is there.
        if self.filling.lock().contains(&ticket) {
            return;
        }
        let waiter = self.waiter(ticket);
        let refused = |reason: String| Failure::definite(FetchErrorKind::System, reason);
        let offer = match self.offered(number) {
            Ok(offered) => offered.offer().clone(),
            Err(failure) => return waiter.answer(Err(&failure)),
        };
        if self.filling.lock().len() >= MAX_FILLING {
            let reason = format!("more than {MAX_FILLING} blobs are fetched whole at once");
            return waiter.answer(Err(&refused(reason)));
        }
        let (dispatcher, link) = (Arc::clone(&self.dispatcher), Arc::clone(&self.link));
        let filling = Arc::clone(&self.filling);
        filling.lock().insert(ticket);
        let run = move || {
            let mut go_on = |_| match dispatcher.is_stopping() || link.has_ended() {
                true => ControlFlow::Break(()),
                false => ControlFlow::Continue(()),
            };
            let filled = fill(&dispatcher, &offer, FillOptions::at_once(), &mut go_on);
            filling.lock().remove(&ticket);
            let filled = filled.map_err(Failure::from);
            waiter.answer(filled.as_ref().copied());
        };
        let thread = thread::Builder::new().name("fetch-fill".to_owned());
        if let Err(error) = thread.spawn(run) {
            // Its waiter is gone with it; the client has a deadline.
            ratelimited_log::error(format_args!(
                "cannot start a thread to fetch a blob: {error}"
            ));
            self.link.end();
        }
    }
}
