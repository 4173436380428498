//! A fetcher that is stuck: the disks of other fetchers go on, and what it stores in the end does no harm.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use common::registry_server::{serve, until};
use common::remote::{Layers, Place};
use rustix::process::{Signal, kill_process};
use serde_json::json;

use super::{Reader, UNIT};

/// A fetcher is stopped while it fetches units from a registry that sends wrong bytes. Another disk fetches the
/// same units from a healthy one. The layer has no checksums: the wrong bytes would reach the guests.
#[test]
fn a_stopped_fetcher_keeps_no_other_disk_waiting() {
    let layers = Layers::plain(4);
    let place = Place::default();
    let holds = Arc::new(AtomicBool::new(false));
    let held = Arc::clone(&holds);
    let wrong = layers.registry_that(move |request, blob| {
        if !held.load(Ordering::SeqCst) {
            return serve(request, blob);
        }
        while held.load(Ordering::SeqCst) {
            std::thread::sleep(Duration::from_millis(10));
        }
        let wrong: Vec<_> = blob.iter().map(|byte| byte ^ 0x55).collect();
        serve(request, &wrong)
    });
    place.config("http", &wrong.host(), &layers.lowers(), json!({}));
    let stuck = place.serve(&[]);
    let mut waiting = Reader::connect(&stuck);
    let (_, fetcher) = stuck.fetcher();
    let fetcher = fetcher.expect("a fetcher");
    holds.store(true, Ordering::SeqCst);
    let before = wrong.count();
    waiting.ask((1..7).map(|read| read * 9 * UNIT));
    until("units are being fetched", || wrong.count() >= before + 6);
    kill_process(fetcher, Signal::STOP).expect("a signal");

    let right = layers.registry();
    place.config("http", &right.host(), &layers.lowers(), json!({}));
    let daemon = place.serve(&[]);
    let mut reader = Reader::connect(&daemon);
    reader.check_all(&layers.content);
    until("the blob is complete", || place.is_complete(&layers));
    holds.store(false, Ordering::SeqCst);
    kill_process(fetcher, Signal::CONT).expect("a signal");
    waiting.check(&layers.content);
    waiting.check_all(&layers.content);
    reader.check_all(&layers.content);
}
