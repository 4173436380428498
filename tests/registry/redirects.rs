//! Redirects: followed without credentials, remembered while they last, refused where they lead
//! astray.

use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};
use std::time::{SystemTime, UNIX_EPOCH};

use common::content::tagged;
use common::registry_server::{Reply, Server, answer, serve};
use ovbd_vhost::registry::client::Client;
use ovbd_vhost::registry::error::Error;

use super::{blob, client, read, with_password};

/// A store that serves a blob at any path.
fn store(bytes: &[u8]) -> Server {
    let bytes = bytes.to_vec();
    Server::start(move |request| serve(request, &bytes))
}

fn redirect(status: u16, location: &str) -> Reply {
    answer(status, &[("Location", location)], b"moved")
}

/// A registry that wants a password and redirects to the URLs of a list, one a request.
fn registry(status: u16, locations: Vec<String>) -> Server {
    let next = AtomicUsize::new(0);
    Server::start(move |request| {
        if request.header("authorization").is_none() {
            return answer(401, &[("WWW-Authenticate", "Basic realm=\"r\"")], b"");
        }
        let number = next.fetch_add(1, Ordering::SeqCst);
        redirect(status, &locations[number % locations.len()])
    })
}

fn read_all(client: &Client, host: &str, bytes: &[u8]) -> Vec<u8> {
    read(
        client
            .read_blob(&blob(host, "a", bytes), 0, bytes.len() as u64)
            .unwrap(),
    )
}

#[test]
fn each_status_is_followed_without_credentials() {
    let bytes = tagged(1000, 1);
    for status in [301, 302, 303, 307, 308] {
        let store = store(&bytes);
        let registry = registry(status, vec![store.url("/key?signature=x")]);
        let (client, _folder) = with_password(&registry.host());
        assert!(read_all(&client, &registry.host(), &bytes) == bytes);
        let asked = store.received();
        assert_eq!(asked.len(), 1);
        assert_eq!(asked[0].target, "/key?signature=x");
        assert_eq!(asked[0].header("authorization"), None, "{status}");
        assert_eq!(asked[0].header("range"), Some("bytes=0-999"));
        assert_eq!(asked[0].header("accept-encoding"), Some("identity"));

        // The target is asked directly from now on.
        assert!(read_all(&client, &registry.host(), &bytes) == bytes);
        assert_eq!((registry.count(), store.count()), (2, 2));
    }
}

#[test]
fn relative_and_chained_redirects_are_followed() {
    let bytes = tagged(1000, 2);
    let served = bytes.clone();
    let registry = Server::start(move |request| match request.target.as_str() {
        "/v2/a/relative" => redirect(307, "../k?x=1"),
        "/three" => redirect(302, "/four"),
        "/four" => redirect(302, "five"),
        "/v2/a/k?x=1" | "/five" => serve(request, &served),
        target if target.starts_with("/v2/a/blobs/") => redirect(307, "../k?x=1"),
        _ => redirect(307, "/three"),
    });
    for name in ["a", "b"] {
        let whole = blob(&registry.host(), name, &bytes);
        let client = client();
        assert!(
            read(client.read_blob(&whole, 0, 1000).unwrap()) == bytes,
            "{name}"
        );
    }
}

#[test]
fn loops_and_bad_locations_are_refused() {
    let looping = Server::start(|_| redirect(307, "/again"));
    let wanted = blob(&looping.host(), "a", b"x");
    let refused = client().read_blob(&wanted, 0, 1).err().unwrap();
    assert!(matches!(refused, Error::Redirect { .. }), "{refused}");
    assert!(looping.count() <= 7, "{}", looping.count());

    for location in [
        "ftp://h/x",
        "http://u:p@h/",
        "http:///",
        "file:///etc/passwd",
        "http://h:0/",
    ] {
        let server = Server::script([redirect(307, location)]);
        let wanted = blob(&server.host(), "a", b"x");
        let refused = client().read_blob(&wanted, 0, 1).err().unwrap();
        assert!(
            matches!(refused, Error::Unexpected { .. }),
            "{location}: {refused}"
        );
    }
    let bare = Server::script([answer(307, &[], b"")]);
    let refused = client().read_blob(&blob(&bare.host(), "a", b"x"), 0, 1);
    assert!(matches!(refused, Err(Error::Unexpected { .. })));
}

#[test]
fn an_expired_target_is_resolved_again() {
    let bytes = tagged(1000, 3);
    for status in [400, 401, 403, 404, 410] {
        // Each key is good for two requests.
        let uses = Arc::new(Mutex::new(std::collections::HashMap::new()));
        let served = bytes.clone();
        let store = Server::start(move |request| {
            let mut uses = uses.lock().unwrap();
            let count = uses.entry(request.target.clone()).or_insert(0);
            *count += 1;
            if *count > 2 {
                return answer(status, &[], b"<Error><Code>ExpiredToken</Code></Error>");
            }
            serve(request, &served)
        });
        let keys = (0..10).map(|number| store.url(&format!("/key?n={number}")));
        let registry = registry(307, keys.collect());
        let (client, _folder) = with_password(&registry.host());
        for _ in 0..6 {
            assert!(
                read_all(&client, &registry.host(), &bytes) == bytes,
                "{status}"
            );
        }
        // One refusal, then three keys of two requests each.
        assert_eq!((registry.count(), store.count()), (4, 8), "{status}");
    }
}

#[test]
fn a_target_that_never_serves_is_asked_twice() {
    for status in [403, 404] {
        let store = Server::start(move |_| answer(status, &[], b""));
        let registry = registry(307, vec![store.url("/key")]);
        let (client, _folder) = with_password(&registry.host());
        let wanted = blob(&registry.host(), "a", b"x");
        assert!(client.read_blob(&wanted, 0, 1).is_err());
        assert_eq!(store.count(), 2, "{status}");
    }
}

#[test]
fn a_hint_in_the_past_means_asking_each_time() {
    let bytes = tagged(1000, 4);
    let store = store(&bytes);
    let now = SystemTime::now()
        .duration_since(UNIX_EPOCH)
        .unwrap()
        .as_secs();
    for (end, expected) in [(now - 3600, 3), (now + 3600, 1)] {
        let registry = registry(307, vec![store.url(&format!("/key?Expires={end}"))]);
        let (client, _folder) = with_password(&registry.host());
        for _ in 0..3 {
            assert!(read_all(&client, &registry.host(), &bytes) == bytes);
        }
        assert_eq!(registry.count(), 1 + expected, "besides the refusal");
    }
}

#[test]
fn a_blob_replaced_at_its_target_is_resolved_again() {
    let (bytes, other) = (tagged(1000, 5), tagged(900, 6));
    let (good, wrong) = (store(&bytes), store(&other));
    let registry = registry(307, vec![wrong.url("/key"), good.url("/key")]);
    let (client, _folder) = with_password(&registry.host());
    assert!(read_all(&client, &registry.host(), &bytes) == bytes);
    assert_eq!((wrong.count(), good.count()), (1, 1));
}
