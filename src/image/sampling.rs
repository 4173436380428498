//! The identity of an open layer: its uuid, or a hash of its structures and of samples of its data.

use super::error::Error;
use super::identity::{Hash, LayerId};
use super::layer::Layer;
use crate::format::lsmt::HEADER_LEN;

/// Number of samples of a layer's data.
const SAMPLES: u64 = 8;

/// Bytes of a sample.
const SAMPLE_LEN: u64 = 4096;

/// Returns the identity of a layer. Reads samples of the data if the layer has no uuid.
///
/// # Errors
/// [`Error::Source`] if the samples cannot be read.
pub(super) fn identity_of(layer: &Layer) -> Result<LayerId, Error> {
    match LayerId::named(layer.uuid()) {
        Some(id) => Ok(id),
        None => Ok(LayerId::Sampled(sampled(layer)?)),
    }
}

/// Appends uuids, size, and checksums of index and block table of a layer.
pub(super) fn add_structures(hash: &mut Hash, layer: &Layer) {
    hash.add(layer.uuid().as_bytes());
    hash.add(layer.parent_uuid().as_bytes());
    hash.add(&layer.trailer().virtual_size.to_le_bytes());
    hash.add(&layer.index_crc().to_le_bytes());
    let zfile_map = layer.container().zfile_map();
    let table_crc = zfile_map.map_or(0, |zfile_map| zfile_map.header().totals.table_crc);
    hash.add(&table_crc.to_le_bytes());
}

/// Hashes the structures of a layer and samples of its stored data. Excludes the tar wrapper and what
/// follows the layer, so that copies of a layer have the same identity.
fn sampled(layer: &Layer) -> Result<u64, Error> {
    let mut hash = Hash::EMPTY;
    add_structures(&mut hash, layer);
    let container = layer.container();
    let (start, end) = match container.zfile_map() {
        None => (HEADER_LEN as u64, layer.trailer().index_offset),
        Some(zfile_map) => {
            let table = zfile_map.table();
            (table.offset(0), table.offset(table.blocks()))
        }
    };
    let len = end.saturating_sub(start);
    let sample_len = SAMPLE_LEN.min(len);
    let mut sample = vec![0; sample_len as usize];
    for number in 0..SAMPLES {
        // Fits: offsets in a file are below 2^63.
        let at = u128::from(len - sample_len) * u128::from(number) / u128::from(SAMPLES - 1);
        let offset = container.payload().offset + start + at as u64;
        container.blob().read_exact_at(&mut sample, offset)?;
        hash.add(&sample);
    }
    Ok(hash.value())
}
