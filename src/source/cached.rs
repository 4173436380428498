//! A blob in the cache, read by a process that cannot write to the cache.
//!
//! The fetcher opens data file and presence map and sends their descriptors. A unit that the map does not
//! have is absent: the sparse data file would read as zeros there. A complete blob has no map, and is read
//! like a local file, until some of its bytes turn out damaged: those are absent until they are fetched again.

use std::fs::File;
use std::sync::Arc;
use std::time::Duration;

use super::blob::Blob;
use super::client::Client;
use super::layer_ref::{LayerRef, RemoteBlob};
use super::opened::Opened;
use super::presence::{Bitmap, PresenceMap};
use super::protocol::Cause;
use super::refetch::RejectedUnits;
use super::waker::{FetchError, FetchErrorKind, Presence, Ticket, Waker};
use crate::format::presence::{Identity, State, UNIT, UnitRange};
use crate::io::mapped_file::Access;
use crate::ratelimited_log;

/// Presence of a blob, and the client that fetches what is absent or damaged.
#[derive(Debug)]
struct CachedPresence {
    identity: Identity,
    /// `None`: the blob was complete when it was opened.
    map: Option<PresenceMap>,
    rejected: Arc<RejectedUnits>,
    client: Arc<Client>,
    blob: u32,
}

impl CachedPresence {
    fn units(&self, offset: u64, len: u64) -> UnitRange {
        let units = self.identity.units_of(offset, len);
        units.unwrap_or_default()
    }
}

impl Presence for CachedPresence {
    fn is_present(&self, offset: u64, len: u64) -> bool {
        let is_stored = |map: &PresenceMap| map.is_present(offset, len);
        self.map.as_ref().is_none_or(is_stored) && !self.rejected.holds_any(self.units(offset, len))
    }

    fn is_complete(&self) -> bool {
        let is_complete = |map: &PresenceMap| map.state() == Some(State::Complete);
        self.map.as_ref().is_none_or(is_complete)
    }

    fn request(&self, offset: u64, len: u64, waker: &Arc<Waker>, ticket: Ticket) {
        let units = self.units(offset, len);
        let damaged = self.rejected.holds_any(units);
        let repair = damaged.then(|| (Arc::clone(&self.rejected), units));
        let bytes = offset..offset.saturating_add(len);
        self.client.request(self.blob, bytes, waker, ticket, repair);
    }

    fn fetch_ahead(&self, offset: u64, len: u64) {
        let bytes = offset..offset.saturating_add(len);
        self.client.suggest(self.blob, bytes, Cause::ReadAhead);
    }

    fn replay(&self, offset: u64, len: u64) {
        let bytes = offset..offset.saturating_add(len);
        self.client.suggest(self.blob, bytes, Cause::Replay);
    }

    fn reject(&self, offset: u64, len: u64) -> bool {
        let all = self.identity.units();
        let rejected = self.rejected.add(self.units(offset, len), all);
        let digest = self.identity.digest();
        match rejected {
            true => ratelimited_log::warn(format_args!(
                "blob {digest} is damaged at byte {offset}; fetching it again"
            )),
            false => ratelimited_log::error(format_args!(
                "blob {digest} is still damaged at byte {offset}"
            )),
        }
        rejected
    }

    fn distrust(&self) -> bool {
        let rejected = self.rejected.add_all(self.identity.units());
        let digest = self.identity.digest();
        match rejected {
            true => ratelimited_log::warn(format_args!(
                "blob {digest} is damaged; fetching again what opening it reads"
            )),
            false => ratelimited_log::error(format_args!("blob {digest} is still damaged")),
        }
        rejected
    }

    fn trust(&self) {
        self.rejected.replaced(self.identity.all_units());
    }

    fn local_bytes(&self) -> u64 {
        let stored = |map: &PresenceMap| map.count(Bitmap::Live).saturating_mul(UNIT);
        let len = self.identity.len();
        self.map.as_ref().map_or(len, stored).min(len)
    }

    fn patience(&self) -> Duration {
        self.client.patience()
    }
}

/// Opens `layer`, which has number `blob` in the fetcher's list. Waits for the fetcher up to the patience of
/// the client.
///
/// # Errors
/// A [`FetchError`] with the fetcher's reason; [`FetchErrorKind::Damaged`] if the blob has another
/// length; [`FetchErrorKind::System`] if its files cannot be used.
pub fn open(client: &Arc<Client>, blob: u32, layer: &Arc<RemoteBlob>) -> Result<Blob, FetchError> {
    let digest = layer.digest;
    let opened = client.open(blob)?;
    let system = |reason: String| FetchError::new(FetchErrorKind::System, reason);
    let Opened {
        len: found,
        data,
        map,
    } = opened;
    if let Some(expected) = layer.size.filter(|expected| *expected != found) {
        let reason = format!("blob {digest} has {found} bytes; the image config says {expected}");
        return Err(FetchError::new(FetchErrorKind::Damaged, reason));
    }
    let data = File::from(data);
    let metadata = data.metadata().map_err(|error| system(error.to_string()))?;
    if !metadata.is_file() || metadata.len() != found {
        let reason = format!("blob {digest}: the fetcher sent a file of another length");
        return Err(system(reason));
    }
    let name = LayerRef::Remote(Arc::clone(layer));
    let Ok(identity) = Identity::new(digest, found) else {
        return match map {
            None => Ok(Blob::complete(name, data, found)),
            Some(_) => Err(system(format!("blob {digest} of {found} bytes has a map"))),
        };
    };
    let opened = |map| PresenceMap::open(&File::from(map), identity, Access::Read);
    let map = map.map(opened).transpose();
    let map = map.map_err(|error| system(format!("blob {digest}: {error}")))?;
    let is_complete = map.is_none();
    let presence = Arc::new(CachedPresence {
        identity,
        map,
        rejected: Arc::default(),
        client: Arc::clone(client),
        blob,
    });
    Ok(match is_complete {
        true => Blob::repairable(name, data, found, presence),
        false => Blob::partial(name, data, found, presence),
    })
}
