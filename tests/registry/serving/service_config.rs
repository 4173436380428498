//! Upstream's `overlaybd.json` under a served disk: each key that is taken has its effect.

use std::fs;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};

use common::daemon::Daemon;
use common::guest::{Guest, Options};
use common::registry_server::{Received, Reply, Server, answer, serve, until};
use common::remote::{Layers, Place};
use ovbd_vhost::format::trace::{self, TracedRead};
use serde_json::{Value, json};

use super::super::password_file;
use super::{Reader, UNIT};

const BASIC: &str = "Basic dXNlcjpwYXNz";

/// Bytes that only the trace asks for, of a blob of 8 MiB.
const TRACED: std::ops::Range<usize> = 4 << 20..7 << 20;

/// Requests of a replay that are under way at once, and bytes of a demand request.
const CONCURRENCY: usize = 3;
const REFILL: usize = 512 << 10;

fn guarded(request: &Received, blob: &[u8]) -> Reply {
    match request.header("authorization") {
        Some(BASIC) => serve(request, blob),
        _ => answer(401, &[("WWW-Authenticate", "Basic realm=\"r\"")], b""),
    }
}

fn is_traced(request: &Received) -> bool {
    let range = request.range();
    range.is_some_and(|(first, last)| TRACED.contains(&first) && TRACED.contains(&last))
}

/// Requests that are held until a test lets them go.
#[derive(Default)]
struct Held {
    now: AtomicUsize,
    most: AtomicUsize,
    released: AtomicBool,
}

impl Held {
    fn hold(&self) {
        let now = self.now.fetch_add(1, Ordering::SeqCst) + 1;
        self.most.fetch_max(now, Ordering::SeqCst);
        until("the requests are released", || {
            self.released.load(Ordering::SeqCst)
        });
        self.now.fetch_sub(1, Ordering::SeqCst);
    }
}

/// Writes a service configuration, and gives the option that names it.
fn service_config(place: &Place, config: &Value) -> [String; 2] {
    let path = place.path("overlaybd.json");
    fs::write(&path, config.to_string()).expect("a service configuration");
    ["--service-config".to_owned(), path.display().to_string()]
}

/// Every third unit of what only the trace asks for: too far apart to be requested together.
fn write_trace(place: &Place) -> String {
    let starts = TRACED.step_by(4 * UNIT);
    let reads = starts.map(|start| TracedRead {
        layer: 0,
        offset: start as u64,
        len: UNIT as u64,
    });
    let path = place.path("trace");
    fs::write(&path, trace::encode(&reads.collect::<Vec<_>>())).expect("a trace");
    path.display().to_string()
}

/// A peer-to-peer proxy and a registry that want a password. The proxy lacks what only the trace asks for.
fn servers(layers: &Layers, held: &Arc<Held>) -> (Server, Server) {
    let proxy = layers.registry_that(|request, blob| match is_traced(request) {
        true => answer(404, &[], b""),
        false => guarded(request, blob),
    });
    let held = Arc::clone(held);
    let origin = layers.registry_that(move |request, blob| {
        if is_traced(request) {
            held.hold();
        }
        guarded(request, blob)
    });
    (proxy, origin)
}

/// One file with all keys: the requests go to the proxy with the password and the user agent, the cache is
/// a directory in upstream's, a demand request has the size of a refill, and a replay has as many requests
/// under way as configured.
#[test]
fn every_key_has_its_effect() {
    let (layers, place, held) = (Layers::plain(8), Place::default(), Arc::<Held>::default());
    let (proxy, origin) = servers(&layers, &held);
    place.config("http", &origin.host(), &layers.lowers(), json!({}));
    password_file(&place.path("auth"), &origin.host(), "user", "pass");
    fs::create_dir(place.path("upstream")).expect("a folder");
    fs::write(place.path("upstream/sha256:0"), "of another format").expect("a file");
    let service = service_config(
        &place,
        &json!({
            "credentialConfig": {"mode": "file", "path": place.path("auth")},
            "cacheConfig": {
                "cacheType": "file", "cacheDir": place.path("upstream"), "cacheSizeGB": 1,
                "refillSize": REFILL,
            },
            "p2pConfig": {"enable": true, "address": format!("{}/p2p", proxy.host())},
            "prefetchConfig": {"concurrency": CONCURRENCY},
            "userAgent": "fleet/7 (test)",
        }),
    );
    let config = place.path("config.v1.json").display().to_string();
    let options = ["--config", &config, &service[0], &service[1]];
    // Opens the layers: the next start knows nothing of the link, and needs no request to open them.
    drop(Daemon::with::<&str>(&[], &options));
    let opened = proxy.count();
    assert_eq!(origin.count(), 0);

    let trace = write_trace(&place);
    let options = [&options[..], &["--prefetch", &trace]].concat();
    let daemon = Daemon::with::<&str>(&[], &options);
    until("the replay has begun", || {
        held.now.load(Ordering::SeqCst) == CONCURRENCY
    });
    // Two reads near each other: the second one asks for a whole refill.
    let mut guest = Guest::boot(daemon.connect(), Options::default()).expect("guest");
    for unit in [10, 12] {
        let start = unit * UNIT;
        let found = guest.read(0, start as u64 / 512, 4096);
        assert!(found == layers.content[start..start + 4096], "unit {unit}");
    }
    let demanded = proxy.received().split_off(opened);
    let demanded = demanded.iter().filter(|request| !is_traced(request));
    let ranges: Vec<_> = demanded.filter_map(Received::range).collect();
    let refill = (12 * UNIT, 12 * UNIT + REFILL - 1);
    assert!(ranges.contains(&refill), "{ranges:?}");

    held.released.store(true, Ordering::SeqCst);
    drop(guest);
    Reader::connect(&daemon).check_all(&layers.content);
    assert_eq!(held.most.load(Ordering::SeqCst), CONCURRENCY);
    let all = [proxy.received(), origin.received()].concat();
    for request in &all {
        assert_eq!(request.header("user-agent"), Some("fleet/7 (test)"));
    }
    assert!(origin.received().iter().all(is_traced));
    let prefix = format!("/p2p/http://{}/v2/", origin.host());
    let through_proxy = proxy.received();
    assert!(
        through_proxy
            .iter()
            .all(|one| one.target.starts_with(&prefix))
    );
    assert!(place.path("upstream/ovbd/version").exists());
    assert!(!place.path("cache").exists());
    let other = fs::read_to_string(place.path("upstream/sha256:0"));
    assert_eq!(other.expect("a file"), "of another format");
}

/// The older key of the credentials, and upstream's file where no key names one, which may be absent. A
/// peer-to-peer proxy where upstream expects one by default need not be there.
#[test]
fn credentials_are_read_where_upstream_keeps_them() {
    let layers = Layers::new(1);
    let guarded = layers.registry_that(guarded);
    let open = layers.registry();
    let (opt, none) = (
        "mount -t tmpfs tmpfs /opt",
        json!({"p2pConfig": {"enable": true}}),
    );
    for (server, is_default, has_file) in [
        (&guarded, false, true),
        (&guarded, true, true),
        (&open, true, false),
    ] {
        let place = Place::default();
        let auth = place.path("auth").display().to_string();
        password_file(&place.path("auth"), &server.host(), "user", "pass");
        let config = match is_default {
            true => none.clone(),
            false => json!({"credentialFilePath": auth}),
        };
        let setup = match is_default && has_file {
            true => format!("{opt}; mkdir /opt/overlaybd; cp {auth} /opt/overlaybd/cred.json"),
            false => opt.to_owned(),
        };
        place.config("http", &server.host(), &layers.lowers(), json!({}));
        let service = service_config(&place, &config);
        let daemon = place.serve_in_namespace(&setup, &[&service[0], &service[1]]);
        Reader::connect(&daemon).check_all(&layers.content);
    }
}
