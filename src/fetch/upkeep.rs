//! The upkeep of the cache: makes units durable, evicts, verifies full blobs, looks at damage.
//!
//! Verifying a blob, and looking at damage, reads all of it. Each has a thread of its own, so that a large blob
//! delays neither the upkeep of the others nor the reads that wait for the repair of another.

use std::sync::Arc;
use std::thread;
use std::time::{Duration, Instant};

use super::blob::Blob;
use super::dispatcher::{Dispatcher, Suspect};
use crate::cache::Publication;
use crate::ratelimited_log;
use crate::reason::reason;

const TICK: Duration = Duration::from_millis(200);

/// Units are made durable after so many bytes, or some time.
const SYNC_BYTES: u64 = 64 << 20;

/// How often the size of the cache is looked at, and the time of what is in use is noted.
const EVICT_EVERY: Duration = Duration::from_secs(30);

/// Makes units durable and evicts, until the fetcher stops; then makes durable what is there.
pub(super) fn run(dispatcher: &Dispatcher) {
    // Nothing is evicted at once: a disk that starts has not opened what it needs.
    let mut evicted = Instant::now();
    while !dispatcher.is_stopping() {
        thread::sleep(TICK);
        for blob in dispatcher.blobs() {
            blob.sync(SYNC_BYTES);
        }
        if evicted.elapsed() >= EVICT_EVERY {
            evicted = Instant::now();
            evict(dispatcher);
        }
    }
    for blob in dispatcher.blobs() {
        blob.sync(1);
    }
}

/// Verifies full blobs until the fetcher stops.
pub(super) fn verify(dispatcher: &Dispatcher) {
    while !dispatcher.is_stopping() {
        thread::sleep(TICK);
        for blob in dispatcher.blobs() {
            publish(dispatcher, &blob);
        }
    }
}

/// Looks at damage until the fetcher stops.
pub(super) fn look_at_damage(dispatcher: &Dispatcher) {
    while !dispatcher.is_stopping() {
        thread::sleep(TICK);
        check_suspects(dispatcher);
    }
}

/// Verifies a blob of which all units are present.
fn publish(dispatcher: &Dispatcher, blob: &Arc<Blob>) {
    let Some(partial) = blob.partial() else {
        return;
    };
    if blob.is_final() || !partial.is_full() {
        return;
    }
    let digest = blob.digest();
    match partial.publish() {
        Ok(Publication::Published) => {
            dispatcher.counters().add_published();
            log::debug!("blob {digest} is complete");
        }
        Ok(Publication::Mismatch { found }) => {
            dispatcher.counters().add_mismatch();
            ratelimited_log::error(format_args!(
                "blob {digest} was fetched completely but has digest {found}; fetching it again \
                 from the registry itself"
            ));
        }
        Ok(Publication::Incomplete | Publication::Busy) => {}
        Err(error) => ratelimited_log::error(format_args!("blob {digest}: {}", reason(&error))),
    }
}

/// Has damaged units of complete blobs fetched again.
fn check_suspects(dispatcher: &Dispatcher) {
    for Suspect {
        client,
        blob,
        units,
        cause,
        waiter,
    } in dispatcher.take_suspects()
    {
        let checked = match blob.is_final() {
            true => blob.check_damage(dispatcher.space().cache(), units),
            // Another reader found damage before.
            false => Ok(()),
        };
        if checked.is_ok() && !blob.is_final() {
            let bytes = blob.identity().bytes_of(units);
            dispatcher.want(client, &blob, bytes, cause, waiter);
        } else if let Some(waiter) = waiter {
            // An intact blob: the reader reads it again, and fails if that gives the same.
            waiter.answer(checked.as_ref().copied());
        }
    }
}

fn evict(dispatcher: &Dispatcher) {
    for blob in dispatcher.blobs() {
        if let Some(partial) = blob.partial() {
            partial.touch();
        }
    }
    dispatcher.space().evict();
}
