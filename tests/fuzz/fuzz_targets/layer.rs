//! Any bytes as a layer's file: opening and reading all of it gives bytes or errors.
#![no_main]

use libfuzzer_sys::{fuzz_mutator, fuzz_target};
use ovbd_vhost::image::Error;
use ovbd_vhost::image::layer::Layer;
use ovbd_vhost::image::reader::Reader;
use ovbd_vhost::source::Blob;

#[path = "../file.rs"]
mod file;
#[path = "../mend.rs"]
mod mend;

/// Mutated files may promise any size: this much of it is read.
const MOST: u64 = 1 << 20;

fuzz_mutator!(|data: &mut [u8], size: usize, max_size: usize, seed: u32| {
    mend::mutate(data, size, max_size, seed)
});

fuzz_target!(|bytes: &[u8]| {
    let held = file::Held::new(bytes);
    let blob = Blob::open(held.path()).map_err(Error::from);
    let Ok((layer, mappings)) = blob.and_then(|blob| Layer::load(blob.into())) else {
        return;
    };
    // What an index may hold after it was read is what the merge relies on.
    for pair in mappings.windows(2) {
        assert!(pair[0].end() <= pair[1].offset(), "overlap or disorder");
    }
    let mut reader = Reader::new();
    let mut block = [0; 4096 + 512];
    let mut at = 0;
    while at < layer.container().len().min(MOST) {
        let len = (layer.container().len() - at).min(block.len() as u64);
        let _ = reader.read_layer(layer.container(), at, &mut block[..len as usize]);
        at += len;
    }
});
