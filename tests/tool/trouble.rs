//! Operations on writable layers that are killed, or find the disk full.

use std::time::Instant;

use super::writable::*;
use super::*;

/// A writable layer with some megabytes of noise, and its content.
fn large(dir: &TempDir) -> Vec<u8> {
    let paths = paths(dir);
    let mut disk = tagged(12 << 20, 3);
    ovbd_vhost::writable::create(&paths, KINDS[2], &header(disk.len() as u64)).unwrap();
    let upper = open_upper(&paths);
    for (start, bytes) in (0..).step_by(24).zip(disk.chunks_mut(24 * 512)) {
        write(&upper, start, bytes);
    }
    close(upper);
    disk
}

/// Starts the tool and kills it some time before it would have ended, or not.
fn kill_within(dir: &TempDir, args: &[&str], random: &mut Random, micros: u64) {
    let mut child = Command::new(env!("CARGO_BIN_EXE_ovbd"))
        .args(args)
        .current_dir(dir.path())
        .stdout(Stdio::null())
        .spawn()
        .unwrap();
    std::thread::sleep(std::time::Duration::from_micros(random.below(micros)));
    child.kill().unwrap();
    child.wait().unwrap();
}

#[test]
fn a_killed_tool_leaves_the_old_file_or_the_new_one() {
    let dir = tempfile::tempdir().unwrap();
    let disk = large(&dir);
    let mut random = Random::new(1);
    for args in [
        &["commit", "--upper", UPPER, "-o", "out"][..],
        &[
            "commit",
            "--upper",
            UPPER,
            "-o",
            "out",
            "--algorithm",
            "none",
            "--tar",
        ],
        &[
            "merge",
            "--upper",
            UPPER,
            "-o",
            "out",
            "--algorithm",
            "zstd",
        ],
    ] {
        let start = Instant::now();
        succeed(&dir, args, b"");
        let micros = start.elapsed().as_micros() as u64;
        let new = fs::read(dir.path().join("out")).unwrap();
        for _ in 0..8 {
            fs::write(dir.path().join("out"), b"old").unwrap();
            kill_within(&dir, args, &mut random, micros);
            let found = fs::read(dir.path().join("out")).unwrap();
            assert!(found == b"old" || found == new);
            let files = names(&dir);
            // For a moment the new file has a name of its own, to take the old one's place.
            let temporary = |name: &str| name.starts_with(".out.") && name.ends_with(".tmp");
            let mut files = files
                .iter()
                .filter(|name| !name.starts_with("u.index.journal") && !temporary(name));
            assert!(files.by_ref().eq(["out", "u.data", "u.index"]));
        }
    }
    for _ in 0..12 {
        kill_within(&dir, &["seal", "--upper", UPPER], &mut random, 20_000);
    }
    succeed(&dir, &["seal", "--upper", UPPER], b"");
    assert_reads(&dir, &["u.data"], &disk);
    assert_eq!(names(&dir), ["out", "u.data"]);
}

/// Runs the tool where no file may become longer than `blocks` of 512 bytes: what it would see on a
/// full disk.
fn cramped(dir: &TempDir, blocks: u64, args: &[&str]) -> String {
    let shell = format!("trap '' XFSZ; ulimit -f {blocks}; exec \"$@\"");
    let output = Command::new("sh")
        .args(["-c", &shell, "sh", env!("CARGO_BIN_EXE_ovbd")])
        .args(args)
        .current_dir(dir.path())
        .output()
        .unwrap();
    assert_eq!(output.status.code(), Some(1));
    String::from_utf8(output.stderr).unwrap()
}

#[test]
fn a_full_disk_changes_nothing() {
    let dir = tempfile::tempdir().unwrap();
    let disk = large(&dir);
    let paths = paths(&dir);
    close(open_upper(&paths));
    fs::write(dir.path().join("out"), b"old").unwrap();
    let before = names(&dir);
    for (blocks, args) in [
        (100, &["commit", "--upper", UPPER, "-o", "out"][..]),
        (
            20_000,
            &[
                "commit",
                "--upper",
                UPPER,
                "-o",
                "out",
                "--algorithm",
                "none",
            ],
        ),
        (3000, &["merge", "--upper", UPPER, "-o", "out", "--tar"]),
    ] {
        let full = cramped(&dir, blocks, args);
        assert!(full.contains("cannot write"), "{full}");
        assert_eq!(fs::read(dir.path().join("out")).unwrap(), b"old");
        assert_eq!(names(&dir), before);
    }
    let data = fs::read(&paths.data).unwrap();
    let blocks = data.len() as u64 / 512;
    for more in [0, 1, 3, 8] {
        let full = cramped(&dir, blocks + more, &["seal", "--upper", UPPER]);
        assert!(full.contains("cannot"), "{full}");
        assert!(fs::read(&paths.data).unwrap() == data);
        assert_eq!(names(&dir), before);
    }
    succeed(&dir, &["seal", "--upper", UPPER], b"");
    assert_reads(&dir, &["u.data"], &disk);
}
