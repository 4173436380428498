//! A table of the layers that this process has open, by the identity of their bytes.
//!
//! Stacks with the same layer share its block table, mapped file and descriptor. The table itself does not
//! keep a layer open.
#![cfg_attr(
    not(test),
    warn(clippy::indexing_slicing, clippy::arithmetic_side_effects)
)]

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, Weak};

use crate::source::BlobIdentity;

/// The open layers, of which the table holds weak references.
#[derive(Debug)]
pub(super) struct OpenLayers<L>(Mutex<BTreeMap<BlobIdentity, Weak<L>>>);

impl<L> OpenLayers<L> {
    /// A table without layers.
    pub(super) const fn new() -> Self {
        Self(Mutex::new(BTreeMap::new()))
    }

    fn lock(&self) -> MutexGuard<'_, BTreeMap<BlobIdentity, Weak<L>>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Returns the open layer with this identity.
    pub(super) fn find(&self, identity: &BlobIdentity) -> Option<Arc<L>> {
        self.lock().get(identity)?.upgrade()
    }

    /// Inserts a layer. If another thread has inserted a layer with the same identity, returns that one.
    pub(super) fn enter(&self, layer: L, identity: &BlobIdentity) -> Arc<L> {
        let layer = Arc::new(layer);
        let mut table = self.lock();
        if let Some(other) = table.get(identity).and_then(Weak::upgrade) {
            // Dropping `layer` locks the table, too.
            drop(table);
            return other;
        }
        table.insert(identity.clone(), Arc::downgrade(&layer));
        layer
    }

    /// Removes a layer that is being dropped.
    pub(super) fn remove(&self, identity: &BlobIdentity) {
        let mut table = self.lock();
        // Another layer with the same identity may have been inserted since the last use of this one.
        if table
            .get(identity)
            .is_some_and(|layer| layer.strong_count() == 0)
        {
            table.remove(identity);
        }
    }
}
