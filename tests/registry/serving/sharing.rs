//! Several disks on one cache: each unit is fetched once, also after kills.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use common::registry_server::{Reply, serve, until};
use common::remote::{Layers, Place};
use rustix::process::{Signal, kill_process};
use serde_json::json;

use super::{Reader, UNIT, asked_units};

#[test]
fn two_daemons_fetch_each_unit_once() {
    let layers = Layers::new(8);
    let place = Place::default();
    let server = layers.registry();
    place.config("http", &server.host(), &layers.lowers(), json!({}));
    let daemons = [place.serve(&[]), place.serve(&[])];
    std::thread::scope(|scope| {
        for daemon in &daemons {
            let content = &layers.content;
            scope.spawn(move || Reader::connect(daemon).check_all(content));
        }
    });
    for blob in &layers.blobs {
        let counts = asked_units(&server, blob);
        assert!(counts.iter().all(|count| *count == 1), "{counts:?}");
    }
}

/// What was in flight when a process was killed is fetched again, and nothing else.
#[test]
fn a_kill_costs_what_was_in_flight() {
    let layers = Layers::new(8);
    let place = Place::default();
    let holds = Arc::new(AtomicBool::new(false));
    let held = Arc::clone(&holds);
    let server = layers.registry_that(move |request, blob| match held.load(Ordering::SeqCst) {
        true => Reply::Stall(Vec::new()),
        false => serve(request, blob),
    });
    place.config("http", &server.host(), &layers.lowers(), json!({}));
    let mut daemon = place.serve(&[]);
    let mut reader = Reader::connect(&daemon);
    // Units that were asked for while the server answered none.
    let mut in_flight = vec![Vec::new(); layers.blobs.len()];
    for (round, victim) in ["fetcher", "daemon", "both"].into_iter().enumerate() {
        holds.store(true, Ordering::SeqCst);
        let before: Vec<_> = layers
            .blobs
            .iter()
            .map(|blob| asked_units(&server, blob))
            .collect();
        reader.ask((0..4).map(|read| (round * 4 + read) * 8 * UNIT));
        let asked = server.count();
        until("requests are held", || {
            server.count() >= asked.max(1) && {
                let now = layers.blobs.iter().map(|blob| asked_units(&server, blob));
                now.zip(&before).any(|(now, before)| now != *before)
            }
        });
        let fetcher = daemon.fetcher().1.expect("a fetcher");
        if victim != "daemon" {
            kill_process(fetcher, Signal::KILL).expect("a kill");
        }
        if victim != "fetcher" {
            daemon.kill();
        }
        holds.store(false, Ordering::SeqCst);
        let after = layers.blobs.iter().map(|blob| asked_units(&server, blob));
        for ((after, before), units) in after.zip(&before).zip(&mut in_flight) {
            units.extend((0..after.len()).filter(|unit| after[*unit] > before[*unit]));
        }
        if victim != "fetcher" {
            daemon.restart();
            reader.reconnect(&daemon);
        }
        reader.check(&layers.content);
    }
    reader.check_all(&layers.content);
    for (blob, units) in layers.blobs.iter().zip(in_flight) {
        let counts = asked_units(&server, blob);
        for (unit, count) in counts.iter().enumerate() {
            let allowed = 1 + units.iter().filter(|other| **other == unit).count();
            assert!(
                (1..=allowed).contains(count),
                "unit {unit}: {count} of {allowed}"
            );
        }
    }
}
