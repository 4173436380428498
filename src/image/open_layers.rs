//! Table of the layers that this process has open, by the identity of their bytes.
//!
//! Stacks with the same layer share its block table, mapped file and descriptor. The table itself does not
//! keep a layer open.
#![cfg_attr(
    not(test),
    warn(clippy::indexing_slicing, clippy::arithmetic_side_effects)
)]

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, Weak};

use super::layer::SharedLayer;
use crate::source::BlobIdentity;

type Table = BTreeMap<BlobIdentity, Weak<SharedLayer>>;

static TABLE: Mutex<Table> = Mutex::new(Table::new());

fn lock() -> MutexGuard<'static, Table> {
    TABLE.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Returns the open layer with this identity.
pub(super) fn find(identity: &BlobIdentity) -> Option<Arc<SharedLayer>> {
    lock().get(identity)?.upgrade()
}

/// Inserts a layer. If another thread has inserted a layer with the same identity, returns that one.
pub(super) fn enter(layer: SharedLayer, identity: &BlobIdentity) -> Arc<SharedLayer> {
    let layer = Arc::new(layer);
    let mut table = lock();
    if let Some(other) = table.get(identity).and_then(Weak::upgrade) {
        // Dropping `layer` locks the table, too.
        drop(table);
        return other;
    }
    table.insert(identity.clone(), Arc::downgrade(&layer));
    layer
}

/// Removes a layer that is being dropped.
pub(super) fn remove(identity: &BlobIdentity) {
    let mut table = lock();
    // Another layer with the same identity may have been inserted since the last use of this one.
    if table
        .get(identity)
        .is_some_and(|layer| layer.strong_count() == 0)
    {
        table.remove(identity);
    }
}
