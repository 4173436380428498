//! What cannot be served: one line that says why, and upstream's words in the result file.

use std::process::Output;
use std::time::{Duration, Instant};

use common::certificates::{Authority, Demands};
use common::daemon;
use common::registries::free_address;
use common::registry_server::{Reply, Server, answer, serve};
use common::remote::{Layers, Place};
use serde_json::json;

fn assert_refused(output: &Output, words: &str) {
    let text = String::from_utf8_lossy(&output.stderr);
    assert_eq!(output.status.code(), Some(1), "{text}");
    let last = text.lines().last().unwrap_or_default();
    assert!(
        last.starts_with("ovbd-vhost: ") && last.contains(words),
        "{text}"
    );
}

/// Starts the daemon with a registry that gives this reply, and checks what it says.
fn check(reply: &Reply, words: &str, upstreams: &str) {
    let given = reply.clone();
    let server = Server::start(move |_| given.clone());
    check_server("http", &server, words, upstreams);
}

fn check_server(scheme: &str, server: &Server, words: &str, upstreams: &str) {
    let layers = Layers::new(1);
    let place = Place::default();
    place.config(scheme, &server.host(), &layers.lowers(), json!({}));
    let start = Instant::now();
    let output = place.run(&[]);
    assert_refused(&output, words);
    let result = place.result();
    assert!(
        result.starts_with(&format!("failed:{upstreams}")),
        "{result}"
    );
    assert!(!place.path("s").exists());
    // Far from the minute that a registry without an answer gets.
    assert!(start.elapsed() < Duration::from_secs(15), "{words}");
}

#[test]
fn refusals_end_the_start_at_once() {
    let basic = [("WWW-Authenticate", "Basic realm=\"r\"")];
    let denied = "Authentication failed";
    check(&answer(401, &basic, b""), "refuses access", denied);
    check(&answer(403, &[], b""), "refuses access", denied);
    check(
        &answer(404, &[], b""),
        "does not have",
        "No such file or directory",
    );
    let authority = Authority::new();
    let tls = authority.sign("IP:127.0.0.1").server(Demands::default());
    let server = Server::start_tls(tls, |_| answer(404, &[], b""));
    check_server("https", &server, "TLS", "Connection failed");
}

#[test]
fn a_blob_of_another_length_is_refused() {
    let layers = Layers::new(1);
    let place = Place::default();
    let server = layers.registry_that(|request, blob| serve(request, &[blob, b"more"].concat()));
    place.config("http", &server.host(), &layers.lowers(), json!({}));
    let output = place.run(&[]);
    assert_refused(&output, "expected");
    assert!(
        place.result().starts_with("failed:Unexpected response"),
        "{}",
        place.result()
    );
}

#[test]
fn what_is_missing_on_the_command_line_is_named() {
    let layers = Layers::new(1);
    let place = Place::default();
    let host = free_address();
    place.config("http", &host, &layers.lowers(), json!({}));
    let config = place.path("config.v1.json").display().to_string();
    let socket = place.path("s").display().to_string();
    let output = daemon::run(["--config", &config, "--socket", &socket]);
    assert_refused(&output, "--cache");
    assert!(place.result().contains("--cache"), "{}", place.result());
    let output = daemon::run(["--image", "r.example/a/b", "--socket", &socket]);
    assert_refused(&output, "r.example/a/b:latest is in a registry");
    let output = daemon::run(["--image", "no such", "--socket", &socket]);
    assert_eq!(output.status.code(), Some(2));
}
