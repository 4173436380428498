//! Redirects under a served disk: followed without credentials, refused where they lead astray.

use common::registry_server::{Received, Reply, Server, answer, serve};
use common::remote::{Layers, Place};
use serde_json::json;

use super::{Reader, asked_units};

const BASIC: &str = "Basic dXNlcjpwYXNz";

/// A registry that wants a password, and what it answers then.
fn registry(
    layers: &Layers,
    reply: impl Fn(&Received, &[u8]) -> Reply + Send + Sync + 'static,
) -> Server {
    layers.registry_that(move |request, blob| match request.header("authorization") {
        Some(given) if given == BASIC => reply(request, blob),
        _ => answer(401, &[("WWW-Authenticate", "Basic realm=\"r\"")], b""),
    })
}

fn redirect(status: u16, location: &str) -> Reply {
    answer(status, &[("Location", location)], b"moved")
}

/// Options with a password for the registry.
fn password(place: &Place, host: &str) -> [String; 2] {
    let path = place.path("auth");
    super::super::password_file(&path, host, "user", "pass");
    ["--credentials".to_owned(), path.display().to_string()]
}

/// Each status leads to a store on another host, at once or by two others; the registry is asked
/// while the disk is opened, and no store sees its password.
#[test]
fn every_redirect_is_followed_without_credentials() {
    let statuses = [301, 302, 303, 307, 308];
    for (status, chained) in statuses.into_iter().zip([false, true].into_iter().cycle()) {
        let (layers, place) = (Layers::new(2), Place::default());
        let store = layers.registry();
        let location = store.url("/store");
        let hop = Server::start(move |request| {
            let (_, blob) = request.target.rsplit_once('/').expect("a path");
            match request.target.starts_with("/first") {
                // A relative target.
                true => redirect(status, &format!("../second/{blob}")),
                false => redirect(status, &format!("{location}/{blob}?signature=x")),
            }
        });
        let first = match chained {
            true => hop.url("/first"),
            false => hop.url("/second"),
        };
        let server = registry(&layers, move |request, _| {
            let (_, blob) = request.target.rsplit_once('/').expect("a path");
            redirect(status, &format!("{first}/{blob}"))
        });
        let host = server.host();
        place.config("http", &host, &layers.lowers(), json!({}));
        let password = password(&place, &host);
        let daemon = place.serve(&[&password[0], &password[1]]);
        // One refusal without a password; then a question for each range, as none knows yet that the
        // registry redirects.
        let opened = (server.count(), hop.count());
        assert!(
            opened.0 <= 1 + 2 * layers.blobs.len(),
            "{status}: {opened:?}"
        );
        Reader::connect(&daemon).check_all(&layers.content);
        assert_eq!((server.count(), hop.count()), opened, "{status}");
        assert!(hop.count() >= layers.blobs.len());
        for blob in &layers.blobs {
            let counts = asked_units(&store, blob);
            assert!(
                counts.iter().all(|count| *count == 1),
                "{status}: {counts:?}"
            );
        }
        let all = [store.received(), hop.received()].concat();
        assert!(
            all.iter()
                .all(|request| request.header("authorization").is_none())
        );
    }
}

/// A relative redirect stays on the registry, which is asked by the new path from then on.
#[test]
fn a_relative_redirect_leads_to_the_registry_itself() {
    let (layers, place) = (Layers::new(2), Place::default());
    let server = layers.registry_that(|request, blob| {
        let (_, name) = request.target.rsplit_once('/').expect("a path");
        match request.target.contains("/kept/") {
            true => serve(request, blob),
            false => redirect(307, &format!("../kept/{name}")),
        }
    });
    place.config("http", &server.host(), &layers.lowers(), json!({}));
    let daemon = place.serve(&[]);
    Reader::connect(&daemon).check_all(&layers.content);
    let asked = server.received();
    let moved = asked.iter().filter(|one| !one.target.contains("/kept/"));
    assert_eq!(moved.count(), layers.blobs.len());
}

/// Where a redirect must not lead: the start ends, and nothing is asked there.
#[test]
fn a_redirect_astray_ends_the_start() {
    let layers = Layers::new(1);
    let authority = common::certificates::Authority::new();
    let plain = layers.registry();
    let location = plain.url("/x");
    let tls = authority.sign("IP:127.0.0.1");
    let tls = tls.server(common::certificates::Demands::default());
    let downgrading = Server::start_tls(tls, move |_| redirect(307, &location));
    let looping = layers.registry_that(|request, _| redirect(307, &request.target));
    let authority = authority.file().display().to_string();
    let leading_to =
        |location: &'static str| layers.registry_that(move |_, _| redirect(307, location));
    let to_metadata = leading_to("http://169.254.169.254/latest/meta-data");
    let to_link = leading_to("http://[fe80::1]/x");
    let local = "loopback, link-local or a metadata service";
    for (scheme, server, words) in [
        ("https", &downgrading, "from https to plain http"),
        ("http", &looping, "more than 5 redirects"),
        ("http", &to_metadata, local),
        ("http", &to_link, local),
    ] {
        let place = Place::default();
        place.config(scheme, &server.host(), &layers.lowers(), json!({}));
        let output = place.run(&["--registry-ca", &authority]);
        let said = String::from_utf8_lossy(&output.stderr);
        assert_eq!(output.status.code(), Some(1), "{said}");
        assert!(said.contains(words), "{said}");
        let result = place.result();
        assert!(result.starts_with("failed:Unexpected response"), "{result}");
    }
    assert_eq!(plain.count(), 0);
    // Two layers: each may be asked for by a range of its own.
    assert!(looping.count() <= 4 * 7, "{}", looping.count());
}
