//! Files that are given by mistake, and paths with commas.

use super::*;

/// A file of 64 KiB that starts with `start` and ends with `end` in its last 512 bytes.
fn file(dir: &TempDir, name: &str, start: &[u8], end: &[u8]) {
    let mut bytes = tagged(64 << 10, 1);
    bytes[..start.len()].copy_from_slice(start);
    let at = bytes.len() - 512;
    bytes[at..at + end.len()].copy_from_slice(end);
    fs::write(dir.path().join(name), bytes).unwrap();
}

#[test]
fn an_image_of_another_format_is_refused_by_its_name() {
    let dir = tempfile::tempdir().unwrap();
    for (start, end, kind) in [
        (&b"QFI\xfb\0\0\0\x03"[..], &b""[..], "is a qcow2 image"),
        (b"KDMV\x01\0\0\0", b"", "is a vmdk image"),
        (b"vhdxfile", b"", "is a vhdx image"),
        (b"conectix", b"conectix", "is a vhd image"),
        (b"", b"conectix", "is a vhd image"),
    ] {
        file(&dir, "image", start, end);
        let bytes = fs::read(dir.path().join("image")).unwrap();
        let error = fail(&dir, 1, &["create", "--from", "image", "out"]);
        let expected = format!("image {kind}; expected a raw image");
        assert!(error.contains(&expected), "{error}");
        assert!(error.contains("qemu-img convert -O raw"), "{error}");
        if !start.is_empty() {
            let output = ovbd(&dir, &["create", "--from", "-", "out"], &bytes);
            let error = String::from_utf8(output.stderr).unwrap();
            assert!(error.contains(kind), "{error}");
            let error = fail(&dir, 1, &["inspect", "image"]);
            let expected = format!("image {kind}; expected an OverlayBD layer");
            assert!(error.contains(&expected), "{error}");
            let output = ovbd(&dir, &["check", "image"], b"");
            let findings = String::from_utf8(output.stdout).unwrap();
            assert!(findings.contains(kind), "{findings}");
        }
        assert!(!dir.path().join("out").exists());
        succeed(&dir, &["create", "--from", "image", "out", "--raw"], b"");
        assert_reads(&dir, &["out"], &bytes);
        succeed(&dir, &["create", "--from", "-", "piped", "--raw"], &bytes);
        assert_reads(&dir, &["piped"], &bytes);
        fs::remove_file(dir.path().join("out")).unwrap();
    }
}

#[test]
fn a_config_in_place_of_a_layer_is_recognized() {
    let dir = tempfile::tempdir().unwrap();
    fs::write(dir.path().join("config.v1.json"), "{\n\"lowers\": []}").unwrap();
    let error = fail(&dir, 1, &["inspect", "config.v1.json"]);
    assert!(error.contains("looks like a JSON file"), "{error}");
    assert!(error.contains("--config"), "{error}");
    file(&dir, "layer.tar.gz", b"\x1f\x8b\x08", b"");
    let error = fail(&dir, 1, &["inspect", "layer.tar.gz"]);
    assert!(error.contains("is compressed with gzip"), "{error}");
}

#[test]
fn layers_whose_paths_have_commas() {
    let dir = tempfile::tempdir().unwrap();
    let (below, above) = (tagged(64 << 10, 1), tagged(64 << 10, 2));
    fs::write(dir.path().join("raw,1"), &below).unwrap();
    succeed(&dir, &["create", "--from", "raw,1", "a,b"], b"");
    fs::write(dir.path().join("raw,2"), &above).unwrap();
    let parent = ["--parent-layer", "a,b"];
    let create = ["create", "--from", "raw,2", "c,d"];
    succeed(&dir, &[&create[..], &parent].concat(), b"");
    assert_reads(&dir, &["a,b", "c,d"], &above);
    let layers = ["--layer", "a,b", "--layer", "c,d"];
    for command in [
        &["check"][..],
        &["inspect"],
        &["export", "-o", "out,1"],
        &["merge", "-o", "out,2"],
    ] {
        succeed(&dir, &[command, &layers].concat(), b"");
    }
    assert_eq!(fs::read(dir.path().join("out,1")).unwrap(), above);
    assert_reads(&dir, &["out,2"], &above);
    let upper = ["upper", "create", "data=u,1,index=i,1"];
    succeed(&dir, &[&upper[..], &parent].concat(), b"");
    succeed(
        &dir,
        &["check", "--upper", "data=u,1,index=i,1", "--layer", "a,b"],
        b"",
    );
    fail(&dir, 2, &["check", "a", "--layer", "b"]);
    fail(
        &dir,
        2,
        &[
            "create",
            "--from",
            "a",
            "b",
            "--parent",
            "c",
            "--parent-layer",
            "d",
        ],
    );
}
