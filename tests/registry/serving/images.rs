//! `--image`: what a reference leads to, through the daemon.

use std::collections::HashMap;
use std::sync::{Arc, Mutex};

use common::guest::{Guest, Options};
use common::registries::{ARCHITECTURE, layer};
use common::registry_server::{Server, answer, serve};
use common::remote::{Layers, Place};
use ovbd_vhost::format::digest::Digest;
use serde_json::{Value, json};

use super::Reader;

const ANNOTATION: &str = "containerd.io/snapshot/overlaybd/";

/// What the paths `/manifests/SELECTOR` of a registry lead to.
pub(super) type Documents = Arc<Mutex<HashMap<String, String>>>;

/// A registry of layers, and of manifests that a test may exchange.
pub(super) fn registry(layers: &Layers, documents: &Documents) -> Server {
    let documents = Arc::clone(documents);
    let blobs = layers.handler(serve);
    Server::start(move |request| {
        let Some((_, selector)) = request.target.split_once("/manifests/") else {
            return blobs(request);
        };
        let selector = selector.split('?').next().unwrap_or_default();
        match documents.lock().expect("documents").get(selector) {
            Some(text) => answer(200, &[], text.as_bytes()),
            None => answer(404, &[], b""),
        }
    })
}

pub(super) fn put(documents: &Documents, selector: &str, text: &str) -> Digest {
    let digest = Digest::of(text.as_bytes());
    let mut documents = documents.lock().expect("documents");
    for selector in [selector, &digest.to_string()] {
        documents.insert(selector.to_owned(), text.to_owned());
    }
    digest
}

/// An entry of an index.
pub(super) fn entry(digest: &str, os: &str, architecture: &str) -> Value {
    json!({
        "mediaType": "application/vnd.oci.image.manifest.v1+json",
        "digest": digest,
        "size": 500,
        "platform": {"os": os, "architecture": architecture},
    })
}

/// The entry of an attestation, which convertors put beside an image.
fn attestation() -> Value {
    let mut attestation = entry(
        &Digest::of(b"attestation").to_string(),
        "linux",
        ARCHITECTURE,
    );
    attestation["annotations"] = json!({"vnd.docker.reference.type": "attestation-manifest"});
    attestation
}

fn absent(os: &str, architecture: &str) -> Value {
    entry(&Digest::of(b"absent").to_string(), os, architecture)
}

/// Docker's list and OCI's index, with entries that are not for this machine; a manifest and a tag.
#[test]
fn an_index_leads_to_the_layers() {
    for kind in [
        "application/vnd.oci.image.index.v1+json",
        "application/vnd.docker.distribution.manifest.list.v2+json",
    ] {
        let (layers, place, documents) = (Layers::new(1), Place::default(), Documents::default());
        let server = registry(&layers, &documents);
        let image = put(&documents, "image", &layers.manifest().to_string());
        let right = entry(&image.to_string(), "linux", ARCHITECTURE);
        let index = json!({
            "schemaVersion": 2,
            "mediaType": kind,
            "manifests": [attestation(), absent("unknown", "unknown"), absent("linux", "s390x"), right],
        });
        put(&documents, "index", &index.to_string());
        let daemon = place.serve_image(&server.host(), ":index", &[]);
        let asked: Vec<_> = server
            .received()
            .iter()
            .map(|one| one.target.clone())
            .collect();
        let documents: Vec<_> = asked
            .iter()
            .filter(|one| one.contains("/manifests/"))
            .collect();
        assert_eq!(documents.len(), 2, "{asked:?}");
        assert!(documents[1].ends_with(&image.to_string()), "{asked:?}");
        // Two ranges of the layer that is longer than a mebibyte, and the other one whole.
        assert_eq!(asked.len(), 2 + 3, "{asked:?}");
        Reader::connect(&daemon).check_all(&layers.content);
    }
}

const OCI_MANIFEST: &str = "application/vnd.oci.image.manifest.v1+json";
const DOCKER_MANIFEST: &str = "application/vnd.docker.distribution.manifest.v2+json";
const OCI_LAYER: &str = "application/vnd.oci.image.layer.v1.tar";
const DOCKER_LAYER: &str = "application/vnd.docker.image.rootfs.diff.tar";

/// What each convertor makes: Docker's types, OCI's, and Docker's manifest with layers of both kinds.
#[test]
fn the_manifests_of_all_convertors_are_served() {
    let docker_config = "application/vnd.docker.container.image.v1+json";
    for (manifest, config, kinds) in [
        (DOCKER_MANIFEST, docker_config, [DOCKER_LAYER, DOCKER_LAYER]),
        (DOCKER_MANIFEST, docker_config, [OCI_LAYER, OCI_LAYER]),
        (DOCKER_MANIFEST, docker_config, [DOCKER_LAYER, OCI_LAYER]),
        (
            OCI_MANIFEST,
            "application/vnd.oci.image.config.v1+json",
            [OCI_LAYER, DOCKER_LAYER],
        ),
    ] {
        let (layers, place, documents) = (Layers::new(1), Place::default(), Documents::default());
        let server = registry(&layers, &documents);
        let mut image = layers.manifest();
        image["mediaType"] = manifest.into();
        image["config"]["mediaType"] = config.into();
        for (number, kind) in kinds.iter().enumerate() {
            image["layers"][number]["mediaType"] = (*kind).into();
        }
        let image = put(&documents, "image", &image.to_string());
        let mut right = entry(&image.to_string(), "linux", ARCHITECTURE);
        right["mediaType"] = manifest.into();
        let index = json!({"schemaVersion": 2, "manifests": [attestation(), right]});
        put(&documents, "index", &index.to_string());
        let daemon = place.serve_image(&server.host(), ":index", &[]);
        Reader::connect(&daemon).check_all(&layers.content);
        let asked = server.received();
        let manifests: Vec<_> = asked
            .iter()
            .filter(|one| one.target.contains("/manifests/"))
            .collect();
        assert_eq!(manifests.len(), 2, "{manifests:?}");
        for request in manifests {
            let accept = request.header("accept").unwrap_or_default();
            let mut accept: Vec<_> = accept.split(',').map(str::trim).collect();
            accept.sort_unstable();
            assert_eq!(
                accept,
                [
                    "application/vnd.docker.distribution.manifest.list.v2+json",
                    DOCKER_MANIFEST,
                    "application/vnd.oci.image.index.v1+json",
                    OCI_MANIFEST,
                ]
            );
        }
    }
}

/// Documents that lead to no image for this machine, or to one that is not served, and what the daemon
/// says about them.
fn refused(layers: &Layers) -> Vec<(Value, &'static str)> {
    let good = layer(&Digest::of(&layers.blobs[0]), layers.blobs[0].len() as u64);
    let changed = |change: &dyn Fn(&mut Value)| {
        let mut layer = good.clone();
        change(&mut layer);
        layer
    };
    let annotated = |key: &str, value: &str| {
        changed(&|layer| layer["annotations"][format!("{ANNOTATION}{key}")] = value.into())
    };
    let image = |layers: Vec<Value>| {
        let config = Digest::of(b"{}");
        common::registries::manifest(&config, layers)
    };
    let index = |entries: Vec<Value>| json!({"schemaVersion": 2, "manifests": entries});
    let plain = changed(&|layer| layer["annotations"] = json!({}));
    let other = Digest::of(b"other").to_string();
    let mut nested = absent("linux", ARCHITECTURE);
    nested["mediaType"] = "application/vnd.oci.image.index.v1+json".into();
    vec![
        (index(vec![absent("linux", "s390x")]), "linux/s390x"),
        (index(vec![attestation()]), "has no image for"),
        (index(vec![]), "has no image for"),
        (
            index(vec![nested]),
            "neither an image index nor an image manifest",
        ),
        (image(vec![plain.clone()]), "not an OverlayBD image"),
        (
            image(vec![good.clone(), plain]),
            "layer 1 of the image is not an OverlayBD layer",
        ),
        (
            image(vec![annotated("turbo-oci/target-digest", &other)]),
            "TurboOCI",
        ),
        (
            image(vec![annotated("version", "0.1.0-fastoci")]),
            "TurboOCI",
        ),
        (
            image(vec![changed(&|layer| {
                layer["mediaType"] = "application/vnd.oci.image.layer.v1.tar+gzip".into();
            })]),
            "tar+gzip",
        ),
        (
            image(vec![annotated("blob-digest", &other)]),
            "annotation blob-digest",
        ),
        (
            image(vec![annotated("blob-size", "7")]),
            "annotation blob-size",
        ),
        (image(vec![]), "the image has 0 layers"),
        (
            image(vec![good.clone(); 10_000]),
            "the image has 10000 layers",
        ),
        (
            image(vec![changed(&|layer| {
                layer["digest"] = "sha256:../../../../etc/passwd".into();
            })]),
            "layer 0",
        ),
        (
            image(vec![changed(&|layer| layer["size"] = 0.into())]),
            "layer 0",
        ),
        (
            image(vec![changed(&|layer| layer["size"] = u64::MAX.into())]),
            "layer 0",
        ),
        (
            image(vec![changed(&|layer| layer["size"] = (-1).into())]),
            "malformed manifest",
        ),
    ]
}

/// Each ends the start with one line, without a request for a blob.
#[test]
fn what_is_no_image_for_this_machine_is_refused_by_name() {
    let (layers, place, documents) = (Layers::new(1), Place::default(), Documents::default());
    let server = registry(&layers, &documents);
    let mut texts: Vec<_> = refused(&layers)
        .into_iter()
        .map(|(document, words)| (document.to_string(), words))
        .collect();
    let manifest = layers.manifest().to_string();
    texts.extend([
        (r#"{"layers":[],"layers":[]}"#.to_owned(), "duplicate field"),
        ("[".repeat(1 << 20), "malformed manifest"),
        ("<html>".to_owned(), "malformed manifest"),
        (
            format!("{}{manifest}", " ".repeat(4 << 20)),
            "expected at most 4194304 bytes, found a longer body",
        ),
    ]);
    for (number, (text, words)) in texts.iter().enumerate() {
        put(&documents, "tag", text);
        let output = place.run_image(&server.host(), ":tag", &[]);
        let said = String::from_utf8_lossy(&output.stderr);
        assert_eq!(output.status.code(), Some(1), "{number}, {words}: {said}");
        let last = said.lines().last().unwrap_or_default();
        let starts = last.starts_with("ovbd-vhost: ");
        assert!(
            starts && last.contains(words) && last.len() < 2000,
            "{number}, {words}: {said}"
        );
        assert!(!place.path("s").exists());
    }
    assert_eq!(server.count(), texts.len(), "{:?}", server.received());
}

/// A document that is not the one that a reference or an index pins.
#[test]
fn a_document_with_another_digest_is_refused() {
    let (layers, place, documents) = (Layers::new(1), Place::default(), Documents::default());
    let server = registry(&layers, &documents);
    let pinned = Digest::of(b"pinned").to_string();
    put(&documents, &pinned, &layers.manifest().to_string());
    let index = json!({"schemaVersion": 2, "manifests": [entry(&pinned, "linux", ARCHITECTURE)]});
    put(&documents, "index", &index.to_string());
    for selector in [format!("@{pinned}"), ":index".to_owned()] {
        let output = place.run_image(&server.host(), &selector, &[]);
        let said = String::from_utf8_lossy(&output.stderr);
        assert_eq!(output.status.code(), Some(1), "{said}");
        assert!(said.contains("the digest of the manifest"), "{said}");
    }
}

/// A tag that moves: the next start reads the new image, and a writable layer above the old one is not
/// put on it.
#[test]
fn a_moved_tag_is_not_put_below_a_writable_layer() {
    let (old, place, documents) = (Layers::new(1), Place::default(), Documents::default());
    let new = Layers::side_by_side(4, 256 << 10);
    let both = Layers {
        blobs: [old.blobs.clone(), new.blobs.clone()].concat(),
        content: Arc::clone(&old.content),
    };
    let server = registry(&both, &documents);
    let pin = put(&documents, "tag", &old.manifest().to_string());
    let upper = place.path("upper");
    std::fs::create_dir(&upper).expect("a folder");
    let upper = ["--upper-auto", &upper.display().to_string()].map(str::to_owned);
    let upper: Vec<_> = upper.iter().map(String::as_str).collect();
    let mut daemon = place.serve_image(&server.host(), ":tag", &upper);
    let written = [7; 4096];
    let mut guest = Guest::boot(daemon.connect(), Options::default()).expect("guest");
    guest.write(0, 8, &written);
    drop(guest);
    assert_eq!(daemon.terminate().code(), Some(0));

    put(&documents, "tag", &new.manifest().to_string());
    let output = place.run_image(&server.host(), ":tag", &upper);
    let said = String::from_utf8_lossy(&output.stderr);
    assert_eq!(output.status.code(), Some(1), "{said}");
    assert!(said.contains("has parent"), "{said}");
    let daemon = place.serve_image(&server.host(), ":tag", &[]);
    Reader::connect(&daemon).check_all(&new.content);
    drop(daemon);

    let daemon = place.serve_image(&server.host(), &format!("@{pin}"), &upper);
    let mut expected = old.content.to_vec();
    expected[4096..8192].copy_from_slice(&written);
    Reader::connect(&daemon).check_all(&expected);
}
