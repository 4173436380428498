//! Configs that are read, refused, and what they name.

use super::*;
use crate::format::digest::Digest;

fn config(dir: &tempfile::TempDir, text: &str) -> Result<ImageConfig, Error> {
    let path = dir.path().join("config.v1.json");
    std::fs::write(&path, text).unwrap();
    ImageConfig::load(&path)
}

fn stack(dir: &tempfile::TempDir, text: &str) -> Result<Stack, Error> {
    config(dir, text)?.stack_and_upper().map(|(stack, _)| stack)
}

#[test]
fn a_trace_is_in_the_acceleration_layer_or_named() {
    let trace = |keys: &str| {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("config.v1.json");
        std::fs::write(
            &path,
            format!(r#"{{"lowers": [{{"file": "a"}}, {{"dir": "/d"}}]{keys}}}"#),
        )
        .unwrap();
        ImageConfig::load(&path).unwrap().trace()
    };
    assert_eq!(trace("").unwrap(), None);
    let layer = TracePath::Layer("/d/trace".into());
    assert_eq!(
        trace(r#", "accelerationLayer": true"#).unwrap(),
        Some(layer)
    );
    let named = TracePath::Named("/t".into());
    assert_eq!(trace(r#", "recordTracePath": "/t""#).unwrap(), Some(named));
    let both = trace(r#", "accelerationLayer": true, "recordTracePath": "/t""#).unwrap_err();
    let text = both.to_string();
    assert!(
        text.contains("Cannot record trace while acceleration layer exists"),
        "{text}"
    );
}

#[test]
fn lowers_by_file_and_folder() {
    let dir = tempfile::tempdir().unwrap();
    let root = dir.path();
    for (folder, names) in [
        ("a", &["overlaybd.commit", ".commit"][..]),
        ("b", &["overlaybd.sealed", ".commit"]),
        ("c", &["overlaybd.sealed"]),
    ] {
        std::fs::create_dir(root.join(folder)).unwrap();
        for name in names {
            std::fs::write(root.join(folder).join(name), "").unwrap();
        }
    }
    let text = r#"{
        "repoBlobUrl": "https://host/v2/x/blobs", "download": {"enable": true}, "new": [1],
        "lowers": [
            {"file": "/abs/olute", "dir": "a", "digest": "sha256:1", "size": 5},
            {"dir": "a", "file": ""}, {"dir": "b"}, {"dir": "c", "targetFile": ""},
            {"file": "rel/ative"}
        ],
        "upper": {"index": "", "data": "", "vsize": 64}, "resultFile": "r",
        "accelerationLayer": false, "recordTracePath": ""
    }"#;
    let config = config(&dir, text).unwrap();
    let expected = [
        PathBuf::from("/abs/olute"),
        root.join("a/overlaybd.commit"),
        root.join("b/.commit"),
        root.join("c/overlaybd.sealed"),
        root.join("rel/ative"),
    ];
    assert_eq!(
        config.stack_and_upper().unwrap(),
        (Stack::new(expected), None)
    );
    assert_eq!(config.result_file(), Some(root.join("r")));
}

#[test]
fn a_digest_is_a_layer_unless_its_file_is_local() {
    let dir = tempfile::tempdir().unwrap();
    std::fs::write(dir.path().join(".commit"), "").unwrap();
    let digest = Digest::of(b"");
    let text = format!(
        r#"{{"repoBlobUrl": "https://host/v2/x/blobs/", "lowers": [
            {{"digest": "{digest}", "size": 5, "dir": "none"}}, {{"digest": "{digest}", "size": 0}},
            {{"digest": "{digest}", "dir": "."}}
        ]}}"#
    );
    let remote = |size| {
        LayerRef::Remote(Arc::new(RemoteBlob {
            digest,
            size,
            blobs_url: "https://host/v2/x/blobs".to_owned(),
        }))
    };
    let local = LayerRef::from(dir.path().join("./.commit"));
    let expected = [remote(Some(5)), remote(None), local];
    let stack = stack(&dir, &text).unwrap();
    assert_eq!(stack.layers(), expected);
    let error = stack.open_files().unwrap_err().to_string();
    let name = format!("https://host/v2/x/blobs/{digest}");
    assert!(
        error.contains(&name) && error.contains("pull it"),
        "{error}"
    );
}

#[test]
fn an_upper_with_layers_and_without() {
    let dir = tempfile::tempdir().unwrap();
    let root = dir.path();
    let upper = r#""upper": {"data": "d", "index": "/i"}"#;
    for (text, layers) in [
        (format!(r#"{{"lowers": [{{"file": "a"}}], {upper}}}"#), 1),
        (format!(r#"{{"lowers": [], {upper}}}"#), 0),
    ] {
        let config = config(&dir, &text).unwrap();
        let (stack, files) = config.stack_and_upper().unwrap();
        assert_eq!(stack.layers().len(), layers);
        let (data, index) = (root.join("d"), PathBuf::from("/i"));
        assert_eq!(files, Some(Paths { data, index }));
    }
}

#[test]
fn what_is_not_supported_is_refused_by_name() {
    let dir = tempfile::tempdir().unwrap();
    for (text, name) in [
        (
            r#"{"lowers":[{"file":"a"},{"file":"b","targetFile":"t"}]}"#,
            "lowers[1].targetFile",
        ),
        (
            r#"{"lowers":[{"file":"b","targetDigest":"t"}]}"#,
            "lowers[0].targetDigest",
        ),
        (
            r#"{"lowers":[{"file":"b","gzipIndex":"t"}]}"#,
            "lowers[0].gzipIndex",
        ),
        (
            r#"{"lowers":[{"file":"b"}],"upper":{"index":"i"}}"#,
            "upper has no data",
        ),
        (
            r#"{"lowers":[{"file":"b"}],"upper":{"target":"i"}}"#,
            "upper.target",
        ),
        (
            r#"{"lowers":[{"file":"b"}],"upper":{"gzipIndex":"i"}}"#,
            "upper.gzipIndex",
        ),
        (
            r#"{"lowers":[{"dir":"b"}],"accelerationLayer":true}"#,
            "lowers is empty",
        ),
        (
            r#"{"lowers":[{"digest":"sha256:77","size":4}]}"#,
            "repoBlobUrl is missing",
        ),
        (
            r#"{"repoBlobUrl":"u","lowers":[{"digest":"sha256:77","dir":"no/where"}]}"#,
            "invalid digest of lowers[0]",
        ),
        (r#"{"lowers":[{"dir":"no/where"}]}"#, "no/where"),
        (
            r#"{"lowers":[{"dir":""}]}"#,
            "the entry has no file, dir or digest",
        ),
        (r#"{"lowers":[]}"#, "lowers is empty"),
        (
            r#"{"lower":[{"file":"b"}]}"#,
            "is \"lowers\"; found \"lower\"",
        ),
        (r#"{"layers":["b"]}"#, "is \"lowers\"; found \"layers\""),
        (r#"{"lowers":null}"#, "lowers is empty"),
        ("{}", "lowers is empty"),
    ] {
        let error = stack(&dir, text).unwrap_err();
        let message = error.to_string();
        assert!(message.contains(name), "{message}");
        assert!(message.contains("config.v1.json"), "{message}");
    }
}

#[test]
fn an_upper_is_two_files_above_the_lowers() {
    let dir = tempfile::tempdir().unwrap();
    let upper = |text: &str| {
        let text = format!(r#"{{"lowers":[{{"file":"l"}}],"upper":{text}}}"#);
        config(&dir, &text).unwrap()
    };
    let both = upper(r#"{"data":"/a/d","index":"i"}"#);
    let files = Paths {
        data: "/a/d".into(),
        index: dir.path().join("i"),
    };
    assert_eq!(both.stack_and_upper().unwrap().1, Some(files));
    let lowers = Stack::new([dir.path().join("l")]);
    assert_eq!(both.stack_and_upper().unwrap().0, lowers);
    for none in ["null", "{}", r#"{"data":"","index":""}"#] {
        assert_eq!(
            upper(none).stack_and_upper().unwrap(),
            (lowers.clone(), None)
        );
    }
    for (half, missing) in [
        (r#"{"data":"d"}"#, "no index"),
        (r#"{"index":"i","data":""}"#, "no data"),
    ] {
        let error = upper(half).stack_and_upper().unwrap_err().to_string();
        assert!(error.contains(missing), "{error}");
    }
    let error = upper(r#"{"data":"d","index":"i","target":"t"}"#).stack_and_upper();
    assert!(error.unwrap_err().to_string().contains("upper.target"));
}

#[test]
fn what_is_no_config_is_refused() {
    let dir = tempfile::tempdir().unwrap();
    for text in [
        "",
        "5",
        "{\"lowers\": 5}",
        "{\"lowers\":[{\"file\":7}]}",
        "{\"lowers\":",
    ] {
        let error = config(&dir, text).unwrap_err();
        assert!(matches!(error, Error::Syntax { .. }), "{text}: {error:?}");
    }
    let long = format!("{{\"x\": \"{}\"}}", "x".repeat(1 << 20));
    assert!(matches!(config(&dir, &long), Err(Error::TooLong { .. })));
    let error = ImageConfig::load(&dir.path().join("absent")).unwrap_err();
    assert!(matches!(error, Error::Read { .. }));
}
