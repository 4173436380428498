//! Disks of images in registries.

use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

use common::guest::{Guest, Options};
use common::registry_server::{Reply, Server, answer, serve};
use common::remote::{Layers, REPOSITORY};
use serde_json::json;

use super::lifecycle::layer;
use super::node::{Node, until};

/// A registry with an image, and the number of requests for bytes of its blobs.
fn registry(layers: &Layers) -> (Server, Arc<AtomicUsize>) {
    let fetched = Arc::new(AtomicUsize::new(0));
    let count = fetched.clone();
    let blobs = layers.handler(move |request, blob| -> Reply {
        count.fetch_add(1, Ordering::SeqCst);
        serve(request, blob)
    });
    let manifest = layers.manifest().to_string();
    let server = Server::start(move |request| {
        let kind = "application/vnd.oci.image.manifest.v1+json";
        match request.target.contains("/manifests/") {
            true => answer(200, &[("Content-Type", kind)], manifest.as_bytes()),
            false => blobs(request),
        }
    });
    (server, fetched)
}

#[test]
fn a_disk_is_made_of_an_image_reference_and_the_cache_is_shared() {
    let layers = Layers::new(4);
    let (server, fetched) = registry(&layers);
    let cache = tempfile::tempdir().unwrap();
    let host = server.host();
    let node = Node::start_with(&[
        "--insecure-registry",
        &host,
        "--cache",
        cache.path().to_str().unwrap(),
    ]);
    let image = format!("{host}/{REPOSITORY}:1");
    let spec = json!({ "image": image });
    let (status, made) = node.put("/disks/a", &spec);
    assert_eq!(status, 201, "{made}");
    assert_eq!(made["content"], json!({ "image": image }));
    let read = |id: &str| {
        let mut guest = Guest::boot(node.connect(id), Options::default()).unwrap();
        guest.assert_reads(0, &layers.content);
    };
    read("a");
    let before = fetched.load(Ordering::SeqCst);
    assert_eq!(node.put("/disks/b", &spec).0, 201);
    read("b");
    assert_eq!(
        fetched.load(Ordering::SeqCst),
        before,
        "read from the cache"
    );
    for id in ["a", "b"] {
        let (status, answer) = node.request("DELETE", &format!("/disks/{id}?wait=60"), "");
        assert_eq!(status, 204, "{answer}");
    }
    until("the fetchers are gone", || node.children() == 0);
}

#[test]
fn a_wrong_image_is_told_and_a_silent_registry_delays_no_other_disk() {
    let server = Server::start(|_| answer(404, &[], b""));
    // It listens, and never answers.
    let silent = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    let silent = silent.local_addr().unwrap().to_string();
    let cache = tempfile::tempdir().unwrap();
    let host = server.host();
    let cache = cache.path().to_str().unwrap();
    let node = Node::start_with(&[
        "--insecure-registry",
        &host,
        "--insecure-registry",
        &silent,
        "--cache",
        cache,
    ]);
    let (status, refused) = node.put("/disks/a", &json!({ "image": "not a reference" }));
    assert_eq!(
        (status, &refused["code"]),
        (400, &json!("bad_request")),
        "{refused}"
    );
    let (status, refused) = node.put("/disks/a", &json!({ "image": format!("{host}/x/y:1") }));
    assert_eq!(
        (status, &refused["code"]),
        (422, &json!("no_layer")),
        "{refused}"
    );
    std::thread::scope(|scope| {
        for number in 0..10 {
            let spec = json!({ "image": format!("{silent}/x/y:1") });
            let node = &node;
            // Killed with the node.
            scope.spawn(move || {
                let text = spec.to_string();
                let head = format!(
                    "PUT /api/v1/disks/s{number} HTTP/1.1\r\nHost: x\r\nContent-Length: {}\r\n\r\n",
                    text.len()
                );
                node.send(&(head + &text))
            });
        }
    });
    until("they start", || {
        let disks = node.get("/disks").1;
        disks["disks"].as_array().unwrap().len() == 10
    });
    let spec = json!({ "layers": [layer(&node, "a.obd", 7)] });
    let (status, made) = node.put("/disks/a", &spec);
    assert_eq!(status, 201, "{made}");
    let disks = node.get("/disks").1;
    let disks = disks["disks"].as_array().unwrap().iter();
    let starting = disks.filter(|disk| disk["state"] == "starting").count();
    assert_eq!(starting, 10, "they still wait");
}
