//! Disks of which snapshots were taken: tools are told of the first pair of files, and find the rest.

use super::writable::*;
use super::*;
use ovbd_vhost::format::lsmt::Header;
use ovbd_vhost::io::scatter::Scatter;
use ovbd_vhost::writable::{Options, Snapshots, Volume};
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
    let (volume, snapshots) = Snapshots::open(&stack, &paths, Options::default()).unwrap();
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
    drop(volume);
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
            unsealed.contains("u.data.1 is a writable layer"),
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
