//! A registry that does not answer, and processes that die, under a guest's reads.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use common::checks;
use common::content::Random;
use common::daemon::Daemon;
use common::guest::{Guest, Options};
use common::queue::Layout;
use common::registries::{DockerRegistry, Storage};
use common::registry_server::{Reply, answer, until};
use common::remote::{Layers, Place, REPOSITORY};
use rustix::process::{Pid, Signal, kill_process};
use serde_json::json;

use super::{Reader, SHAPE, UNIT};

/// Reads at random while `disturb` is called; it leaves a daemon that listens.
fn under_load(
    daemon: &mut Daemon,
    content: &Arc<Vec<u8>>,
    rounds: u64,
    mut disturb: impl FnMut(&mut Daemon, u64),
) {
    let Reader {
        mut load,
        mut front_end,
        mut session,
    } = Reader::connect(daemon);
    let done = Arc::new(AtomicBool::new(false));
    let (stop, content) = (Arc::clone(&done), Arc::clone(content));
    let reader = thread::spawn(move || {
        let mut random = Random::new(7);
        while !stop.load(Ordering::Relaxed) {
            checks::random_load(&mut load, SHAPE, &content, 100, &mut random);
        }
    });
    let mut random = Random::new(rounds);
    for round in 0..rounds {
        thread::sleep(Duration::from_millis(random.below(300)));
        let before = daemon.pid();
        disturb(daemon, round);
        if daemon.pid() != before {
            session = front_end.connect(daemon.connect());
        }
    }
    done.store(true, Ordering::Relaxed);
    reader
        .join()
        .expect("every read is answered once, and right");
    drop(session);
}

/// The registry is back long before the start gives up, but its last failures ask for long pauses.
#[test]
fn a_start_outwaits_twenty_seconds_of_failures() {
    let layers = Layers::new(2);
    let place = Place::default();
    let server = layers.registry_with_outages(answer(503, &[("Retry-After", "1")], b"not now"));
    place.config("http", &server.host(), &layers.lowers(), json!({}));
    server.take_away();
    let back = thread::scope(|scope| {
        scope.spawn(|| {
            thread::sleep(Duration::from_secs(20));
            server.bring_back();
        });
        place.serve(&[])
    });
    Reader::connect(&back).check_all(&layers.content);
}

fn kill(pid: Pid) {
    // It may have died meanwhile.
    let _ = kill_process(pid, Signal::KILL);
}

/// All that can die does, again and again, while a guest reads a disk that is fetched slowly.
#[test]
fn everything_but_the_guest_is_killed_under_reads() {
    let layers = Layers::new(48);
    let place = Place::default();
    let storage = Storage::default();
    for blob in &layers.blobs {
        storage.blob(REPOSITORY, blob);
    }
    let mut registry = DockerRegistry::open(storage);
    place.config("http", registry.host(), &layers.lowers(), json!({}));
    let mut daemon = place.serve(&[]);
    under_load(&mut daemon, &layers.content, 24, |daemon, round| {
        match round % 4 {
            0 => registry.stop(),
            1 => {
                if let (_, Some(fetcher)) = daemon.fetcher() {
                    kill(fetcher);
                }
            }
            2 => registry.restart(),
            _ => {
                daemon.kill();
                // All is to be fetched again.
                place.forget_cache();
                daemon.restart();
            }
        }
    });
    daemon.assert_alive();
}

/// The fetcher serves on without its keeper, and ends with the disk.
#[test]
fn a_killed_keeper_costs_nothing() {
    let layers = Layers::new(8);
    let place = Place::default();
    let server = layers.registry_with_outages(Reply::Stall(Vec::new()));
    place.config("http", &server.host(), &layers.lowers(), json!({}));
    let daemon = place.serve(&[]);
    let (keeper, fetcher) = daemon.fetcher();
    kill(keeper.expect("a keeper"));
    let mut guest = Guest::boot(daemon.connect(), Options::default()).expect("guest");
    guest.assert_reads(0, &layers.content);
    drop(daemon);
    until("the fetcher ends with its disk", || {
        rustix::process::test_kill_process(fetcher.expect("a fetcher")).is_err()
    });
}

/// A guest waits while the registry fails in this way, and goes on when it is back.
fn wait_out(failure: Reply) {
    let layers = Layers::new(4);
    let place = Place::default();
    let server = layers.registry_with_outages(failure);
    place.config("http", &server.host(), &layers.lowers(), json!({}));
    let daemon = place.serve(&[]);
    server.take_away();
    let before = server.count();
    let answered = AtomicBool::new(false);
    thread::scope(|scope| {
        let (daemon, content, answered) = (&daemon, &layers.content, &answered);
        scope.spawn(move || {
            let mut guest = Guest::boot(daemon.connect(), Options::default()).expect("guest");
            let found = guest.read(0, content.len() as u64 / 1024, 65536);
            assert!(found == content[content.len() / 2..][..65536]);
            answered.store(true, Ordering::SeqCst);
        });
        until("a request fails", || server.count() > before);
        assert!(!answered.load(Ordering::SeqCst));
        server.bring_back();
    });
}

#[test]
fn a_guest_waits_out_an_overload() {
    wait_out(answer(503, &[], b""));
}

#[test]
fn a_guest_waits_out_a_missing_blob() {
    wait_out(answer(404, &[], b""));
}

#[test]
fn a_guest_waits_out_a_refusal() {
    wait_out(answer(401, &[], b""));
}

#[test]
fn a_guest_waits_out_connections_that_break() {
    wait_out(Reply::Reset(Vec::new()));
    wait_out(Reply::Close(b"garbage\r\n\r\n".to_vec()));
}

/// With a deadline, a read fails in time and the next one works again.
#[test]
fn a_deadline_fails_reads_and_nothing_else() {
    let layers = Layers::new(4);
    let place = Place::default();
    let server = layers.registry_with_outages(Reply::Stall(Vec::new()));
    place.config("http", &server.host(), &layers.lowers(), json!({}));
    let daemon = place.serve(&["--fetch-deadline", "1"]);
    server.take_away();
    let mut guest = Guest::boot(daemon.connect(), Options::default()).expect("guest");
    let middle = layers.content.len() / 2;
    let answer = guest.request(0, common::blk::IN, middle as u64 / 512, 4096);
    assert_eq!(answer.status, common::blk::IOERR);
    server.bring_back();
    // The request that stalls is given up after some seconds; until then reads may fail.
    until("the registry is used again", || {
        let answer = guest.request(0, common::blk::IN, middle as u64 / 512, 4096);
        answer.status == common::blk::OK && answer.data == layers.content[middle..middle + 4096]
    });
}

/// A guest whose reads all wait is stopped, disconnected, and its daemon ended: none of it waits for
/// the network. The next daemon answers all reads.
#[test]
fn a_stop_does_not_wait_for_the_network() {
    let layers = Layers::new(8);
    let place = Place::default();
    let server = layers.registry_with_outages(Reply::Stall(Vec::new()));
    place.config("http", &server.host(), &layers.lowers(), json!({}));
    let mut daemon = place.serve(&[]);
    let mut reader = Reader::connect(&daemon);
    reader.ask([0]);
    reader.check(&layers.content);
    server.take_away();
    let before = server.count();
    reader.ask((1..31).map(|read| read * 4 * UNIT));
    until("many requests stall", || server.count() >= before + 8);
    // What is present overtakes what waits.
    reader.load.submit(31, 0);
    reader.load.ring.publish();
    until("a read of present bytes", || {
        reader.load.ring.vring.used_index() == 2
    });
    let done = reader.load.take().expect("an answer");
    assert_eq!((done.status, done.sector), (common::blk::OK, 0));

    let start = Instant::now();
    reader.session.stop_queue(0).expect("the queue stops");
    // After 5 seconds, whatever the network does: it would never answer.
    assert!(start.elapsed() < Duration::from_secs(20), "the stop waits");
    reader.reconnect(&daemon);
    // The connection ends without a word.
    reader.reconnect(&daemon);
    assert_eq!(daemon.terminate().code(), Some(0));
    assert!(reader.load.take().is_none(), "no read is answered");

    server.bring_back();
    daemon.restart();
    reader.reconnect(&daemon);
    reader.check(&layers.content);
}

/// Without a region for requests in flight, nothing can be left for a later daemon: reads that wait when
/// the queue stops fail, and succeed when the driver repeats them.
#[test]
fn a_stop_without_a_region_fails_the_reads_that_wait() {
    let (layers, place) = (Layers::new(4), Place::default());
    let server = layers.registry_with_outages(Reply::Stall(Vec::new()));
    place.config("http", &server.host(), &layers.lowers(), json!({}));
    let daemon = place.serve(&[]);
    let mut guest = Guest::boot(daemon.connect(), Options::default()).expect("guest");
    server.take_away();
    let before = server.count();
    let middle = layers.content.len() / 2;
    let placed = guest.place(common::blk::IN, middle as u64 / 512, 4096);
    guest.queues[0].submit(&placed.chain, Layout::Direct);
    guest.queues[0].publish();
    until("the read's request stalls", || server.count() > before);
    let start = Instant::now();
    guest.session.stop_queue(0).expect("the queue stops");
    assert!(start.elapsed() < Duration::from_secs(20), "the stop waits");
    let used = guest.queues[0].take().expect("an answer");
    let answer = guest.answer(&placed, used);
    assert_eq!(answer.status, common::blk::IOERR);
    server.bring_back();
    guest.start_queue(0).expect("the queue starts");
    let found = guest.read(0, middle as u64 / 512, 4096);
    assert!(found == layers.content[middle..middle + 4096]);
}

/// SIGTERM ends a start that waits for a registry.
#[test]
fn a_signal_ends_a_start_that_waits() {
    let layers = Layers::new(1);
    let place = Place::default();
    let server = layers.registry_with_outages(Reply::Stall(Vec::new()));
    server.take_away();
    place.config("http", &server.host(), &layers.lowers(), json!({}));
    let socket = place.path("s");
    let mut child = common::daemon::command()
        .args(place.options())
        .arg("--socket")
        .arg(&socket)
        .spawn()
        .expect("the daemon");
    until("the daemon asks", || server.count() > 0);
    let pid = Pid::from_raw(child.id().cast_signed()).expect("a process");
    let _ = kill_process(pid, Signal::TERM);
    let status = child.wait().expect("its end");
    assert_eq!(status.code(), Some(0));
    assert!(!socket.exists());
}
