//! A fetcher that replaces a killed one opens the blobs of its disks again.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use common::registry_server::{answer, serve, until};
use common::remote::{Layers, Place};
use rustix::process::{Signal, kill_process};
use serde_json::json;

use super::{Reader, UNIT};

/// The length of a blob is asked of its registry if the image does not say it. A registry that is away when
/// a new fetcher asks delays the guest's reads.
#[test]
fn a_guest_waits_while_a_new_fetcher_cannot_open_its_blobs() {
    let layers = Layers::new(8);
    let place = Place::default();
    let is_away = Arc::new(AtomicBool::new(false));
    let goes_away = Arc::clone(&is_away);
    let server = layers.registry_that(move |request, blob| match is_away.load(Ordering::SeqCst) {
        true => answer(503, &[], b""),
        false => serve(request, blob),
    });
    let mut lowers = layers.lowers();
    for lower in &mut lowers {
        lower.as_object_mut().expect("a layer").remove("size");
    }
    place.config("http", &server.host(), &lowers, json!({}));
    let daemon = place.serve(&[]);
    let mut reader = Reader::connect(&daemon);
    reader.ask([0]);
    reader.check(&layers.content);

    goes_away.store(true, Ordering::SeqCst);
    let (_, fetcher) = daemon.fetcher();
    let fetcher = fetcher.expect("a fetcher");
    kill_process(fetcher, Signal::KILL).expect("a signal");
    until("another fetcher runs", || {
        let (_, found) = daemon.fetcher();
        found.is_some_and(|found| found != fetcher)
    });
    let before = server.count();
    reader.ask((1..31).map(|read| read * 4 * UNIT));
    until("the new fetcher asks again", || server.count() > before + 2);
    assert!(reader.load.take().is_none(), "no read is answered");
    goes_away.store(false, Ordering::SeqCst);
    reader.check(&layers.content);
    reader.check_all(&layers.content);
}
