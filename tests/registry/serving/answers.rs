//! Answers that are not what was asked for, one of each kind, under a guest that reads.

use std::sync::Arc;
use std::sync::Mutex;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use common::content::Random;
use common::nginx::Nginx;
use common::registries::{DockerRegistry, Storage};
use common::registry_server::{Received, Reply, Server, answer, raw, serve};
use common::remote::{Layers, Place, REPOSITORY};
use ovbd_vhost::format::digest::Digest;
use serde_json::json;

use super::allowed::received_bytes;
use super::{Reader, asked_units};

/// An answer in place of the right one.
pub(super) type Fault = fn(&Received, &[u8]) -> Reply;

/// Headers and body of the right answer.
fn right<'b>(request: &Received, blob: &'b [u8]) -> (String, &'b [u8]) {
    let (first, last) = request.range().expect("a range");
    let last = last.min(blob.len() - 1);
    let range = format!("bytes {first}-{last}/{}", blob.len());
    (range, &blob[first..=last])
}

fn with_range(range: &str, more: &[(&str, &str)], body: &[u8]) -> Reply {
    answer(206, &[&[("Content-Range", range)], more].concat(), body)
}

/// A 206 whose length is that of `body`, but of which only a part is sent.
fn cut(request: &Received, blob: &[u8]) -> Vec<u8> {
    let (range, body) = right(request, blob);
    let length = body.len().to_string();
    let headers = [
        ("Content-Range", range.as_str()),
        ("Content-Length", &length),
    ];
    raw(206, &headers, &body[..body.len() / 2])
}

/// Faults that pass: the bytes are asked for again soon.
const PASSING: [(&str, Fault); 24] = [
    ("wrong start", |request, blob| {
        let (first, last) = request.range().expect("a range");
        let range = format!("bytes {}-{}/{}", first + 1, last + 1, blob.len());
        with_range(&range, &[], right(request, blob).1)
    }),
    ("no Content-Range", |request, blob| {
        answer(206, &[], right(request, blob).1)
    }),
    ("Content-Range without numbers", |request, blob| {
        with_range("bytes */*", &[], right(request, blob).1)
    }),
    ("multipart", |request, blob| {
        let kind = [("Content-Type", "multipart/byteranges; boundary=x")];
        answer(206, &kind, right(request, blob).1)
    }),
    ("gzip", |request, blob| {
        let (range, body) = right(request, blob);
        with_range(&range, &[("Content-Encoding", "gzip")], body)
    }),
    ("another length", |request, blob| {
        let (range, body) = right(request, blob);
        with_range(&range, &[], &body[1..])
    }),
    ("more bytes than promised", |request, blob| {
        let (range, body) = right(request, blob);
        let headers = [("Content-Range", range.as_str())];
        Reply::Close(raw(206, &headers, &[body, b"more"].concat()))
    }),
    ("204", |_, _| Reply::Send(raw(204, &[], b""))),
    ("304", |_, _| Reply::Send(raw(304, &[], b""))),
    ("a body that ends early", |request, blob| {
        Reply::Close(cut(request, blob))
    }),
    ("a body that is reset", |request, blob| {
        Reply::Reset(cut(request, blob))
    }),
    ("chunks that end early", |request, blob| {
        let (range, body) = right(request, blob);
        let headers = [
            ("Content-Range", range.as_str()),
            ("Transfer-Encoding", "chunked"),
        ];
        let chunk = [b"100\r\n", &body[..256], b"\r\n0\r\n\r\n"].concat();
        Reply::Send(raw(206, &headers, &chunk))
    }),
    ("a long header", |_, _| {
        let long = "x".repeat(1 << 20);
        Reply::Close(raw(206, &[("X", &long)], b""))
    }),
    ("garbage", |_, _| Reply::Close(b"garbage\r\n\r\n".to_vec())),
    ("nothing", |_, _| Reply::Close(Vec::new())),
    ("a reset", |_, _| Reply::Reset(Vec::new())),
    ("408", |_, _| answer(408, &[], b"")),
    ("429 for a second", |_, _| {
        answer(429, &[("Retry-After", "1")], b"")
    }),
    ("429 until a date", |_, _| {
        let dates = [
            ("Date", "Fri, 24 May 2013 00:00:00 GMT"),
            ("Retry-After", "Fri, 24 May 2013 00:00:01 GMT"),
        ];
        answer(429, &dates, b"")
    }),
    ("500", |_, _| answer(500, &[], b"")),
    ("502", |_, _| answer(502, &[], b"")),
    ("503", |_, _| answer(503, &[], b"")),
    ("504", |_, _| answer(504, &[], b"")),
    ("600", |_, _| answer(600, &[], b"")),
];

/// Faults that seem definite, after which a guest's bytes are asked for again after a while; and
/// bodies that do not come.
const LASTING: [(&str, Fault); 6] = [
    ("another total", |request, blob| {
        let (first, last) = request.range().expect("a range");
        let range = format!("bytes {first}-{last}/{}", blob.len() + 1);
        with_range(&range, &[], right(request, blob).1)
    }),
    ("416 that lies about its body", |_, blob| {
        let headers = [
            ("Content-Range", "bytes */50"),
            ("Content-Length", "1000000"),
        ];
        let _ = blob;
        Reply::Stall(raw(416, &headers, b"{}"))
    }),
    ("404", |_, _| answer(404, &[], b"")),
    ("no answer", |_, _| Reply::Stall(Vec::new())),
    ("half a body", |request, blob| {
        Reply::Stall(cut(request, blob))
    }),
    ("one byte a second", |request, blob| {
        let (range, body) = right(request, blob);
        let headers = [("Content-Range", range.as_str())];
        Reply::Drip(raw(206, &headers, body), Duration::from_secs(1))
    }),
];

/// The fault of this name.
pub(super) fn fault(name: &str) -> Fault {
    let mut all = PASSING.iter().chain(&LASTING);
    all.find(|fault| fault.0 == name).expect("a fault").1
}

/// Serves a disk, and answers each of these faults once while the guest reads.
fn survive(faults: &'static [(&'static str, Fault)]) {
    let layers = Layers::new(8);
    let place = Place::default();
    let armed = Arc::new(AtomicBool::new(false));
    let left = Arc::new(Mutex::new(faults.to_vec()));
    let (active, next) = (Arc::clone(&armed), Arc::clone(&left));
    let server = layers.registry_that(move |request, blob| {
        let fault = match active.load(Ordering::SeqCst) {
            true => next.lock().expect("faults").pop(),
            false => None,
        };
        fault.map_or_else(|| serve(request, blob), |(_, fault)| fault(request, blob))
    });
    place.config("http", &server.host(), &layers.lowers(), json!({}));
    let mut daemon = place.serve(&[]);
    let mut reader = Reader::connect(&daemon);
    armed.store(true, Ordering::SeqCst);
    for round in 0..2 {
        reader.ask((0..32).map(|read| (read * 2 + round) << 17));
        reader.check(&layers.content);
    }
    reader.check_all(&layers.content);
    let left: Vec<_> = left
        .lock()
        .expect("faults")
        .iter()
        .map(|fault| fault.0)
        .collect();
    assert!(left.is_empty(), "{left:?}");
    // A fault costs the units of its request once more, and a broken connection all in flight.
    let asked: usize = layers
        .blobs
        .iter()
        .flat_map(|blob| asked_units(&server, blob))
        .sum();
    let units: usize = layers
        .blobs
        .iter()
        .map(|blob| blob.len().div_ceil(super::UNIT))
        .sum();
    let most = units + faults.len() * 2 * 16;
    assert!(asked <= most, "{asked} units were asked for, of {units}");
    daemon.assert_alive();
}

#[test]
fn faults_that_pass_are_not_seen_by_the_guest() {
    survive(&PASSING);
}

#[test]
fn faults_that_last_are_waited_out() {
    survive(&LASTING);
}

/// Any fault at any request, while random reads go on.
#[test]
fn random_faults_never_reach_the_guest() {
    let layers = Layers::new(16);
    let place = Place::default();
    let armed = Arc::new(AtomicBool::new(false));
    let (active, random) = (Arc::clone(&armed), Mutex::new(Random::new(5)));
    let server = layers.registry_that(move |request, blob| {
        let mut random = random.lock().expect("numbers");
        match active.load(Ordering::SeqCst) && random.below(4) == 0 {
            true => PASSING[random.below(PASSING.len() as u64) as usize].1(request, blob),
            false => serve(request, blob),
        }
    });
    place.config("http", &server.host(), &layers.lowers(), json!({}));
    let daemon = place.serve(&[]);
    let mut reader = Reader::connect(&daemon);
    armed.store(true, Ordering::SeqCst);
    let mut random = Random::new(6);
    for _ in 0..40 {
        let last = layers.content.len() as u64 / 512 - 32;
        reader.ask((0..8).map(|_| random.within(0..=last) as usize * 512));
        reader.check(&layers.content);
    }
    armed.store(false, Ordering::SeqCst);
    reader.check_all(&layers.content);
}

/// HTTP/1.0: no length, and the end of the connection is the end of the body.
#[test]
fn a_server_of_http_1_0_is_read() {
    let layers = Layers::new(2);
    let place = Place::default();
    let server = layers.registry_that(|request, blob| {
        let (range, body) = right(request, blob);
        let head = format!("HTTP/1.0 206 X\r\nContent-Range: {range}\r\n\r\n");
        Reply::Close([head.as_bytes(), body].concat())
    });
    place.config("http", &server.host(), &layers.lowers(), json!({}));
    let daemon = place.serve(&[]);
    Reader::connect(&daemon).check_all(&layers.content);
}

/// A server without ranges sends each blob once, whatever is read.
#[test]
fn a_server_without_ranges_sends_each_blob_once() {
    let layers = Layers::new(4);
    let place = Place::default();
    let names = layers.blobs.iter().map(|blob| {
        let digest = Digest::of(blob);
        format!("v2/{REPOSITORY}/blobs/{digest}")
    });
    let names: Vec<_> = names.collect();
    let files = names
        .iter()
        .map(String::as_str)
        .zip(layers.blobs.iter().map(Vec::as_slice));
    let files: Vec<_> = files.collect();
    let nginx = Nginx::start("", "max_ranges 0;", &files);
    place.config("http", nginx.host(), &layers.lowers(), json!({}));
    let control = place.path("control").display().to_string();
    let daemon = place.serve(&["--control", &control]);
    Reader::connect(&daemon).check_all(&layers.content);
    let seen = super::fetching(&place);
    // Each blob: its first bytes, a refusal of the last ones, and all of it.
    let requests = seen["fetcher"]["requests"].as_u64().expect("requests");
    assert!(requests <= 3 * 2 + 2, "{seen}");
    // What came with a first answer may come again.
    let bytes = received_bytes(&seen);
    let stored: usize = layers.blobs.iter().map(Vec::len).sum();
    let most = stored + layers.blobs.len() * super::UNIT;
    assert!((stored as u64..=most as u64).contains(&bytes), "{seen}");
}

/// Debian's registry as a pull-through proxy: everything at first, and ranges from then on.
#[test]
fn a_cold_proxy_is_waited_for() {
    let layers = Layers::new(4);
    let place = Place::default();
    let storage = Storage::default();
    for blob in &layers.blobs {
        storage.blob(REPOSITORY, blob);
    }
    let origin = DockerRegistry::open(storage);
    let proxy = DockerRegistry::proxy(&format!("http://{}", origin.host()));
    place.config("http", proxy.host(), &layers.lowers(), json!({}));
    let control = place.path("control").display().to_string();
    let daemon = place.serve(&["--control", &control]);
    Reader::connect(&daemon).check_all(&layers.content);
    let seen = super::fetching(&place);
    let stored: usize = layers.blobs.iter().map(Vec::len).sum();
    let most = stored + layers.blobs.len() * super::UNIT;
    let bytes = received_bytes(&seen);
    assert!((stored as u64..=most as u64).contains(&bytes), "{seen}");
    // At most two that are answered with everything for each blob, and one for each unit.
    let requests = seen["fetcher"]["requests"].as_u64().expect("requests");
    let units = layers
        .blobs
        .iter()
        .map(|blob| blob.len().div_ceil(super::UNIT));
    let most = units.sum::<usize>() + 2 * layers.blobs.len();
    assert!(requests <= most as u64, "{seen}");
}

/// Mirrors in every state are passed by, and a peer-to-peer proxy too.
#[test]
fn dead_mirrors_do_not_keep_a_guest_waiting() {
    let layers = Layers::new(4);
    let origin = layers.registry();
    let silent = Server::start(|_| Reply::Stall(Vec::new()));
    let poisoned = layers.registry_that(|request, blob| {
        let wrong: Vec<u8> = blob.iter().map(|byte| byte ^ 1).collect();
        serve(request, &wrong)
    });
    for (option, url) in [
        ("--mirror", silent.url("")),
        ("--mirror", poisoned.url("")),
        ("--p2p", silent.url("/p2p")),
        ("--p2p", poisoned.url("/p2p")),
        (
            "--mirror",
            format!("http://{}", common::registries::free_address()),
        ),
    ] {
        let place = Place::default();
        place.config("http", &origin.host(), &layers.lowers(), json!({}));
        let value = match option {
            "--mirror" => format!("{}={url}", origin.host()),
            _ => url.clone(),
        };
        let before = (origin.count(), silent.count());
        let daemon = place.serve(&[option, &value]);
        Reader::connect(&daemon).check_all(&layers.content);
        assert!(origin.count() > before.0, "{option} {url}");
        // Five that fail, and those that are under way meanwhile; then one a pause of 5 seconds and more.
        let asked = silent.count() - before.1;
        assert!(asked <= 5 + 24 + 8, "{option} {url}: {asked} requests");
    }
}
