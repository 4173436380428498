//! A fetcher that disks share, whose layers are in different registries.

use std::fs::{self, Permissions};
use std::os::unix::fs::PermissionsExt;

use common::fetch_processes::of_cache;
use common::registry_server::{Reply, answer};
use common::remote::{Layers, Place};
use rustix::process::{Signal, kill_process};
use serde_json::json;

use super::{Reader, UNIT};

fn directory(place: &Place) -> String {
    let shared = place.path("shared");
    fs::create_dir(&shared).expect("a directory");
    fs::set_permissions(&shared, Permissions::from_mode(0o700)).expect("a mode");
    shared.display().to_string()
}

/// Both images have the same layers, so that the disks share the blobs as well.
#[test]
fn a_disk_does_not_wait_for_the_registry_of_another() {
    let unavailable = || answer(503, &[], b"not now");
    for failure in [unavailable(), Reply::Reset(Vec::new())] {
        let layers = Layers::new(16);
        let place = Place::default();
        let shared = directory(&place);
        let options = ["--shared-fetcher", &shared];
        let first = layers.registry_with_outages(failure);
        place.config("http", &first.host(), &layers.lowers(), json!({}));
        let waiting = place.serve(&options);
        let second = layers.registry();
        place.config("http", &second.host(), &layers.lowers(), json!({}));
        let served = place.serve(&options);

        let mut stuck = Reader::connect(&waiting);
        first.take_away();
        stuck.ask((0..4).rev().map(|read| read * 2 * UNIT));
        let mut reader = Reader::connect(&served);
        reader.check_all(&layers.content);
        assert!(second.count() > 0);
        // The bytes that the other disk wants came as well.
        stuck.check(&layers.content);
    }
}

#[test]
fn a_session_that_ends_does_not_end_the_fetcher() {
    let layers = Layers::new(8);
    let place = Place::default();
    let shared = directory(&place);
    let server = layers.registry();
    place.config("http", &server.host(), &layers.lowers(), json!({}));
    let daemon = place.serve(&["--shared-fetcher", &shared]);
    let before = of_cache(&place.path("cache"));
    assert!(!before.is_empty());
    for (_, pid) in &before {
        kill_process(*pid, Signal::HUP).expect("a signal");
    }
    let mut reader = Reader::connect(&daemon);
    reader.check_all(&layers.content);
    let after = of_cache(&place.path("cache"));
    assert!(
        before.iter().all(|process| after.contains(process)),
        "{after:?}"
    );
}
