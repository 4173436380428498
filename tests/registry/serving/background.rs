//! Whole layers, downloaded while a guest reads them.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use common::registry_server::{serve, until};
use common::remote::{Layers, Place};
use serde_json::{Value, json};

use super::{Reader, UNIT, asked_units, fetching};

fn download(delay: u64, rate: u64, attempts: u64, block_size: u64) -> Value {
    json!({"download": {
        "enable": true, "delay": delay, "delayExtra": 0, "maxMBps": rate, "tryCnt": attempts,
        "blockSize": block_size,
    }})
}

/// A guest reads before, while and after its blobs are completed and renamed; each unit comes once.
#[test]
fn readers_go_on_while_blobs_are_completed() {
    let layers = Layers::new(16);
    let place = Place::default();
    let server = layers.registry();
    place.config(
        "http",
        &server.host(),
        &layers.lowers(),
        download(0, 0, 1, 1 << 20),
    );
    let daemon = place.serve(&[]);
    let mut reader = Reader::connect(&daemon);
    let mut rounds = 0;
    while !place.is_complete(&layers) || rounds < 3 {
        reader.check_all(&layers.content);
        rounds += 1;
    }
    reader.check_all(&layers.content);
    for blob in &layers.blobs {
        let counts = asked_units(&server, blob);
        // A gap of one unit between two that are asked for is asked for as well.
        assert!(
            counts.iter().all(|count| (1..=2).contains(count)),
            "{counts:?}"
        );
        let twice = counts.iter().filter(|count| **count == 2).count();
        assert!(
            twice * 4 < counts.len(),
            "{twice} units of {}",
            counts.len()
        );
    }
}

#[test]
fn a_download_keeps_to_its_delay_and_rate() {
    let layers = Layers::new(4);
    let place = Place::default();
    let server = layers.registry();
    place.config(
        "http",
        &server.host(),
        &layers.lowers(),
        download(1, 2, 1, 1 << 20),
    );
    let start = Instant::now();
    let daemon = place.serve(&[]);
    let opened = server.count();
    until("the first block", || server.count() > opened);
    assert!(start.elapsed() >= Duration::from_secs(1), "the delay");
    until("both blobs are complete", || place.is_complete(&layers));
    // Of 6 MiB, a block of each blob comes at once.
    assert!(
        start.elapsed() >= Duration::from_millis(1000 + 1500),
        "{:?}",
        start.elapsed()
    );
    Reader::connect(&daemon).check_all(&layers.content);
}

/// Each attempt fetches a blob with a wrong digest twice; after the last one it is left alone.
#[test]
fn a_download_is_tried_as_often_as_configured() {
    let layers = Layers::plain(2);
    let place = Place::default();
    let wrong = Arc::new(AtomicBool::new(true));
    let is_wrong = Arc::clone(&wrong);
    let server = layers.registry_that(move |request, blob| {
        let mut blob = blob.to_vec();
        blob[1 << 20] ^= u8::from(is_wrong.load(Ordering::SeqCst));
        serve(request, &blob)
    });
    place.config(
        "http",
        &server.host(),
        &layers.lowers(),
        download(0, 0, 2, 1 << 20),
    );
    let daemon = place.serve(&[]);
    until("the last attempt", || daemon.log().contains("attempt 2"));
    std::thread::sleep(Duration::from_millis(500));
    let counts = asked_units(&server, &layers.blobs[0]);
    assert_eq!(counts[16], 4, "{counts:?}");
    assert!(!place.is_complete(&layers));
}

/// While requests of a guest wait for their turn, a download asks for nothing more.
#[test]
fn a_download_yields_to_the_guest() {
    let layers = Layers::plain(16);
    let place = Place::default();
    let gates = Arc::new([AtomicBool::new(false), AtomicBool::new(false)]);
    let opened = Arc::clone(&gates);
    // The guest reads the second half; the download begins with the first, once the disk is open.
    let is_demand = |first: usize| usize::from(first >= 8 << 20);
    let server = layers.registry_that(move |request, blob| {
        let (first, last) = request.range().expect("a range");
        // What opening needs.
        if first > 0 && last + 1 < blob.len() {
            let gate = &opened[is_demand(first)];
            until("the gate is open", || gate.load(Ordering::SeqCst));
        }
        serve(request, blob)
    });
    // Units of the second half, or of the first, that were asked for after the opening.
    let asked = |demand: usize| {
        let ranges = server.received().into_iter().filter_map(|one| one.range());
        let ranges = ranges.filter(|(first, _)| *first > 0 && is_demand(*first) == demand);
        let units = |(first, last)| last / UNIT - first / UNIT + 1;
        ranges.map(units).sum::<usize>()
    };
    place.config(
        "http",
        &server.host(),
        &layers.lowers(),
        download(1, 0, 1, 4 << 16),
    );
    let control = place.path("control").display().to_string();
    let daemon = place.serve(&["--control", &control]);
    until("the download has begun", || asked(0) > 0);
    let mut reader = Reader::connect(&daemon);
    let opening = asked(1);
    reader.ask((1..32).rev().map(|read| (8 << 20) + read * 4 * UNIT));
    // As many as the fetcher has under way at once; the others wait in its queue.
    until("the guest's requests", || {
        asked(1) >= opening + 16 && fetching(&place)["waiting_reads"] == 31
    });
    gates[0].store(true, Ordering::SeqCst);
    std::thread::sleep(Duration::from_secs(1));
    // Of 120 units, two blocks of four were under way.
    assert!(asked(0) <= 12, "{} units: the download yields", asked(0));
    gates[1].store(true, Ordering::SeqCst);
    reader.check(&layers.content);
    until("the blob is complete", || place.is_complete(&layers));
    assert!(asked(0) > 64);
}
