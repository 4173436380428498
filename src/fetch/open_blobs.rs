//! The blobs that a connection has open.

use std::collections::HashMap;
use std::sync::{Arc, Weak};

use super::blob::{Blob, BlobId, Offer};
use super::pace::Pace;
use crate::cache::Entry;
use crate::format::presence::Identity;

/// Open blobs by number and by identity.
#[derive(Debug, Default)]
pub(super) struct OpenBlobs {
    by_id: HashMap<BlobId, Weak<Blob>>,
    by_identity: HashMap<Identity, BlobId>,
    next_id: u64,
}

impl OpenBlobs {
    pub(super) fn get(&self, id: BlobId) -> Option<Arc<Blob>> {
        self.by_id.get(&id)?.upgrade()
    }

    pub(super) fn find(&self, identity: &Identity) -> Option<Arc<Blob>> {
        self.get(*self.by_identity.get(identity)?)
    }

    pub(super) fn all(&self) -> Vec<Arc<Blob>> {
        self.by_id.values().filter_map(Weak::upgrade).collect()
    }

    pub(super) fn add(
        &mut self,
        identity: Identity,
        entry: Entry,
        offer: &Offer,
        pace: Pace,
    ) -> Arc<Blob> {
        let id = BlobId(self.next_id);
        self.next_id += 1;
        let origin = Arc::clone(&offer.origin);
        let blob = Arc::new(Blob::new(id, identity, entry, origin, pace));
        self.by_id.retain(|_, blob| blob.strong_count() > 0);
        self.by_id.insert(id, Arc::downgrade(&blob));
        let by_id = &self.by_id;
        self.by_identity.retain(|_, id| by_id.contains_key(id));
        self.by_identity.insert(identity, id);
        blob
    }
}
