//! The cache's storage under served disks: power loss, damage, a cache that takes nothing.

use std::fs;
use std::os::unix::fs::FileExt;
use std::path::PathBuf;
use std::time::Duration;

use common::content::tagged;
use common::daemon;
use common::registry_server::until;
use common::remote::{Layers, Place};
use ovbd_vhost::cache::Cache;
use ovbd_vhost::format::digest::Digest;
use ovbd_vhost::format::presence::{BOOT_OFFSET, HEADER_LEN, Identity};
use serde_json::json;
use uuid::Uuid;

use super::{Reader, UNIT, asked_units, kill_all, partial, publish, units};

/// Leaves of a partial blob what a power loss may leave: all bits, and of the data only what was
/// synced. Returns the units that are lost and those that are not.
fn lose_power(place: &Place, blob: &[u8]) -> (Vec<usize>, Vec<usize>) {
    let path = partial(place, blob, "map");
    let mut map = fs::read(&path).expect("a map");
    let count = blob.len().div_ceil(UNIT);
    let identity = Identity::new(Digest::of(blob), blob.len() as u64).expect("an identity");
    let live = units(&map, HEADER_LEN, count);
    let durable = units(&map, HEADER_LEN + identity.bitmap_len(), count);
    let data = fs::File::options()
        .write(true)
        .open(partial(place, blob, "data"));
    let data = data.expect("data");
    let (mut lost, mut kept) = (Vec::new(), Vec::new());
    for unit in 0..count {
        match (live[unit], durable[unit]) {
            (true, false) => {
                let len = UNIT.min(blob.len() - unit * UNIT);
                data.write_all_at(&vec![0; len], (unit * UNIT) as u64)
                    .expect("zeros");
                lost.push(unit);
            }
            (true, true) => kept.push(unit),
            (false, _) => {}
        }
    }
    // The system that starts again has another boot id than the one that wrote the map.
    map[BOOT_OFFSET..BOOT_OFFSET + 16].copy_from_slice(Uuid::new_v4().as_bytes());
    fs::write(path, map).expect("a map");
    (lost, kept)
}

#[test]
fn nothing_that_a_power_loss_took_is_served() {
    let layers = Layers::new(8);
    let place = Place::default();
    let server = layers.registry();
    place.config("http", &server.host(), &layers.lowers(), json!({}));
    let half = layers.content.len() / 2;
    // What a daemon that ends makes durable.
    let mut daemon = place.serve(&[]);
    let mut reader = Reader::connect(&daemon);
    reader.ask((0..32).map(|read| read * half / 64));
    reader.check(&layers.content);
    drop(reader);
    assert_eq!(daemon.terminate().code(), Some(0));
    // What another reads just before the power goes.
    let mut daemon = place.serve(&[]);
    let mut reader = Reader::connect(&daemon);
    reader.ask((0..32).map(|read| half + read * half / 64));
    reader.check(&layers.content);
    kill_all(&mut daemon);
    drop(reader);
    let before: Vec<_> = layers
        .blobs
        .iter()
        .map(|blob| asked_units(&server, blob))
        .collect();
    let losses: Vec<_> = layers
        .blobs
        .iter()
        .map(|blob| lose_power(&place, blob))
        .collect();
    let count = |all: fn(&(Vec<usize>, Vec<usize>)) -> usize| losses.iter().map(all).sum::<usize>();
    assert!(
        count(|loss| loss.0.len()) > 0,
        "nothing was lost: {losses:?}"
    );
    assert!(
        count(|loss| loss.1.len()) > 4,
        "nothing was kept: {losses:?}"
    );
    let daemon = place.serve(&[]);
    Reader::connect(&daemon).check_all(&layers.content);
    for ((blob, before), (lost, kept)) in layers.blobs.iter().zip(before).zip(losses) {
        let after = asked_units(&server, blob);
        assert!(lost.iter().all(|unit| after[*unit] == before[*unit] + 1));
        assert!(kept.iter().all(|unit| after[*unit] == before[*unit]));
    }
}

/// Files of the cache that are torn, cut, exchanged or gone at the next start.
#[test]
fn a_damaged_cache_is_fetched_again() {
    type Damage = fn(&Place, &[u8]);
    fn write_at(path: PathBuf, at: u64, bytes: &[u8]) {
        let file = fs::File::options().write(true).open(path).expect("a file");
        file.write_all_at(bytes, at).expect("bytes");
    }
    fn cut(path: PathBuf, len: impl Fn(u64) -> u64) {
        let file = fs::File::options().write(true).open(path).expect("a file");
        let whole = file.metadata().expect("a file").len();
        file.set_len(len(whole)).expect("another length");
    }
    let cases: [(&str, Damage); 8] = [
        ("a torn header", |place, blob| {
            write_at(partial(place, blob, "map"), 16, &[0xff; 48])
        }),
        ("an empty header", |place, blob| {
            write_at(partial(place, blob, "map"), 0, &[0; 4096])
        }),
        ("a map that is too long", |place, blob| {
            cut(partial(place, blob, "map"), |len| len + 4096)
        }),
        ("a map that is too short", |place, blob| {
            cut(partial(place, blob, "map"), |_| 4096)
        }),
        ("cut data", |place, blob| {
            cut(partial(place, blob, "data"), |len| len / 2)
        }),
        ("longer data", |place, blob| {
            cut(partial(place, blob, "data"), |len| len + 1)
        }),
        ("no data", |place, blob| {
            fs::remove_file(partial(place, blob, "data")).expect("removed");
        }),
        ("no map", |place, blob| {
            fs::remove_file(partial(place, blob, "map")).expect("removed")
        }),
    ];
    let layers = Layers::new(4);
    let server = layers.registry();
    for (what, damage) in cases {
        let place = Place::default();
        place.config("http", &server.host(), &layers.lowers(), json!({}));
        let daemon = place.serve(&[]);
        let mut reader = Reader::connect(&daemon);
        reader.ask((0..8).map(|read| read * 8 * UNIT));
        reader.check(&layers.content);
        drop((reader, daemon));
        damage(&place, &layers.blobs[1]);
        let daemon = place.serve(&[]);
        Reader::connect(&daemon).check_all(&layers.content);
        assert!(
            daemon.log().contains("will be fetched again"),
            "{what}: {}",
            daemon.log()
        );
    }
}

/// All files of the cache are removed while a disk is served from it.
#[test]
fn files_that_are_removed_under_a_disk_serve_it_on() {
    let layers = Layers::new(4);
    let place = Place::default();
    let server = layers.registry();
    place.config("http", &server.host(), &layers.lowers(), json!({}));
    let daemon = place.serve(&[]);
    let mut reader = Reader::connect(&daemon);
    reader.ask([0]);
    reader.check(&layers.content);
    for blob in &layers.blobs {
        for extension in ["data", "map"] {
            fs::remove_file(partial(&place, blob, extension)).expect("removed");
        }
    }
    reader.check_all(&layers.content);
    // All units are there; what has no name any more gets none.
    std::thread::sleep(Duration::from_millis(500));
    assert!(
        !place
            .path("cache/blobs/sha256")
            .join(Digest::of(&layers.blobs[0]).hex())
            .exists()
    );
    let other = place.serve(&[]);
    Reader::connect(&other).check_all(&layers.content);
}

/// Data that are cut under a disk are errors, never zeros, and come again at the next start.
#[test]
fn data_that_are_cut_under_a_disk_are_errors() {
    let layers = Layers::new(4);
    let place = Place::default();
    let server = layers.registry();
    place.config("http", &server.host(), &layers.lowers(), json!({}));
    let daemon = place.serve(&[]);
    Reader::connect(&daemon).check_all(&layers.content);
    until("the blob is complete", || {
        place
            .path("cache/blobs/sha256")
            .join(Digest::of(&layers.blobs[0]).hex())
            .exists()
    });
    let path = place
        .path("cache/blobs/sha256")
        .join(Digest::of(&layers.blobs[0]).hex());
    fs::set_permissions(&path, std::os::unix::fs::PermissionsExt::from_mode(0o600)).expect("mode");
    let file = fs::File::options().write(true).open(&path).expect("a blob");
    file.set_len(layers.blobs[0].len() as u64 / 2)
        .expect("another length");
    let options = common::guest::Options::default();
    let mut guest = common::guest::Guest::boot(daemon.connect(), options).expect("guest");
    let mut failed = 0;
    for start in (0..layers.content.len()).step_by(UNIT) {
        let answer = guest.request(0, common::blk::IN, start as u64 / 512, UNIT as u32);
        match answer.status {
            common::blk::OK => assert!(answer.data == layers.content[start..start + UNIT]),
            _ => failed += 1,
        }
    }
    assert!(failed > 8, "{failed} reads of bytes that are gone");
    drop((guest, daemon));
    let daemon = place.serve(&[]);
    Reader::connect(&daemon).check_all(&layers.content);
}

/// A cache that is full or read-only at the start ends it with a reason.
#[test]
fn a_cache_that_takes_nothing_ends_the_start() {
    let layers = Layers::new(1);
    let place = Place::default();
    let server = layers.registry();
    place.config("http", &server.host(), &layers.lowers(), json!({}));
    drop(Cache::open(&place.path("cache")).expect("a cache"));
    let cache = place.path("cache").display().to_string();
    let options = place.options();
    let socket = place.path("s").display().to_string();
    let options: Vec<_> = options.iter().map(String::as_str).collect();
    for (setup, words) in [
        (
            format!("mount --bind {cache} {cache}; mount -o remount,ro,bind {cache}"),
            "Read-only",
        ),
        (
            format!("mount -t tmpfs -o size=4k,mode=0700 tmpfs {cache}"),
            "space",
        ),
        (
            format!(
                "mount -t tmpfs -o size=64k,mode=0700 tmpfs {cache}; mkdir -m 700 {cache}/c; \
                 head -c 60K /dev/zero >{cache}/other || true"
            ),
            "cache",
        ),
    ] {
        let output = daemon::run_in_namespace(
            &setup,
            &[options.as_slice(), &["--socket", &socket]].concat(),
        );
        let text = String::from_utf8_lossy(&output.stderr);
        assert_eq!(output.status.code(), Some(1), "{text}");
        let mut lines = text.lines();
        let reason = lines
            .find(|line| line.starts_with("ovbd-vhost: "))
            .unwrap_or_default();
        assert!(reason.contains(&cache) && reason.contains(words), "{text}");
        assert!(!text.contains("is damaged"), "{text}");
    }
    assert_eq!(server.count(), 0);
}

/// Over the mark with everything in use: disks are served, downloads pause, the log says so.
#[test]
fn a_cache_over_its_mark_serves_what_is_in_use() {
    let layers = Layers::new(4);
    let place = Place::default();
    let server = layers.registry();
    let download = json!({"enable": true, "delay": 0, "delayExtra": 0, "maxMBps": 0});
    place.config(
        "http",
        &server.host(),
        &layers.lowers(),
        json!({"download": download}),
    );
    let other = Cache::open(&place.path("cache")).expect("a cache");
    publish(&other, &tagged(UNIT, 9));
    let service = place.path("overlaybd.json");
    let mark = json!({"cacheConfig": {"cacheType": "file", "cacheSizeGB": 0}});
    fs::write(&service, mark.to_string()).expect("a configuration");
    let daemon = place.serve(&["--service-config", &service.display().to_string()]);
    until("the log says so", || {
        daemon.log().contains("downloads pause")
    });
    let unused = Digest::of(&tagged(UNIT, 9)).hex();
    let unused = place.path("cache/blobs/sha256").join(unused);
    until("what is not in use is evicted", || !unused.exists());
    let before = server.count();
    std::thread::sleep(Duration::from_secs(1));
    assert_eq!(server.count(), before, "nothing is downloaded");
    Reader::connect(&daemon).check_all(&layers.content);
    assert!(
        partial(&place, &layers.blobs[0], "data").exists() || {
            place
                .path("cache/blobs/sha256")
                .join(Digest::of(&layers.blobs[0]).hex())
                .exists()
        }
    );
    assert_eq!(
        daemon.log().matches("downloads pause").count(),
        1,
        "{}",
        daemon.log()
    );
}
