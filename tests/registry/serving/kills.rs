//! Kills at random moments: what was in the cache then is never fetched again.

use std::fs;
use std::sync::Mutex;
use std::time::Duration;

use common::content::Random;
use common::daemon::Daemon;
use common::registry_server::{Reply, serve, until};
use common::remote::{Layers, Place};
use ovbd_vhost::format::digest::Digest;
use ovbd_vhost::format::presence::HEADER_LEN;
use rustix::process::{Signal, kill_process};
use serde_json::json;

use super::{Reader, UNIT, asked_units, kill_all, partial, units};

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Victim {
    Fetcher,
    Daemon,
    Everything,
    /// The process that starts fetchers, and then the daemon: without a keeper there is no new fetcher.
    Keeper,
}

const VICTIMS: [Victim; 4] = [
    Victim::Fetcher,
    Victim::Daemon,
    Victim::Everything,
    Victim::Keeper,
];

/// Units of a blob that the cache holds.
fn present(place: &Place, blob: &[u8]) -> Vec<bool> {
    let count = blob.len().div_ceil(UNIT);
    let complete = place
        .path("cache/blobs/sha256")
        .join(Digest::of(blob).hex());
    match fs::read(partial(place, blob, "map")) {
        Ok(map) => units(&map, HEADER_LEN, count),
        Err(error) => {
            assert!(complete.exists(), "no map and no blob: {error}");
            vec![true; count]
        }
    }
}

fn strike(daemon: &mut Daemon, victim: Victim) {
    let (keeper, fetcher) = daemon.fetcher();
    let kill = |pid: Option<rustix::process::Pid>| {
        // It may be on its way.
        if let Some(pid) = pid {
            let _ = kill_process(pid, Signal::KILL);
        }
    };
    match victim {
        Victim::Fetcher => kill(fetcher),
        Victim::Daemon => daemon.kill(),
        Victim::Everything => kill_all(daemon),
        Victim::Keeper => {
            kill(keeper);
            daemon.kill();
        }
    }
}

/// What is known of a blob at a kill.
struct Moment {
    /// Units that the cache held before it.
    before: Vec<bool>,
    /// Units that it held after it.
    after: Vec<bool>,
    /// How often each unit was asked for until then.
    asked: Vec<usize>,
}

#[test]
fn what_was_in_the_cache_at_a_kill_is_not_fetched_again() {
    let layers = Layers::new(24);
    let place = Place::default();
    let random = Mutex::new(Random::new(11));
    let server = layers.registry_that(move |request, blob| {
        let pause = random.lock().expect("numbers").below(60);
        Reply::Later(Duration::from_millis(pause), Box::new(serve(request, blob)))
    });
    place.config("http", &server.host(), &layers.lowers(), json!({}));
    let mut daemon = place.serve(&[]);
    let mut reader = Reader::connect(&daemon);
    let mut random = Random::new(12);
    let mut kills = Vec::new();
    let starts: Vec<_> = (0..layers.content.len()).step_by(UNIT).rev().collect();
    for (round, part) in starts.chunks(32).enumerate() {
        reader.ask(part.iter().copied());
        std::thread::sleep(Duration::from_millis(random.below(120)));
        let victim = VICTIMS[round % VICTIMS.len()];
        let held = || layers.blobs.iter().map(|blob| present(&place, blob));
        let before: Vec<_> = held().collect();
        strike(&mut daemon, victim);
        let after: Vec<_> = held().collect();
        let asked = layers.blobs.iter().map(|blob| asked_units(&server, blob));
        let moments = before.into_iter().zip(after).zip(asked);
        let moments = moments.map(|((before, after), asked)| Moment {
            before,
            after,
            asked,
        });
        kills.push(moments.collect::<Vec<_>>());
        if victim != Victim::Fetcher {
            daemon.restart();
            reader.reconnect(&daemon);
        }
        reader.check(&layers.content);
    }
    assert_eq!(kills.len(), 12);
    reader.check_all(&layers.content);
    // What is there in the end was asked for once, and once more for each kill that found it on its way.
    for (number, blob) in layers.blobs.iter().enumerate() {
        let counts = asked_units(&server, blob);
        for (unit, count) in counts.iter().enumerate() {
            let mut lost = 0;
            for moment in kills.iter().map(|blobs| &blobs[number]) {
                if moment.after[unit] {
                    assert_eq!(*count, moment.asked[unit], "blob {number}, unit {unit}");
                }
                lost += usize::from(!moment.before[unit] && moment.asked[unit] > 0);
            }
            assert!(
                (1..=1 + lost).contains(count),
                "blob {number}, unit {unit}: {count}"
            );
        }
    }
    until("both blobs are complete", || place.is_complete(&layers));
}
