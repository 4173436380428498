//! The programs as they are run by hand: the `ovbd` image tool, what it wrote and said, and the
//! command line of the daemon.

mod cache;
mod check;
mod command_line;
mod commit;
mod create;
mod export;
mod foreign;
mod help;
mod inspect;
mod lazy;
mod lineage;
mod logs;
mod merge;
mod mistakes;
mod people;
mod pipes;
mod pull;
mod remote;
mod seal;
mod shape;
mod snapshot_verbs;
mod snapshots;
mod trouble;
mod writable;

use std::fs::{self, File};
use std::io::Write;
use std::os::unix::fs::FileExt;
use std::path::Path;
use std::process::{Command, Output, Stdio};

use common::content::{Random, difference, tagged};
use common::golden;
use ovbd_vhost::image::Image;
use ovbd_vhost::image::config::Stack;
use ovbd_vhost::image::reader::Reader;
use ovbd_vhost::units::{Sector, SectorRange};
use tempfile::TempDir;

/// Runs the tool in `dir`, with `input` on its standard input.
fn ovbd(dir: &TempDir, args: &[&str], input: &[u8]) -> Output {
    let mut child = Command::new(env!("CARGO_BIN_EXE_ovbd"))
        .args(args)
        .current_dir(dir.path())
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .unwrap();
    // A tool that does not read its input may have closed it.
    let _ = child.stdin.take().unwrap().write_all(input);
    child.wait_with_output().unwrap()
}

/// Runs the tool, which must succeed and say nothing on standard error: its standard output.
fn succeed(dir: &TempDir, args: &[&str], input: &[u8]) -> Vec<u8> {
    let output = ovbd(dir, args, input);
    let stderr = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success() && stderr.is_empty(), "{stderr}");
    output.stdout
}

/// Runs the tool, which must fail with this code and one line on standard error: the line.
fn fail(dir: &TempDir, code: i32, args: &[&str]) -> String {
    let output = ovbd(dir, args, b"");
    let stderr = String::from_utf8(output.stderr).unwrap();
    assert_eq!(output.status.code(), Some(code), "{args:?}: {stderr}");
    assert_eq!(stderr.lines().count(), 1, "{stderr}");
    assert!(stderr.starts_with("ovbd: "), "{stderr}");
    stderr
}

/// Names of the files in `dir`, sorted, hidden ones too.
fn names(dir: &TempDir) -> Vec<String> {
    let entries = fs::read_dir(dir.path()).unwrap();
    let mut names: Vec<_> = entries
        .map(|entry| entry.unwrap().file_name().into_string().unwrap())
        .collect();
    names.sort();
    names
}

/// A disk of noise, text and zeros in pieces of random length; zeros only in `holes`, as far as
/// they are whole units.
fn disk(seed: u64, len: usize) -> Vec<u8> {
    let mut random = Random::new(seed);
    let mut bytes = vec![0; len];
    let mut at = 0;
    while at < len {
        let longest = [600, 9000, 300_000][random.below(3) as usize];
        let part = (random.within(1..=longest) as usize).min(len - at);
        match random.below(3) {
            0 => bytes[at..at + part].copy_from_slice(&tagged(part, random.any())),
            1 => bytes[at..at + part].fill(random.within(1..=255) as u8),
            _ => {}
        }
        at += part;
    }
    bytes
}

/// Writes `bytes` with a hole wherever 64 KiB are zero.
fn write_sparse(path: &Path, bytes: &[u8]) {
    let file = File::create(path).unwrap();
    file.set_len(bytes.len() as u64).unwrap();
    for (number, chunk) in bytes.chunks(65536).enumerate() {
        if chunk.iter().any(|byte| *byte != 0) {
            file.write_all_at(chunk, number as u64 * 65536).unwrap();
        }
    }
}

fn open(dir: &TempDir, layers: &[&str]) -> Image {
    let paths = layers.iter().map(|layer| dir.path().join(layer));
    Image::open(&Stack::new(paths)).unwrap()
}

/// The whole disk of a stack.
fn content_of(image: &Image) -> Vec<u8> {
    let mut bytes = vec![0xEE; image.at_own_size().sectors().0 as usize * 512];
    for (number, chunk) in bytes.chunks_mut(1 << 20).enumerate() {
        let start = Sector(number as u64 * 2048);
        Reader::new()
            .read(image.at_own_size(), start, chunk)
            .unwrap();
    }
    bytes.truncate(image.size() as usize);
    bytes
}

fn assert_reads(dir: &TempDir, layers: &[&str], expected: &[u8]) {
    let found = content_of(&open(dir, layers));
    assert_eq!(difference(&found, expected), None, "{layers:?}");
}

#[test]
fn wrong_usage() {
    let dir = tempfile::tempdir().unwrap();
    let long = "x".repeat(257);
    for args in [
        &["nonsense"][..],
        &["create", "out"],
        &["create", "--from", "raw"],
        &["create", "--from", "raw", "out", "--algorithm", "gzip"],
        &["create", "--from", "raw", "out", "--block-size", "5000"],
        &["create", "--from", "raw", "out", "--block-size", "131072"],
        &[
            "create",
            "--from",
            "raw",
            "out",
            "--block-size",
            "4096",
            "--algorithm",
            "none",
        ],
        &[
            "create",
            "--from",
            "raw",
            "out",
            "--no-checksum",
            "--algorithm",
            "none",
        ],
        &["create", "--from", "raw", "out", "--uuid", "12"],
        &["create", "--from", "raw", "out", "--threads", "0"],
        &["create", "--from", "raw", "out", "--message", &long],
        &["create", "--from", "raw", "out", "--parent", "a,,b"],
        &["create", "--from", "raw", "out", "more"],
        &["inspect"],
        &["inspect", "a", "--config", "b"],
        &["check", "--threads", "257", "a"],
        &["export", "a"],
        &["export", "-o", "raw"],
    ] {
        fail(&dir, 2, args);
    }
    assert!(names(&dir).is_empty());
    for (args, help) in [
        (&["commit"][..], "see ovbd commit --help"),
        (&["upper", "create"], "see ovbd upper create --help"),
        (&["inspect", "a", "--nonsense"], "see ovbd inspect --help"),
        (&["nonsense"], "see ovbd --help"),
    ] {
        let wrong = fail(&dir, 2, args);
        assert!(wrong.contains(help), "{wrong}");
    }
}
