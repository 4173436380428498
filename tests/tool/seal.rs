//! `ovbd seal`, `ovbd resize` and `ovbd upper create`: what they do to the files.

use super::writable::*;
use super::*;
use ovbd_vhost::format::lsmt::writable::Kind;
use ovbd_vhost::writable::{Paths, journal};

#[test]
fn the_golden_upper_sealed_is_its_commit() {
    let dir = tempfile::tempdir().unwrap();
    let case = golden::find("10-upper-append");
    let Paths { data, index } = golden::copy_upper(&case, dir.path());
    let upper = "data=upper.data,index=upper.index";
    let before = fs::read(&data).unwrap();
    succeed(&dir, &["seal", "--upper", upper], b"");
    let sealed = fs::read(&data).unwrap();
    assert!(sealed.starts_with(&before), "what was there stays");
    assert!(!index.exists());
    let committed =
        content_of(&Image::open(&Stack::new([golden::path("commit-pairs/raw.obd")])).unwrap());
    assert_reads(&dir, &["upper.data"], &committed);
    let again = succeed(&dir, &["seal", "--upper", upper], b"");
    assert_eq!(again, b"the layer was sealed already\n");
    assert!(fs::read(&data).unwrap() == sealed);
}

#[test]
fn uppers_of_every_type_and_size() {
    let dir = tempfile::tempdir().unwrap();
    lower(&dir, 1, 3 << 20);
    let config = r#"{"lowers": [{"file": "lower"}], "upper": {"data": "", "index": ""}}"#;
    fs::write(dir.path().join("config.v1.json"), config).unwrap();
    for (number, (args, kind, size)) in [
        (&["--size", "10G"][..], "hybrid", 10_u64 << 30),
        (&["--size", "1536", "--type", "append"], "append", 1536),
        (&["--size", "2t", "--type", "sparse"], "sparse", 2 << 40),
        (&["--parent", "lower"], "hybrid", 3 << 20),
        (&["--parent", "lower", "--size", "4M"], "hybrid", 4 << 20),
        (&["--config", "config.v1.json"], "hybrid", 3 << 20),
    ]
    .into_iter()
    .enumerate()
    {
        let files = format!("data=d{number},index=i{number}");
        succeed(&dir, &[&["upper", "create", &files], args].concat(), b"");
        let json = succeed(&dir, &["inspect", "--json", "--upper", &files], b"");
        let json: serde_json::Value = serde_json::from_slice(&json).unwrap();
        assert_eq!(json["upper"]["kind"], kind);
        assert_eq!(json["upper"]["virtual_size"], size);
        assert_eq!(json["virtual_size"], size);
        assert_eq!(json["upper"]["parent_uuid"].is_null(), args[0] == "--size");
        let exists = fail(&dir, 1, &[&["upper", "create", &files], args].concat());
        assert!(exists.contains("cannot create"), "{exists}");
    }
    let order = format!(
        "{}\n",
        succeed_text(&dir, &["check", "lower", "--upper", "data=d3,index=i3"])
    );
    assert!(!order.contains("note"), "{order}");
    for args in [
        &["--size", "0"][..],
        &["--size", "1000"],
        &["--parent", "absent"],
    ] {
        fail(&dir, 1, &[&["upper", "create", UPPER], args].concat());
    }
    for args in [
        &[][..],
        &["--size", "1X"],
        &["--size", "1", "--type", "odd"],
    ] {
        fail(&dir, 2, &[&["upper", "create", UPPER], args].concat());
    }
}

/// As upstream makes it, a new sparse layer has no index: what other tools write to the data file
/// counts until we do.
#[test]
fn what_others_write_to_a_new_sparse_layer_counts() {
    let dir = tempfile::tempdir().unwrap();
    let create = ["upper", "create", UPPER, "--type", "sparse", "--size", "4M"];
    succeed(&dir, &create, b"");
    succeed(&dir, &["resize", "--upper", UPPER, "6M"], b"");
    let paths = paths(&dir);
    let mut disk = vec![0; 6 << 20];
    disk[5 << 20..][..8192].copy_from_slice(&tagged(8192, 3));
    let data = File::options().write(true).open(&paths.data).unwrap();
    data.write_all_at(&disk[5 << 20..][..8192], 4096 + (5 << 20))
        .unwrap();
    drop(data);
    let reads = |disk: &[u8]| {
        let raw = succeed(&dir, &["export", "--upper", UPPER, "-o", "-"], b"");
        assert_eq!(difference(&raw, disk), None);
    };
    reads(&disk);
    let upper = open_upper(&paths);
    let mut sector = tagged(512, 4);
    disk[512..1024].copy_from_slice(&sector);
    write(&upper, 1, &mut sector);
    close(upper);
    reads(&disk);
    assert_eq!(
        File::open(&paths.index).unwrap().metadata().unwrap().len(),
        4096 + 16
    );
}

#[test]
fn the_upper_that_a_config_names_is_made() {
    let dir = tempfile::tempdir().unwrap();
    lower(&dir, 1, 3 << 20);
    let config = |lowers: &str, upper: &str| {
        let text = format!(r#"{{"lowers": [{lowers}], "upper": {{{upper}}}}}"#);
        fs::write(dir.path().join("config.v1.json"), text).unwrap();
    };
    let (layer, pair) = (
        r#"{"file": "lower"}"#,
        r#""data": "u.data", "index": "u.index""#,
    );
    let create = ["upper", "create", "--config", "config.v1.json"];
    config(layer, pair);
    succeed(&dir, &create, b"");
    let made = succeed_text(&dir, &["check", "--config", "config.v1.json"]);
    assert!(
        made.contains("ok; layers: 2") && !made.contains("note"),
        "{made}"
    );
    let exists = fail(&dir, 1, &[&create[..], &[UPPER]].concat());
    assert!(exists.contains("u.data"), "{exists}");
    succeed(
        &dir,
        &[&create[..], &["data=other,index=one"]].concat(),
        b"",
    );
    fs::remove_file(dir.path().join("u.data")).unwrap();
    fs::remove_file(dir.path().join("u.index")).unwrap();
    config("", pair);
    let size = fail(&dir, 2, &create);
    assert!(size.contains("--size"), "{size}");
    succeed(&dir, &[&create[..], &["--size", "1M"]].concat(), b"");
    config(layer, "");
    let upper = fail(&dir, 2, &create);
    assert!(upper.contains("names no `upper`"), "{upper}");
}

fn succeed_text(dir: &TempDir, args: &[&str]) -> String {
    String::from_utf8(succeed(dir, args, b"")).unwrap()
}

#[test]
fn a_disk_grows_and_shrinks() {
    for kind in KINDS {
        let dir = tempfile::tempdir().unwrap();
        let paths = paths(&dir);
        let mut disk = vec![0; 4 << 20];
        write_at_random(&paths, kind, &mut Random::new(5), &mut disk);
        {
            let upper = open_upper(&paths);
            let mut end = tagged(8192, 9);
            write(&upper, (3 << 11) + 100, &mut end);
            let at = (3 << 20) + 100 * 512;
            disk[at..at + 8192].copy_from_slice(&end);
            // Not flushed: the journal has it.
            close(upper);
        }
        let reads = |disk: &[u8]| {
            let raw = succeed(&dir, &["export", "--upper", UPPER, "-o", "-"], b"");
            assert_eq!(difference(&raw, disk), None, "{kind:?}");
        };
        succeed(&dir, &["resize", "--upper", UPPER, "9M"], b"");
        disk.resize(9 << 20, 0);
        reads(&disk);
        succeed(&dir, &["resize", "--upper", UPPER, "4M"], b"");
        disk.truncate(4 << 20);
        reads(&disk);
        let beyond = fail(&dir, 1, &["resize", "--upper", UPPER, "2M"]);
        assert!(
            beyond.contains("bytes of data beyond byte 2097152"),
            "{beyond}"
        );
        reads(&disk);
        succeed(
            &dir,
            &["resize", "--upper", UPPER, "2M", "--drop-data"],
            b"",
        );
        reads(&disk[..2 << 20]);
        if kind == Kind::Sparse {
            let len = fs::metadata(&paths.data).unwrap().len();
            assert_eq!(len, (2 << 20) + 4096);
        }
        succeed(&dir, &["resize", "--upper", UPPER, "4M"], b"");
        disk[2 << 20..].fill(0);
        reads(&disk);
        assert!(
            journal::paths(&paths.index)
                .iter()
                .all(|path| !path.exists())
        );
        fail(&dir, 1, &["resize", "--upper", UPPER, "100"]);
        let upper = open_upper(&paths);
        assert_eq!(upper.header().virtual_size, 4 << 20);
    }
}

#[test]
fn a_damaged_upper_is_found() {
    let dir = tempfile::tempdir().unwrap();
    let paths = paths(&dir);
    let mut disk = vec![0; 1 << 20];
    write_at_random(&paths, Kind::Hybrid, &mut Random::new(3), &mut disk);
    let found = succeed_text(&dir, &["check", "--upper", UPPER]);
    assert!(
        found.contains("mappings in the journal") && found.contains("ok; layers: 1"),
        "{found}"
    );
    close(open_upper(&paths));
    let mut index = fs::read(&paths.index).unwrap();
    index[4096 + 6] = 0; // a length of 0 sectors, and not in the place of padding
    index[4096 + 7] = 0;
    fs::write(&paths.index, &index).unwrap();
    let output = ovbd(&dir, &["check", "--upper", UPPER], b"");
    let found = String::from_utf8(output.stdout).unwrap();
    assert_eq!(output.status.code(), Some(1));
    assert!(found.contains("index entry 0 covers no sector"), "{found}");
}
