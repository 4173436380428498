//! `ovbd inspect`: what it says about layers.

use super::*;
use serde_json::{Value, json};

fn inspect(dir: &TempDir, layers: &str) -> Value {
    let stdout = succeed(dir, &["inspect", "--json", layers], b"");
    serde_json::from_slice(&stdout).unwrap()
}

#[test]
fn json_tells_what_create_was_told() {
    let dir = tempfile::tempdir().unwrap();
    let mut bytes = tagged(40 << 12, 3);
    fs::write(dir.path().join("raw"), &bytes).unwrap();
    let uuid = "0a1b2c3d-4e5f-6071-8293-a4b5c6d7e8f9";
    let zstd = [
        "--algorithm",
        "zstd",
        "--block-size",
        "8192",
        "--tar",
        "--message",
        "hello",
    ];
    let create = ["create", "--from", "raw", "a", "--uuid", uuid];
    succeed(&dir, &[&create[..], &zstd].concat(), b"");
    bytes[..10 << 12].fill(0);
    bytes[30 << 12..31 << 12].fill(1);
    fs::write(dir.path().join("raw"), &bytes).unwrap();
    let create = [
        "create",
        "--from",
        "raw",
        "b",
        "--parent",
        "a",
        "--algorithm",
        "none",
    ];
    succeed(&dir, &create, b"");

    let found = inspect(&dir, "a,b");
    let size = 40 << 12;
    assert_eq!(found["virtual_size"], size);
    assert_eq!(found["segments"], 4);
    assert_eq!(found["zeroed"], 10 << 12);
    assert_eq!(found["unmapped"], 0);
    let (lower, upper) = (&found["layers"][0], &found["layers"][1]);
    let file_size = fs::metadata(dir.path().join("a")).unwrap().len();
    for (key, expected) in [
        ("path", json!("a")),
        ("file_size", json!(file_size)),
        ("tar", json!(true)),
        ("layer_size", json!(size + 4096 * 3)),
        ("data_size", json!(size)),
        ("virtual_size", json!(size)),
        ("uuid", json!(uuid)),
        ("parent_uuid", json!(null)),
        ("message", json!("hello")),
        ("mappings", json!(1)),
        ("share", json!(29 << 12)),
        ("share_percent", json!(72.5)),
    ] {
        assert_eq!(lower[key], expected, "{key}");
    }
    let compression = &lower["compression"];
    assert_eq!(compression["algorithm"], "zstd");
    assert_eq!(compression["block_size"], 8192);
    assert_eq!(compression["blocks"], 22);
    assert_eq!(compression["checksum"], true);
    assert!(compression["stored_size"].as_u64().unwrap() < file_size);
    assert_eq!(upper["compression"], json!(null));
    assert_eq!(upper["ratio"], 1.0);
    assert_eq!(upper["parent_uuid"], uuid);
    assert_eq!(upper["share"], 1 << 12);
    assert_eq!(upper["mappings"], 2);
}

#[test]
fn the_table_names_every_layer() {
    let dir = tempfile::tempdir().unwrap();
    let case = golden::find("08-deep64-small");
    let layers: Vec<_> = case
        .layers
        .iter()
        .map(|path| path.to_str().unwrap())
        .collect();
    let stdout = succeed(&dir, &["inspect", &layers.join(",")], b"");
    let text = String::from_utf8(stdout).unwrap();
    for layer in &layers {
        assert_eq!(text.matches(layer).count(), 1, "{text}");
    }
    for word in [
        "64 layers",
        "tar, zfile",
        "lz4",
        "zstd",
        "16384",
        "67108864",
    ] {
        assert!(text.contains(word), "{word} in {text}");
    }
}

#[test]
fn what_is_no_layer_is_an_error() {
    let dir = tempfile::tempdir().unwrap();
    fs::write(dir.path().join("text"), "text ".repeat(5000)).unwrap();
    let error = fail(&dir, 1, &["inspect", "text"]);
    assert!(error.contains("text: not a valid layer"), "{error}");
    let error = fail(&dir, 1, &["inspect", "--config", "absent.json"]);
    assert!(error.contains("absent.json"), "{error}");
}
