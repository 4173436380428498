//! A disk from real servers that misbehave as real ones do: limits, links that expire, connections that
//! end, TLS in front of a registry, an HTTP proxy.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use common::certificates::Authority;
use common::nginx::Nginx;
use common::registries::{DockerRegistry, Storage};
use common::registry_server::{Reply, Server, answer, raw, serve, until};
use common::remote::{Layers, Place, REPOSITORY};
use ovbd_vhost::format::digest::Digest;
use rustix::process::{Signal, kill_process};
use serde_json::{Value, json};

use super::super::servers::link_hash;
use super::{Reader, UNIT, fetching};

/// Starts nginx with the blobs at the paths of a registry.
fn nginx(http: &str, server: &str, layers: &Layers) -> Nginx {
    let path = |blob: &Vec<u8>| format!("v2/{REPOSITORY}/blobs/{}", Digest::of(blob));
    let paths: Vec<_> = layers.blobs.iter().map(path).collect();
    let files = paths.iter().map(String::as_str);
    let files: Vec<_> = files.zip(layers.blobs.iter().map(Vec::as_slice)).collect();
    Nginx::start(http, server, &files)
}

/// Serves the layers, reads all of the disk, and gives what the control socket says then.
fn read_all(layers: &Layers, scheme: &str, host: &str, more: &[&str]) -> Value {
    let place = Place::default();
    place.config(scheme, host, &layers.lowers(), json!({}));
    let control = place.path("control").display().to_string();
    let daemon = place.serve(&[&["--control", &control], more].concat());
    Reader::connect(&daemon).check_all(&layers.content);
    fetching(&place)["fetcher"].clone()
}

#[test]
fn a_server_with_a_limit_is_read_within_it() {
    let layers = Layers::new(1);
    let zone = "limit_req_zone $remote_addr zone=all:1m rate=5r/s;";
    let limit = "limit_req zone=all;\nlimit_req_status 429;\nadd_header Retry-After 1 always;";
    let nginx = nginx(zone, limit, &layers);
    let seen = read_all(&layers, "http", nginx.host(), &[]);
    assert!(seen["answers_429"].as_u64() > Some(0), "{seen}");
    assert_eq!(seen["refusals"], 0, "{seen}");
}

#[test]
fn connections_that_end_after_three_requests_cost_nothing() {
    let layers = Layers::new(2);
    let nginx = nginx("", "keepalive_requests 3;", &layers);
    let seen = read_all(&layers, "http", nginx.host(), &[]);
    assert_eq!(seen["retries"], 0, "{seen}");
    assert_eq!(seen["answers_none"], 0, "{seen}");
}

/// Links that are good for two seconds, and a guest that reads for longer.
#[test]
fn links_that_expire_are_renewed_while_a_guest_reads() {
    let (layers, place) = (Layers::new(1), Place::default());
    let guard = "secure_link $arg_md5,$arg_e;\nsecure_link_md5 \"$secure_link_expires$uri KEY\";\n\
                 if ($secure_link = \"\") { return 403; }\nif ($secure_link = \"0\") { return 403; }";
    let store = nginx("", guard, &layers);
    let host = store.host().to_owned();
    let registry = layers.registry_that(move |request, _| {
        let now = SystemTime::now()
            .duration_since(UNIX_EPOCH)
            .expect("a time");
        let end = now.as_secs() + 2;
        let path = &request.target;
        let hash = link_hash(&format!("{end}{path} KEY"));
        let link = format!("http://{host}{path}?md5={hash}&e={end}");
        answer(307, &[("Location", link.as_str())], b"")
    });
    place.config("http", &registry.host(), &layers.lowers(), json!({}));
    let control = place.path("control").display().to_string();
    let daemon = place.serve(&["--control", &control]);
    let mut reader = Reader::connect(&daemon);
    let opened = registry.count();
    std::thread::sleep(Duration::from_secs(3));
    reader.check_all(&layers.content);
    assert!(registry.count() > opened, "{} requests", registry.count());
    let seen = fetching(&place);
    assert_eq!(seen["fetcher"]["refusals"], 0, "{seen}");
}

#[test]
fn a_registry_behind_tls_serves_a_disk() {
    let (layers, storage) = (Layers::new(1), Storage::default());
    for blob in &layers.blobs {
        storage.blob(REPOSITORY, blob);
    }
    let registry = DockerRegistry::open(storage);
    let authority = Authority::new();
    let own = authority.sign("IP:127.0.0.1");
    let forward = format!("location / {{ proxy_pass http://{}; }}", registry.host());
    let nginx = Nginx::start_tls(&own.certificate, &own.key, &forward);
    let authority = authority.file().display().to_string();
    let seen = read_all(
        &layers,
        "https",
        nginx.host(),
        &["--registry-ca", &authority],
    );
    assert_eq!(seen["retries"], 0, "{seen}");
}

/// The name of the registry is the proxy's to resolve.
#[test]
fn a_daemon_reaches_its_registry_through_the_proxy_of_its_environment() {
    let (layers, place) = (Layers::new(1), Place::default());
    let blobs = layers.handler(serve);
    let proxy = Server::start(move |request| match request.method.as_str() {
        "CONNECT" => Reply::Send(raw(200, &[], b"")),
        _ => blobs(request),
    });
    place.config("http", "r.invalid:5000", &layers.lowers(), json!({}));
    let setup = format!(
        "unset NO_PROXY no_proxy; export HTTPS_PROXY={}",
        proxy.url("")
    );
    let daemon = place.serve_in_namespace(&setup, &[]);
    Reader::connect(&daemon).check_all(&layers.content);
    let asked = proxy.received();
    let tunnels = asked.iter().filter(|one| one.method == "CONNECT");
    let targets: Vec<_> = tunnels.map(|one| one.target.as_str()).collect();
    assert!(!targets.is_empty());
    assert!(
        targets.iter().all(|target| *target == "r.invalid:5000"),
        "{targets:?}"
    );
}

/// A pause of a year holds up the read that got it, which the next fetcher asks for, and no other.
#[test]
fn a_pause_of_a_year_holds_up_one_read() {
    const PAUSED: usize = 10 * UNIT;
    let (layers, place) = (Layers::plain(8), Place::default());
    let year = [("Retry-After", "31536000")];
    let (busy, done) = (
        Arc::new(AtomicBool::new(true)),
        Arc::<AtomicBool>::default(),
    );
    let (is_busy, was_asked) = (Arc::clone(&busy), Arc::clone(&done));
    let server = layers.registry_that(move |request, blob| {
        let is_paused = request.range().is_some_and(|(first, _)| first == PAUSED);
        match is_paused && is_busy.load(Ordering::SeqCst) {
            true => {
                was_asked.store(true, Ordering::SeqCst);
                answer(429, &year, b"")
            }
            false => serve(request, blob),
        }
    });
    place.config("http", &server.host(), &layers.lowers(), json!({}));
    let daemon = place.serve(&[]);
    let mut reader = Reader::connect(&daemon);
    reader.ask([PAUSED]);
    until("the read is refused", || done.load(Ordering::SeqCst));
    busy.store(false, Ordering::SeqCst);
    for unit in [40, 60, 80] {
        reader.load.submit(1, (unit * UNIT / 512) as u64);
        reader.load.ring.publish();
        let mut found = None;
        until("a read elsewhere is finished", || {
            found = reader
                .load
                .take()
                .map(|done| (done.status, done.sector as usize * 512));
            found.is_some()
        });
        assert_eq!(found, Some((common::blk::OK, unit * UNIT)));
    }
    assert!(reader.load.take().is_none(), "the pause is kept");
    let (_, fetcher) = daemon.fetcher();
    kill_process(fetcher.expect("a fetcher"), Signal::KILL).expect("SIGKILL");
    reader.check(&layers.content);
}
