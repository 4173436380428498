//! A blob in the cache, read by a process that cannot write to the cache.
//!
//! The fetcher opens data file and presence map and sends their descriptors. A unit that the map does not
//! have is absent: the sparse data file would read as zeros there. A complete blob has no map, and is read
//! like a local file, until some of its bytes turn out damaged: those are absent until they are fetched again.
//!
//! The files of the cache may be removed while a disk is served. The bytes in them can still be read, but a
//! fetcher that is started later fills other files, and sends their descriptors. Bytes that the older file
//! lacks are then located in the newer one (`Successor`).

use std::fs::File;
use std::os::unix::fs::MetadataExt;
use std::sync::{Arc, OnceLock};
use std::time::Duration;

use super::blob::Blob;
use super::client::Client;
use super::layer_ref::{LayerRef, RemoteBlob};
use super::opened::Opened;
use super::openings::Reopen;
use super::presence::{Bitmap, PresenceMap};
use super::protocol::Cause;
use super::refetch::RejectedUnits;
use super::waker::{FetchError, FetchErrorKind, Presence, Ticket, Waker};
use crate::format::presence::{Identity, State, UNIT, UnitRange};
use crate::io::mapped_file::Access;
use crate::ratelimited_log;

/// Most files that a blob is opened in, one after the other.
const MAX_FILES: usize = 64;

/// A file of a blob, and which of its bytes are present.
#[derive(Debug)]
struct CachedPresence {
    identity: Identity,
    layer: Arc<RemoteBlob>,
    /// Device and inode of the data file.
    file: (u64, u64),
    /// `None`: the blob was complete when it was opened.
    map: Option<PresenceMap>,
    rejected: Arc<RejectedUnits>,
    client: Arc<Client>,
    blob: u32,
    successor: OnceLock<Box<Successor>>,
}

/// The file that bytes arrive in since the cache lost the one before.
#[derive(Debug)]
struct Successor {
    blob: Blob,
    presence: Arc<CachedPresence>,
}

impl CachedPresence {
    fn units(&self, offset: u64, len: u64) -> UnitRange {
        let units = self.identity.units_of(offset, len);
        units.unwrap_or_default()
    }

    /// The presence in the file that bytes arrive in, and the number of files before that.
    fn newest(&self) -> (&Self, usize) {
        let (mut newest, mut before) = (self, 0);
        while let Some(successor) = newest.successor.get() {
            (newest, before) = (&successor.presence, before + 1);
        }
        (newest, before)
    }

    fn ask(&self, offset: u64, len: u64, waker: &Arc<Waker>, ticket: Ticket) {
        let units = self.units(offset, len);
        let damaged = self.rejected.holds_any(units);
        let repair = damaged.then(|| (Arc::clone(&self.rejected), units));
        let bytes = offset..offset.saturating_add(len);
        self.client.request(self.blob, bytes, waker, ticket, repair);
    }
}

impl Reopen for CachedPresence {
    fn reopen(&self, opened: Opened) {
        let (newest, before) = self.newest();
        let digest = self.identity.digest();
        let verified = match Verified::new(&self.layer, opened) {
            Ok(verified) if verified.file == newest.file => return,
            Ok(verified) if verified.data_len == self.identity.len() && before + 1 < MAX_FILES => {
                verified
            }
            Ok(_) => {
                return ratelimited_log::error(format_args!(
                    "blob {digest}: the fetcher opened it with another length, or in more than \
                     {MAX_FILES} files; restart the disk"
                ));
            }
            Err(error) => {
                return ratelimited_log::error(format_args!(
                    "cannot use the new file of blob {digest}: {error}"
                ));
            }
        };
        ratelimited_log::warn(format_args!(
            "the cache lost the file of blob {digest}; reading on from a new one"
        ));
        let (blob, presence) = verified.into_blob(&self.client, self.blob, &self.layer);
        // Only the client's thread, which takes descriptors, sets it.
        if let Some(presence) = presence {
            newest.rejected.supersede();
            let _ = newest.successor.set(Box::new(Successor { blob, presence }));
        }
    }
}

impl Presence for CachedPresence {
    fn is_present(&self, offset: u64, len: u64) -> bool {
        let is_stored = |map: &PresenceMap| map.is_present(offset, len);
        self.map.as_ref().is_none_or(is_stored) && !self.rejected.holds_any(self.units(offset, len))
    }

    fn is_complete(&self) -> bool {
        let is_complete = |map: &PresenceMap| map.state() == Some(State::Complete);
        self.successor.get().is_none() && self.map.as_ref().is_none_or(is_complete)
    }

    fn successor(&self) -> Option<&Blob> {
        self.successor.get().map(|successor| &successor.blob)
    }

    fn request(&self, offset: u64, len: u64, waker: &Arc<Waker>, ticket: Ticket) {
        self.newest().0.ask(offset, len, waker, ticket);
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
        if let Some(later) = self.successor() {
            self.rejected.exclude(self.units(offset, len), all);
            return later.mark_absent(offset, len);
        }
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
        if let Some(later) = self.successor() {
            let all = self.identity.all_units();
            self.rejected.exclude(all, self.identity.units());
            return later.distrust();
        }
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
        if let Some(later) = self.successor() {
            later.trust();
        }
    }

    fn local_bytes(&self) -> u64 {
        let stored = |map: &PresenceMap| map.count(Bitmap::Live).saturating_mul(UNIT);
        let len = self.identity.len();
        let own = self.map.as_ref().map_or(len, stored).min(len);
        own.max(self.successor().map_or(0, Blob::local_bytes))
    }

    fn patience(&self) -> Duration {
        self.client.patience()
    }
}

/// Files of a blob that the fetcher sent, verified to be what they must be.
struct Verified {
    data: File,
    data_len: u64,
    file: (u64, u64),
    /// `None`: the blob is empty, and nothing of it is ever fetched.
    identity: Option<Identity>,
    map: Option<PresenceMap>,
}

impl Verified {
    fn new(layer: &RemoteBlob, opened: Opened) -> Result<Self, FetchError> {
        let digest = layer.digest;
        let system = |reason: String| FetchError::new(FetchErrorKind::System, reason);
        let found = opened.len;
        if let Some(expected) = layer.size.filter(|expected| *expected != found) {
            let reason =
                format!("blob {digest} has {found} bytes; the image config says {expected}");
            return Err(FetchError::new(FetchErrorKind::Damaged, reason));
        }
        let data = File::from(opened.data);
        let metadata = data.metadata().map_err(|error| system(error.to_string()))?;
        if !metadata.is_file() || metadata.len() != found {
            let reason = format!("blob {digest}: the fetcher sent a file of another length");
            return Err(system(reason));
        }
        let identity = Identity::new(digest, found).ok();
        let map = match (opened.map, identity) {
            (None, _) => None,
            (Some(_), None) => {
                return Err(system(format!("blob {digest} of {found} bytes has a map")));
            }
            (Some(map), Some(identity)) => {
                let map = PresenceMap::open(&File::from(map), identity, Access::Read);
                Some(map.map_err(|error| system(format!("blob {digest}: {error}")))?)
            }
        };
        Ok(Self {
            data,
            data_len: found,
            file: (metadata.dev(), metadata.ino()),
            identity,
            map,
        })
    }

    /// The blob, and its presence unless it is empty.
    fn into_blob(
        self,
        client: &Arc<Client>,
        number: u32,
        layer: &Arc<RemoteBlob>,
    ) -> (Blob, Option<Arc<CachedPresence>>) {
        let name = LayerRef::Remote(Arc::clone(layer));
        let (data, len) = (self.data, self.data_len);
        let Some(identity) = self.identity else {
            return (Blob::complete(name, data, len), None);
        };
        let is_complete = self.map.is_none();
        let presence = Arc::new(CachedPresence {
            identity,
            layer: Arc::clone(layer),
            file: self.file,
            map: self.map,
            rejected: Arc::default(),
            client: Arc::clone(client),
            blob: number,
            successor: OnceLock::new(),
        });
        let asked = Arc::clone(&presence);
        let blob = match is_complete {
            true => Blob::repairable(name, data, len, asked),
            false => Blob::partial(name, data, len, asked),
        };
        (blob, Some(presence))
    }
}

/// Opens `layer`, which has number `blob` in the fetcher's list. Waits for the fetcher up to the patience of
/// the client.
///
/// # Errors
/// A [`FetchError`] with the fetcher's reason; [`FetchErrorKind::Damaged`] if the blob has another
/// length; [`FetchErrorKind::System`] if its files cannot be used.
pub fn open(client: &Arc<Client>, blob: u32, layer: &Arc<RemoteBlob>) -> Result<Blob, FetchError> {
    let verified = Verified::new(layer, client.open(blob)?)?;
    let (opened, presence) = verified.into_blob(client, blob, layer);
    if let Some(presence) = presence {
        client.register(blob, &presence);
    }
    Ok(opened)
}
