//! Keeps the cache: makes units durable, verifies full blobs, evicts.

use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::thread;
use std::time::{Duration, Instant};

use super::blob::{Blob, lock};
use super::fetcher::{Shared, Suspect};
use crate::cache::Publication;
use crate::format::presence::State;
use crate::reason::reason;
use crate::source::protocol::Cause;

const TICK: Duration = Duration::from_millis(200);

/// Units are made durable after so long, or so many bytes.
const SYNC_AFTER: Duration = Duration::from_secs(5);
const SYNC_BYTES: u64 = 64 << 20;

/// How often the size of the cache is looked at, and the time of what is in use is noted.
const EVICT_EVERY: Duration = Duration::from_secs(30);

/// Runs until the fetcher stops; then makes durable what is there.
pub(super) fn run(shared: &Shared) {
    // Nothing is evicted at once: a disk that starts has not opened what it needs.
    let mut evicted = Instant::now();
    while !shared.is_stopping() {
        thread::sleep(TICK);
        for blob in shared.blobs() {
            sync(&blob, SYNC_BYTES);
            publish(shared, &blob);
        }
        check_suspects(shared);
        if evicted.elapsed() >= EVICT_EVERY {
            evicted = Instant::now();
            evict(shared);
        }
    }
    for blob in shared.blobs() {
        sync(&blob, 1);
    }
}

/// Makes a blob's units durable if many bytes, or old ones, are not.
pub(super) fn sync(blob: &Blob, many: u64) {
    let Some(partial) = blob.partial() else {
        return;
    };
    let unsynced = partial.unsynced();
    let mut synced = lock(&blob.synced);
    if unsynced == 0 {
        *synced = Instant::now();
        return;
    }
    if unsynced < many && synced.elapsed() < SYNC_AFTER {
        return;
    }
    if let Err(error) = partial.sync() {
        let digest = blob.identity.digest();
        log::error!("blob {digest}: {}; fetching it again", reason(&error));
    }
    *synced = Instant::now();
}

/// Verifies a blob of which all units are present.
fn publish(shared: &Shared, blob: &Arc<Blob>) {
    let Some(partial) = blob.partial() else {
        return;
    };
    if partial.map().state() != Some(State::Partial) || !partial.is_full() {
        return;
    }
    let digest = blob.identity.digest();
    let _publishing = lock(&blob.publishing);
    match partial.publish() {
        Ok(Publication::Published) => {
            shared.counters.add_published();
            log::debug!("blob {digest} is complete");
        }
        Ok(Publication::Mismatch { found }) => {
            shared.counters.add_mismatch();
            shared.retire(blob);
            log::error!("blob {digest} was fetched completely but has digest {found}; removed it");
        }
        Ok(Publication::Incomplete | Publication::Busy) => {}
        Err(error) => log::error!("blob {digest}: {}", reason(&error)),
    }
}

/// Has damaged units of complete blobs fetched again.
fn check_suspects(shared: &Shared) {
    let suspects = std::mem::take(&mut *lock(&shared.suspects));
    for Suspect {
        blob,
        units,
        waiter,
    } in suspects
    {
        let is_done = match blob.is_final() {
            true => blob.check_damage(&shared.cache, units),
            // Another reader found damage before.
            false => Ok(()),
        };
        match (is_done, waiter) {
            (Ok(()), waiter) if !blob.is_final() => {
                let bytes = blob.identity.bytes_of(units);
                shared.want(&blob, bytes, Cause::Repair, waiter);
            }
            // An intact blob: the reader reads it again, and fails if that gives the same.
            (result, Some(waiter)) => waiter.answer(result.as_ref().copied()),
            (_, None) => {}
        }
    }
}

fn evict(shared: &Shared) {
    for blob in shared.blobs() {
        if let Some(partial) = blob.partial() {
            partial.touch();
        }
    }
    match shared.cache.evict(shared.options.limits) {
        Ok(evicted) if evicted.files > 0 => {
            log::info!("evicted {} files, {} bytes", evicted.files, evicted.bytes);
        }
        Ok(_) => {}
        Err(error) => log::warn!("cannot evict blobs from the cache: {}", reason(&error)),
    }
    let is_over = shared.cache.is_over(shared.options.limits);
    let is_over = is_over.is_ok_and(|is_over| is_over);
    shared.is_over.store(is_over, Ordering::Relaxed);
}
