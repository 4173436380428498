//! `ovbd export`: the disk as a file.

use std::os::unix::fs::MetadataExt;

use super::*;
use sha2::{Digest, Sha256};

pub fn sha256(bytes: &[u8]) -> String {
    let digest = Sha256::digest(bytes);
    digest.iter().map(|byte| format!("{byte:02x}")).collect()
}

#[test]
fn golden_images() {
    let dir = tempfile::tempdir().unwrap();
    let mut cases = golden::cases();
    cases.retain(|case| !case.has_upper && !case.name.starts_with("14"));
    assert!(cases.len() > 15);
    for case in cases {
        let layers: Vec<_> = case
            .layers
            .iter()
            .map(|path| path.to_str().unwrap())
            .collect();
        let output = ["-o", "raw", "--threads", "3"];
        succeed(&dir, &[&["export"], &layers[..], &output].concat(), b"");
        let raw = fs::read(dir.path().join("raw")).unwrap();
        assert_eq!(raw.len() as u64, case.size, "{}", case.name);
        assert_eq!(sha256(&raw), case.sha256, "{}", case.name);
        if case.size <= 32 << 20 {
            let list = layers.join(",");
            let stdout = succeed(&dir, &["export", &list, "--output", "-"], b"");
            assert!(stdout == raw, "{}", case.name);
        }
    }
    assert_eq!(names(&dir), ["raw"]);
}

#[test]
fn zeros_are_holes() {
    let dir = tempfile::tempdir().unwrap();
    let raw = File::create(dir.path().join("raw")).unwrap();
    let size = (1 << 40) + 777;
    raw.set_len(size).unwrap();
    // The second unit is stored because of its last byte; the first not at all.
    raw.write_all_at(b"x", 8191).unwrap();
    raw.write_all_at(b"end", size - 3).unwrap();
    succeed(&dir, &["create", "--from", "raw", "a"], b"");
    let config = r#"{"lowers": [{"file": "a"}]}"#;
    fs::write(dir.path().join("config.v1.json"), config).unwrap();
    succeed(
        &dir,
        &["export", "--config", "config.v1.json", "-o", "out"],
        b"",
    );
    let out = File::open(dir.path().join("out")).unwrap();
    let metadata = out.metadata().unwrap();
    assert_eq!(metadata.len(), size);
    assert!(
        metadata.blocks() * 512 < 1 << 20,
        "{} blocks",
        metadata.blocks()
    );
    let mut found = [0; 8192];
    out.read_exact_at(&mut found, 0).unwrap();
    assert!(found[8191] == b'x' && found[..8191].iter().all(|byte| *byte == 0));
    out.read_exact_at(&mut found[..3], size - 3).unwrap();
    assert_eq!(&found[..3], b"end");
}

#[test]
fn failures_leave_nothing_behind() {
    let dir = tempfile::tempdir().unwrap();
    fs::write(dir.path().join("raw"), tagged(3 << 20, 1)).unwrap();
    succeed(&dir, &["create", "--from", "raw", "a"], b"");
    fs::write(dir.path().join("old"), b"as it was").unwrap();
    let same = fail(&dir, 1, &["export", "a", "-o", "a"]);
    assert!(same.contains("is also an input"), "{same}");

    let mut damaged = fs::read(dir.path().join("a")).unwrap();
    let middle = damaged.len() / 2;
    damaged[middle] ^= 1;
    fs::write(dir.path().join("a"), &damaged).unwrap();
    let block = fail(&dir, 1, &["export", "a", "-o", "old"]);
    assert!(block.contains("damaged block"), "{block}");
    fail(&dir, 1, &["export", "a", "-o", "new"]);
    assert_eq!(names(&dir), ["a", "old", "raw"]);
    assert_eq!(fs::read(dir.path().join("old")).unwrap(), b"as it was");
}

#[test]
fn a_reader_who_leaves_is_an_error_without_a_panic() {
    let dir = tempfile::tempdir().unwrap();
    fs::write(dir.path().join("raw"), tagged(3 << 20, 1)).unwrap();
    succeed(&dir, &["create", "--from", "raw", "a"], b"");
    let run = |args: &[&str]| {
        let (reader, writer) = std::io::pipe().unwrap();
        drop(reader);
        let mut command = Command::new(env!("CARGO_BIN_EXE_ovbd"));
        command.args(args).current_dir(dir.path()).stdout(writer);
        let output = command.stderr(Stdio::piped()).spawn().unwrap();
        let output = output.wait_with_output().unwrap();
        (
            output.status.code(),
            String::from_utf8(output.stderr).unwrap(),
        )
    };
    let (code, stderr) = run(&["export", "a", "-o", "-"]);
    assert!(
        code == Some(1) && stderr.starts_with("ovbd: cannot write"),
        "{stderr}"
    );
    for command in ["inspect", "check"] {
        assert_eq!(run(&[command, "a"]), (Some(0), String::new()), "{command}");
    }
}
