//! Disks that read blobs through a fetcher process, from a real registry.

use std::fs;
use std::path::Path;
use std::sync::Arc;
use std::thread;

use common::content::Random;
use common::fetch_processes::{Role, children};
use common::golden;
use common::registries::{DockerRegistry, Storage, TokenServer};
use common::registry_server::until;
use ovbd_vhost::fetch::open::{LocalLayers, Needs};
use ovbd_vhost::fetch::process::{Config, Process};
use ovbd_vhost::format::digest::Digest;
use ovbd_vhost::image::config::Stack;
use ovbd_vhost::image::reader::Reader;
use ovbd_vhost::image::{Image, OpenStack};
use ovbd_vhost::registry::args::RegistryArgs;
use ovbd_vhost::source::client::{Client, Patience};
use ovbd_vhost::source::{Blob, Error, FetchErrorKind, LayerRef, RemoteBlob, cached};
use ovbd_vhost::units::Sector;
use rustix::process::{Pid, Signal, kill_process};
use tempfile::TempDir;

fn bytes(len: usize, seed: u64) -> Vec<u8> {
    let mut random = Random::new(seed);
    let words = (0..len.div_ceil(8)).flat_map(|_| random.any().to_le_bytes());
    words.take(len).collect()
}

fn remote(host: &str, bytes: &[u8]) -> Arc<RemoteBlob> {
    Arc::new(RemoteBlob {
        digest: Digest::of(bytes),
        size: Some(bytes.len() as u64),
        blobs_url: format!("http://{host}/v2/team/app/blobs"),
    })
}

/// Starts a fetcher with a cache in `dir` and the credentials there, if any.
fn start(dir: &TempDir) -> Process {
    let credentials = dir.path().join("auth");
    let config = Config {
        cache: dir.path().join("cache"),
        registry: RegistryArgs {
            credentials: credentials.exists().then_some(credentials),
            ..RegistryArgs::default()
        },
        sandbox: true,
    };
    let program = Path::new(env!("CARGO_BIN_EXE_ovbd-vhost"));
    Process::start(program, &config).unwrap()
}

/// A disk process that may read one blob.
fn connect(process: &Process, layer: &Arc<RemoteBlob>) -> (Arc<Client>, Blob) {
    let socket = process.attach(&[Arc::clone(layer)], None).unwrap();
    let client = Arc::new(Client::start(socket, Patience::default(), || {}).unwrap());
    let blob = cached::open(&client, 0, layer).unwrap();
    (client, blob)
}

fn check(blob: &Blob, expected: &[u8], offset: usize, len: usize) {
    let mut found = vec![0; len];
    blob.read_exact_at(&mut found, offset as u64).unwrap();
    assert!(found == expected[offset..offset + len], "{offset}+{len}");
}

/// Process number of the fetcher.
fn fetcher(process: &Process) -> Option<Pid> {
    let keeper = Pid::from_raw(i32::try_from(process.keeper()?).ok()?)?;
    children(keeper, Role::Fetcher).first().copied()
}

#[test]
fn disks_share_what_was_fetched_and_survive_killed_fetchers() {
    let dir = tempfile::tempdir().unwrap();
    let content = bytes(24 << 20, 1);
    let storage = Storage::default();
    storage.blob("team/app", &content);
    let tokens = TokenServer::start(60);
    let registry = DockerRegistry::with_tokens(storage, &tokens);
    let credentials = TokenServer::credentials(registry.host());
    fs::write(dir.path().join("auth"), credentials).unwrap();
    let layer = remote(registry.host(), &content);
    let process = start(&dir);
    let disks = [connect(&process, &layer), connect(&process, &layer)];
    for (client, _) in &disks {
        client.start_serving();
    }
    thread::scope(|scope| {
        for (number, (_, blob)) in disks.iter().enumerate() {
            let content = &content;
            scope.spawn(move || {
                let mut random = Random::new(number as u64);
                for _ in 0..200 {
                    let offset = random.below(content.len() as u64 - 5000) as usize;
                    check(blob, content, offset, 5000);
                }
                check(blob, content, 0, content.len());
            });
        }
        for _ in 0..5 {
            let before = fetcher(&process);
            if let Some(pid) = before {
                let _ = kill_process(pid, Signal::KILL);
            }
            until("another fetcher", || {
                let now = fetcher(&process);
                now.is_some() && now != before
            });
        }
    });
    until("the blob is complete", || {
        dir.path()
            .join("cache/blobs/sha256")
            .join(layer.digest.hex())
            .exists()
    });
    drop(registry);
    // Without the registry, and with another fetcher.
    let again = start(&dir);
    let (_client, blob) = connect(&again, &layer);
    check(&blob, &content, 0, content.len());
}

#[test]
fn what_cannot_be_opened_has_a_reason() {
    let dir = tempfile::tempdir().unwrap();
    let content = bytes(200_000, 2);
    let storage = Storage::default();
    storage.blob("team/app", &content);
    let registry = DockerRegistry::open(storage);
    let absent = remote(registry.host(), b"absent");
    let process = start(&dir);
    let (_client, blob) = connect(&process, &absent);
    let error = blob.read_exact_at(&mut [0; 3], 0).unwrap_err();
    let Error::Fetch { source, .. } = error else {
        panic!("{error}")
    };
    assert_eq!(source.kind(), FetchErrorKind::NotFound, "{source}");
    let there = remote(registry.host(), &content);
    let (_client, blob) = connect(&process, &there);
    check(&blob, &content, 100_000, 1000);
    let liar = Arc::new(RemoteBlob {
        size: Some(100),
        ..(*there).clone()
    });
    let (_client, blob) = connect(&process, &liar);
    assert!(blob.read_exact_at(&mut [0; 3], 0).is_err());
    let unknown = Arc::new(RemoteBlob {
        size: None,
        ..(*there).clone()
    });
    let (_client, blob) = connect(&process, &unknown);
    assert_eq!(blob.len(), content.len() as u64);
    check(&blob, &content, 0, content.len());
}

#[test]
fn a_fetcher_ends_with_its_owner() {
    let dir = tempfile::tempdir().unwrap();
    let process = start(&dir);
    until("a fetcher", || fetcher(&process).is_some());
    let pid = fetcher(&process).unwrap();
    drop(process);
    until("the fetcher ended", || {
        rustix::process::test_kill_process(pid).is_err()
    });
}

/// Every golden image that has no writable layer, its topmost layer from a local file.
#[test]
fn images_from_a_registry_hold_what_local_ones_do() {
    let dir = tempfile::tempdir().unwrap();
    let mut cases = golden::cases();
    cases.retain(|case| !case.has_upper && case.size <= 64 << 20);
    let storage = Storage::default();
    for layer in cases.iter().flat_map(|case| &case.layers) {
        storage.blob("team/app", &fs::read(layer).unwrap());
    }
    let registry = DockerRegistry::open(storage);
    let process = start(&dir);
    let mut compared = 0;
    for case in &cases {
        // Some are damaged on purpose: both must then fail.
        let local = Image::open(&Stack::new(case.layers.iter()));
        let mut layers: Vec<LayerRef> = case
            .layers
            .iter()
            .map(|path| LayerRef::Remote(remote(registry.host(), &fs::read(path).unwrap())))
            .collect();
        if let (Some(top), Some(path)) = (layers.last_mut(), case.layers.last())
            && case.layers.len() > 1
        {
            *top = LayerRef::from(path);
        }
        let layers = LocalLayers::open(&layers).unwrap();
        let layers = layers.attach(&process, None, None).unwrap();
        let opened = layers
            .open(Patience::default(), Needs::Structures, || {})
            .unwrap();
        let fetched = Image::load(OpenStack::of(opened.blobs).unwrap());
        let (Ok(local), Ok(fetched)) = (&local, &fetched) else {
            assert_eq!(local.is_ok(), fetched.is_ok(), "{}", case.name);
            continue;
        };
        assert_eq!(local.size(), fetched.size(), "{}", case.name);
        let (mut ours, mut theirs) = (vec![0; 1 << 20], vec![0; 1 << 20]);
        for start in (0..local.size()).step_by(1 << 20) {
            let len = (local.size() - start).min(1 << 20) as usize;
            let sector = Sector(start / 512);
            let one = Reader::new().read(local.at_own_size(), sector, &mut ours[..len]);
            let other = Reader::new().read(fetched.at_own_size(), sector, &mut theirs[..len]);
            assert_eq!(one.is_ok(), other.is_ok(), "{} at {start}", case.name);
            assert!(
                one.is_err() || ours[..len] == theirs[..len],
                "{} at {start}",
                case.name
            );
        }
        compared += 1;
    }
    assert!(compared > 10, "{compared} images");
}
