//! Opening and evicting blobs at the same time.

use std::fs;
use std::os::unix::fs::{FileExt, MetadataExt};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use common::content::{Random, tagged};
use common::remote::{Layers, Place};
use ovbd_vhost::cache::{Cache, Entry};
use ovbd_vhost::format::digest::Digest;
use ovbd_vhost::format::presence::{Identity, UnitRange};
use ovbd_vhost::source::presence::Bitmap;
use serde_json::json;

use super::{Reader, UNIT};

/// Two evictors and several disks that come and go: what is open is never taken away, and what is
/// opened is either there or empty.
#[test]
fn openers_and_evictors_do_not_meet() {
    let dir = tempfile::tempdir().expect("a folder");
    let blobs: Vec<_> = (0..4).map(|seed| tagged(3 * UNIT, 20 + seed)).collect();
    let done = Arc::new(AtomicBool::new(false));
    let stopped = || done.load(Ordering::Relaxed);
    let dir = &dir;
    std::thread::scope(|scope| {
        let evictors: Vec<_> = (0..2)
            .map(|_| {
                scope.spawn(|| {
                    let cache = Cache::open(dir.path()).expect("a cache");
                    let mut files = 0;
                    while !stopped() {
                        files += cache.free(1 << 20).expect("an eviction").files;
                        std::thread::sleep(Duration::from_millis(3));
                    }
                    files
                })
            })
            .collect();
        let openers: Vec<_> = (0..3)
            .map(|seed| {
                let blobs = &blobs;
                scope.spawn(move || {
                    let mut random = Random::new(seed);
                    let cache = Cache::open(dir.path()).expect("a cache");
                    for _ in 0..60 {
                        open_and_fill(&cache, &blobs[random.below(4) as usize], &mut random);
                    }
                })
            })
            .collect();
        let opened: Vec<_> = openers.into_iter().map(|opener| opener.join()).collect();
        done.store(true, Ordering::Relaxed);
        assert!(opened.iter().all(Result::is_ok), "what is open stays");
        let files: u64 = evictors
            .into_iter()
            .map(|evictor| evictor.join().expect("evictor"))
            .sum();
        assert!(files > 20, "{files} files were evicted");
    });
}

/// Disks that start, read everything and end, while all that can be evicted is.
#[test]
fn disks_start_and_read_while_the_cache_is_emptied() {
    let (layers, place) = (Layers::new(2), Place::default());
    let server = layers.registry();
    place.config("http", &server.host(), &layers.lowers(), json!({}));
    let done = AtomicBool::new(false);
    let files = std::thread::scope(|scope| {
        let evictor = scope.spawn(|| {
            let cache = Cache::open(&place.path("cache")).expect("a cache");
            let mut files = 0;
            while !done.load(Ordering::Relaxed) {
                files += cache.free(1 << 30).expect("an eviction").files;
                std::thread::sleep(Duration::from_millis(3));
            }
            files
        });
        for _ in 0..6 {
            let daemon = place.serve(&[]);
            Reader::connect(&daemon).check_all(&layers.content);
        }
        done.store(true, Ordering::Relaxed);
        evictor.join().expect("evictor")
    });
    assert!(files >= 5, "{files} files were evicted");
}

/// Opens a blob, checks what is there, adds a unit, and checks that it was not taken away meanwhile.
fn open_and_fill(cache: &Cache, blob: &[u8], random: &mut Random) {
    let identity = Identity::new(Digest::of(blob), blob.len() as u64).expect("an identity");
    let partial = match cache.entry(identity).expect("an entry") {
        Entry::Complete(file) => {
            let mut found = vec![0; blob.len()];
            file.read_exact_at(&mut found, 0).expect("a blob");
            assert!(found == blob);
            return assert_named(cache, &file, &identity);
        }
        Entry::Partial(partial) => partial,
    };
    let file = &partial.files().data;
    for unit in 0..identity.units() {
        if partial.map().holds(Bitmap::Live, UnitRange::one(unit)) {
            let mut found = vec![0; UNIT];
            let start = unit as usize * UNIT;
            file.read_exact_at(&mut found, start as u64)
                .expect("a unit");
            assert!(found == blob[start..start + UNIT], "unit {unit}");
        }
    }
    let unit = random.below(identity.units());
    if let Some(claim) = partial.claim(UnitRange::one(unit)).expect("a claim") {
        let start = unit as usize * UNIT;
        // Another process may have completed the blob.
        let _ = claim.store(unit, &blob[start..start + UNIT]);
    }
    if partial.is_full() {
        partial.publish().expect("an outcome");
    }
    assert_named(cache, file, &identity);
}

/// Asserts that a blob's file is the one in the cache.
fn assert_named(cache: &Cache, file: &fs::File, identity: &Identity) {
    let hex = identity.digest().hex();
    let names = [
        format!("partial/sha256/{hex}-{}.data", identity.len()),
        format!("blobs/sha256/{hex}"),
    ];
    let own = file.metadata().expect("a file").ino();
    let named = names.iter().any(|name| {
        let found = fs::metadata(cache.root().join(name));
        found.is_ok_and(|found| found.ino() == own)
    });
    assert!(named, "an open blob was evicted");
}
