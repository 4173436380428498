//! Replay of a trace: what is asked for, in which order, and what is lost on the way and asked for again.

use std::collections::BTreeSet;
use std::fs;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};

use common::daemon::Daemon;
use common::guest::{Guest, Options};
use common::registry_server::{Received, Reply, Server, answer, serve, until};
use common::remote::{Layers, Place};
use ovbd_vhost::format::trace::{self, TracedRead};
use rustix::process::{Signal, kill_process};
use serde_json::json;

use super::UNIT;

/// A trace of whole units of the bottom layer, which is stored as it is.
fn trace_of(units: &[usize]) -> Vec<u8> {
    let reads = units.iter().map(|unit| TracedRead {
        layer: 0,
        offset: (unit * UNIT) as u64,
        len: UNIT as u64,
    });
    trace::encode(&reads.collect::<Vec<_>>())
}

/// Serves a disk in whose cache a trace is replayed.
fn replay(place: &Place, server: &Server, layers: &Layers, trace: &[u8]) -> Daemon {
    place.config("http", &server.host(), &layers.lowers(), json!({}));
    fs::write(place.path("trace"), trace).expect("a trace");
    let [trace, control] = ["trace", "control"].map(|name| place.path(name).display().to_string());
    place.serve(&["--prefetch", &trace, "--control", &control])
}

fn wait_until_local(daemon: &Daemon) {
    until("the trace is local", || {
        daemon
            .log()
            .contains("prefetched the bytes recorded in the trace")
    });
}

/// Reads the start of each of these units, and asserts that no read waited for the registry.
fn assert_local(daemon: &Daemon, place: &Place, layers: &Layers, units: &[usize]) {
    let mut guest = Guest::boot(daemon.connect(), Options::default()).expect("guest");
    for unit in units {
        let start = unit * UNIT;
        let found = guest.read(0, start as u64 / 512, 4096);
        assert!(found == layers.content[start..start + 4096], "unit {unit}");
    }
    let seen = super::fetching(place);
    assert_eq!(seen["fetcher"]["demand_bytes"], 0, "{seen}");
    assert_eq!(seen["fetcher"]["read_ahead_bytes"], 0, "{seen}");
}

/// Whether a request of a blob of 8 MiB is for neither the first bytes nor the last ones.
fn is_of_replay(request: &Received) -> bool {
    let range = request.range();
    range.is_some_and(|(first, last)| first > 0 && last < 8 << 20)
}

fn replayed(server: &Server) -> Vec<(usize, usize)> {
    let asked = server.received();
    let asked = asked.iter().filter(|request| is_of_replay(request));
    asked.filter_map(Received::range).collect()
}

fn range(first: usize, end: usize) -> (usize, usize) {
    (first * UNIT, end * UNIT - 1)
}

/// Units in any order are one request if they are neighbours, or nearly so.
#[test]
fn the_units_of_a_trace_are_sorted_and_merged() {
    let (layers, place) = (Layers::plain(8), Place::default());
    let server = layers.registry();
    let units = [62, 25, 21, 60, 23, 20, 22, 24, 90];
    let daemon = replay(&place, &server, &layers, &trace_of(&units));
    wait_until_local(&daemon);
    let found: BTreeSet<_> = replayed(&server).into_iter().collect();
    let expected = [range(20, 26), range(60, 63), range(90, 91)];
    assert_eq!(found, BTreeSet::from(expected));
    assert_eq!(replayed(&server).len(), 3);
    assert_local(&daemon, &place, &layers, &units);
}

/// A trace as upstream's daemon writes it: the paddings hold what was in memory, the checksum covers
/// those of the records, and writes are recorded too. Reads of units 20 and 30, and a write to unit 40.
const UPSTREAMS: [u8; 96] = [
    0x20, 0x18, 0xef, 0xc2, 0x55, 0x7f, 0x00, 0x00, 0x48, 0x00, 0x00, 0x00, //
    0x00, 0x00, 0x00, 0x00, 0xc6, 0xd4, 0xae, 0x8b, 0xfe, 0x7f, 0x00, 0x00, //
    0x52, 0xaa, 0xbb, 0xcc, 0x00, 0x00, 0x00, 0x00, 0x00, 0x00, 0x01, 0x00, //
    0x00, 0x00, 0x00, 0x00, 0x00, 0x00, 0x14, 0x00, 0x00, 0x00, 0x00, 0x00, //
    0x57, 0x7f, 0x00, 0x01, 0x00, 0x00, 0x00, 0x00, 0x00, 0x10, 0x00, 0x00, //
    0x00, 0x00, 0x00, 0x00, 0x00, 0x00, 0x28, 0x00, 0x00, 0x00, 0x00, 0x00, //
    0x52, 0x00, 0xff, 0x10, 0x00, 0x00, 0x00, 0x00, 0x00, 0x00, 0x01, 0x00, //
    0x00, 0x00, 0x00, 0x00, 0x00, 0x00, 0x1e, 0x00, 0x00, 0x00, 0x00, 0x00, //
];

#[test]
fn a_file_of_upstreams_daemon_is_replayed() {
    let (layers, place) = (Layers::plain(8), Place::default());
    let server = layers.registry();
    let daemon = replay(&place, &server, &layers, &UPSTREAMS);
    wait_until_local(&daemon);
    let found: BTreeSet<_> = replayed(&server).into_iter().collect();
    assert_eq!(found, BTreeSet::from([range(20, 21), range(30, 31)]));
    assert_local(&daemon, &place, &layers, &[20, 30]);
}

/// Every third request of a replay is refused, and all that was recorded arrives before the guest reads.
#[test]
fn a_replay_outlasts_a_registry_that_refuses_some_of_it() {
    let (layers, place) = (Layers::plain(8), Place::default());
    let number = AtomicUsize::new(0);
    let server = layers.registry_that(move |request, blob| {
        let is_refused =
            is_of_replay(request) && number.fetch_add(1, Ordering::SeqCst).is_multiple_of(3);
        match is_refused {
            true => answer(503, &[], b""),
            false => serve(request, blob),
        }
    });
    let units: Vec<_> = (8..120).step_by(4).collect();
    let daemon = replay(&place, &server, &layers, &trace_of(&units));
    wait_until_local(&daemon);
    // A unit that failed is asked for again, and no other.
    let asked = replayed(&server).len();
    assert!(
        (units.len() + 9..3 * units.len()).contains(&asked),
        "{asked}"
    );
    assert_local(&daemon, &place, &layers, &units);
}

/// The fetcher dies with all that was suggested to it.
#[test]
fn a_replay_goes_on_with_the_next_fetcher() {
    let (layers, place) = (Layers::plain(8), Place::default());
    let served = Arc::<AtomicBool>::default();
    let is_served = Arc::clone(&served);
    let server = layers.registry_that(move |request, blob| {
        match is_of_replay(request) && !is_served.load(Ordering::SeqCst) {
            true => Reply::Stall(Vec::new()),
            false => serve(request, blob),
        }
    });
    let units: Vec<_> = (8..120).step_by(4).collect();
    let daemon = replay(&place, &server, &layers, &trace_of(&units));
    until("the replay has begun", || !replayed(&server).is_empty());
    served.store(true, Ordering::SeqCst);
    let (_, fetcher) = daemon.fetcher();
    kill_process(fetcher.expect("a fetcher"), Signal::KILL).expect("SIGKILL");
    wait_until_local(&daemon);
    assert_local(&daemon, &place, &layers, &units);
}
