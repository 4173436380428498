//! Behaviour of real servers that a registry alone does not show: pull-through proxies, stores
//! without ranges, limits, links that expire, connections that end.

use std::io::Write;
use std::process::{Command, Stdio};
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::{SystemTime, UNIX_EPOCH};

use common::certificates::Authority;
use common::content::tagged;
use common::nginx::Nginx;
use common::registries::{DockerRegistry, Storage};
use common::registry_server::{Server, answer};
use ovbd_vhost::registry::client::{Client, Options};
use ovbd_vhost::registry::error::{Class, Error};
use ovbd_vhost::registry::repository::Scheme;

use super::{blob, client, read};

#[test]
fn a_pull_through_proxy_serves_ranges_once_it_has_the_blob() {
    let storage = Storage::default();
    let bytes = tagged(300_000, 1);
    storage.blob("a/b", &bytes);
    let origin = DockerRegistry::open(storage);
    let proxy = DockerRegistry::proxy(&format!("http://{}", origin.host()));
    let wanted = blob(proxy.host(), "a/b", &bytes);
    let client = client();
    let cold = client.read_blob(&wanted, 100_000, 1000);
    assert!(matches!(cold, Err(Error::WithoutRanges { .. })));
    assert!(read(client.read_whole(&wanted).unwrap()) == bytes);
    common::registry_server::until("the proxy has the blob", || {
        client
            .read_blob(&wanted, 100_000, 1000)
            .is_ok_and(|body| read(body) == bytes[100_000..101_000])
    });
}

#[test]
fn a_store_without_ranges_gives_the_whole_blob() {
    let bytes = tagged(300_000, 2);
    let wanted = blob("h", "a/b", &bytes);
    let path = format!("v2/a/b/blobs/{}", wanted.digest);
    let nginx = Nginx::start("", "max_ranges 0;", &[(&path, &bytes)]);
    let wanted = blob(nginx.host(), "a/b", &bytes);
    let client = client();
    assert!(read(client.read_blob(&wanted, 0, 1000).unwrap()) == bytes[..1000]);
    let refused = client.read_blob(&wanted, 1, 1000);
    assert!(matches!(refused, Err(Error::WithoutRanges { .. })));
    assert!(read(client.read_whole(&wanted).unwrap()) == bytes);
}

#[test]
fn connections_that_end_after_some_requests_cost_nothing() {
    let bytes = tagged(10_000, 3);
    let path = format!("v2/a/b/blobs/{}", blob("h", "a/b", &bytes).digest);
    let nginx = Nginx::start("", "keepalive_requests 3;", &[(&path, &bytes)]);
    let wanted = blob(nginx.host(), "a/b", &bytes);
    let client = client();
    for offset in 0..20 {
        let body = client.read_blob(&wanted, offset, 5000).unwrap();
        assert!(
            read(body) == bytes[offset as usize..][..5000],
            "{}",
            nginx.log()
        );
    }
}

#[test]
fn a_limited_server_says_when_to_come_back() {
    let bytes = tagged(1000, 4);
    let path = format!("v2/a/b/blobs/{}", blob("h", "a/b", &bytes).digest);
    let limit = "limit_req zone=all;\nlimit_req_status 429;\nadd_header Retry-After 7 always;";
    let zone = "limit_req_zone $remote_addr zone=all:1m rate=1r/m;";
    let nginx = Nginx::start(zone, limit, &[(&path, &bytes)]);
    let wanted = blob(nginx.host(), "a/b", &bytes);
    let client = client();
    assert!(read(client.read_blob(&wanted, 0, 1000).unwrap()) == bytes);
    let busy = client.read_blob(&wanted, 0, 1000).err().unwrap();
    let retry_after = Some(std::time::Duration::from_secs(7));
    assert_eq!(busy.class(), Class::Passing { retry_after });
}

/// The hash that `secure_link_md5` expects.
pub(super) fn link_hash(text: &str) -> String {
    let mut openssl = Command::new("sh")
        .args(["-c", "openssl md5 -binary | openssl base64"])
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .spawn()
        .unwrap();
    openssl
        .stdin
        .take()
        .unwrap()
        .write_all(text.as_bytes())
        .unwrap();
    let output = openssl.wait_with_output().unwrap();
    let hash = String::from_utf8(output.stdout).unwrap();
    hash.trim()
        .replace('+', "-")
        .replace('/', "_")
        .replace('=', "")
}

#[test]
fn a_link_that_has_expired_is_renewed() {
    let bytes = tagged(1000, 5);
    let guard = "secure_link $arg_md5,$arg_e;\nsecure_link_md5 \"$secure_link_expires$uri KEY\";\n\
                 if ($secure_link = \"\") { return 403; }\nif ($secure_link = \"0\") { return 403; }";
    let nginx = Nginx::start("", guard, &[("key", &bytes)]);
    let now = SystemTime::now()
        .duration_since(UNIX_EPOCH)
        .unwrap()
        .as_secs();
    let link = |end: u64| {
        let hash = link_hash(&format!("{end}/key KEY"));
        format!("http://{}/key?md5={hash}&e={end}", nginx.host())
    };
    let links = [link(now - 10), link(now + 3600)];
    let next = AtomicUsize::new(0);
    let registry = Server::start(move |_| {
        let number = next.fetch_add(1, Ordering::SeqCst).min(1);
        answer(307, &[("Location", links[number].as_str())], b"")
    });
    let wanted = blob(&registry.host(), "a/b", &bytes);
    let client = client();
    for _ in 0..2 {
        assert!(read(client.read_blob(&wanted, 0, 1000).unwrap()) == bytes);
    }
    assert_eq!(registry.count(), 2, "the good link is used again");
}

#[test]
fn a_registry_behind_tls_is_read() {
    let storage = Storage::default();
    let bytes = tagged(300_000, 6);
    storage.blob("a/b", &bytes);
    let registry = DockerRegistry::open(storage);
    let authority = Authority::new();
    let own = authority.sign("IP:127.0.0.1");
    let forward = format!("location / {{ proxy_pass http://{}; }}", registry.host());
    let nginx = Nginx::start_tls(&own.certificate, &own.key, &forward);
    let client = Client::new(Options {
        ca: Some(authority.file()),
        ..Options::default()
    })
    .unwrap();
    let mut wanted = blob(nginx.host(), "a/b", &bytes);
    wanted.repository = wanted.repository.with_scheme(Scheme::Https);
    for offset in [0, 65_536, 299_000] {
        let body = client.read_blob(&wanted, offset, 1000).unwrap();
        assert!(read(body) == bytes[offset as usize..][..1000]);
    }
}
