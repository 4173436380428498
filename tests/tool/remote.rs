//! Commands that read layers in a registry.

use super::*;
use common::registries::{DockerRegistry, Storage};
use common::remote::{Layers, REPOSITORY};
use ovbd_vhost::format::digest::Digest;
use ovbd_vhost::format::trace::{self, TracedRead};
use serde_json::{Value, json};

#[test]
fn layers_in_a_registry_are_read_as_local_ones() {
    let dir = tempfile::tempdir().unwrap();
    let layers = Layers::new(2);
    let storage = Storage::default();
    let blobs: Vec<_> = layers.blobs.iter().map(Vec::as_slice).collect();
    storage.image(REPOSITORY, "1", &blobs);
    let mut registry = DockerRegistry::open(storage);
    let host = registry.host().to_owned();
    let reference = format!("{host}/{REPOSITORY}:1");
    let with_image = |args: &[&str]| -> Vec<String> {
        let remote = ["--cache", "c", "--insecure-registry", &host];
        let all = args.iter().chain(&remote);
        all.map(|arg| (*arg).to_owned()).collect()
    };
    let run = |args: &[&str]| {
        let args = with_image(args);
        let args: Vec<_> = args.iter().map(String::as_str).collect();
        succeed(&dir, &args, b"")
    };
    let inspect = || -> Value {
        let text = run(&["inspect", "--json", "--image", &reference]);
        serde_json::from_slice(&text).unwrap()
    };
    let seen = inspect();
    assert_eq!(seen["layers"][0]["file_size"], blobs[0].len());
    assert_eq!(seen["layers"][0]["local_bytes"], 0, "{seen}");
    let digest = Digest::of(blobs[1]).to_string();
    assert!(
        seen["layers"][1]["path"]
            .as_str()
            .unwrap()
            .ends_with(&digest)
    );

    run(&["export", "--image", &reference, "-o", "raw"]);
    assert!(fs::read(dir.path().join("raw")).unwrap() == *layers.content);
    assert_eq!(inspect()["layers"][0]["local_bytes"], blobs[0].len());
    // From here on, all is in the cache.
    registry.stop();
    let lowers = layers.lowers();
    let config = json!({
        "repoBlobUrl": format!("http://{host}/v2/{REPOSITORY}/blobs"),
        "lowers": lowers,
    });
    fs::write(dir.path().join("config"), config.to_string()).unwrap();
    run(&["check", "--config", "config"]);
    run(&["merge", "--config", "config", "-o", "merged"]);
    assert_reads(&dir, &["merged"], &layers.content);
    let text = fail(&dir, 2, &["export", "--config", "config", "-o", "raw"]);
    assert!(text.contains("--cache"), "{text}");
}

#[test]
fn a_layer_is_made_upon_an_image_in_a_registry() {
    let dir = tempfile::tempdir().unwrap();
    let layers = Layers::new(1);
    let storage = Storage::default();
    let blobs: Vec<_> = layers.blobs.iter().map(Vec::as_slice).collect();
    storage.image(REPOSITORY, "1", &blobs);
    let registry = DockerRegistry::open(storage);
    let host = registry.host();
    let reference = format!("{host}/{REPOSITORY}:1");
    let mut changed = layers.content.to_vec();
    changed[5000..6000].fill(7);
    fs::write(dir.path().join("raw"), &changed).unwrap();
    let args = [
        "create",
        "--from",
        "raw",
        "top",
        "--parent-image",
        &reference,
        "--cache",
        "c",
        "--insecure-registry",
        host,
    ];
    succeed(&dir, &args, b"");
    for (number, blob) in blobs.iter().enumerate() {
        fs::write(dir.path().join(format!("layer{number}")), blob).unwrap();
    }
    assert_reads(&dir, &["layer0", "layer1", "top"], &changed);
    assert!(fs::metadata(dir.path().join("top")).unwrap().len() < 100_000);
}

#[test]
fn a_trace_is_shown() {
    let dir = tempfile::tempdir().unwrap();
    let reads = [(0, 4096, 512), (2, 1 << 20, 65536)].map(|(layer, offset, len)| TracedRead {
        layer,
        offset,
        len,
    });
    fs::write(dir.path().join("trace"), trace::encode(&reads)).unwrap();
    let text = String::from_utf8(succeed(&dir, &["trace", "show", "trace"], b"")).unwrap();
    let numbers = |line: &str| {
        line.split_whitespace()
            .map(str::to_owned)
            .collect::<Vec<_>>()
    };
    let lines: Vec<_> = text.lines().skip(1).map(numbers).collect();
    assert_eq!(lines, [["0", "4096", "512"], ["2", "1048576", "65536"]]);
    fs::write(
        dir.path().join("list"),
        "/bin/sh\n/etc/passwd\n/usr/lib/x\n",
    )
    .unwrap();
    assert!(fail(&dir, 1, &["trace", "show", "list"]).contains("not a trace"));

    let said = succeed(&dir, &["trace", "layer", "trace", "layer.tar"], b"");
    let layer = fs::read(dir.path().join("layer.tar")).unwrap();
    let expected = format!("{} {}\n", Digest::of(&layer), layer.len());
    assert_eq!(String::from_utf8(said).unwrap(), expected);
    let listed = Command::new("tar")
        .arg("-tvf")
        .arg(dir.path().join("layer.tar"))
        .output();
    let listed = String::from_utf8(listed.unwrap().stdout).unwrap();
    assert!(
        listed.starts_with("-r--r--r--") && listed.ends_with(" trace\n"),
        "{listed}"
    );
    assert!(fail(&dir, 1, &["trace", "layer", "list", "x"]).contains("not a trace"));
    let absent = fail(&dir, 1, &["trace", "record", "no-socket", "t"]);
    assert!(
        absent.contains("cannot reach a daemon at no-socket"),
        "{absent}"
    );
    assert!(!dir.path().join("t").exists());
}
