//! What can be opened, and with how many requests.

use std::fs;
use std::sync::Arc;

use common::daemon::Daemon;
use common::disk;
use common::golden;
use common::guest::{Guest, Options};
use common::registries::{self, DockerRegistry, Storage, TokenServer};
use common::registry_server::{Received, Server, answer, serve, until};
use common::remote::{Layers, Place, REPOSITORY};
use ovbd_vhost::format::digest::Digest;
use serde_json::json;

fn assert_reads(daemon: &Daemon, content: &[u8]) {
    let mut guest = Guest::boot(daemon.connect(), Options::default()).expect("guest");
    guest.assert_reads(0, content);
}

/// Layers in the registry, local files, and complete directories, in one image.
#[test]
fn a_config_mixes_remote_and_local_layers() {
    let case = golden::find("08-deep64-small");
    let content = disk::content(&case);
    let place = Place::default();
    let storage = Storage::default();
    let lowers = case.layers.iter().enumerate().map(|(number, path)| {
        let bytes = fs::read(path).expect("a golden layer");
        let digest = Digest::of(&bytes).to_string();
        match number % 3 {
            0 => json!({"file": path}),
            1 => {
                storage.blob(REPOSITORY, &bytes);
                let dir = place.path(&format!("absent-{number}"));
                json!({"digest": digest, "size": bytes.len(), "dir": dir})
            }
            _ => {
                let dir = place.path(&format!("layer-{number}"));
                fs::create_dir(&dir).expect("a folder");
                fs::write(dir.join("overlaybd.commit"), &bytes).expect("a layer");
                json!({"digest": digest, "size": bytes.len(), "dir": dir})
            }
        }
    });
    let lowers: Vec<_> = lowers.collect();
    let tokens = TokenServer::start(60);
    let registry = DockerRegistry::with_tokens(storage, &tokens);
    let credentials = place.path("auth");
    fs::write(&credentials, TokenServer::credentials(registry.host())).expect("credentials");
    place.config("http", registry.host(), &lowers, json!({}));
    let credentials = credentials.display().to_string();
    let mut daemon = place.serve(&["--credentials", &credentials]);
    until("the result is written", || place.result() == "success");
    assert_reads(&daemon, &content);
    daemon.assert_alive();
}

/// Once all is in the cache, the registry is not asked.
#[test]
fn the_second_start_makes_no_request() {
    let layers = Layers::new(2);
    let place = Place::default();
    let server = layers.registry();
    place.config("http", &server.host(), &layers.lowers(), json!({}));
    let daemon = place.serve(&[]);
    // Two ranges of each layer.
    assert_eq!(server.count(), 4, "{:?}", server.received());
    let mut guest = Guest::boot(daemon.connect(), Options::default()).expect("guest");
    for start in (0..layers.content.len()).step_by(128 << 10) {
        let found = guest.read(0, start as u64 / 512, 128 << 10);
        assert!(
            found == layers.content[start..start + (128 << 10)],
            "at {start}"
        );
    }
    drop(guest);
    until("both blobs are complete", || place.is_complete(&layers));
    drop(daemon);
    let before = server.count();
    let daemon = place.serve(&[]);
    assert_reads(&daemon, &layers.content);
    assert_eq!(server.count(), before);
    drop(daemon);
    drop(server);
    assert_reads(&place.serve(&[]), &layers.content);
}

/// With image tables, opening reads nothing of the layers: those that were evicted need not be there, and
/// are fetched when the guest reads them.
#[test]
fn evicted_layers_are_not_fetched_to_open_an_image_whose_tables_are_there() {
    let layers = Layers::new(2);
    let place = Place::default();
    let server = layers.registry();
    place.config("http", &server.host(), &layers.lowers(), json!({}));
    let daemon = place.serve(&[]);
    let opened = server.count();
    let tables = || {
        let files = fs::read_dir(place.path("cache/tables")).expect("a cache");
        let mut files = files.map(|file| fs::read(file.expect("a file").path()));
        files.any(|bytes| bytes.is_ok_and(|bytes| bytes.starts_with(b"ovbdtab1")))
    };
    until("tables are written", tables);
    drop(daemon);
    for kind in ["partial", "blobs"] {
        let path = place.path(&format!("cache/{kind}/sha256"));
        for file in fs::read_dir(path).expect("a cache") {
            fs::remove_file(file.expect("a file").path()).expect("a blob");
        }
    }
    let daemon = place.serve(&[]);
    assert_eq!(server.count(), opened, "{:?}", server.received());
    assert_reads(&daemon, &layers.content);
    assert!(server.count() > opened);
    drop(daemon);
    drop(server);
    // The registry is away, and what the guest reads is local.
    assert_reads(&place.serve(&[]), &layers.content);
}

/// A tag, an index and a digest; and the same again while the registry is away.
#[test]
fn an_image_is_served_by_its_reference() {
    let layers = Layers::new(1);
    let place = Place::default();
    let storage = Storage::default();
    let blobs: Vec<&[u8]> = layers.blobs.iter().map(Vec::as_slice).collect();
    let manifest = storage.image(REPOSITORY, "1.2", &blobs);
    let text = json!({
        "schemaVersion": 2,
        "mediaType": "application/vnd.oci.image.index.v1+json",
        "manifests": [{
            "mediaType": "application/vnd.oci.image.manifest.v1+json",
            "digest": manifest.to_string(),
            "size": 1,
            "platform": {"os": "linux", "architecture": registries::ARCHITECTURE},
        }],
    });
    let index = storage.manifest(REPOSITORY, "many", &text.to_string());
    let mut registry = DockerRegistry::open(storage);
    let host = registry.host().to_owned();
    let serve = |selector: &str| place.serve_image(&host, selector, &[]);
    let (by_digest, by_index) = (format!("@{manifest}"), format!("@{index}"));
    let selectors = [":1.2", ":many", &by_digest, &by_index];
    for selector in selectors {
        assert_reads(&serve(selector), &layers.content);
    }
    // Bring in the rest.
    let daemon = serve(":1.2");
    let mut guest = Guest::boot(daemon.connect(), Options::default()).expect("guest");
    let content = Arc::clone(&layers.content);
    for start in (0..content.len()).step_by(128 << 10) {
        guest.read(0, start as u64 / 512, 128 << 10);
    }
    drop((guest, daemon));
    registry.stop();
    for selector in selectors {
        let daemon = serve(selector);
        assert_reads(&daemon, &layers.content);
        let is_pinned = selector.contains('@');
        let asked = daemon.log().contains("using the cached manifest");
        assert_eq!(asked, !is_pinned, "{selector}: {}", daemon.log());
    }
}

/// `download` of the image, and of the service configuration for an image that says nothing.
#[test]
fn layers_are_downloaded_in_the_background() {
    let download = json!({"enable": true, "delay": 0, "delayExtra": 0, "maxMBps": 0});
    for in_config in [true, false] {
        let (layers, place) = (Layers::new(2), Place::default());
        let server = layers.registry();
        let more = json!({"download": download.clone()});
        let none = json!({});
        let (config, service) = if in_config {
            (more, none)
        } else {
            (none, more)
        };
        place.config("http", &server.host(), &layers.lowers(), config);
        let path = place.path("overlaybd.json");
        fs::write(&path, service.to_string()).expect("a service configuration");
        let daemon = place.serve(&["--service-config", &path.display().to_string()]);
        until("both blobs are complete", || place.is_complete(&layers));
        drop(server);
        assert_reads(&daemon, &layers.content);
    }
}

/// The mirror is asked first, and the registry only for what the mirror lacks.
#[test]
fn a_mirror_serves_the_layers_it_has() {
    let (layers, place) = (Layers::new(1), Place::default());
    let origin = layers.registry();
    let bottom = layers.blobs[0].clone();
    let mirror = Server::start(move |request| {
        let wanted = format!("{}?", Digest::of(&bottom));
        match request.target.contains(&wanted) {
            true => serve(request, &bottom),
            false => answer(404, &[], b""),
        }
    });
    place.config("http", &origin.host(), &layers.lowers(), json!({}));
    let header = "X-Dragonfly-Registry:https://registry.example";
    let option = format!("{}={},header={header}", origin.host(), mirror.url(""));
    let daemon = place.serve(&["--mirror", &option]);
    assert_reads(&daemon, &layers.content);
    let top = Digest::of(&layers.blobs[1]).to_string();
    for request in origin.received() {
        assert!(request.target.ends_with(&top), "{}", request.target);
    }
    assert!(mirror.count() > 1 && origin.count() > 0);
    let asked = mirror.received();
    let named = |target: &str| target.contains("?ns=127.0.0.1");
    assert!(
        asked.iter().all(|request| named(&request.target)),
        "{asked:?}"
    );
    let registry = |request: &Received| {
        request.header("x-dragonfly-registry") == Some("https://registry.example")
    };
    assert!(asked.iter().all(registry), "{asked:?}");
}
