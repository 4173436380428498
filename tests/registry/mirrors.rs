//! Mirrors and peer-to-peer proxies: asked first, and never in the way.

use std::time::Duration;

use common::PATIENCE;
use common::content::tagged;
use common::registry_server::{Reply, Server, answer, raw, serve};
use ovbd_vhost::registry::client::{Client, Options};
use ovbd_vhost::registry::credential_source::Source;

use super::{blob, password_file, read};

fn with_mirror(registry: &Server, mirror: &Server) -> Client {
    let text = format!("{}={},header=X-Test: yes", registry.host(), mirror.url(""));
    Client::new(Options {
        mirrors: vec![text.parse().unwrap()],
        ..Options::default()
    })
    .unwrap()
}

fn with_p2p(proxy: &Server, credentials: Source) -> Client {
    let prefix = format!("{}/p2p", proxy.host());
    Client::new(Options {
        p2p: Some(prefix.parse().unwrap()),
        credentials,
        ..Options::default()
    })
    .unwrap()
}

fn serving(bytes: &[u8]) -> Server {
    let bytes = bytes.to_vec();
    Server::start(move |request| serve(request, &bytes))
}

#[test]
fn a_mirror_is_asked_instead_of_the_registry() {
    let bytes = tagged(1000, 1);
    let (registry, mirror) = (serving(&bytes), serving(&bytes));
    let client = with_mirror(&registry, &mirror);
    let wanted = blob(&registry.host(), "a/b", &bytes);
    assert!(read(client.read_blob(&wanted, 10, 500).unwrap()) == bytes[10..510]);
    assert_eq!(registry.count(), 0);
    let asked = &mirror.received()[0];
    let expected = format!("/v2/a/b/blobs/{}?ns={}", wanted.digest, registry.host());
    assert_eq!(asked.target, expected);
    assert_eq!(asked.header("x-test"), Some("yes"));

    assert!(read(client.read_blob_past_mirrors(&wanted, 10, 500).unwrap()) == bytes[10..510]);
    assert_eq!((registry.count(), mirror.count()), (1, 1));
}

#[test]
fn a_mirror_that_does_not_serve_is_passed_by() {
    let bytes = tagged(1000, 2);
    let wrong_size = [("Content-Range", "bytes 10-509/999")];
    for reply in [
        answer(404, &[], b""),
        answer(500, &[], b""),
        answer(429, &[], b""),
        answer(401, &[("WWW-Authenticate", "Basic")], b""),
        answer(200, &[], &bytes),
        answer(206, &[("Content-Range", "bytes 0-499/1000")], &bytes[..500]),
        answer(206, &wrong_size, &bytes[10..510]),
        answer(307, &[("Location", "ftp://x/")], b""),
        Reply::Close(Vec::new()),
        Reply::Close(b"garbage\r\n\r\n".to_vec()),
        Reply::Stall(raw(206, &[], b"")[..10].to_vec()),
    ] {
        let registry = serving(&bytes);
        let given = reply.clone();
        let mirror = Server::start(move |_| given.clone());
        let client = with_mirror(&registry, &mirror);
        let wanted = blob(&registry.host(), "a/b", &bytes);
        let found = read(client.read_blob(&wanted, 10, 500).unwrap());
        assert!(found == bytes[10..510], "{reply:?}");
        assert_eq!(registry.count(), 1, "{reply:?}");
    }
}

#[test]
fn a_mirror_that_fails_is_left_alone() {
    let bytes = tagged(1000, 3);
    let registry = serving(&bytes);
    let mirror = Server::start(|_| answer(500, &[], b""));
    let client = with_mirror(&registry, &mirror);
    let wanted = blob(&registry.host(), "a/b", &bytes);
    for _ in 0..20 {
        assert_eq!(read(client.read_blob(&wanted, 0, 1).unwrap()), bytes[..1]);
    }
    assert_eq!(mirror.count(), 5);

    // Not to have a blob is no failure.
    let empty = Server::start(|_| answer(404, &[], b""));
    let client = with_mirror(&registry, &empty);
    for _ in 0..20 {
        assert_eq!(read(client.read_blob(&wanted, 0, 1).unwrap()), bytes[..1]);
    }
    assert_eq!(empty.count(), 20);
}

#[test]
fn bodies_that_break_off_count_against_a_mirror() {
    let bytes = tagged(1000, 4);
    let registry = serving(&bytes);
    let headers = [
        ("Content-Range", "bytes 0-999/1000"),
        ("Content-Length", "1000"),
    ];
    let cut = raw(206, &headers, &bytes[..500]);
    let mirror = Server::start(move |_| Reply::Close(cut.clone()));
    let client = with_mirror(&registry, &mirror);
    let wanted = blob(&registry.host(), "a/b", &bytes);
    let mut whole = 0;
    for _ in 0..10 {
        let mut found = Vec::new();
        let mut body = client.read_blob(&wanted, 0, 1000).unwrap();
        whole += usize::from(std::io::Read::read_to_end(&mut body, &mut found).is_ok());
    }
    assert_eq!((mirror.count(), whole), (1, 9));
}

#[test]
fn a_prefix_proxy_gets_the_url_and_its_authorization() {
    let bytes = tagged(1000, 5);
    let store = serving(&bytes);
    let location = store.url("/key?sig=x%2F");
    let registry = Server::start(move |request| match request.header("authorization") {
        Some(_) => answer(307, &[("Location", location.as_str())], b""),
        None => answer(401, &[("WWW-Authenticate", "Basic realm=\"r\"")], b""),
    });
    let served = bytes.clone();
    let proxy = Server::start(move |request| {
        // It cannot log in by itself, and fetches what is signed.
        if request.target.contains("/v2/") && request.header("authorization").is_none() {
            return answer(401, &[("WWW-Authenticate", "Basic realm=\"r\"")], b"");
        }
        serve(request, &served)
    });
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("c");
    password_file(&path, &registry.host(), "user", "pass");
    let client = with_p2p(&proxy, Source::File(path));
    let wanted = blob(&registry.host(), "a/b", &bytes);
    for _ in 0..3 {
        assert!(read(client.read_blob(&wanted, 10, 500).unwrap()) == bytes[10..510]);
    }
    let asked = proxy.received();
    let last = asked.last().unwrap();
    let prefix = format!("/p2p/http://{}/v2/a/b/blobs/", registry.host());
    assert!(last.target.starts_with(&prefix), "{}", last.target);
    assert_eq!(last.header("authorization"), Some("Basic dXNlcjpwYXNz"));

    // Once the redirect's target is known, that is what the proxy fetches, without credentials.
    assert!(read(client.read_blob_past_mirrors(&wanted, 10, 500).unwrap()) == bytes[10..510]);
    assert!(read(client.read_blob(&wanted, 10, 500).unwrap()) == bytes[10..510]);
    let asked = proxy.received();
    let last = asked.last().unwrap();
    assert_eq!(last.target, format!("/p2p/{}", store.url("/key?sig=x%2F")));
    assert_eq!(last.header("authorization"), None);
}

/// A refusal whose body takes minutes.
#[test]
fn a_mirror_that_drips_its_refusal_is_passed_by() {
    for status in [401, 404, 307, 500] {
        let bytes = tagged(1000, 7);
        let registry = serving(&bytes);
        let target = registry.url("/elsewhere");
        let mirror = Server::start(move |_| {
            let headers = [
                ("Content-Length", "60000"),
                ("Location", target.as_str()),
                ("WWW-Authenticate", "Basic"),
            ];
            Reply::Drip(
                raw(status, &headers, &[b' '; 60000]),
                Duration::from_millis(8),
            )
        });
        let client = with_mirror(&registry, &mirror);
        let wanted = blob(&registry.host(), "a/b", &bytes);
        let (done, answer) = std::sync::mpsc::channel();
        std::thread::spawn(move || done.send(read(client.read_blob(&wanted, 10, 500).unwrap())));
        let answer = answer.recv_timeout(PATIENCE);
        assert!(
            answer.expect("an answer in time") == bytes[10..510],
            "{status}"
        );
        assert!(registry.count() > 0, "{status}");
    }
}

#[test]
fn a_mirror_whose_body_stalls_is_not_asked_again_at_once() {
    let bytes = tagged(1000, 8);
    let registry = serving(&bytes);
    let headers = [
        ("Content-Range", "bytes 10-509/1000"),
        ("Content-Length", "500"),
    ];
    let half = raw(206, &headers, &bytes[10..260]);
    let mirror = Server::start(move |_| Reply::Stall(half.clone()));
    let client = with_mirror(&registry, &mirror);
    let wanted = blob(&registry.host(), "a/b", &bytes);
    let mut broken = client.read_blob(&wanted, 10, 500).unwrap();
    std::io::copy(&mut broken, &mut std::io::sink()).expect_err("the body stalls");
    assert!(read(client.read_blob(&wanted, 10, 500).unwrap()) == bytes[10..510]);
    assert_eq!((registry.count(), mirror.count()), (1, 1));
}
