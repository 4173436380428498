//! A named pipe at each path at which the tool expects a file: it is refused, and never waited for.

use std::thread;
use std::time::{Duration, Instant};

use common::PATIENCE;
use ovbd_vhost::cache::Cache;
use rustix::fs::{CWD, Mode, mkfifoat};

use super::writable::*;
use super::*;

/// Puts a named pipe in the place of a file.
fn pipe(dir: &TempDir, name: &str) {
    let path = dir.path().join(name);
    let _ = fs::remove_file(&path);
    mkfifoat(CWD, path, Mode::RWXU).unwrap();
}

/// Runs the tool, which must end by itself with exit code 1: all that it wrote.
fn refused(dir: &TempDir, args: &[&str]) -> String {
    let mut child = Command::new(env!("CARGO_BIN_EXE_ovbd"))
        .args(args)
        .current_dir(dir.path())
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .unwrap();
    let start = Instant::now();
    while child.try_wait().unwrap().is_none() {
        if start.elapsed() > PATIENCE {
            child.kill().unwrap();
            panic!("{args:?} waits for a pipe");
        }
        thread::sleep(Duration::from_millis(5));
    }
    let output = child.wait_with_output().unwrap();
    assert_eq!(output.status.code(), Some(1), "{args:?}: {output:?}");
    String::from_utf8([output.stdout, output.stderr].concat()).unwrap()
}

fn assert_refused(dir: &TempDir, args: &[&str]) {
    let text = refused(dir, args);
    assert!(text.contains("not a regular file"), "{args:?}: {text}");
}

#[test]
fn in_place_of_the_files_of_a_writable_layer() {
    for name in [
        "u.data",
        "u.index",
        "u.index.journal0",
        "u.index.journal1",
        "u.data.snapshots",
    ] {
        let dir = tempfile::tempdir().unwrap();
        let create = ["upper", "create", UPPER, "--size", "1M"];
        succeed(&dir, &create, b"");
        pipe(&dir, name);
        for args in [
            &["check", "--upper", UPPER][..],
            &["inspect", "--upper", UPPER],
            &["export", "--upper", UPPER, "-o", "raw"],
            &["commit", "--upper", UPPER, "-o", "out"],
            &["resize", "--upper", UPPER, "2M"],
        ] {
            assert_refused(&dir, args);
        }
        // Sealing removes journals, and looks at the list of snapshots in the end.
        if name == "u.data" || name == "u.index" {
            assert_refused(&dir, &["seal", "--upper", UPPER]);
        }
    }
}

#[test]
fn in_place_of_layers_and_configs() {
    let dir = tempfile::tempdir().unwrap();
    pipe(&dir, "pipe");
    assert_refused(&dir, &["inspect", "--config", "pipe"]);
    for args in [
        &["inspect", "pipe"][..],
        &["check", "pipe"],
        &["export", "pipe", "-o", "raw"],
        &["merge", "pipe", "-o", "out"],
        &["create", "--from", "/dev/null", "out", "--parent", "pipe"],
    ] {
        refused(&dir, args);
    }
}

#[test]
fn in_place_of_the_files_of_a_registry_and_a_cache() {
    let dir = tempfile::tempdir().unwrap();
    pipe(&dir, "pipe");
    for option in ["--registry-ca", "--service-config"] {
        // No process listens on that port.
        let host = "127.0.0.1:1";
        let reference = format!("{host}/a:b");
        let pull = [
            "pull",
            &reference,
            "--cache",
            "c",
            "--insecure-registry",
            host,
        ];
        assert_refused(&dir, &[&pull[..], &[option, "pipe"]].concat());
    }
    let digest = format!("sha256:{}", "0".repeat(64));
    for (name, args) in [
        ("version", &["cache", "ls"][..]),
        (&digest.replace(':', "/"), &["cache", "verify", &digest]),
    ] {
        let _ = fs::remove_dir_all(dir.path().join("c"));
        Cache::open(&dir.path().join("c")).unwrap();
        let folder = match name.starts_with("sha256") {
            true => "c/blobs",
            false => "c",
        };
        pipe(&dir, &format!("{folder}/{name}"));
        assert_refused(&dir, &[args, &["--cache", "c"]].concat());
    }
}
