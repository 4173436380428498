//! A small stack whose image tables are fuzzed, the same in each run.

use std::fs::File;
use std::io::Write;
use std::sync::Arc;

use common::layers::{LayerBuilder, Pack, noise, wrap_tar, zfile};
use ovbd_vhost::format::digest::Digest;
use ovbd_vhost::format::zfile::Algorithm;
use ovbd_vhost::image::OpenStack;
use ovbd_vhost::source::{Blob, LayerRef, RemoteBlob};

/// Three layers, as blobs of a registry: their identities do not depend on the machine.
pub fn open() -> OpenStack {
    let layer = |seed: u64| {
        let layer = LayerBuilder::new(1 << 20).zeroed(0, seed);
        let layer = layer.data(16 * seed, &noise(seed, 20 * 512));
        layer
            .data(40 * seed + 100, &noise(seed + 9, 9 * 512))
            .lsmt()
    };
    let zstd = Pack {
        algorithm: Algorithm::Zstd,
        checksum: false,
        ..Pack::default()
    };
    let blobs = [
        zfile(&layer(1), Pack::default()),
        layer(2),
        wrap_tar(&zfile(&layer(3), zstd)),
    ];
    OpenStack::of(blobs.iter().map(|bytes| blob(bytes)).collect()).expect("three layers")
}

fn blob(bytes: &[u8]) -> Blob {
    let flags = rustix::fs::MemfdFlags::CLOEXEC;
    let mut file = File::from(rustix::fs::memfd_create("layer", flags).expect("memfd"));
    file.write_all(bytes).expect("memory");
    let remote = RemoteBlob {
        digest: Digest::of(bytes),
        size: None,
        blobs_url: "https://r.example/v2/a/blobs".to_owned(),
    };
    Blob::complete(LayerRef::Remote(Arc::new(remote)), file, bytes.len() as u64)
}
