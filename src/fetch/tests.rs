//! Disk process, connection, fetcher and cache together, with an origin that does what it is told.

use std::collections::VecDeque;
use std::fs::File;
use std::io::{self, Read};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::mpsc::{self, Receiver};
use std::sync::{Arc, Mutex};
use std::thread;
use std::time::{Duration, Instant};

use tempfile::TempDir;

use super::{Body, Failure, Fetcher, From, Offer, Options, Origin};
use crate::cache::Cache;
use crate::format::digest::Digest;
use crate::format::presence::UNIT;
use crate::source::client::{Client, Patience};
use crate::source::link::Link;
use crate::source::{
    Blob, Error, FetchErrorKind, Located, RemoteBlob, Ticket, Waker, cached, link,
};

pub(super) const DEADLINE: Duration = Duration::from_secs(60);

/// What the origin does instead of serving the range.
#[derive(Debug)]
pub(super) enum Answer {
    Fail(Failure),
    /// So many bytes, then the end.
    Cut(u64),
    /// One bit is wrong.
    Flip,
    /// The first unit, then nothing until the sender is dropped.
    Pause(Receiver<()>),
}

/// A blob whose bytes are known, and which notes what it was asked for.
#[derive(Debug)]
pub(super) struct Fake {
    pub(super) bytes: Vec<u8>,
    script: Mutex<VecDeque<Answer>>,
    ranges: bool,
    asked: Mutex<Vec<(u64, u64)>>,
    served: Vec<AtomicU64>,
    /// Requests that mirrors must not answer.
    past_mirrors: AtomicU64,
}

impl Fake {
    pub(super) fn new(len: u64) -> Self {
        let bytes: Vec<u8> = (0..len)
            .map(|at| (at / 3 % 253) as u8 ^ (at >> 16) as u8)
            .collect();
        let served = (0..len.div_ceil(UNIT)).map(|_| AtomicU64::new(0)).collect();
        Self {
            bytes,
            script: Mutex::default(),
            ranges: true,
            asked: Mutex::default(),
            served,
            past_mirrors: AtomicU64::new(0),
        }
    }

    pub(super) fn script(self, answers: impl IntoIterator<Item = Answer>) -> Self {
        self.script.lock().unwrap().extend(answers);
        self
    }

    fn layer(&self) -> Arc<RemoteBlob> {
        Arc::new(RemoteBlob {
            digest: Digest::of(&self.bytes),
            size: None,
            blobs_url: "http://r.example/v2/a/blobs".to_owned(),
        })
    }

    pub(super) fn asked(&self) -> Vec<(u64, u64)> {
        self.asked.lock().unwrap().clone()
    }

    fn answer(&self, offset: u64, len: u64) -> Result<Body, Failure> {
        self.asked.lock().unwrap().push((offset, len));
        let mut part = self.bytes[offset as usize..(offset + len) as usize].to_vec();
        let answer = self.script.lock().unwrap().pop_front();
        let mut pause = None;
        match answer {
            Some(Answer::Fail(failure)) => return Err(failure),
            Some(Answer::Cut(most)) => part.truncate(most as usize),
            Some(Answer::Flip) => part[5] ^= 1,
            Some(Answer::Pause(receiver)) => pause = Some(receiver),
            None => {}
        }
        for unit in offset / UNIT..(offset + part.len() as u64).div_ceil(UNIT) {
            self.served[unit as usize].fetch_add(1, Ordering::Relaxed);
        }
        let reader = Paused {
            part: io::Cursor::new(part),
            pause,
        };
        Ok(Body {
            reader: Box::new(reader),
            len,
        })
    }
}

struct Paused {
    part: io::Cursor<Vec<u8>>,
    pause: Option<Receiver<()>>,
}

impl Read for Paused {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        if self.part.position() >= UNIT
            && let Some(pause) = self.pause.take()
        {
            let _ = pause.recv_timeout(DEADLINE);
        }
        self.part.read(buffer)
    }
}

impl Origin for Fake {
    fn read(&self, offset: u64, len: u64, from: From) -> Result<Body, Failure> {
        self.past_mirrors
            .fetch_add(u64::from(from == From::Registry), Ordering::Relaxed);
        if !self.ranges {
            self.asked.lock().unwrap().push((offset, len));
            let mut failure = Failure::passing(FetchErrorKind::Unreachable, "no ranges");
            failure.without_ranges = true;
            return Err(failure);
        }
        self.answer(offset, len)
    }

    fn read_whole(&self) -> Result<Body, Failure> {
        self.answer(0, self.bytes.len() as u64)
    }

    fn blob_len(&self) -> Result<u64, Failure> {
        Ok(self.bytes.len() as u64)
    }
}

/// A cache with a fetcher.
pub(super) struct Setup {
    pub(super) dir: TempDir,
    pub(super) fetcher: Fetcher,
    pub(super) fake: Arc<Fake>,
}

impl Setup {
    pub(super) fn new(fake: Fake) -> Self {
        let dir = tempfile::tempdir().unwrap();
        let fetcher = fetcher(&dir);
        let fake = Arc::new(fake);
        Self { dir, fetcher, fake }
    }

    pub(super) fn offer(&self) -> Offer {
        Offer {
            digest: Digest::of(&self.fake.bytes),
            len: None,
            origin: self.fake.clone(),
        }
    }

    /// A disk process that opened the blob.
    fn connect(&self) -> (Arc<Client>, Blob) {
        let (ours, theirs) = link::pair().unwrap();
        self.fetcher
            .attach(theirs, vec![self.offer()], None)
            .unwrap();
        let client = Arc::new(Client::start(ours, Patience::default(), || {}).unwrap());
        let blob = cached::open(&client, 0, &self.fake.layer()).unwrap();
        (client, blob)
    }

    fn check(&self, blob: &Blob, offset: u64, len: usize) {
        let mut found = vec![0; len];
        blob.read_exact_at(&mut found, offset).unwrap();
        assert!(
            found == self.fake.bytes[offset as usize..][..len],
            "{offset}+{len}"
        );
    }
}

fn fetcher(dir: &TempDir) -> Fetcher {
    let cache = Cache::open(&dir.path().join("cache")).unwrap();
    let mut options = Options::default();
    (options.demand_threads, options.other_threads) = (4, 2);
    // A full disk of the machine must not pause downloads.
    options.limits.free_percent = 0;
    Fetcher::start(cache, options, Arc::default()).unwrap()
}

pub(super) fn passing() -> Answer {
    Answer::Fail(Failure::passing(FetchErrorKind::Unreachable, "not now"))
}

pub(super) fn denied() -> Failure {
    Failure::definite(FetchErrorKind::Unauthorized, "r.example refuses access")
}

/// Waits until `condition` holds.
pub(super) fn until(what: &str, mut condition: impl FnMut() -> bool) {
    let start = Instant::now();
    while !condition() {
        assert!(start.elapsed() < DEADLINE, "{what}");
        thread::sleep(Duration::from_millis(5));
    }
}

#[test]
fn a_reader_gets_the_blobs_bytes_and_each_unit_is_fetched_once() {
    let setup = Setup::new(Fake::new(40 * UNIT + 123));
    let (_client, blob) = setup.connect();
    let end = blob.len();
    for (offset, len) in [
        (0, 100),
        (end - 50, 50),
        (5 * UNIT - 10, 20),
        (7, 3 * UNIT as usize),
    ] {
        setup.check(&blob, offset, len);
    }
    setup.check(&blob, 0, end as usize);
    let served = setup
        .fake
        .served
        .iter()
        .map(|count| count.load(Ordering::Relaxed));
    assert!(
        served.clone().all(|count| count == 1),
        "{:?}",
        served.collect::<Vec<_>>()
    );
    let counters = setup.fetcher.counters();
    assert_eq!(counters.start_bytes, end);
    assert_eq!(counters.requests, setup.fake.asked().len() as u64);
}

#[test]
fn a_full_blob_is_published_and_next_time_it_is_complete() {
    let setup = Setup::new(Fake::new(3 * UNIT + 1));
    let (_client, blob) = setup.connect();
    setup.check(&blob, 0, blob.len() as usize);
    until("published", || setup.fetcher.counters().published == 1);
    setup.check(&blob, 10, 1000);
    let requests = setup.fake.asked().len();
    let (_client, again) = setup.connect();
    setup.check(&again, 0, again.len() as usize);
    assert_eq!(setup.fake.asked().len(), requests);
}

#[test]
fn failures_that_pass_are_repeated_and_short_answers_continued() {
    let fake = Fake::new(8 * UNIT);
    let setup = Setup::new(fake.script([passing(), Answer::Cut(UNIT + 5), passing()]));
    let (_client, blob) = setup.connect();
    setup.check(&blob, 0, 4 * UNIT as usize);
    let asked = setup.fake.asked();
    assert_eq!(asked[0], asked[1]);
    assert_eq!(asked[2].0, UNIT, "from the first unit that did not come");
    assert_eq!(setup.fetcher.counters().retries, 3);
}

#[test]
fn a_definite_refusal_ends_an_opening_and_a_guest_waits_it_out() {
    let fake = Fake::new(8 * UNIT);
    let setup = Setup::new(fake.script([Answer::Fail(denied())]));
    let (client, blob) = setup.connect();
    let error = blob.read_exact_at(&mut [0; 10], 0).unwrap_err();
    let Error::Fetch { source, .. } = error else {
        panic!("{error}")
    };
    assert_eq!(source.kind(), FetchErrorKind::Unauthorized);
    assert_eq!(source.to_string(), "r.example refuses access");
    client.start_serving();
    setup.fake.script.lock().unwrap().push_back(passing());
    setup.check(&blob, 0, 10);
}

#[test]
fn waiters_are_woken_as_the_body_streams_in() {
    let (release, paused) = mpsc::channel();
    let setup = Setup::new(Fake::new(16 * UNIT).script([Answer::Pause(paused)]));
    let (client, blob) = setup.connect();
    let waker = Waker::new().unwrap();
    for (ticket, offset) in [(1, 0), (2, 2 * UNIT)] {
        let Located::Absent(range) = blob.locate(offset, 1) else {
            panic!("present");
        };
        range.request(&waker, Ticket(ticket));
    }
    let mut fetched = Vec::new();
    until("the first unit", || {
        waker.take(&mut fetched);
        let first = fetched.iter().find(|outcome| outcome.ticket == Ticket(1));
        first.is_some()
    });
    // The second is in the same answer, or in one of its own, which is not held up.
    drop(release);
    until("the second unit", || {
        waker.take(&mut fetched);
        fetched.len() == 2
    });
    assert!(fetched.iter().all(|outcome| outcome.result.is_ok()));
    assert_eq!(client.waiting(), 0);
}

#[test]
fn a_server_without_ranges_is_streamed_once() {
    let mut fake = Fake::new(20 * UNIT + 9);
    fake.ranges = false;
    let setup = Setup::new(fake);
    let (_client, blob) = setup.connect();
    thread::scope(|scope| {
        for at in [10, 3, 20] {
            let (setup, blob) = (&setup, &blob);
            scope.spawn(move || setup.check(blob, at * UNIT, 9));
        }
    });
    let whole = (0, setup.fake.bytes.len() as u64);
    let streams = setup
        .fake
        .asked()
        .iter()
        .filter(|asked| **asked == whole)
        .count();
    assert_eq!(streams, 1, "{:?}", setup.fake.asked());
}

#[test]
fn damaged_bytes_are_fetched_again_in_place() {
    let setup = Setup::new(Fake::new(8 * UNIT).script([Answer::Flip]));
    let (_client, blob) = setup.connect();
    let mut found = vec![0; 100];
    blob.read_exact_at(&mut found, 0).unwrap();
    assert!(found != setup.fake.bytes[..100]);
    assert!(blob.reject(0, 100));
    assert!(matches!(blob.locate(0, 1), Located::Absent(_)));
    setup.check(&blob, 0, 100);
    // As often as it may be, then not once, then again.
    for _ in 1..3 {
        assert!(blob.reject(0, 100));
        setup.check(&blob, 0, 100);
    }
    assert!(!blob.reject(0, 100));
    assert!(blob.reject(0, 100));
    assert!(setup.fetcher.counters().repair_bytes >= 3 * UNIT);
    assert_eq!(setup.fake.past_mirrors.load(Ordering::Relaxed), 3);
}

#[test]
fn a_successor_answers_what_a_killed_fetcher_did_not() {
    let (release, paused) = mpsc::channel::<()>();
    let script = [Answer::Cut(UNIT), Answer::Pause(paused)];
    let setup = Setup::new(Fake::new(8 * UNIT).script(script));
    let (ours, theirs) = link::pair().unwrap();
    let kept = theirs.try_clone().unwrap();
    setup
        .fetcher
        .attach(theirs, vec![setup.offer()], None)
        .unwrap();
    let client = Arc::new(Client::start(ours, Patience::default(), || {}).unwrap());
    let blob = cached::open(&client, 0, &setup.fake.layer()).unwrap();
    client.start_serving();
    let waker = Waker::new().unwrap();
    // The pause comes after the first unit of the second request.
    let Located::Absent(range) = blob.locate(3 * UNIT, 4 * UNIT as usize) else {
        panic!("present");
    };
    let Located::Absent(first) = blob.locate(0, 1) else {
        panic!("present");
    };
    first.request(&waker, Ticket(1));
    until("the first answer", || client.waiting() == 0);
    range.request(&waker, Ticket(2));
    until("asked for both", || setup.fake.asked().len() == 2);
    // It ends without an answer to the second, which comes after the pause.
    let Setup { dir, fetcher, fake } = setup;
    let dispatcher = Arc::clone(fetcher.dispatcher());
    thread::scope(|scope| {
        scope.spawn(|| drop(fetcher));
        until("the fetcher stops", || dispatcher.is_stopping());
        drop(release);
    });
    assert_eq!(client.waiting(), 1);
    let successor = self::fetcher(&dir);
    let setup = Setup {
        dir,
        fetcher: successor,
        fake,
    };
    setup
        .fetcher
        .attach(kept, vec![setup.offer()], None)
        .unwrap();
    let mut fetched = Vec::new();
    until("both answers", || {
        waker.take(&mut fetched);
        fetched.len() == 2
    });
    assert!(fetched.iter().all(|outcome| outcome.result.is_ok()));
    setup.check(&blob, 3 * UNIT, 5);
    assert!(setup.dir.path().exists());
}

#[test]
fn a_fetcher_that_ended_reads_nothing_of_its_connections() {
    for ticket in 0..8 {
        let setup = Setup::new(Fake::new(8 * UNIT));
        let (ours, theirs) = link::pair().unwrap();
        let kept = Link::new(theirs.try_clone().unwrap()).unwrap();
        let attached = setup.fetcher.attach(theirs, vec![setup.offer()], None);
        attached.unwrap();
        let client = Arc::new(Client::start(ours, Patience::default(), || {}).unwrap());
        let blob = cached::open(&client, 0, &setup.fake.layer()).unwrap();
        drop(setup.fetcher);
        let Located::Absent(range) = blob.locate(0, 1) else {
            panic!("present");
        };
        range.request(&Waker::new().unwrap(), Ticket(ticket));
        let mut read = 0;
        until("the request", || {
            kept.turn(Duration::from_millis(5), |_| read += 1).unwrap();
            read > 0
        });
    }
}

#[test]
fn two_fetchers_of_one_cache_fetch_each_unit_once() {
    let setup = Setup::new(Fake::new(100 * UNIT));
    let other = Setup {
        fetcher: fetcher(&setup.dir),
        dir: tempfile::tempdir().unwrap(),
        fake: setup.fake.clone(),
    };
    let ((_one, mine), (_two, theirs)) = (setup.connect(), other.connect());
    thread::scope(|scope| {
        for blob in [&mine, &theirs] {
            for thread in 0..4 {
                let setup = &setup;
                scope.spawn(move || {
                    for step in 0..25 {
                        let unit = (step * 37 + thread * 11) % 100;
                        setup.check(blob, unit * UNIT, UNIT as usize);
                    }
                });
            }
        }
    });
    let served = setup
        .fake
        .served
        .iter()
        .map(|count| count.load(Ordering::Relaxed));
    assert!(
        served.clone().all(|count| count <= 1),
        "{:?}",
        served.collect::<Vec<_>>()
    );
}

#[test]
fn a_sequential_reader_is_read_ahead_of() {
    let setup = Setup::new(Fake::new(400 * UNIT));
    let (client, blob) = setup.connect();
    client.start_serving();
    for unit in 0..400 {
        setup.check(&blob, unit * UNIT, UNIT as usize);
    }
    let counters = setup.fetcher.counters();
    assert!(counters.read_ahead_bytes > 0, "{counters:?}");
    // A thread that is late leaves a unit to the demand: how many depends on the machine.
    let requests = setup.fake.asked().len();
    assert!(requests < 200, "{requests}");
}

#[test]
fn a_file_that_was_cut_is_an_error_and_never_zeros() {
    let setup = Setup::new(Fake::new(8 * UNIT));
    let (_client, blob) = setup.connect();
    setup.check(&blob, 0, 10);
    let partial = setup.dir.path().join("cache/partial/sha256");
    for entry in std::fs::read_dir(partial).unwrap() {
        let path = entry.unwrap().path();
        if path.extension().is_some_and(|extension| extension == "map") {
            let file = File::options().write(true).open(path).unwrap();
            file.set_len(4096).unwrap();
        }
    }
    assert!(matches!(blob.locate(0, 10), Located::Absent(_)));
}
