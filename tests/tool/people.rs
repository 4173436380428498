//! What the tool tells people and scripts: last lines, JSON, colours, and the options that all commands share.

use super::writable::UPPER;
use super::*;
use serde_json::Value;

/// The output of a command that must succeed, as text.
fn text(dir: &TempDir, args: &[&str]) -> String {
    String::from_utf8(succeed(dir, args, b"")).unwrap()
}

/// The same with `--json`.
fn json(dir: &TempDir, args: &[&str]) -> Value {
    let output = succeed(dir, &[args, &["--json"]].concat(), b"");
    serde_json::from_slice(&output).unwrap()
}

/// A raw image of noise, a layer of it, and a writable layer with data above.
fn files() -> TempDir {
    let dir = tempfile::tempdir().unwrap();
    let mut raw = tagged(1 << 20, 7);
    raw.resize(3 << 20, 0);
    fs::write(dir.path().join("raw"), raw).unwrap();
    succeed(&dir, &["create", "--from", "raw", "base"], b"");
    succeed(&dir, &["upper", "create", UPPER, "--parent", "base"], b"");
    dir
}

#[test]
fn what_makes_a_file_ends_with_one_line_about_it() {
    let dir = files();
    let with_upper = ["base", "--upper", UPPER];
    for (name, command) in [
        ("a", &["create", "--from", "raw", "a"][..]),
        ("b", &["merge", "base", "-o", "b"]),
        ("c", &["commit", "--upper", UPPER, "-o", "c"]),
        ("d", &[&["export", "-o", "d"], &with_upper[..]].concat()),
    ] {
        let said = text(&dir, command);
        assert_eq!(said.lines().count(), 1, "{said}");
        assert!(said.starts_with(&format!("{name}: ")), "{said}");
        assert!(said.ends_with(" s\n"), "{said}");
        let made = json(&dir, command);
        let len = fs::metadata(dir.path().join(name)).unwrap().len();
        assert_eq!(
            (&made["path"], &made["file_size"]),
            (&name.into(), &len.into())
        );
        assert!(made["seconds"].as_f64().unwrap() >= 0.0);
        let data = if name == "c" { 0 } else { 1 << 20 };
        assert_eq!(made["data_size"], data, "{made}");
        let ratio = data as f64 / len as f64;
        assert!((made["ratio"].as_f64().unwrap() - ratio).abs() < 1e-9);
        match name {
            "d" => assert_eq!(made["mappings"], Value::Null),
            _ => assert!(said.contains(" mappings, "), "{said}"),
        }
    }
    // Standard output has the image alone.
    let raw = succeed(&dir, &["export", "base", "-o", "-"], b"");
    assert_eq!(raw.len(), 3 << 20);
    fail(&dir, 2, &["export", "base", "-o", "-", "--json"]);

    let sealed = json(&dir, &["seal", "--upper", UPPER]);
    let len = fs::metadata(dir.path().join("u.data")).unwrap().len();
    assert_eq!(sealed["file_size"], len);
    assert_eq!(sealed["sealed_before"], false);
    let before = json(&dir, &["seal", "--upper", UPPER]);
    assert_eq!(before["sealed_before"], true);
    let before = text(&dir, &["seal", "--upper", UPPER]);
    assert_eq!(before, "the layer was sealed already\n");
}

#[test]
fn a_writable_layer_is_described_when_it_is_made_and_resized() {
    let dir = files();
    let uuid = "11111111-2222-4333-8444-555555555555";
    let make = ["upper", "create", "data=d,index=i", "--parent", "base"];
    let made = json(&dir, &[&make[..], &["--uuid", uuid]].concat());
    let parent = open(&dir, &["base"]).layers()[0].uuid().to_string();
    let expected = serde_json::json!({
        "data": "d", "index": "i", "kind": "hybrid", "virtual_size": 3 << 20,
        "uuid": uuid, "parent_uuid": parent,
    });
    assert_eq!(made, expected);
    let make = ["upper", "create", "data=e,index=j", "--size", "1M"];
    let said = text(&dir, &[&make[..], &["--type", "sparse"]].concat());
    assert_eq!(said, "e: empty sparse layer for a disk of 1.00 MiB\n");

    let resize = ["resize", "--upper", "data=d,index=i"];
    let said = text(&dir, &[&resize[..], &["8M"]].concat());
    assert_eq!(said, "d: disk of 8.00 MiB, was 3.00 MiB\n");
    let resized = json(&dir, &[&resize[..], &["9M"]].concat());
    let expected =
        serde_json::json!({ "data": "d", "virtual_size": 9 << 20, "old_virtual_size": 8 << 20 });
    assert_eq!(resized, expected);
}

#[test]
fn a_strict_check_fails_for_notes() {
    let dir = files();
    fs::write(dir.path().join("raw"), tagged(1 << 20, 8)).unwrap();
    let create = ["create", "--from", "raw", "upper", "--parent", "base"];
    succeed(&dir, &create, b"");
    let whole = ["check", "base", "upper", "--strict"];
    assert!(text(&dir, &whole).starts_with("ok; layers: 2; "));

    // A layer without the one below it.
    let checked = text(&dir, &["check", "upper"]);
    assert!(checked.ends_with("; notes: 1\n"), "{checked}");
    let found = json(&dir, &["check", "upper"]);
    assert_eq!((&found["ok"], &found["notes"]), (&true.into(), &1.into()));
    let finding = &found["findings"][0];
    assert_eq!(finding["kind"], "note");
    assert!(
        finding["what"]
            .as_str()
            .unwrap()
            .contains("no layer is below it")
    );
    let strict = ["check", "--strict", "upper"];
    let output = ovbd(&dir, &strict, b"");
    assert_eq!(output.status.code(), Some(1));
    let said = String::from_utf8(output.stdout).unwrap();
    assert!(
        said.lines().last().unwrap().starts_with("not ok; "),
        "{said}"
    );
    let output = ovbd(&dir, &[&strict[..], &["--json"]].concat(), b"");
    assert_eq!(output.status.code(), Some(1));
    let found: Value = serde_json::from_slice(&output.stdout).unwrap();
    assert_eq!((&found["ok"], &found["broken"]), (&false.into(), &0.into()));
}

/// `script` gives a command a terminal.
#[test]
fn colours_are_on_a_terminal_alone() {
    let dir = files();
    let check = format!("{} check base", env!("CARGO_BIN_EXE_ovbd"));
    let on_terminal = |no_colour: &str, term: &str| {
        let output = Command::new("script")
            .args(["--quiet", "--return", "--command", &check, "/dev/null"])
            .env("NO_COLOR", no_colour)
            .env("TERM", term)
            .current_dir(dir.path())
            .output()
            .unwrap();
        assert!(output.status.success(), "{output:?}");
        String::from_utf8(output.stdout).unwrap()
    };
    let coloured = on_terminal("", "xterm");
    assert!(
        coloured.contains("\x1b[1;32mok\x1b[0m; layers: 1"),
        "{coloured:?}"
    );
    for (no_colour, term) in [("1", "xterm"), ("", "dumb")] {
        let plain = on_terminal(no_colour, term);
        assert!(plain.contains("ok; layers: 1"), "{plain:?}");
        assert!(!plain.contains("\x1b[1"), "{plain:?}");
    }
    assert!(!text(&dir, &["check", "base"]).contains('\x1b'));
}

#[test]
fn a_directory_names_a_writable_layer_wherever_its_files_do() {
    let dir = files();
    fs::create_dir(dir.path().join("w")).unwrap();
    let make = ["upper", "create", "--upper-auto", "w", "--parent", "base"];
    succeed(&dir, &make, b"");
    for command in [
        &["inspect", "base"][..],
        &["check", "base"],
        &["export", "base", "-o", "out"],
        &["merge", "base", "-o", "out"],
        &["commit", "-o", "out"],
    ] {
        succeed(&dir, &[command, &["--upper-auto", "w"]].concat(), b"");
        let both = ["--upper-auto", "w", "--upper", UPPER];
        fail(&dir, 2, &[command, &both].concat());
    }
    succeed(&dir, &["resize", "--upper-auto", "w", "9M"], b"");
    let inspected = json(&dir, &["inspect", "--upper-auto", "w"]);
    assert_eq!(inspected["virtual_size"], 9 << 20);
    assert!(
        inspected["upper"]["data"]
            .as_str()
            .unwrap()
            .ends_with("w/upper.data")
    );
    succeed(&dir, &["seal", "--upper-auto", "w"], b"");
    assert_eq!(open(&dir, &["base", "w/upper.data"]).layers().len(), 2);
    fail(&dir, 2, &["seal"]);
}

/// Numbers of a column end in the same place.
#[test]
fn numbers_are_to_the_right() {
    let dir = files();
    let table = text(&dir, &["inspect", "base", "--upper", UPPER]);
    let lines: Vec<_> = table.lines().collect();
    let heading = lines.iter().find(|line| line.contains("mappings")).unwrap();
    let end = heading.find("mappings").unwrap() + "mappings".len();
    let row = lines.iter().find(|line| line.ends_with("base")).unwrap();
    assert_ne!(row.as_bytes()[end - 1], b' ', "{table}");
    assert_eq!(row.as_bytes()[end], b' ', "{table}");
}
