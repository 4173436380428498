//! Wrong bytes: noticed, fetched again, and never served.

use std::fs::{self, File, Permissions};
use std::os::unix::fs::{FileExt, PermissionsExt};
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

use common::blk;
use common::guest::{Guest, Options};
use common::registry_server::{Received, Reply, serve, until};
use common::remote::{Layers, Place};
use ovbd_vhost::cache::Cache;
use ovbd_vhost::format::digest::Digest;
use serde_json::json;

use super::{Reader, UNIT, asked_units, store};

/// Serves a blob with one bit wrong, in the middle, as often as `times` says.
fn flipped(request: &Received, blob: &[u8], at: usize, times: &AtomicUsize) -> Reply {
    let (first, last) = request.range().unwrap_or((0, blob.len() - 1));
    let touches = (first..=last).contains(&at);
    let again = |left: usize| left.checked_sub(1);
    let wrong = touches
        && times
            .fetch_update(Ordering::SeqCst, Ordering::SeqCst, again)
            .is_ok();
    if !wrong {
        return serve(request, blob);
    }
    let mut wrong = blob.to_vec();
    wrong[at] ^= 4;
    serve(request, &wrong)
}

/// Reads the disk from its end in 16 KiB, and returns how many reads failed.
fn failures(guest: &mut Guest, content: &[u8]) -> usize {
    const LEN: usize = 16 << 10;
    let mut failed = 0;
    for start in (0..content.len()).step_by(LEN).rev() {
        let answer = guest.request(0, blk::IN, start as u64 / 512, LEN as u32);
        match answer.status {
            blk::OK => assert!(answer.data == content[start..start + LEN], "at {start}"),
            status => {
                assert_eq!(status, blk::IOERR);
                failed += 1;
            }
        }
    }
    failed
}

#[test]
fn a_bit_that_is_wrong_once_is_fetched_again() {
    let layers = Layers::new(4);
    let place = Place::default();
    let times = AtomicUsize::new(1);
    let at = layers.blobs[1].len() / 2;
    let len = layers.blobs[1].len();
    let server = layers.registry_that(move |request, blob| match blob.len() == len {
        true => flipped(request, blob, at, &times),
        false => serve(request, blob),
    });
    place.config("http", &server.host(), &layers.lowers(), json!({}));
    let daemon = place.serve(&[]);
    let mut guest = Guest::boot(daemon.connect(), Options::default()).expect("guest");
    assert_eq!(failures(&mut guest, &layers.content), 0);
    let counts = asked_units(&server, &layers.blobs[1]);
    let twice: Vec<_> = (0..counts.len()).filter(|unit| counts[*unit] > 1).collect();
    assert!(
        twice.contains(&(at / UNIT)) && twice.len() <= 2,
        "{counts:?}"
    );
    assert!(daemon.log().contains("is damaged"), "{}", daemon.log());
}

/// Makes one byte of a complete blob in the cache wrong, as failing storage does.
fn damage_on_storage(place: &Place, blob: &[u8], at: usize) {
    let path = place
        .path("cache/blobs/sha256")
        .join(Digest::of(blob).hex());
    until("the blob is complete", || path.exists());
    fs::set_permissions(&path, Permissions::from_mode(0o600)).expect("permissions");
    let file = File::options().write(true).open(&path).expect("a blob");
    file.write_all_at(&[blob[at] ^ 4], at as u64)
        .expect("a damaged byte");
}

/// Damage of a complete blob is fetched again like that of a partial one, whether it was complete when the
/// disk was opened or became so later, and the blob is complete again then.
#[test]
fn damage_of_a_complete_blob_on_storage_is_fetched_again() {
    for complete_at_start in [true, false] {
        let layers = Layers::new(4);
        let place = Place::default();
        let server = layers.registry();
        place.config("http", &server.host(), &layers.lowers(), json!({}));
        let mut daemon = place.serve(&[]);
        let mut guest = Guest::boot(daemon.connect(), Options::default()).expect("guest");
        assert_eq!(failures(&mut guest, &layers.content), 0);
        let blob = &layers.blobs[1];
        let path = place
            .path("cache/blobs/sha256")
            .join(Digest::of(blob).hex());
        until("the blob is complete", || path.exists());
        if complete_at_start {
            drop((guest, daemon));
            daemon = place.serve(&[]);
            guest = Guest::boot(daemon.connect(), Options::default()).expect("guest");
        }
        let before = asked_units(&server, blob);
        let at = blob.len() / 2;
        damage_on_storage(&place, blob, at);
        assert_eq!(failures(&mut guest, &layers.content), 0, "{}", daemon.log());
        let counts = asked_units(&server, blob);
        let again: Vec<_> = (0..counts.len())
            .filter(|unit| counts[*unit] > before[*unit])
            .collect();
        assert!(
            again.contains(&(at / UNIT)) && again.len() <= 2,
            "{again:?}"
        );
        until("the blob is complete again", || {
            fs::read(&path).is_ok_and(|bytes| bytes == *blob)
        });
        assert!(
            daemon.log().contains("damaged on storage"),
            "{}",
            daemon.log()
        );
        assert_eq!(failures(&mut guest, &layers.content), 0);
    }
}

/// A block that is always wrong fails the reads of it, and no others.
#[test]
fn a_bit_that_is_always_wrong_fails_the_reads_of_it() {
    let layers = Layers::new(4);
    let place = Place::default();
    let at = layers.blobs[1].len() / 2;
    let len = layers.blobs[1].len();
    let server = layers.registry_that(move |request, blob| match blob.len() == len {
        true => flipped(request, blob, at, &AtomicUsize::new(1)),
        false => serve(request, blob),
    });
    place.config("http", &server.host(), &layers.lowers(), json!({}));
    let daemon = place.serve(&[]);
    let mut guest = Guest::boot(daemon.connect(), Options::default()).expect("guest");
    let failed = failures(&mut guest, &layers.content);
    assert!((1..=2).contains(&failed), "{failed} reads");
    let counts = asked_units(&server, &layers.blobs[1]);
    // Once, and three times more for each read that fails.
    let most = 1 + 3 * failed;
    assert!((4..=most).contains(&counts[at / UNIT]), "{counts:?}");
    // All others are there: the blob is whole, and found to be wrong.
    until("the log says so", || {
        daemon
            .log()
            .contains("was fetched completely but has digest")
    });
    assert!(
        !place
            .path("cache/blobs/sha256")
            .join(Digest::of(&layers.blobs[1]).hex())
            .exists()
    );
}

#[test]
fn what_only_a_mirror_has_wrong_comes_from_the_registry() {
    let layers = Layers::new(4);
    let place = Place::default();
    let origin = layers.registry();
    let at = layers.blobs[1].len() / 2;
    let len = layers.blobs[1].len();
    let mirror = layers.registry_that(move |request, blob| match blob.len() == len {
        true => flipped(request, blob, at, &AtomicUsize::new(1)),
        false => serve(request, blob),
    });
    place.config("http", &origin.host(), &layers.lowers(), json!({}));
    let option = format!("{}={}", origin.host(), mirror.url(""));
    let daemon = place.serve(&["--mirror", &option]);
    let mut guest = Guest::boot(daemon.connect(), Options::default()).expect("guest");
    assert_eq!(failures(&mut guest, &layers.content), 0);
    let counts = asked_units(&origin, &layers.blobs[1]);
    let asked: usize = counts.iter().sum();
    assert!(counts[at / UNIT] == 1 && asked <= 2, "{counts:?}");
}

/// Waits until the cache has both blobs, complete and right.
fn until_complete(place: &Place, layers: &Layers) {
    for blob in &layers.blobs {
        let path = place
            .path("cache/blobs/sha256")
            .join(Digest::of(blob).hex());
        until("the blob is complete", || path.exists());
        assert!(fs::read(path).expect("a blob") == *blob);
    }
}

/// A mirror has zeros instead of most bytes, and they are downloaded faster than repairs come: also when a
/// blob is full and wrong while repairs wait, all reads are answered, and right.
#[test]
fn a_mirror_that_serves_zeros_delays_a_guest_and_nothing_else() {
    let layers = Layers::new(24);
    let place = Place::default();
    let origin = layers.registry_that(|request, blob| {
        Reply::Later(Duration::from_millis(50), Box::new(serve(request, blob)))
    });
    let mirror = layers.registry_that(|request, blob| {
        let mut wrong = blob.to_vec();
        wrong[blob.len() / 8..][..blob.len() / 4 * 3].fill(0);
        serve(request, &wrong)
    });
    let download = json!({"enable": true, "delay": 0, "delayExtra": 0, "maxMBps": 0});
    let more = json!({"download": download});
    place.config("http", &origin.host(), &layers.lowers(), more);
    let option = format!("{}={}", origin.host(), mirror.url(""));
    let daemon = place.serve(&["--mirror", &option]);
    let mut reader = Reader::connect(&daemon);
    let starts: Vec<_> = (0..layers.content.len()).step_by(16 << 10).collect();
    for part in starts.chunks(32) {
        reader.ask(part.iter().copied());
        reader.check(&layers.content);
    }
    until_complete(&place, &layers);
    reader.check_all(&layers.content);
}

/// A cache that holds all of a blob, and none of it right.
#[test]
fn a_full_blob_of_zeros_is_fetched_again() {
    let layers = Layers::new(4);
    let place = Place::default();
    let server = layers.registry();
    let download = json!({"enable": true, "delay": 0, "delayExtra": 0, "maxMBps": 0});
    let more = json!({"download": download});
    place.config("http", &server.host(), &layers.lowers(), more);
    let cache = Cache::open(&place.path("cache")).expect("a cache");
    for blob in &layers.blobs {
        store(&cache, &Digest::of(blob), &vec![0; blob.len()]);
    }
    let daemon = place.serve(&[]);
    Reader::connect(&daemon).check_all(&layers.content);
    until_complete(&place, &layers);
}

/// Without checksums only the digest of the whole tells: the blob is never published.
#[test]
fn a_blob_without_checksums_is_not_published_with_another_digest() {
    let layers = Layers::plain(2);
    let place = Place::default();
    let at = 1 << 20;
    let times = Arc::new(AtomicUsize::new(1));
    let left = Arc::clone(&times);
    let server = layers.registry_that(move |request, blob| flipped(request, blob, at, &left));
    let download = json!({"enable": true, "delay": 0, "delayExtra": 0, "maxMBps": 0});
    let more = json!({"download": download});
    place.config("http", &server.host(), &layers.lowers(), more);
    let daemon = place.serve(&[]);
    let name = Digest::of(&layers.blobs[0]).hex();
    let published = place.path("cache/blobs/sha256").join(&name);
    until("the second download is right", || published.exists());
    assert_eq!(times.load(Ordering::SeqCst), 0);
    assert!(fs::read(published).expect("a blob") == layers.blobs[0]);
    drop(daemon);
    drop(server);
    let daemon = place.serve(&[]);
    let mut guest = Guest::boot(daemon.connect(), Options::default()).expect("guest");
    assert_eq!(failures(&mut guest, &layers.content), 0);
}

/// Nothing is served before all of it was compared with its digest.
#[test]
fn a_disk_that_is_verified_first_never_has_wrong_bytes() {
    let layers = Layers::plain(2);
    let times = Arc::new(AtomicUsize::new(2));
    let left = Arc::clone(&times);
    let server = layers.registry_that(move |request, blob| flipped(request, blob, 1 << 20, &left));
    let place = Place::default();
    place.config("http", &server.host(), &layers.lowers(), json!({}));
    let output = place.run(&["--verify-first"]);
    let text = String::from_utf8_lossy(&output.stderr);
    assert_eq!(output.status.code(), Some(1), "{text}");
    assert!(
        text.contains("was fetched twice; its bytes have digest"),
        "{text}"
    );
    assert!(
        place.result().starts_with("failed:Unexpected response"),
        "{}",
        place.result()
    );

    let daemon = place.serve(&["--verify-first"]);
    let fetched = server.count();
    let counts = asked_units(&server, &layers.blobs[0]);
    assert!(counts.iter().all(|count| *count == 3), "{counts:?}");
    let mut guest = Guest::boot(daemon.connect(), Options::default()).expect("guest");
    assert_eq!(failures(&mut guest, &layers.content), 0);
    assert_eq!(server.count(), fetched);
}

#[test]
fn a_config_without_sizes_asks_the_registry() {
    let layers = Layers::new(2);
    let place = Place::default();
    let server = layers.registry();
    let mut lowers = layers.lowers();
    for lower in &mut lowers {
        lower.as_object_mut().expect("a layer").remove("size");
    }
    place.config("http", &server.host(), &lowers, json!({}));
    let daemon = place.serve(&[]);
    // The length, and two ranges, of each layer.
    assert_eq!(server.count(), 6);
    let mut guest = Guest::boot(daemon.connect(), Options::default()).expect("guest");
    assert_eq!(failures(&mut guest, &layers.content), 0);
}
