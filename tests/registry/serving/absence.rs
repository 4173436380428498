//! A registry that is away for five minutes. The first of these tests by its name, so that others run beside
//! it.

use std::thread;
use std::time::{Duration, Instant};

use common::blk;
use common::content::difference;
use common::registry_server::{Reply, until};
use common::remote::{Layers, Place};
use serde_json::json;

use super::{Reader, SHAPE, UNIT};

const OUTAGE: Duration = Duration::from_secs(300);

/// Reads 16 KiB at this byte of the disk while other reads wait, and checks them.
fn check_one(reader: &mut Reader, start: usize, content: &[u8]) {
    let last = SHAPE.depth - 1;
    reader.load.submit(last, start as u64 / 512);
    reader.load.ring.publish();
    let mut found = vec![0; SHAPE.len as usize];
    until("what is cached is read", || match reader.load.take() {
        None => false,
        Some(done) => {
            assert_eq!((done.slot, done.status), (last, blk::OK));
            done.data.copy_to(&mut found);
            true
        }
    });
    let wrong = difference(&found, &content[start..start + found.len()]);
    assert_eq!(wrong, None, "byte {start}");
}

/// What is cached is read all the time; what is not is waited for, with few requests, and comes soon
/// after the registry is back.
#[test]
fn a_guest_waits_out_five_minutes_without_a_registry() {
    let layers = Layers::new(8);
    let place = Place::default();
    let server = layers.registry_with_outages(Reply::Reset(Vec::new()));
    place.config("http", &server.host(), &layers.lowers(), json!({}));
    let daemon = place.serve(&[]);
    let mut reader = Reader::connect(&daemon);
    // Backwards, so that nothing is read ahead.
    let cached: Vec<_> = (0..8).rev().map(|read| read * 2 * UNIT).collect();
    reader.ask(cached.iter().copied());
    reader.check(&layers.content);

    server.take_away();
    let before = server.count();
    reader.ask((0..24).rev().map(|read| (4 << 20) + read * 2 * UNIT));
    let start = Instant::now();
    for at in cached.iter().copied().cycle() {
        check_one(&mut reader, at, &layers.content);
        if start.elapsed() > OUTAGE {
            break;
        }
        thread::sleep(Duration::from_secs(1));
    }
    let asked = server.count() - before;
    // At first each read's request; then one request now and then, which is repeated once.
    assert!((8..150).contains(&asked), "{asked} requests");
    server.bring_back();
    reader.check(&layers.content);
    reader.check_all(&layers.content);
    let said = |words: &str| daemon.log().matches(words).count();
    until("the log says so", || said("answers again") > 0);
    assert_eq!((said("stopped answering"), said("answers again")), (1, 1));
}
