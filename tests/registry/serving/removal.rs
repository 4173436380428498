//! Files of the cache that are removed under a disk, combined with kills of its fetcher: the guest reads the
//! right bytes, and waits for none for ever.

use std::fs::{self, File, Permissions};
use std::os::unix::fs::{FileExt, PermissionsExt};
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use common::daemon::Daemon;
use common::registry_server::{Reply, serve, until};
use common::remote::{Layers, Place};
use ovbd_vhost::cache::{Cache, Removal};
use ovbd_vhost::format::digest::Digest;
use rustix::process::{Pid, Signal, kill_process};
use serde_json::json;

use super::{Reader, UNIT, asked_units, partial};

/// Path of a complete blob.
fn complete(place: &Place, blob: &[u8]) -> PathBuf {
    let blobs = place.path("cache/blobs/sha256");
    blobs.join(Digest::of(blob).hex())
}

/// Removes what the cache has of the blobs, as `rm` does.
fn remove_files(place: &Place, layers: &Layers) {
    let mut removed = 0;
    for blob in &layers.blobs {
        let [data, map] = ["data", "map"].map(|extension| partial(place, blob, extension));
        for path in [data, map, complete(place, blob)] {
            removed += usize::from(fs::remove_file(path).is_ok());
        }
    }
    assert!(removed > 0, "the cache has no file of the blobs");
}

/// Kills the fetcher, and returns it.
fn kill_fetcher(daemon: &Daemon) -> Pid {
    let mut fetcher = None;
    until("a fetcher runs", || {
        fetcher = daemon.fetcher().1;
        fetcher.is_some()
    });
    let fetcher = fetcher.expect("a fetcher");
    kill_process(fetcher, Signal::KILL).expect("a kill");
    fetcher
}

fn wait_for_another(daemon: &Daemon, killed: Pid) {
    until("another fetcher runs", || {
        daemon.fetcher().1.is_some_and(|found| found != killed)
    });
}

#[derive(Clone, Copy, Debug)]
enum Order {
    RemovedThenKilled,
    KilledThenRemoved,
    /// Removed, and then killed, while reads wait for the registry.
    WhileFetching,
}

/// Each round removes the files once more: the disk then reads from one more file of each blob.
#[test]
fn a_fetcher_that_is_replaced_after_a_removal_serves_the_disk() {
    for order in [
        Order::RemovedThenKilled,
        Order::KilledThenRemoved,
        Order::WhileFetching,
    ] {
        let layers = Layers::new(16);
        let place = Place::default();
        let holds = Arc::new(AtomicBool::new(false));
        let held = Arc::clone(&holds);
        let server = layers.registry_that(move |request, blob| match held.load(Ordering::SeqCst) {
            true => Reply::Stall(Vec::new()),
            false => serve(request, blob),
        });
        place.config("http", &server.host(), &layers.lowers(), json!({}));
        let daemon = place.serve(&[]);
        let mut reader = Reader::connect(&daemon);
        for round in 0..3 {
            let reads = (0..8).map(|read| (round * 8 + read) * 37 % 256 * UNIT);
            match order {
                Order::RemovedThenKilled => {
                    reader.ask(reads);
                    reader.check(&layers.content);
                    remove_files(&place, &layers);
                    wait_for_another(&daemon, kill_fetcher(&daemon));
                }
                Order::KilledThenRemoved => {
                    reader.ask(reads);
                    reader.check(&layers.content);
                    let killed = kill_fetcher(&daemon);
                    remove_files(&place, &layers);
                    wait_for_another(&daemon, killed);
                }
                Order::WhileFetching => {
                    holds.store(true, Ordering::SeqCst);
                    let before = server.count();
                    reader.ask(reads);
                    until("reads wait", || server.count() > before);
                    remove_files(&place, &layers);
                    kill_fetcher(&daemon);
                    holds.store(false, Ordering::SeqCst);
                    reader.check(&layers.content);
                }
            }
        }
        reader.check_all(&layers.content);
        drop((reader, daemon));
        let daemon = place.serve(&[]);
        Reader::connect(&daemon).check_all(&layers.content);
    }
}

/// Damage in a complete blob that has no name any more: the bytes come again, into another file.
#[test]
fn damage_in_a_removed_file_is_fetched_again() {
    for kills in [false, true] {
        let layers = Layers::new(2);
        let place = Place::default();
        let server = layers.registry();
        place.config("http", &server.host(), &layers.lowers(), json!({}));
        let daemon = place.serve(&[]);
        let mut reader = Reader::connect(&daemon);
        reader.check_all(&layers.content);
        until("the blobs are complete", || place.is_complete(&layers));
        let blob = &layers.blobs[1];
        let path = complete(&place, blob);
        fs::set_permissions(&path, Permissions::from_mode(0o600)).expect("permissions");
        let file = File::options().write(true).open(&path).expect("a blob");
        remove_files(&place, &layers);
        if kills {
            wait_for_another(&daemon, kill_fetcher(&daemon));
        }
        let at = blob.len() / 2;
        file.write_all_at(&[blob[at] ^ 4], at as u64)
            .expect("a damaged byte");
        let before = asked_units(&server, blob);
        reader.check_all(&layers.content);
        reader.check_all(&layers.content);
        let again: Vec<_> = asked_units(&server, blob)
            .iter()
            .zip(before)
            .map(|(after, before)| after - before)
            .collect();
        assert!(again[at / UNIT] > 0, "{again:?}");
    }
}

/// A disk whose fetcher is dead keeps its blobs: they are not removed as those that no process uses are.
#[test]
fn blobs_of_a_disk_without_a_fetcher_are_in_use() {
    let layers = Layers::new(4);
    let place = Place::default();
    let server = layers.registry();
    place.config("http", &server.host(), &layers.lowers(), json!({}));
    let daemon = place.serve(&[]);
    let mut reader = Reader::connect(&daemon);
    reader.ask([0]);
    reader.check(&layers.content);
    let killed = kill_fetcher(&daemon);
    let cache = Cache::open_existing(&place.path("cache")).expect("a cache");
    for blob in &layers.blobs {
        let removal = cache.remove(&Digest::of(blob)).expect("an outcome");
        assert_eq!(removal, Removal::InUse);
    }
    wait_for_another(&daemon, killed);
    reader.check_all(&layers.content);
    for blob in &layers.blobs {
        let counts = asked_units(&server, blob);
        assert!(counts.iter().all(|count| *count == 1), "{counts:?}");
    }
}
