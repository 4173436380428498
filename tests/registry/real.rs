//! Debian's `docker-registry`, open and with tokens.

use std::fs;

use common::content::tagged;
use common::registries::{DockerRegistry, Storage, TokenServer, layer, manifest};
use ovbd_vhost::registry::blob::BlobRef;
use ovbd_vhost::registry::client::{Client, Options};
use ovbd_vhost::registry::credential_source::Source;
use ovbd_vhost::registry::error::Error;
use ovbd_vhost::registry::manifest::Manifest;
use ovbd_vhost::registry::reference::Reference;
use serde_json::json;
use tempfile::TempDir;

use super::{blob, client, read};

/// A client that reaches `host` by plain HTTP, with the credentials that the token server knows.
fn logged_in(host: &str, folder: &TempDir) -> Client {
    let path = folder.path().join("config.json");
    fs::write(&path, TokenServer::credentials(host)).unwrap();
    Client::new(Options {
        credentials: Source::File(path),
        insecure: vec![host.parse().unwrap()],
        ..Options::default()
    })
    .unwrap()
}

#[test]
fn ranges_of_an_open_registry() {
    let storage = Storage::default();
    let bytes = tagged(300_000, 1);
    storage.blob("a/b", &bytes);
    let registry = DockerRegistry::open(storage);
    let client = client();
    let whole = blob(registry.host(), "a/b", &bytes);
    for (offset, len) in [
        (0, 1),
        (0, 300_000),
        (1, 299_999),
        (299_999, 1),
        (65_536, 65_536),
    ] {
        let body = client.read_blob(&whole, offset, len).unwrap();
        assert_eq!((body.len(), body.total()), (len, Some(300_000)));
        let (start, end) = (offset as usize, (offset + len) as usize);
        assert!(read(body) == bytes[start..end], "{offset} {len}");
    }
    assert!(read(client.read_whole(&whole).unwrap()) == bytes);

    // Without a size the end is the server's to know.
    let unsized_blob = BlobRef {
        size: None,
        ..whole.clone()
    };
    let cut = client.read_blob(&unsized_blob, 299_990, 100).unwrap();
    assert_eq!(read(cut), bytes[299_990..]);
    let beyond = client.read_blob(&unsized_blob, 300_000, 1);
    assert!(matches!(beyond, Err(Error::Mismatch { .. })));
    let other_size = BlobRef {
        size: Some(300_001),
        ..whole
    };
    let refused = client.read_blob(&other_size, 0, 10);
    assert!(matches!(refused, Err(Error::Mismatch { .. })));

    let absent = client.read_blob(&blob(registry.host(), "a/b", b"absent"), 0, 1);
    let absent = absent.err().unwrap();
    assert!(matches!(absent, Error::NotFound { .. }), "{absent}");
    assert_eq!(absent.upstream_words(), "No such file or directory");
}

#[test]
fn manifests_of_an_open_registry() {
    let storage = Storage::default();
    let digest = storage.image("team/app", "1.2", &[b"base", b"top"]);
    let config = storage.blob("team/app", b"{}");
    let plain = {
        let digest = storage.blob("team/app", b"gzip");
        let mut plain = layer(&digest, 4);
        plain["annotations"] = json!({});
        manifest(&config, vec![plain]).to_string()
    };
    storage.manifest("team/app", "plain", &plain);
    let index = json!({
        "schemaVersion": 2,
        "mediaType": "application/vnd.oci.image.index.v1+json",
        "manifests": [{
            "mediaType": "application/vnd.oci.image.manifest.v1+json",
            "digest": digest.to_string(),
            "size": 500,
            "platform": {"os": "linux", "architecture": if cfg!(target_arch = "aarch64") {
                "arm64"
            } else {
                "amd64"
            }},
        }],
    });
    storage.manifest("team/app", "index", &index.to_string());
    let registry = DockerRegistry::open(storage);
    let host = registry.host();
    let client = Client::new(Options {
        insecure: vec![host.parse().unwrap()],
        ..Options::default()
    })
    .unwrap();
    let get = |rest: &str| {
        let reference: Reference = format!("{host}/team/app{rest}").parse().unwrap();
        client.manifest(&reference)
    };
    for rest in [
        ":1.2",
        ":index",
        &format!("@{digest}"),
        &format!(":other@{digest}"),
    ] {
        let found = get(rest).unwrap_or_else(|error| panic!("{rest}: {error}"));
        assert_eq!(found.digest, digest, "{rest}");
        let manifest = Manifest::parse(&found.bytes).unwrap();
        let sizes: Vec<_> = manifest.layers().iter().map(|layer| layer.size()).collect();
        assert_eq!(sizes, [4, 3]);
    }
    assert!(matches!(get(":absent"), Err(Error::NotFound { .. })));
    let refused = get(":plain").unwrap_err();
    assert!(matches!(refused, Error::Manifest { .. }), "{refused}");
}

#[test]
fn tokens_are_fetched_and_renewed() {
    let storage = Storage::default();
    let bytes = tagged(100_000, 2);
    storage.blob("a/b", &bytes);
    storage.image("a/b", "latest", &[&bytes]);
    let tokens = TokenServer::start(300);
    let registry = DockerRegistry::with_tokens(storage, &tokens);
    let folder = tempfile::tempdir().unwrap();
    let client = logged_in(registry.host(), &folder);
    let reference: Reference = format!("{}/a/b", registry.host()).parse().unwrap();
    client.manifest(&reference).unwrap();
    let wanted = blob(registry.host(), "a/b", &bytes);
    std::thread::scope(|scope| {
        for _ in 0..8 {
            scope.spawn(|| {
                assert!(read(client.read_blob(&wanted, 5, 90_000).unwrap()) == bytes[5..90_005]);
            });
        }
    });
    assert_eq!(tokens.issued(), 1, "one token serves all threads");

    let anonymous = super::client().read_blob(&wanted, 0, 1).err().unwrap();
    assert!(matches!(anonymous, Error::Denied { .. }), "{anonymous}");
    assert_eq!(anonymous.upstream_words(), "Authentication failed");
}

#[test]
fn a_short_token_is_renewed_between_requests() {
    let storage = Storage::default();
    let bytes = tagged(10_000, 3);
    storage.blob("a/b", &bytes);
    let tokens = TokenServer::start(1);
    let registry = DockerRegistry::with_tokens(storage, &tokens);
    let folder = tempfile::tempdir().unwrap();
    let client = logged_in(registry.host(), &folder);
    let wanted = blob(registry.host(), "a/b", &bytes);
    for _ in 0..3 {
        assert!(read(client.read_blob(&wanted, 0, 10_000).unwrap()) == bytes);
        std::thread::sleep(std::time::Duration::from_millis(600));
    }
    assert_eq!(tokens.issued(), 3);
}
