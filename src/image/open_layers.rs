//! The layers that this process has open, by the identity of their bytes.
//!
//! A layer that is in several stacks is opened once: the stacks share its block table, its mapping and
//! its descriptor. The table holds no layer open.
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

/// Returns the open layer whose bytes have this identity.
pub(super) fn find(identity: &BlobIdentity) -> Option<Arc<SharedLayer>> {
    lock().get(identity)?.upgrade()
}

/// Enters a layer under the identity of its bytes. If another thread has entered one meanwhile, returns
/// that one.
pub(super) fn enter(layer: SharedLayer, identity: &BlobIdentity) -> Arc<SharedLayer> {
    let layer = Arc::new(layer);
    let mut table = lock();
    if let Some(other) = table.get(identity).and_then(Weak::upgrade) {
        // Dropping `layer` locks the table.
        drop(table);
        return other;
    }
    table.insert(identity.clone(), Arc::downgrade(&layer));
    layer
}

/// Removes a layer that is dropped.
pub(super) fn remove(identity: &BlobIdentity) {
    let mut table = lock();
    // Another layer may have been entered under the identity since the last user of this one left.
    if table
        .get(identity)
        .is_some_and(|layer| layer.strong_count() == 0)
    {
        table.remove(identity);
    }
}
