//! Mirrors and peer-to-peer proxies under a served disk: used instead of the registry, with the right
//! credentials, for manifests too.

use common::registries::{ARCHITECTURE, free_address};
use common::registry_server::{Received, Reply, Server, answer, serve};
use common::remote::{Layers, Place};
use serde_json::json;

use super::images::{Documents, entry, put, registry};
use super::network::{NO_SERVER, with_names};
use super::{Reader, asked_units};

fn mirror_of(registry: &str, mirror: &Server) -> String {
    format!("{registry}={}", mirror.url(""))
}

/// What a digest pins starts from a mirror while the registry is away.
#[test]
fn a_pinned_image_starts_from_a_mirror_without_the_registry() {
    let (layers, place, documents) = (Layers::new(1), Place::default(), Documents::default());
    let mirror = registry(&layers, &documents);
    let image = put(&documents, "image", &layers.manifest().to_string());
    let index = json!({
        "schemaVersion": 2,
        "manifests": [entry(&image.to_string(), "linux", ARCHITECTURE)],
    });
    let index = put(&documents, "index", &index.to_string());
    let away = free_address();
    let options = ["--mirror", &mirror_of(&away, &mirror)];
    let daemon = place.serve_image(&away, &format!("@{index}"), &options);
    Reader::connect(&daemon).check_all(&layers.content);
    let asked = mirror.received();
    let manifests: Vec<_> = asked
        .iter()
        .filter(|one| one.target.contains("/manifests/"))
        .collect();
    assert_eq!(manifests.len(), 2, "{manifests:?}");
    for (request, digest) in manifests.iter().zip([index, image]) {
        let expected = format!("/manifests/{digest}?ns={away}");
        assert!(request.target.ends_with(&expected), "{request:?}");
    }
}

/// A tag is asked for at the registry alone, and a manifest that does not have its digest is passed by.
#[test]
fn a_mirror_names_no_tag_and_replaces_no_manifest() {
    let (layers, place, documents) = (Layers::new(1), Place::default(), Documents::default());
    let origin = registry(&layers, &documents);
    let image = put(&documents, "image", &layers.manifest().to_string());
    let index = json!({
        "schemaVersion": 2,
        "manifests": [entry(&image.to_string(), "linux", ARCHITECTURE)],
    });
    put(&documents, "tag", &index.to_string());
    let other = Layers::side_by_side(1, 256 << 10).manifest().to_string();
    let wrong = Documents::default();
    put(&wrong, &image.to_string(), &other);
    put(&wrong, "tag", &other);
    let mirror = registry(&Layers::side_by_side(1, 256 << 10), &wrong);
    let options = ["--mirror", &mirror_of(&origin.host(), &mirror)];
    let daemon = place.serve_image(&origin.host(), ":tag", &options);
    Reader::connect(&daemon).check_all(&layers.content);
    let asked = mirror.received();
    assert!(
        asked[0].target.contains(&format!("/manifests/{image}")),
        "{:?}",
        asked[0]
    );
    assert!(
        asked
            .iter()
            .all(|one| !one.target.contains("/manifests/tag"))
    );
}

/// `user:pass` and `user:new`, as HTTP has them.
const ORIGINS: &str = "Basic dXNlcjpwYXNz";
const OWN: &str = "Basic dXNlcjpuZXc=";

fn wants(authorization: &'static str) -> impl Fn(&Received, &[u8]) -> Reply + Send + Sync {
    move |request, blob| match request.header("authorization") {
        Some(given) if given == authorization => serve(request, blob),
        _ => answer(401, &[("WWW-Authenticate", "Basic realm=\"r\"")], b""),
    }
}

/// Each unit came once, from this server.
fn assert_served_once(layers: &Layers, server: &Server) {
    for blob in &layers.blobs {
        let counts = asked_units(server, blob);
        assert!(counts.iter().all(|count| *count >= 1), "{counts:?}");
        let twice = counts.iter().filter(|count| **count > 1).count();
        // Requests that were refused before the credentials were known.
        assert!(twice <= 4 * 2, "{counts:?}");
    }
}

/// All bytes come through a peer-to-peer proxy, which sends the daemon to another peer for half of them.
#[test]
fn a_proxy_and_the_peer_it_names_serve_the_disk() {
    let (layers, place) = (Layers::new(4), Place::default());
    let origin = layers.registry();
    let peer = layers.registry();
    let other = peer.url("/peer");
    let proxy = layers.registry_that(move |request, blob| {
        match request
            .range()
            .is_some_and(|(first, _)| first / super::UNIT % 2 == 1)
        {
            true => {
                let (_, name) = request.target.rsplit_once('/').expect("a path");
                answer(307, &[("Location", &format!("{other}/{name}"))], b"")
            }
            false => serve(request, blob),
        }
    });
    place.config("http", &origin.host(), &layers.lowers(), json!({}));
    let daemon = place.serve(&["--p2p", &proxy.url("/dadip2p")]);
    Reader::connect(&daemon).check_all(&layers.content);
    assert_eq!(origin.count(), 0);
    assert!(peer.count() > 0);
    assert_served_once(&layers, &proxy);
    let prefix = format!("/dadip2p/http://{}/v2/", origin.host());
    let asked = proxy.received();
    assert!(asked.iter().all(|one| one.target.starts_with(&prefix)));
}

/// A mirror on this machine passes the registry's challenge on, and gets its credentials. A mirror
/// elsewhere gets those that are configured for it, and never the registry's.
#[test]
fn a_mirror_gets_its_own_credentials_or_those_of_the_registry_it_stands_for() {
    const NAME: &str = "mirror.test";
    for is_here in [true, false] {
        let (place, setup) = with_names(&format!("127.0.0.1 {NAME}\n"), NO_SERVER);
        let layers = Layers::new(2);
        let origin = layers.registry_that(wants(ORIGINS));
        let mirror = layers.registry_that(wants(if is_here { ORIGINS } else { OWN }));
        let host = match is_here {
            true => mirror.host(),
            false => mirror.host().replace("127.0.0.1", NAME),
        };
        let entry = |password| json!({"username": "user", "password": password});
        let auths = json!({"auths": {origin.host(): entry("pass"), &host: entry("new")}});
        std::fs::write(place.path("auth"), auths.to_string()).expect("credentials");
        place.config("http", &origin.host(), &layers.lowers(), json!({}));
        let auth = place.path("auth").display().to_string();
        let mirror_option = format!("{}=http://{host}", origin.host());
        let options = ["--credentials", &auth, "--mirror", &mirror_option];
        let daemon = place.serve_in_namespace(&setup, &options);
        Reader::connect(&daemon).check_all(&layers.content);
        assert_eq!(origin.count(), 0, "{host}");
        assert_served_once(&layers, &mirror);
        let foreign = if is_here { OWN } else { ORIGINS };
        let asked = mirror.received();
        let gave = |one: &Received| one.header("authorization") == Some(foreign);
        assert!(!asked.iter().any(gave), "{host}: {asked:?}");
    }
}
