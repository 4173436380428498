//! Commands that read layers in a registry fetch what they read, and nothing else.

use super::*;
use std::collections::BTreeMap;
use std::process::Child;
use std::sync::atomic::{AtomicU8, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use common::layers::{LayerBuilder, Pack, noise, wrap_tar, zfile};
use common::registries;
use common::registry_server::{Received, Reply, Server, answer, raw, serve, until};
use ovbd_vhost::format::digest::Digest;
use rustix::process::{Pid, Signal, kill_process};
use serde_json::Value;

const MANIFEST: &str = "application/vnd.oci.image.manifest.v1+json";

/// What the registry does about requests for blobs.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Blobs {
    Served = 0,
    Refused = 1,
    Stalled = 2,
    /// Whole blobs are refused, and ends of blobs beyond their first 64 KiB.
    StartsOnly = 3,
}

/// A registry of the test's own with one image, `a/b:1`.
struct Registry {
    server: Server,
    blobs: Arc<AtomicU8>,
    layers: Arc<BTreeMap<String, Vec<u8>>>,
}

impl Registry {
    fn start(layers: &[Vec<u8>]) -> Registry {
        let named = |bytes: &Vec<u8>| (Digest::of(bytes).to_string(), bytes.clone());
        let digests = layers.iter().map(|bytes| (Digest::of(bytes), bytes.len()));
        let descriptors = digests.map(|(digest, len)| registries::layer(&digest, len as u64));
        let config = Digest::of(b"{}");
        let manifest = registries::manifest(&config, descriptors.collect()).to_string();
        let layers: Arc<BTreeMap<_, _>> = Arc::new(layers.iter().map(named).collect());
        let blobs = Arc::new(AtomicU8::new(Blobs::Served as u8));
        let (served, mode) = (Arc::clone(&layers), Arc::clone(&blobs));
        let server = Server::start(move |request| {
            let (path, name) = request.target.rsplit_once('/').unwrap();
            if path.ends_with("/manifests") {
                return answer(200, &[("content-type", MANIFEST)], manifest.as_bytes());
            }
            let blob = &served[name];
            match mode.load(Ordering::SeqCst) {
                mode if mode == Blobs::Refused as u8 => refusal(),
                mode if mode == Blobs::Stalled as u8 => stalled(request, blob),
                mode if mode == Blobs::StartsOnly as u8 && !is_start(request) => refusal(),
                _ => serve(request, blob),
            }
        });
        Registry {
            server,
            blobs,
            layers,
        }
    }

    fn set(&self, blobs: Blobs) {
        self.blobs.store(blobs as u8, Ordering::SeqCst);
    }

    fn reference(&self) -> String {
        format!("{}/a/b:1", self.server.host())
    }

    /// The command line of a command upon the image.
    fn image(&self, command: &[&str], more: &[&str]) -> Vec<String> {
        let (host, reference) = (self.server.host(), self.reference());
        let image = ["--image", &reference, "--cache", "c"];
        let access = ["--insecure-registry", &host];
        let all = command.iter().chain(&image).chain(&access).chain(more);
        all.map(|arg| (*arg).to_owned()).collect()
    }

    fn bytes(&self) -> usize {
        self.layers.values().map(Vec::len).sum()
    }

    /// Bytes of blobs that were asked for.
    fn asked(&self) -> usize {
        let received = self.server.received();
        let ranges = received.iter().filter_map(Received::range);
        ranges.map(|(first, last)| last - first + 1).sum()
    }

    fn requests_of_blobs(&self) -> usize {
        let received = self.server.received();
        let of_blobs = received.iter();
        of_blobs
            .filter(|request| request.target.contains("/blobs/"))
            .count()
    }
}

fn refusal() -> Reply {
    answer(404, &[], br#"{"errors":[{"code":"BLOB_UNKNOWN"}]}"#)
}

fn is_start(request: &Received) -> bool {
    request.range().is_some_and(|(first, _)| first < 65536)
}

/// The head of an answer, and then nothing.
fn stalled(request: &Received, blob: &[u8]) -> Reply {
    let (first, last) = request.range().unwrap();
    let last = last.min(blob.len() - 1);
    let (range, len) = (
        format!("bytes {first}-{last}/{}", blob.len()),
        last + 1 - first,
    );
    let headers = [
        ("Content-Range", range.as_str()),
        ("Content-Length", &len.to_string()),
    ];
    Reply::Stall(raw(206, &headers, b""))
}

/// Layers of a disk of `mib` MiB, one for each length in KiB of data that does not compress, which
/// follow each other on the disk; and the disk.
fn stack(mib: usize, lens: &[usize]) -> (Vec<Vec<u8>>, Vec<u8>) {
    let mut disk = vec![0; mib << 20];
    let (mut start, mut blobs) = (0, Vec::new());
    for (number, len) in (1u64..).zip(lens) {
        let data = noise(number, len << 10);
        disk[start..start + data.len()].copy_from_slice(&data);
        let layer = LayerBuilder::new(disk.len() as u64)
            .uuids(number.into(), u128::from(number - 1))
            .data(start as u64 / 512, &data);
        blobs.push(wrap_tar(&zfile(&layer.lsmt(), Pack::default())));
        start += data.len();
    }
    (blobs, disk)
}

fn run(dir: &TempDir, args: &[String]) -> Vec<u8> {
    let args: Vec<_> = args.iter().map(String::as_str).collect();
    succeed(dir, &args, b"")
}

fn refuse(dir: &TempDir, args: &[String]) -> String {
    let args: Vec<_> = args.iter().map(String::as_str).collect();
    fail(dir, 1, &args)
}

#[test]
fn inspecting_an_image_makes_only_the_requests_of_its_opening() {
    let dir = tempfile::tempdir().unwrap();
    // Six small layers, fetched whole, and two large ones, of which both ends are fetched.
    let (layers, disk) = stack(24, &[8192, 300, 700, 20, 6000, 100, 650, 8]);
    let registry = Registry::start(&layers);
    let inspect = |more: &[&str]| -> Value {
        let args = registry.image(&["inspect", "--json"], more);
        serde_json::from_slice(&run(&dir, &args)).unwrap()
    };
    let seen = inspect(&[]);
    assert_eq!(seen["virtual_size"], disk.len());
    let received = registry.server.received();
    let ranges: Vec<_> = received
        .iter()
        .map(|r| (r.target.clone(), r.range()))
        .collect();
    assert_eq!(registry.server.count(), 1 + 6 + 2 * 2, "{ranges:?}");
    let asked = registry.asked();
    assert!(
        asked < registry.bytes() - (6 << 20),
        "{asked} of {}",
        registry.bytes()
    );
    for layer in seen["layers"].as_array().unwrap() {
        assert_eq!(layer["local_bytes"], 0, "{layer}");
    }
    // From then on, only the manifest is asked for: a tag may move.
    let seen = inspect(&[]);
    assert_eq!(registry.server.count(), 1 + 6 + 2 * 2 + 1);
    let [large, small] = [0, 1].map(|number| &seen["layers"][number]);
    assert_eq!(small["local_bytes"], layers[1].len());
    assert_eq!(small["file_size"], layers[1].len());
    assert!(
        large["local_bytes"].as_u64().unwrap() > 128 << 10,
        "{large}"
    );
    assert!(large["local_bytes"].as_u64().unwrap() < 1 << 20, "{large}");
    let table = String::from_utf8(run(&dir, &registry.image(&["inspect"], &[]))).unwrap();
    assert!(table.contains("local"), "{table}");
}

#[test]
fn an_image_is_named_in_place_of_layers() {
    let dir = tempfile::tempdir().unwrap();
    let (layers, disk) = stack(1, &[100]);
    let registry = Registry::start(&layers);
    let (host, reference) = (registry.server.host(), registry.reference());
    let access = ["--insecure-registry", &host, "--cache", "c"];
    let export = [&["export", &reference, "-o", "raw"][..], &access].concat();
    succeed(&dir, &export, b"");
    assert!(fs::read(dir.path().join("raw")).unwrap() == disk);
    fs::write(dir.path().join("more"), vec![7; 1 << 20]).unwrap();
    let create = [
        &["create", "--from", "more", "top", "--parent", &reference][..],
        &access,
    ];
    succeed(&dir, &create.concat(), b"");
    // Without a cache, and for a path that could be no reference, it is a file.
    for path in [&reference[..], "./a.b/c", "a.b"] {
        let line = fail(&dir, 1, &["inspect", path]);
        assert!(
            line.contains("cannot open") && line.contains(path),
            "{line}"
        );
    }
}

#[test]
fn what_is_read_is_fetched_once_and_ahead_and_what_is_hidden_is_not() {
    let dir = tempfile::tempdir().unwrap();
    let len = 24 << 20;
    let hidden = LayerBuilder::new(len as u64).data(0, &noise(1, len));
    // The upper layer shows the last two MiB of the lower one.
    let data = noise(2, len - (2 << 20));
    let above = LayerBuilder::new(len as u64).data(0, &data);
    let mut disk = noise(1, len);
    disk[..data.len()].copy_from_slice(&data);
    let layers = [hidden, above].map(|layer| wrap_tar(&zfile(&layer.lsmt(), Pack::default())));
    let registry = Registry::start(&layers);
    run(&dir, &registry.image(&["export", "-o", "raw"], &[]));
    assert!(fs::read(dir.path().join("raw")).unwrap() == disk);
    let received = registry.server.received();
    let mut units = BTreeMap::new();
    for request in received.iter().filter(|one| one.target.contains("/blobs/")) {
        let (first, last) = request.range().unwrap();
        for unit in first / 65536..=last / 65536 {
            *units.entry((request.target.clone(), unit)).or_insert(0) += 1;
        }
    }
    assert!(units.values().all(|count| *count == 1), "{units:?}");
    // All of the upper layer, and of the lower one its ends and a read-ahead.
    let asked = registry.asked();
    assert!(asked < layers[1].len() + (8 << 20), "{asked}");
    assert!(registry.requests_of_blobs() < 60, "{received:?}");
}

#[test]
fn every_command_reads_lazily() {
    let dir = tempfile::tempdir().unwrap();
    let (layers, disk) = stack(16, &[5000, 5000]);
    let registry = Registry::start(&layers);
    let host = registry.server.host();
    let lowers = layers.iter().map(
        |blob| serde_json::json!({"digest": Digest::of(blob).to_string(), "size": blob.len()}),
    );
    let config = serde_json::json!({
        "repoBlobUrl": format!("http://{host}/v2/a/b/blobs"),
        "lowers": lowers.collect::<Vec<_>>(),
    });
    fs::write(dir.path().join("config"), config.to_string()).unwrap();
    let mut changed = disk.clone();
    changed[5000..6000].fill(7);
    fs::write(dir.path().join("changed"), &changed).unwrap();
    let reference = registry.reference();
    let access = ["--insecure-registry", &host, "--cache"];
    let with = |command: &[&str], cache: &str| {
        let args = [command, &access, &[cache]].concat();
        succeed(&dir, &args, b"")
    };
    let config = ["--config", "config"];
    with(&[&["check"][..], &config].concat(), "c1");
    with(&[&["merge", "-o", "merged"][..], &config].concat(), "c2");
    assert_reads(&dir, &["merged"], &disk);
    let create = ["create", "--from", "changed", "top", "--parent-image"];
    with(&[&create[..], &[&reference]].concat(), "c3");
    for (number, blob) in layers.iter().enumerate() {
        fs::write(dir.path().join(format!("l{number}")), blob).unwrap();
    }
    assert_reads(&dir, &["l0", "l1", "top"], &changed);
    // A writable layer needs the opening alone, from an image or from a config.
    let before = registry.asked();
    with(
        &[&["upper", "create", "data=d,index=i"][..], &config].concat(),
        "c4",
    );
    let parent = ["upper", "create", "data=e,index=j", "--parent-image"];
    with(&[&parent[..], &[&reference]].concat(), "c5");
    let asked = registry.asked() - before;
    assert!(
        asked < registry.bytes() / 2,
        "{asked} of {}",
        registry.bytes()
    );
    let export = [
        &["export", "--upper", "data=d,index=i", "-o", "raw"][..],
        &config,
    ];
    with(&export.concat(), "c4");
    assert!(fs::read(dir.path().join("raw")).unwrap() == disk);
}

#[test]
fn a_registry_that_refuses_ends_each_command_with_its_reason() {
    let dir = tempfile::tempdir().unwrap();
    let (layers, _) = stack(16, &[9000, 3000]);
    let registry = Registry::start(&layers);
    let commands = [
        &["inspect"][..],
        &["check"],
        &["export", "-o", "out"],
        &["merge", "-o", "out"],
    ];
    registry.set(Blobs::Refused);
    for command in commands {
        let line = refuse(&dir, &registry.image(command, &[]));
        assert!(line.contains("does not have"), "{command:?}: {line}");
    }
    // The layers open, and the registry refuses what lies between their ends.
    registry.set(Blobs::Served);
    run(&dir, &registry.image(&["inspect"], &[]));
    registry.set(Blobs::Refused);
    for command in &commands[1..] {
        let line = refuse(&dir, &registry.image(command, &[]));
        assert!(line.contains("does not have"), "{command:?}: {line}");
    }
    // A refusal is no damage.
    let output = ovbd(&dir, &strs(&registry.image(&["check"], &[])), b"");
    assert_eq!(output.stdout, b"");
    assert!(!dir.path().join("out").exists());
}

fn strs(args: &[String]) -> Vec<&str> {
    args.iter().map(String::as_str).collect()
}

#[test]
fn a_read_waits_until_its_deadline() {
    let dir = tempfile::tempdir().unwrap();
    let (layers, _) = stack(16, &[9000]);
    let registry = Registry::start(&layers);
    run(&dir, &registry.image(&["inspect"], &[]));
    registry.set(Blobs::Stalled);
    let args = registry.image(&["export", "-o", "out"], &["--fetch-deadline", "1"]);
    let line = refuse(&dir, &args);
    assert!(line.contains("deadline"), "{line}");
    assert!(!dir.path().join("out").exists());
}

/// The process and all below it.
fn family(pid: u32) -> Vec<u32> {
    let path = format!("/proc/{pid}/task/{pid}/children");
    let children = fs::read_to_string(path).unwrap_or_default();
    let children = children
        .split_whitespace()
        .flat_map(|pid| family(pid.parse().unwrap()));
    std::iter::once(pid).chain(children).collect()
}

fn is_alive(pid: u32) -> bool {
    let stat = fs::read_to_string(format!("/proc/{pid}/stat")).unwrap_or_default();
    let state = stat
        .rsplit_once(')')
        .and_then(|(_, rest)| rest.trim().chars().next());
    state.is_some_and(|state| state != 'Z' && state != 'X')
}

fn start(dir: &TempDir, args: &[String]) -> Child {
    Command::new(env!("CARGO_BIN_EXE_ovbd"))
        .args(args)
        .current_dir(dir.path())
        .stdout(Stdio::null())
        .spawn()
        .unwrap()
}

#[test]
fn a_signal_ends_a_command_that_waits_and_all_it_started() {
    let dir = tempfile::tempdir().unwrap();
    let (layers, _) = stack(16, &[9000]);
    let registry = Registry::start(&layers);
    run(&dir, &registry.image(&["inspect"], &[]));
    registry.set(Blobs::Stalled);
    for signal in [Signal::INT, Signal::KILL] {
        let asked = registry.requests_of_blobs();
        let mut child = start(&dir, &registry.image(&["export", "-o", "out"], &[]));
        until("a request", || registry.requests_of_blobs() > asked);
        let family = family(child.id());
        assert!(
            family.len() >= 4,
            "tool, its child, keeper, fetcher: {family:?}"
        );
        kill_process(Pid::from_child(&child), signal).unwrap();
        assert!(!child.wait().unwrap().success());
        until("all to end", || !family.iter().any(|pid| is_alive(*pid)));
    }
    assert!(!dir.path().join("out").exists());
}

#[test]
fn a_fetcher_that_asks_for_a_manifest_ends_with_the_command_that_waits_for_it() {
    let dir = tempfile::tempdir().unwrap();
    let asked = Arc::new(Mutex::new(0));
    let count = Arc::clone(&asked);
    let server = Server::start(move |_| {
        *count.lock().unwrap() += 1;
        Reply::Later(Duration::from_secs(60), Box::new(refusal()))
    });
    let host = server.host();
    let reference = format!("{host}/a/b:1");
    let args = ["inspect", "--image", &reference, "--cache", "c"];
    let args = [&args[..], &["--insecure-registry", &host]].concat();
    let args: Vec<_> = args.into_iter().map(str::to_owned).collect();
    for signal in [Signal::INT, Signal::KILL] {
        let before = *asked.lock().unwrap();
        let mut child = start(&dir, &args);
        until("a request", || *asked.lock().unwrap() > before);
        let family = family(child.id());
        assert!(family.len() >= 2, "{family:?}");
        kill_process(Pid::from_child(&child), signal).unwrap();
        child.wait().unwrap();
        until("all to end", || !family.iter().any(|pid| is_alive(*pid)));
    }
}

/// Path of the cached bytes of a blob.
fn cached(dir: &TempDir, blob: &[u8]) -> std::path::PathBuf {
    let name = format!("{}-{}.data", Digest::of(blob).hex(), blob.len());
    dir.path().join("c/partial/sha256").join(name)
}

#[test]
fn damage_in_the_cache_is_fetched_again() {
    let (layers, disk) = stack(16, &[9000]);
    let registry = Registry::start(&layers);
    for command in [&["export", "-o", "out"][..], &["check"]] {
        let dir = tempfile::tempdir().unwrap();
        // The first MiB becomes local, and the ends.
        run(&dir, &registry.image(&["inspect"], &[]));
        let file = File::options().write(true).open(cached(&dir, &layers[0]));
        file.unwrap().write_all_at(b"damage", 60_000).unwrap();
        let output = ovbd(&dir, &strs(&registry.image(command, &[])), b"");
        let stderr = String::from_utf8_lossy(&output.stderr);
        assert!(output.status.success(), "{command:?}: {stderr}");
        assert!(stderr.contains("fetching it again"), "{stderr}");
        if command[0] == "export" {
            assert!(fs::read(dir.path().join("out")).unwrap() == disk);
        }
    }
}

#[test]
fn a_layer_without_checksums_is_checked_by_its_digest() {
    let dir = tempfile::tempdir().unwrap();
    let data = noise(1, 3 << 20);
    let layer = wrap_tar(&LayerBuilder::new(4 << 20).data(0, &data).lsmt());
    let mut wrong = layer.clone();
    wrong[1 << 20] ^= 1;
    let digest = Digest::of(&layer);
    let descriptor = registries::layer(&digest, layer.len() as u64);
    let manifest = registries::manifest(&Digest::of(b"{}"), vec![descriptor]).to_string();
    let server = Server::start(
        move |request| match request.target.contains("/manifests/") {
            true => answer(200, &[("content-type", MANIFEST)], manifest.as_bytes()),
            false => serve(request, &wrong),
        },
    );
    let (host, reference) = (server.host(), format!("{}/a/b:1", server.host()));
    let args = ["check", "--image", &reference, "--cache", "c"];
    let args = [&args[..], &["--insecure-registry", &host]].concat();
    let output = ovbd(&dir, &args, b"");
    assert_eq!(output.status.code(), Some(1));
    let found = String::from_utf8(output.stdout).unwrap();
    assert!(found.contains("expected sha256:"), "{found}");
    assert!(found.contains(&digest.to_string()), "{found}");
}

#[test]
fn bytes_that_are_absent_are_no_zeros() {
    let dir = tempfile::tempdir().unwrap();
    // A layer whose middle is absent and is asked for in vain: no command makes anything of it.
    let data = noise(1, 9 << 20);
    let layer = wrap_tar(&LayerBuilder::new(9 << 20).data(0, &data).lsmt());
    let registry = Registry::start(&[layer]);
    run(&dir, &registry.image(&["inspect"], &[]));
    registry.set(Blobs::StartsOnly);
    for command in [&["export", "-o", "out"][..], &["merge", "-o", "out"]] {
        refuse(&dir, &registry.image(command, &[]));
        assert!(!dir.path().join("out").exists());
    }
    registry.set(Blobs::Served);
    run(&dir, &registry.image(&["export", "-o", "out"], &[]));
    assert!(fs::read(dir.path().join("out")).unwrap() == data);
}
