//! Any bytes as a layer's file: opening and reading all of it gives bytes or errors.
#![no_main]

use libfuzzer_sys::fuzz_target;
use ovbd_vhost::image::layer::Layer;
use ovbd_vhost::image::reader::Reader;

#[path = "../file.rs"]
mod file;

/// Mutated files may promise any size: this much of it is read.
const MOST: u64 = 1 << 20;

fuzz_target!(|bytes: &[u8]| {
    let held = file::Held::new(bytes);
    let Ok((layer, _mappings)) = Layer::open(held.path()) else {
        return;
    };
    let mut reader = Reader::new();
    let mut block = [0; 4096 + 512];
    let mut at = 0;
    while at < layer.container().len().min(MOST) {
        let len = (layer.container().len() - at).min(block.len() as u64);
        let _ = reader.read_layer(layer.container(), at, &mut block[..len as usize]);
        at += len;
    }
});
