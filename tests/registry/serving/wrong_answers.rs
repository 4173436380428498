//! A registry whose answers are wrong every time: a start ends with the reason, and does not wait for better ones.

use std::collections::HashSet;
use std::process::Output;
use std::sync::Mutex;
use std::thread;

use common::registry_server::{Received, Reply, Server, answer, raw, serve};
use common::remote::{Layers, Place};
use ovbd_vhost::format::digest::Digest;
use serde_json::json;

use super::answers::{Fault, fault};

/// Serves a blob with these bytes inverted.
fn inverted(request: &Received, blob: &[u8], wrong: std::ops::Range<usize>) -> Reply {
    let mut bytes = blob.to_vec();
    bytes[wrong].iter_mut().for_each(|byte| *byte = !*byte);
    serve(request, &bytes)
}

/// Bytes that are wrong, and what the error says besides the blob.
const BYTES: [(&str, Fault, &str); 5] = [
    (
        "zeros",
        |request, blob| serve(request, &vec![0; blob.len()]),
        "byte 0",
    ),
    (
        "the tar header",
        |request, blob| inverted(request, blob, 0..512),
        "byte 0",
    ),
    (
        "the header of the ZFile",
        |request, blob| inverted(request, blob, 1536 + 32..1536 + 40),
        "byte 1536",
    ),
    (
        "the trailer and the table",
        |request, blob| inverted(request, blob, blob.len() - 4096..blob.len()),
        "byte",
    ),
    (
        "a page of JSON",
        |request, blob| serve(request, &[b"{\"error\":", &blob[9..]].concat()),
        "JSON",
    ),
];

/// Answers that do not fit the request, and what the error says.
fn malformed() -> Vec<(&'static str, Fault, &'static str)> {
    let named = |name, words| (name, fault(name), words);
    let mut all = vec![
        named("wrong start", "instead of 0-"),
        named("no Content-Range", "status 206 with Content-Range"),
        named("multipart", "status 206 with Content-Range"),
        named("another length", "Content-Length"),
        named("gzip", "Content-Encoding"),
        named("a body that ends early", "the body ends after"),
        named("chunks that end early", "the body ends after"),
        named("garbage", "unexpected answer"),
        named("204", "HTTP status 204"),
        named("another total", "the size of blob"),
    ];
    all.push((
        "200 with another length",
        |_, blob| answer(200, &[], &blob[1..]),
        "the size of blob",
    ));
    all
}

/// Checks that the daemon ended with an error whose line has these words.
fn assert_refused(name: &str, output: &Output, expected: &[&str]) {
    let text = String::from_utf8_lossy(&output.stderr);
    assert_eq!(output.status.code(), Some(1), "{name}: {text}");
    // Lines of the fetcher's log may follow.
    let mut errors = text.lines().filter(|line| line.starts_with("ovbd-vhost: "));
    let error = errors.next().unwrap_or_default();
    for expected in expected {
        assert!(error.contains(expected), "{name}: {expected:?} in {text}");
    }
}

/// Starts a disk with a registry that answers each request for a blob like this.
fn check(name: &str, fault: Fault, words: &str) {
    let (layers, place) = (Layers::new(1), Place::default());
    let server = layers.registry_that(fault);
    place.config("http", &server.host(), &layers.lowers(), json!({}));
    let output = place.run(&[]);
    assert_refused(name, &output, &[&server.host(), "sha256:", words]);
    let result = place.result();
    let expected = "failed:Unexpected response: ";
    assert!(result.starts_with(expected), "{name}: {result}");
    assert!(result.contains(words), "{name}: {result}");
}

#[test]
fn wrong_bytes_end_a_start() {
    thread::scope(|scope| {
        for (name, fault, words) in BYTES {
            scope.spawn(move || check(name, fault, words));
        }
    });
}

#[test]
fn malformed_answers_end_a_start() {
    thread::scope(|scope| {
        for (name, fault, words) in malformed() {
            scope.spawn(move || check(name, fault, words));
        }
    });
}

/// Manifests of another digest than the one that the reference or the index names, and no manifest at all.
#[test]
fn wrong_manifests_end_a_start() {
    let layers = Layers::new(1);
    let (right, other) = (layers.manifest().to_string(), "{}");
    let digest = Digest::of(right.as_bytes()).to_string();
    let found = Digest::of(other.as_bytes()).to_string();
    let pinned = format!("@{digest}");
    let garbage = Reply::Close(b"garbage\r\n\r\n".to_vec());
    let half = raw(200, &[("Content-Length", "1000")], b"{");
    let cases = [
        (
            pinned.as_str(),
            answer(200, &[], other.as_bytes()),
            vec![digest.as_str(), &found],
        ),
        (pinned.as_str(), answer(200, &[], b"{"), vec![&digest]),
        (
            ":1",
            answer(200, &[], b"{"),
            vec!["cannot use the manifest"],
        ),
        (":1", answer(204, &[], b""), vec!["HTTP status 204"]),
        (":1", garbage, vec!["unexpected answer"]),
        (
            ":1",
            Reply::Close(half),
            vec!["manifests/1", "ends after 1 bytes"],
        ),
    ];
    thread::scope(|scope| {
        for (selector, reply, words) in cases {
            scope.spawn(move || {
                let place = Place::default();
                let server = Server::start(move |_| reply.clone());
                let output = place.run_image(&server.host(), selector, &[]);
                let host = server.host();
                assert_refused(selector, &output, &[&[host.as_str()], &words[..]].concat());
            });
        }
    });
}

/// Wrong bytes, and a refusal when they are fetched again.
#[test]
fn a_refused_repair_ends_a_start() {
    let (layers, place) = (Layers::new(1), Place::default());
    let served = Mutex::new(HashSet::new());
    let server = layers.registry_that(move |request, blob| {
        let first = served
            .lock()
            .expect("requests")
            .insert(request.target.clone());
        match first || request.range().is_some_and(|(first, _)| first != 0) {
            true => serve(request, &vec![0; blob.len()]),
            false => answer(404, &[], b""),
        }
    });
    place.config("http", &server.host(), &layers.lowers(), json!({}));
    let output = place.run(&[]);
    assert_refused(
        "a repair",
        &output,
        &[&server.host(), "sha256:", "does not have"],
    );
    let result = place.result();
    assert!(
        result.starts_with("failed:No such file or directory: "),
        "{result}"
    );
}
