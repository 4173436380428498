//! What a reader asks for: requests that grow with the link, a window ahead of a reader in order, and
//! bytes that are used as they arrive.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use common::blk;
use common::delay::{Delay, Link};
use common::guest::{Guest, Options};
use common::registry_server::{Received, Reply, Server, raw, serve, until};
use common::remote::{Layers, Place};
use rustix::process::{Signal, kill_process};
use serde_json::json;

use super::{Reader, SHAPE, UNIT};

const MIB: usize = 1 << 20;

/// Ranges that were asked for since the first `opened` requests.
fn ranges(server: &Server, opened: usize) -> Vec<(usize, usize)> {
    let asked = server.received().split_off(opened);
    asked.iter().filter_map(Received::range).collect()
}

/// Serves a disk that an earlier daemon has opened: nothing is known of the link, and nothing is asked.
fn serve_again(place: &Place) -> common::daemon::Daemon {
    drop(place.serve(&[]));
    place.serve(&[])
}

/// Reads a part of the disk in order, 256 KiB at a time.
fn read_in_order(guest: &mut Guest, content: &[u8], part: std::ops::Range<usize>) {
    const STEP: usize = 256 << 10;
    for start in part.step_by(STEP) {
        let found = guest.read(0, start as u64 / 512, STEP as u32);
        assert!(found == content[start..start + STEP], "at {start}");
    }
}

/// A disk of 1024 units, read in order: no request has more than 4 MiB, and few are enough. While all that
/// lies ahead is held back, much of it has been asked for.
#[test]
fn a_reader_in_order_is_read_ahead_of_in_few_large_requests() {
    const HELD: usize = 24 * MIB;
    let (layers, place) = (Layers::plain(64), Place::default());
    let released = Arc::<AtomicBool>::default();
    let is_released = Arc::clone(&released);
    let server = layers.registry_that(move |request, blob| {
        let (first, last) = request.range().expect("a range");
        if first >= HELD && last + 1 < blob.len() {
            until("the requests are released", || {
                is_released.load(Ordering::SeqCst)
            });
        }
        serve(request, blob)
    });
    place.config("http", &server.host(), &layers.lowers(), json!({}));
    let daemon = place.serve(&[]);
    let opened = server.count();
    let mut guest = Guest::boot(daemon.connect(), Options::default()).expect("guest");
    read_in_order(&mut guest, &layers.content, 0..HELD);
    until("4 MiB are asked for ahead", || {
        let held = ranges(&server, opened).into_iter();
        let held = held.filter(|(first, _)| *first >= HELD);
        held.map(|(first, last)| last + 1 - first).sum::<usize>() >= 4 * MIB
    });
    released.store(true, Ordering::SeqCst);
    read_in_order(&mut guest, &layers.content, HELD..64 * MIB);
    let asked = ranges(&server, opened);
    let longest = asked.iter().map(|(first, last)| last + 1 - first).max();
    let is_large = |longest: usize| (MIB..=4 * MIB).contains(&longest);
    assert!(longest.is_some_and(is_large), "{asked:?}");
    assert!(asked.len() <= 128, "{} requests: {asked:?}", asked.len());
    let all: usize = asked.iter().map(|(first, last)| last + 1 - first).sum();
    // What was held back for longer than an answer may take is asked for again.
    assert!(all <= 96 * MIB, "{all} bytes of 64 MiB");
}

/// Over a long link, a reader that stays near gets as much as the link carries in a round trip: 1 MiB.
#[test]
fn a_request_grows_with_the_round_trip() {
    let (layers, place) = (Layers::plain(16), Place::default());
    let server = layers.registry();
    let link = Link {
        round_trip: Duration::from_millis(100),
        ..Link::default()
    };
    let delay = Delay::start(&server.host(), link);
    place.config("http", &delay.host(), &layers.lowers(), json!({}));
    let daemon = serve_again(&place);
    let opened = server.count();
    let mut guest = Guest::boot(daemon.connect(), Options::default()).expect("guest");
    // Each read is near the one before, and none follows it. The first ones measure the link.
    for number in 0..6 {
        for near in [0, 2] {
            let start = (2 * number + 1) * MIB + near * UNIT;
            let found = guest.read(0, start as u64 / 512, 4096);
            assert!(found == layers.content[start..start + 4096], "at {start}");
        }
    }
    let asked = ranges(&server, opened);
    let lens: Vec<_> = asked.iter().map(|(first, last)| last + 1 - first).collect();
    assert_eq!(lens[..2], [UNIT, 4 * UNIT], "{lens:?}");
    assert_eq!(lens.iter().max(), Some(&MIB), "{lens:?}");
}

/// A body that stops after its first unit: the read of that unit is finished, the one behind it waits.
#[test]
fn a_read_is_finished_when_its_part_of_a_body_has_come() {
    let (layers, place) = (Layers::plain(8), Place::default());
    let stalls = Arc::<AtomicBool>::default();
    let is_stalling = Arc::clone(&stalls);
    let server = layers.registry_that(move |request, blob| {
        let (first, last) = request.range().expect("a range");
        if !is_stalling.load(Ordering::SeqCst) || last + 1 - first == UNIT {
            return serve(request, blob);
        }
        let range = format!("bytes {first}-{last}/{}", blob.len());
        let length = (last + 1 - first).to_string();
        let headers = [
            ("Content-Range", range.as_str()),
            ("Content-Length", &length),
        ];
        Reply::Stall(raw(206, &headers, &blob[first..first + UNIT]))
    });
    place.config("http", &server.host(), &layers.lowers(), json!({}));
    let daemon = serve_again(&place);
    stalls.store(true, Ordering::SeqCst);
    let opened = server.count();
    let mut reader = Reader::connect(&daemon);
    reader.ask([10 * UNIT]);
    reader.check(&layers.content);
    // Both are in one request, as they are near the first one.
    let starts = [12 * UNIT, 14 * UNIT];
    reader.ask(starts);
    let mut found = vec![0; SHAPE.len as usize];
    until("the first of two reads is finished", || {
        let Some(done) = reader.load.take() else {
            return false;
        };
        assert_eq!(
            (done.status, done.sector as usize * 512),
            (blk::OK, starts[0])
        );
        done.data.copy_to(&mut found);
        true
    });
    assert!(found == layers.content[starts[0]..starts[0] + found.len()]);
    let expected = [(10 * UNIT, 11 * UNIT - 1), (12 * UNIT, 16 * UNIT - 1)];
    assert_eq!(ranges(&server, opened)[..2], expected);
    assert!(reader.load.take().is_none(), "the second read waits");

    // The next fetcher asks again, and is answered.
    stalls.store(false, Ordering::SeqCst);
    let (_, fetcher) = daemon.fetcher();
    kill_process(fetcher.expect("a fetcher"), Signal::KILL).expect("SIGKILL");
    reader.check(&layers.content);
}
