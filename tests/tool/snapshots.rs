//! Disks of which snapshots were taken: tools are told of the first pair of files, and find the rest.

use super::writable::*;
use super::*;
use common::volume::BlockingIo as _;
use ovbd_vhost::format::lsmt::Header;
use ovbd_vhost::io::scatter::Scatter;
use ovbd_vhost::writable::{Options, Volume};
use uuid::Uuid;
use vm_memory::VolatileSlice;

/// A disk of a lower layer and two snapshots above it, the second of them sealed or not: what it
/// holds.
fn with_snapshots(dir: &TempDir, sealed: bool) -> Vec<u8> {
    let mut disk = lower(dir, 4, 4 << 20);
    let paths = paths(dir);
    let header = Header {
        parent_uuid: Uuid::nil(),
        ..header(disk.len() as u64)
    };
    ovbd_vhost::writable::create(&paths, KINDS[2], &header).unwrap();
    let stack = Stack::new([dir.path().join("lower")]);
    let (volume, snapshots) = common::volume::open(&stack, &paths, Options::default()).unwrap();
    for number in 0..3_u64 {
        let start = number * 100;
        let mut bytes = tagged(150 * 512, number);
        disk[start as usize * 512..][..bytes.len()].copy_from_slice(&bytes);
        put(&volume, start, &mut bytes);
        if number < 2 {
            snapshots.take(&number.to_string()).unwrap();
            if sealed || number == 0 {
                snapshots.seal().unwrap();
            }
        }
    }
    volume.flush().unwrap();
    let files: Vec<_> = volume
        .layers()
        .iter()
        .map(|upper| upper.paths().data.clone())
        .collect();
    drop((volume, snapshots));
    files.iter().for_each(|file| free(file));
    disk
}

fn put(volume: &Volume, start: u64, bytes: &mut [u8]) {
    let mut scatter = Scatter::new();
    let sectors = bytes.len() as u64 / 512;
    scatter.push(VolatileSlice::from(bytes));
    volume
        .write(common::sectors(start, sectors), scatter.cursor(0))
        .unwrap();
}

/// As a config names it, and the command line.
fn ways(dir: &TempDir) -> [Vec<&'static str>; 2] {
    let config =
        r#"{"lowers": [{"file": "lower"}], "upper": {"data": "u.data", "index": "u.index"}}"#;
    fs::write(dir.path().join("config.v1.json"), config).unwrap();
    [
        vec!["--config", "config.v1.json"],
        vec!["lower", "--upper", UPPER],
    ]
}

#[test]
fn tools_follow_the_list_to_the_disk_of_now() {
    let dir = tempfile::tempdir().unwrap();
    let disk = with_snapshots(&dir, true);
    for files in ways(&dir) {
        let raw = succeed(&dir, &[&["export", "-o", "-"], &files[..]].concat(), b"");
        assert_eq!(difference(&raw, &disk), None, "{files:?}");
        succeed(&dir, &[&["merge", "-o", "one"], &files[..]].concat(), b"");
        assert_reads(&dir, &["one"], &disk);
        let json = succeed(&dir, &[&["inspect", "--json"], &files[..]].concat(), b"");
        let json: serde_json::Value = serde_json::from_slice(&json).unwrap();
        let layers = json["layers"].as_array().unwrap().iter();
        let names: Vec<_> = layers
            .map(|layer| layer["path"].as_str().unwrap())
            .collect();
        assert_eq!(names.len(), 3, "{names:?}");
        assert!(
            names[1].ends_with("u.data") && names[2].ends_with("u.data.1"),
            "{names:?}"
        );
        let active = json["upper"]["data"].as_str().unwrap();
        assert!(active.ends_with("u.data.2"), "{active}");
        let checked = succeed(&dir, &[&["check"], &files[..]].concat(), b"");
        let checked = String::from_utf8(checked).unwrap();
        assert!(checked.contains("ok; layers: 4"), "{checked}");
        assert!(!checked.contains("note"), "{checked}");
    }
}

#[test]
fn tools_for_one_pair_name_the_one_that_counts() {
    let dir = tempfile::tempdir().unwrap();
    let disk = with_snapshots(&dir, true);
    for args in [
        &["commit", "--upper", UPPER, "-o", "top"][..],
        &["seal", "--upper", UPPER],
        &["resize", "--upper", UPPER, "8M"],
    ] {
        let frozen = fail(&dir, 1, args);
        for word in [
            "u.data is frozen",
            "u.data.snapshots",
            "data=u.data.2,index=u.index.2",
        ] {
            assert!(frozen.contains(word), "{frozen}");
        }
    }
    let active = "data=u.data.2,index=u.index.2";
    succeed(&dir, &["commit", "--upper", active, "-o", "top"], b"");
    assert_reads(&dir, &["lower", "u.data", "u.data.1", "top"], &disk);
    succeed(&dir, &["resize", "--upper", active, "8M"], b"");
    let grown = succeed(&dir, &["export", "lower", "--upper", UPPER, "-o", "-"], b"");
    assert_eq!(grown.len(), 8 << 20);
}

/// The device was killed after a snapshot, before its layer was finished.
#[test]
fn a_frozen_pair_that_is_not_sealed_is_named() {
    let dir = tempfile::tempdir().unwrap();
    let disk = with_snapshots(&dir, false);
    for files in ways(&dir) {
        let unsealed = fail(&dir, 1, &[&["export", "-o", "raw"], &files[..]].concat());
        assert!(
            unsealed
                .contains("u.data.1: expected a sealed layer, found a writable or truncated one"),
            "{unsealed}"
        );
        assert!(unsealed.contains("ovbd seal"), "{unsealed}");
    }
    succeed(
        &dir,
        &["seal", "--upper", "data=u.data.1,index=u.index.1"],
        b"",
    );
    for files in ways(&dir) {
        let raw = succeed(&dir, &[&["export", "-o", "-"], &files[..]].concat(), b"");
        assert_eq!(difference(&raw, &disk), None, "{files:?}");
    }
}

/// It is a healthy disk: the check says what the layer waits for.
#[test]
fn a_frozen_pair_that_is_not_sealed_is_checked() {
    let dir = tempfile::tempdir().unwrap();
    with_snapshots(&dir, false);
    for files in ways(&dir) {
        let checked = succeed(&dir, &[&["check"], &files[..]].concat(), b"");
        let checked = String::from_utf8(checked).unwrap();
        for word in [
            "not sealed yet",
            "ovbd seal --upper data=",
            "u.data.1",
            "ok; layers: 4",
        ] {
            assert!(checked.contains(word), "{checked}");
        }
        // What an interrupted seal leaves.
        let path = dir.path().join("u.data.1");
        let data = File::options().append(true).open(path).unwrap();
        (&data).write_all(&[0x55; 8192]).unwrap();
    }
    let layer = ovbd(&dir, &["check", "lower,u.data,u.data.1"], b"");
    let found = String::from_utf8(layer.stdout).unwrap();
    assert_eq!(layer.status.code(), Some(1));
    assert!(
        found.contains("u.data.1: expected a sealed layer, found a writable or truncated one"),
        "{found}"
    );
}

/// Images without uuids, as upstream's tools make them: the layers that snapshots froze are missed.
#[test]
fn frozen_layers_that_are_left_out_are_missed() {
    let dir = tempfile::tempdir().unwrap();
    fs::write(dir.path().join("raw"), tagged(1 << 20, 1)).unwrap();
    let create = ["create", "--from", "raw", "x", "--uuid", lineage::NIL];
    succeed(&dir, &create, b"");
    succeed(&dir, &["upper", "create", UPPER, "--parent", "x"], b"");
    let stack = Stack::new([dir.path().join("x")]);
    let paths = paths(&dir);
    // Two snapshots before the disk is opened again, and one after.
    for names in [&["0", "1"][..], &["2"]] {
        let (volume, snapshots) = common::volume::open(&stack, &paths, Options::default()).unwrap();
        for name in names {
            put(&volume, 8, &mut tagged(4096, 2));
            snapshots.take(name).unwrap();
        }
        snapshots.seal().unwrap();
        volume.flush().unwrap();
        drop((volume, snapshots));
        names_of_data(&dir)
            .iter()
            .for_each(|name| free(&dir.path().join(name)));
    }
    succeed(&dir, &["check", "x", "--upper", UPPER], b"");
    let active = "data=u.data.3,index=u.index.3";
    succeed(
        &dir,
        &["check", "x,u.data,u.data.1,u.data.2", "--upper", active],
        b"",
    );
    for layers in [
        "x",
        "x,u.data.2",
        "x,u.data,u.data.1",
        "x,u.data.1,u.data.2",
    ] {
        for verb in [&["check"][..], &["export", "-o", "out"]] {
            let args = [verb, &[layers, "--upper", active]].concat();
            let output = ovbd(&dir, &args, b"");
            assert_eq!(output.status.code(), Some(1), "{layers} {output:?}");
        }
    }
    for layers in ["x,u.data.1", "u.data,u.data.1", "x,u.data,u.data.2"] {
        let output = ovbd(&dir, &["check", layers], b"");
        assert_eq!(output.status.code(), Some(1), "{layers} {output:?}");
    }
    // A list without its first entry.
    let list = dir.path().join("u.data.snapshots");
    let mut json: serde_json::Value = serde_json::from_slice(&fs::read(&list).unwrap()).unwrap();
    json["frozen"].as_array_mut().unwrap().remove(0);
    fs::write(&list, json.to_string()).unwrap();
    let error = common::volume::open(&stack, &paths, Options::default()).unwrap_err();
    assert!(
        error.to_string().contains("was made for a stack"),
        "{error}"
    );
}

fn names_of_data(dir: &TempDir) -> Vec<String> {
    let mut names = names(dir);
    names.retain(|name| name.starts_with("u.data") && !name.ends_with("snapshots"));
    names
}

#[test]
fn a_list_that_cannot_be_read_is_named() {
    let dir = tempfile::tempdir().unwrap();
    with_snapshots(&dir, true);
    fs::write(dir.path().join("u.data.snapshots"), "[").unwrap();
    for args in [
        &["export", "lower", "--upper", UPPER, "-o", "raw"][..],
        &["check", "lower", "--upper", UPPER],
        &["commit", "--upper", UPPER, "-o", "top"],
    ] {
        let list = fail(&dir, 1, args);
        assert!(list.contains("u.data.snapshots"), "{list}");
    }
}
