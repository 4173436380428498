//! The scripts under `contrib/` that touch a host, run where they can do no harm.

use std::os::unix::net::UnixListener;
use std::path::{Path, PathBuf};
use std::process::{Command, Output};
use std::{fs, str};

use serde_json::Value;
use tempfile::tempdir;

fn attach(arguments: &[&str]) -> Output {
    let script = Path::new(env!("CARGO_MANIFEST_DIR")).join("contrib/kata/attach");
    Command::new(script).args(arguments).output().unwrap()
}

fn text(bytes: &[u8]) -> &str {
    str::from_utf8(bytes).unwrap()
}

/// Names that follow `--bench` in scripts and documents, with the file each was found in.
fn benches_named(folder: &Path, found: &mut Vec<(String, PathBuf)>) {
    for entry in fs::read_dir(folder).unwrap() {
        let path = entry.unwrap().path();
        if path.is_dir() {
            benches_named(&path, found);
        } else if let Ok(text) = fs::read_to_string(&path) {
            let mut words = text.split(|c: char| c.is_whitespace() || c == '`');
            while let Some(word) = words.next() {
                if word == "--bench"
                    && let Some(name) = words.next()
                {
                    found.push((name.to_owned(), path.clone()));
                }
            }
        }
    }
}

#[test]
fn every_benchmark_that_a_script_or_a_document_names_is_there() {
    let root = Path::new(env!("CARGO_MANIFEST_DIR"));
    let manifest = fs::read_to_string(root.join("Cargo.toml")).unwrap();
    let mut found = Vec::new();
    for folder in ["contrib", "docs"] {
        benches_named(&root.join(folder), &mut found);
    }
    assert!(found.iter().any(|(name, _)| name == "stress"), "{found:?}");
    for (name, path) in found {
        let entry = format!("[[bench]]\nname = \"{name}\"\npath = ");
        assert!(manifest.contains(&entry), "{}: {name}", path.display());
    }
}

#[test]
fn a_kata_direct_volume_is_written_and_removed() {
    let dir = tempdir().unwrap();
    let path = |name: &str| dir.path().join(name).to_str().unwrap().to_owned();
    let (root, socket) = (path("volumes"), path("disk.sock"));
    let volume = "/kubelet/kata-test-vol-001/volume001";
    let add = ["direct-volume", volume, &socket, "--root", &root];

    let refused = attach(&add);
    assert_eq!(refused.status.code(), Some(1));
    assert!(
        text(&refused.stderr).contains(&socket),
        "names the socket that no process listens on"
    );

    let _listener = UnixListener::bind(&socket).unwrap();
    assert!(attach(&add).status.success());
    // The path in URL-safe base64, as Kata looks it up.
    let entry = Path::new(&root).join("L2t1YmVsZXQva2F0YS10ZXN0LXZvbC0wMDEvdm9sdW1lMDAx");
    let info = fs::read_to_string(entry.join("mountInfo.json")).unwrap();
    let info: Value = serde_json::from_str(&info).unwrap();
    assert_eq!(info["device"], socket.as_str());
    for (old, new, value) in [
        ("volume_type", "volume-type", "spdkvol"),
        ("fs_type", "fstype", "ext4"),
    ] {
        assert_eq!((&info[old], &info[new]), (&value.into(), &value.into()));
    }
    assert_eq!(info["options"][0], "ro");

    assert!(attach(&[&add[..], &["--remove"]].concat()).status.success());
    assert!(!entry.exists());
}

#[test]
fn a_kata_device_node_takes_the_lowest_free_minor() {
    let dir = tempdir().unwrap();
    let store = dir.path().to_str().unwrap();
    let shown = attach(&[
        "qemu-node",
        "disk0",
        "--store",
        store,
        "--dry-run",
        "--",
        "--layers",
        "a.obd",
    ]);
    assert!(shown.status.success(), "{}", text(&shown.stderr));
    assert_eq!(
        text(&shown.stdout)
            .lines()
            .map(str::trim)
            .collect::<Vec<_>>(),
        [
            format!("mkdir -p {store}/block/sockets {store}/block/devices"),
            format!("mknod {store}/block/devices/disk0 b 241 0"),
            format!("exec ovbd-vhost --socket {store}/block/sockets/disk0 --layers a.obd"),
        ]
    );
}

#[test]
fn wrong_use_is_told_apart_from_failure() {
    for wrong in [
        &["qemu-node"][..],
        &["qemu-node", "../escape", "--dry-run"],
        &["qemu-node", "disk0", "--minor", "one", "--dry-run"],
        &["direct-volume", "relative", "/sock", "--dry-run"],
        &["direct-volume", "/a\"b", "/sock", "--dry-run"],
        &["direct-volume", "/a", "/sock", "--colour"],
        &[],
    ] {
        let output = attach(wrong);
        assert_eq!(output.status.code(), Some(2), "{wrong:?}");
        assert_eq!(text(&output.stderr).lines().count(), 1, "{wrong:?}");
    }
    assert!(attach(&["--help"]).status.success());
}

#[test]
fn the_picture_of_the_performance_shows_the_figures_of_the_page() {
    let root = Path::new(env!("CARGO_MANIFEST_DIR"));
    let made = Command::new(root.join("contrib/bench/picture"))
        .output()
        .unwrap();
    assert!(made.status.success(), "{}", text(&made.stderr));
    let kept = fs::read_to_string(root.join("docs/performance.svg")).unwrap();
    assert_eq!(
        text(&made.stdout),
        kept,
        "run contrib/bench/picture >docs/performance.svg"
    );
}
