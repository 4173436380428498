//! How many requests an opening takes, and how many of them side by side.

use std::collections::HashMap;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Arc, Condvar, Mutex};
use std::time::Duration;

use common::daemon::Daemon;
use common::layers::{LayerBuilder, wrap_tar};
use common::registries;
use common::registry_server::{Reply, Server, answer, serve, until};
use common::remote::{Layers, Place};
use ovbd_vhost::format::digest::Digest;
use serde_json::json;

use super::{Reader, UNIT, asked_units, fetching};

const MIB: usize = 1 << 20;

/// Two ranges of a layer, or a small one whole, whatever their number; none the second time.
#[test]
fn an_opening_takes_two_ranges_a_layer_and_a_second_one_none() {
    for (count, piece, each) in [
        (1, 2 * MIB, 2),
        (8, 2 * MIB, 2),
        (32, 5 * MIB / 4, 2),
        (255, UNIT, 1),
    ] {
        let layers = Layers::side_by_side(count, piece);
        let place = Place::default();
        let server = layers.registry();
        place.config("http", &server.host(), &layers.lowers(), json!({}));
        let daemon = place.serve(&[]);
        assert_eq!(server.count(), count * each, "{count} layers");
        drop(daemon);
        let daemon = place.serve(&[]);
        assert_eq!(server.count(), count * each, "{count} layers again");
        let mut reader = Reader::connect(&daemon);
        reader.ask((0..32).map(|read| read * layers.content.len() / 32 / 512 * 512));
        reader.check(&layers.content);
        for blob in &layers.blobs {
            let counts = asked_units(&server, blob);
            assert!(counts.iter().all(|count| *count <= 1), "{counts:?}");
        }
    }
}

const LAYERS: usize = 8;

/// Requests that are answered once all of them are there.
#[derive(Default)]
struct Wave {
    arrived: Mutex<usize>,
    all: Condvar,
    was_late: AtomicBool,
}

impl Wave {
    /// Waits until `size` requests have arrived.
    fn join(&self, size: usize) {
        let mut arrived = self.arrived.lock().expect("a number");
        *arrived += 1;
        self.all.notify_all();
        let patience = Duration::from_secs(20);
        let short = |arrived: &mut usize| *arrived < size;
        let waited = self.all.wait_timeout_while(arrived, patience, short);
        if waited.expect("a number").1.timed_out() {
            self.was_late.store(true, Ordering::SeqCst);
        }
    }

    fn assert_whole(&self) {
        let was_late = self.was_late.load(Ordering::SeqCst);
        assert!(!was_late, "the requests came one after the other");
    }
}

/// Requests that the fetcher has under way at once.
const AT_ONCE: usize = 16;

/// The ranges of all layers are asked for side by side: after the first answer, which tells how the
/// registry wants to be talked to, as many as the fetcher has threads are on their way before the next
/// one comes. So 1, 8, 32 and 255 layers take 2, 2, 5 and 17 round trips.
#[test]
fn layers_are_opened_in_waves_of_many_requests() {
    for (count, piece, requests, round_trips) in [
        (1, 2 * MIB, 2, 2),
        (8, 2 * MIB, 16, 2),
        (32, 5 * MIB / 4, 64, 5),
        (255, UNIT, 255, 17),
    ] {
        let layers = Layers::side_by_side(count, piece);
        let place = Place::default();
        let waves: Vec<_> = (1..round_trips).map(|_| Wave::default()).collect();
        let (number, waves) = (AtomicUsize::new(0), Arc::new(waves));
        let joined = Arc::clone(&waves);
        let server = layers.registry_that(move |request, blob| {
            if let Some(later) = number.fetch_add(1, Ordering::SeqCst).checked_sub(1) {
                let wave = later / AT_ONCE;
                let size = AT_ONCE.min(requests - 1 - wave * AT_ONCE);
                joined[wave].join(size);
            }
            serve(request, blob)
        });
        place.config("http", &server.host(), &layers.lowers(), json!({}));
        let daemon = place.serve(&[]);
        assert_eq!(server.count(), requests);
        waves.iter().for_each(Wave::assert_whole);
        let mut reader = Reader::connect(&daemon);
        reader.ask([0]);
        reader.check(&layers.content);
    }
}

/// With a token, the wave begins once the token is there: three round trips, and a request each for the
/// challenge and the token.
#[test]
fn all_layers_are_opened_in_one_wave_after_the_token() {
    let layers = Layers::side_by_side(LAYERS, 2 * MIB);
    let place = Place::default();
    let wave = Arc::new(Wave::default());
    let joined = Arc::clone(&wave);
    let tokens = Server::start(|_| answer(200, &[], br#"{"token":"T","expires_in":3600}"#));
    let challenge = format!("Bearer realm=\"{}\"", tokens.url("/t"));
    let server = layers.registry_that(move |request, blob| {
        if request.header("authorization") != Some("Bearer T") {
            return answer(401, &[("WWW-Authenticate", challenge.as_str())], b"");
        }
        joined.join(2 * LAYERS);
        serve(request, blob)
    });
    place.config("http", &server.host(), &layers.lowers(), json!({}));
    let _daemon = place.serve(&[]);
    assert_eq!((server.count(), tokens.count()), (2 * LAYERS + 1, 1));
    wave.assert_whole();
}

/// What the fetcher learned to get the manifest serves the layers: one challenge and one token, and the
/// layers are asked for in the next round trip. The layers have the URL that is used.
#[test]
fn an_image_is_opened_with_one_challenge_and_one_token() {
    let layers = Layers::side_by_side(LAYERS, 2 * MIB);
    let place = Place::default();
    let digest = |blob: &[u8]| Digest::of(blob).to_string();
    let named = |blob: &Vec<u8>| (digest(blob), blob.clone());
    let blobs: HashMap<_, _> = layers.blobs.iter().map(named).collect();
    let listed = layers
        .blobs
        .iter()
        .map(|blob| registries::layer(&Digest::of(blob), blob.len() as u64));
    let manifest = registries::manifest(&Digest::of(b"{}"), listed.collect()).to_string();
    let wave = Arc::new(Wave::default());
    let joined = Arc::clone(&wave);
    let tokens = Server::start(|_| answer(200, &[], br#"{"token":"T","expires_in":3600}"#));
    let challenge = format!("Bearer realm=\"{}\"", tokens.url("/t"));
    let server = Server::start(move |request| {
        if request.header("authorization") != Some("Bearer T") {
            return answer(401, &[("WWW-Authenticate", challenge.as_str())], b"");
        }
        let (path, name) = request.target.rsplit_once('/').expect("a path");
        if path.ends_with("/manifests") {
            let kind = "application/vnd.oci.image.manifest.v1+json";
            return answer(200, &[("Content-Type", kind)], manifest.as_bytes());
        }
        joined.join(2 * LAYERS);
        serve(request, &blobs[name])
    });
    let (host, cache) = (server.host(), place.path("cache").display().to_string());
    let (reference, control) = (
        format!("{host}/a/b:1"),
        place.path("control").display().to_string(),
    );
    let options = [
        "--image",
        &reference,
        "--insecure-registry",
        &host,
        "--cache",
        &cache,
        "--control",
        &control,
    ];
    let daemon = Daemon::with::<&str>(&[], &options);
    assert_eq!((server.count(), tokens.count()), (2 * LAYERS + 2, 1));
    wave.assert_whole();
    for (layer, blob) in fetching(&place)["layers"]
        .as_array()
        .expect("layers")
        .iter()
        .zip(&layers.blobs)
    {
        assert_eq!(
            layer["layer"],
            format!("http://{host}/v2/a/b/blobs/{}", digest(blob))
        );
    }
    let mut reader = Reader::connect(&daemon);
    reader.ask([0]);
    reader.check(&layers.content);
}

/// The index of many small mappings is longer than the end of the layer that is asked for at once.
#[test]
fn an_index_that_is_longer_than_guessed_takes_one_wave_more() {
    let mut layers = Layers::plain(8);
    let mut layer = LayerBuilder::new(layers.content.len() as u64).uuids(1, 0);
    for (sector, bytes) in layers.content.chunks(512).enumerate() {
        layer = layer.data(sector as u64, bytes);
    }
    layers.blobs = vec![wrap_tar(&layer.lsmt())];
    let place = Place::default();
    let server = layers.registry();
    place.config("http", &server.host(), &layers.lowers(), json!({}));
    let daemon = place.serve(&[]);
    let opened = server.count();
    assert!((3..=4).contains(&opened), "{opened} requests");
    Reader::connect(&daemon).check_all(&layers.content);
    let counts = asked_units(&server, &layers.blobs[0]);
    assert!(counts.iter().all(|count| *count == 1), "{counts:?}");
}

/// A cache with holes is enough to start from while the registry is away.
#[test]
fn a_cache_with_holes_starts_without_the_registry() {
    let layers = Layers::new(4);
    let place = Place::default();
    let server = layers.registry_with_outages(Reply::Reset(Vec::new()));
    place.config("http", &server.host(), &layers.lowers(), json!({}));
    let daemon = place.serve(&[]);
    let mut reader = Reader::connect(&daemon);
    reader.ask([0, 2 * MIB]);
    reader.check(&layers.content);
    drop((reader, daemon));
    server.take_away();
    let before = server.count();
    let daemon = place.serve(&[]);
    let mut reader = Reader::connect(&daemon);
    reader.ask([0, 2 * MIB]);
    reader.check(&layers.content);
    assert_eq!(server.count(), before, "all of it is there");
    reader.ask([MIB + UNIT, 3 * MIB + UNIT]);
    until("a request fails", || server.count() > before);
    assert!(reader.load.take().is_none());
    server.bring_back();
    reader.check(&layers.content);
    reader.check_all(&layers.content);
}
