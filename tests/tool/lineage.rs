//! Layers upon other stacks than the ones they were made upon are refused, whatever they are named by.

use super::writable::UPPER;
use super::*;

pub const NIL: &str = "00000000-0000-0000-0000-000000000000";

/// Layers without uuids, `x` and `y`, of disks of random bytes: their indexes and block tables are equal.
fn nameless(algorithm: &str) -> TempDir {
    let dir = tempfile::tempdir().unwrap();
    for (seed, name) in [(1, "x"), (2, "y")] {
        fs::write(dir.path().join("raw"), tagged(4 << 20, seed)).unwrap();
        let create = ["create", "--from", "raw", name, "--uuid", NIL];
        succeed(
            &dir,
            &[&create[..], &["--algorithm", algorithm]].concat(),
            b"",
        );
    }
    dir
}

/// Layers `a`, `l1` upon it and `l2` upon both.
fn named() -> TempDir {
    let dir = tempfile::tempdir().unwrap();
    for (seed, name, parent) in [(1, "a", ""), (2, "l1", "a"), (3, "l2", "a,l1")] {
        fs::write(dir.path().join("raw"), tagged(40_960, seed)).unwrap();
        let parent: &[_] = if parent.is_empty() {
            &[]
        } else {
            &["--parent", parent]
        };
        succeed(
            &dir,
            &[&["create", "--from", "raw", name], parent].concat(),
            b"",
        );
    }
    dir
}

/// Asserts that the stack is refused by all that reads a disk, by `check` too, and not with `--force`.
fn assert_refused(dir: &TempDir, stack: &[&str], reason: &str) {
    let checked = ovbd(dir, &[&["check"], stack].concat(), b"");
    let text = String::from_utf8(checked.stdout).unwrap();
    assert_eq!(checked.status.code(), Some(1), "{stack:?}: {text}");
    assert!(text.contains(reason), "{stack:?}: {text}");
    let export = [&["export", "-o", "out"], stack].concat();
    let error = fail(dir, 1, &export);
    assert!(
        error.contains(reason) && error.contains("--force"),
        "{error}"
    );
    let forced = ovbd(dir, &[&export[..], &["--force"]].concat(), b"");
    assert!(forced.status.success(), "{forced:?}");
    let daemon = Command::new(env!("CARGO_BIN_EXE_ovbd-vhost"))
        .args(["--socket", "s", "--layers"])
        .args(stack)
        .current_dir(dir.path())
        .output()
        .unwrap();
    let error = String::from_utf8(daemon.stderr).unwrap();
    assert_eq!(daemon.status.code(), Some(1), "{error}");
    assert!(error.contains(reason), "{stack:?}: {error}");
}

fn assert_ok(dir: &TempDir, stack: &[&str]) {
    succeed(dir, &[&["check"], stack].concat(), b"");
    succeed(dir, &[&["export", "-o", "out"], stack].concat(), b"");
}

#[test]
fn layers_without_names_are_told_apart_by_their_data() {
    for algorithm in ["lz4", "none"] {
        let dir = nameless(algorithm);
        succeed(&dir, &["upper", "create", UPPER, "--parent", "x"], b"");
        assert_ok(&dir, &["x", "--upper", UPPER]);
        assert_refused(&dir, &["y", "--upper", UPPER], "was made for a stack");
        // The layer that it becomes keeps the record, beside a message.
        let commit = ["commit", "--upper", UPPER, "-o"];
        succeed(&dir, &[&commit[..], &["c"]].concat(), b"");
        let message = ["hi", "--message", "made by hand"];
        succeed(&dir, &[&commit[..], &message].concat(), b"");
        let child = ["create", "--from", "raw", "n", "--parent", "x"];
        succeed(&dir, &child, b"");
        for layer in ["c", "hi", "n"] {
            assert_ok(&dir, &[&format!("x,{layer}")]);
            assert_refused(&dir, &[&format!("y,{layer}")], "was made for a stack");
        }
        let info = succeed(&dir, &["inspect", "--json", "hi"], b"");
        let info: serde_json::Value = serde_json::from_slice(&info).unwrap();
        assert_eq!(info["layers"][0]["message"], "made by hand");
        assert_eq!(info["layers"][0]["made_upon"]["size"], 4 << 20);
    }
}

#[test]
fn a_message_that_leaves_no_room_for_the_record_is_refused() {
    let dir = named();
    let long = "m".repeat(256);
    let create = ["create", "--from", "raw", "out", "--message", &long];
    succeed(&dir, &create, b"");
    let error = fail(&dir, 1, &[&create[..], &["--parent", "a"]].concat());
    assert!(error.contains("256 bytes; at most 2"), "{error}");
}

#[test]
fn the_bottom_of_a_stack_is_missed() {
    let dir = named();
    assert_ok(&dir, &["a,l1,l2"]);
    assert_refused(&dir, &["l1,l2"], "no layer is below it");
    succeed(&dir, &["upper", "create", UPPER, "--parent", "a"], b"");
    let error = fail(&dir, 1, &["export", "--upper", UPPER, "-o", "raw2"]);
    assert!(error.contains("no layer is below it"), "{error}");
    // Parts can be looked at, and merged.
    for part in ["l1", "l1,l2"] {
        succeed(&dir, &["inspect", part], b"");
        succeed(&dir, &["merge", part, "-o", "part"], b"");
        assert_ok(&dir, &["a,part"]);
        assert_refused(&dir, &["part,part"], "no layer is below it");
    }
    for lone in [&["l1"][..], &["--upper", UPPER]] {
        let text = succeed(&dir, &[&["check"], lone].concat(), b"");
        let text = String::from_utf8(text).unwrap();
        assert!(text.contains("no layer is below it"), "{text}");
    }
    for create in [
        &["create", "--from", "raw", "new", "--parent", "l1"][..],
        &["upper", "create", "data=v,index=w", "--parent", "l1,l2"],
    ] {
        let error = fail(&dir, 1, create);
        assert!(error.contains("no layer is below it"), "{error}");
    }
}

#[test]
fn another_disk_of_the_same_name_has_another_size() {
    let dir = named();
    let uuid = open(&dir, &["a"]).layers()[0].uuid().to_string();
    fs::write(dir.path().join("raw"), tagged(81_920, 9)).unwrap();
    succeed(
        &dir,
        &["create", "--from", "raw", "b", "--uuid", &uuid],
        b"",
    );
    succeed(&dir, &["upper", "create", UPPER, "--parent", "a"], b"");
    assert_ok(&dir, &["a", "--upper", UPPER]);
    assert_refused(&dir, &["b", "--upper", UPPER], "disk of 40960 bytes");
    assert_refused(&dir, &["b,l1"], "disk of 40960 bytes");
}

#[test]
fn files_of_a_writable_layer_have_any_name() {
    use std::ffi::OsStr;
    use std::os::unix::ffi::OsStrExt;

    let dir = named();
    let pair = OsStr::from_bytes(b"data=d\xff,index=i\xfe");
    for args in [
        &["upper", "create", "--size", "1M"][..],
        &["check", "--upper"],
        &["inspect", "--json", "--upper"],
        &["commit", "-o", "out", "--upper"],
        &["seal", "--upper"],
    ] {
        let output = Command::new(env!("CARGO_BIN_EXE_ovbd"))
            .args(args)
            .arg(pair)
            .current_dir(dir.path())
            .output()
            .unwrap();
        assert!(output.status.success(), "{args:?}: {output:?}");
    }
}
