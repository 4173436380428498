//! A cache directory through its whole life: filled, synced, published, evicted, damaged.

mod demotion;

use std::fs::{self, File};
use std::os::unix::fs::{FileExt, PermissionsExt};
use std::path::PathBuf;
use std::sync::Arc;
use std::time::{Duration, SystemTime};

use tempfile::TempDir;
use uuid::Uuid;

use super::{Cache, Entry, Error, Evicted, Limits, Partial, Publication, Removal};
use crate::format::digest::Digest;
use crate::format::presence::{Identity, UNIT, UnitRange};

pub(super) fn content(len: u64, seed: u8) -> Vec<u8> {
    let byte = |at: u64| (at / 7 % 251) as u8 ^ seed;
    (0..len).map(byte).collect()
}

pub(super) fn identity(bytes: &[u8]) -> Identity {
    Identity::new(Digest::of(bytes), bytes.len() as u64).unwrap()
}

pub(super) fn partial(cache: &Cache, identity: Identity) -> Arc<Partial> {
    match cache.entry(identity).unwrap() {
        Entry::Partial(partial) => partial,
        Entry::Complete(_) => panic!("complete"),
    }
}

/// Stores units of `bytes`.
pub(super) fn store(partial: &Arc<Partial>, bytes: &[u8], units: UnitRange) {
    let claim = partial.claim(units).unwrap().unwrap();
    let range = partial.identity().bytes_of(units);
    let part = &bytes[range.start as usize..range.end as usize];
    claim.store(units.start(), part).unwrap();
}

fn fill(cache: &Cache, bytes: &[u8]) {
    let partial = partial(cache, identity(bytes));
    store(&partial, bytes, partial.identity().all_units());
    assert_eq!(partial.publish().unwrap(), Publication::Published);
}

fn only_file(dir: &TempDir, kind: &str, extension: &str) -> PathBuf {
    let entries = fs::read_dir(dir.path().join(kind).join("sha256")).unwrap();
    let paths = entries.map(|entry| entry.unwrap().path());
    let found = paths.filter(|path| path.extension().unwrap_or_default() == extension);
    let found: Vec<_> = found.collect();
    assert_eq!(found.len(), 1, "{found:?}");
    found[0].clone()
}

#[test]
fn a_reader_that_locks_a_blob_keeps_no_other_away() {
    let dir = tempfile::tempdir().unwrap();
    let cache = Cache::open(dir.path()).unwrap();
    let (whole, begun) = (content(100, 1), content(UNIT, 2));
    fill(&cache, &whole);
    drop(partial(&cache, identity(&begun)));
    let _locked = [("blobs", ""), ("partial", "data")].map(|(kind, extension)| {
        let file = File::open(only_file(&dir, kind, extension)).unwrap();
        file.lock().unwrap();
        file
    });
    assert!(cache.entry(identity(&whole)).unwrap().is_complete());
    assert!(!cache.entry(identity(&begun)).unwrap().is_complete());
    let digest = Digest::of(&whole);
    assert_eq!(cache.remove(&digest).unwrap(), Removal::InUse);
}

#[test]
fn a_blob_from_nothing_to_complete() {
    let dir = tempfile::tempdir().unwrap();
    let cache = Cache::open(dir.path()).unwrap();
    let bytes = content(3 * UNIT + 100, 1);
    let partial = partial(&cache, identity(&bytes));
    assert_eq!(partial.publish().unwrap(), Publication::Incomplete);
    store(&partial, &bytes, UnitRange::new(3, 4));
    store(&partial, &bytes, UnitRange::new(0, 2));
    assert_eq!(
        partial.map().absent(UnitRange::new(0, 4)),
        [UnitRange::new(2, 3)]
    );
    store(&partial, &bytes, UnitRange::new(2, 3));
    let reader = partial.files().data.try_clone().unwrap();
    assert_eq!(partial.publish().unwrap(), Publication::Published);
    assert_eq!(partial.publish().unwrap(), Publication::Published);
    let claim = partial.claim(UnitRange::new(0, 1)).unwrap().unwrap();
    claim.store(0, &[9; UNIT as usize]).unwrap();
    let error = claim.replace(0, &bytes[..UNIT as usize]).unwrap_err();
    assert!(matches!(error, Error::Closed { .. }), "{error}");
    let Entry::Complete(file) = cache.entry(identity(&bytes)).unwrap() else {
        panic!("not complete");
    };
    for file in [file, Arc::new(reader)] {
        let mut found = vec![0; bytes.len()];
        file.read_exact_at(&mut found, 0).unwrap();
        assert_eq!(found, bytes);
    }
    let path = only_file(&dir, "blobs", "");
    assert_eq!(
        fs::metadata(&path).unwrap().permissions().mode() & 0o777,
        0o444
    );
    assert_eq!(
        fs::read_dir(dir.path().join("partial/sha256"))
            .unwrap()
            .count(),
        0
    );
}

#[test]
fn only_whole_claimed_units_are_stored() {
    let dir = tempfile::tempdir().unwrap();
    let cache = Cache::open(dir.path()).unwrap();
    let bytes = content(3 * UNIT + 100, 1);
    let partial = partial(&cache, identity(&bytes));
    let claim = partial.claim(UnitRange::new(1, 3)).unwrap().unwrap();
    let unit = UNIT as usize;
    for (first, len) in [
        (0, unit),
        (1, unit - 1),
        (1, 3 * unit),
        (3, 100),
        (1, 0),
        (u64::MAX, unit),
    ] {
        let error = claim.store(first, &bytes[..len]).unwrap_err();
        assert!(
            matches!(error, Error::NotUnits { .. }),
            "{first}, {len}: {error}"
        );
    }
    claim.store(1, &bytes[..2 * unit]).unwrap();
    let last = partial.claim(UnitRange::new(3, 4)).unwrap().unwrap();
    assert!(last.store(3, &bytes[..unit]).is_err());
    last.store(3, &bytes[..100]).unwrap();
    assert_eq!(
        partial.map().absent(UnitRange::new(0, 4)),
        [UnitRange::new(0, 1)]
    );
}

#[test]
fn another_boot_believes_what_was_synced_and_a_kill_loses_nothing() {
    let dir = tempfile::tempdir().unwrap();
    let bytes = content(8 * UNIT, 1);
    let boot = Uuid::new_v4();
    let open = |boot| {
        let cache = Cache::open_in_boot(dir.path(), boot).unwrap();
        partial(&cache, identity(&bytes))
    };
    let first = open(boot);
    store(&first, &bytes, UnitRange::new(0, 3));
    first.sync().unwrap();
    assert_eq!(first.unsynced(), 0);
    store(&first, &bytes, UnitRange::new(3, 5));
    assert_eq!(first.unsynced(), 2 * UNIT);
    drop(first);
    assert_eq!(
        open(boot).map().absent(UnitRange::new(0, 8)),
        [UnitRange::new(5, 8)],
        "after a kill"
    );
    let next = Uuid::new_v4();
    assert_eq!(
        open(next).map().absent(UnitRange::new(0, 8)),
        [UnitRange::new(3, 8)],
        "after another boot"
    );
    assert_eq!(
        open(Uuid::nil()).map().absent(UnitRange::new(0, 8)),
        [UnitRange::new(3, 8)]
    );
    let unknown = open(Uuid::nil());
    store(&unknown, &bytes, UnitRange::new(3, 8));
    assert_eq!(
        open(Uuid::nil()).map().absent(UnitRange::new(0, 8)),
        [UnitRange::new(3, 8)],
        "an unknown boot is another"
    );
}

#[test]
fn wrong_bytes_are_never_published() {
    let dir = tempfile::tempdir().unwrap();
    let cache = Cache::open(dir.path()).unwrap();
    let bytes = content(2 * UNIT, 1);
    let mut wrong = bytes.clone();
    wrong[70_000] ^= 1;
    let bad = partial(&cache, identity(&bytes));
    store(&bad, &wrong, UnitRange::new(0, 2));
    let found = Digest::of(&wrong);
    assert!(!bad.is_restarted());
    assert_eq!(bad.publish().unwrap(), Publication::Mismatch { found });
    assert_eq!(bad.publish().unwrap(), Publication::Incomplete);
    drop(bad);
    // The disks that have the file open see what is stored next, also by another process.
    let again = partial(&cache, identity(&bytes));
    assert!(again.is_restarted());
    let all = UnitRange::new(0, 2);
    assert_eq!(again.map().absent(all), [all]);
    store(&again, &wrong, all);
    assert_eq!(again.publish().unwrap(), Publication::Mismatch { found });
    store(&again, &bytes, all);
    assert_eq!(again.publish().unwrap(), Publication::Published);
}

#[test]
fn what_does_not_fit_is_fetched_again() {
    let bytes = content(5 * UNIT, 1);
    type Spoil = fn(&File);
    let spoil: [(&str, Spoil); 7] = [
        ("map", |file| file.set_len(100).unwrap()),
        ("map", |file| file.set_len(0).unwrap()),
        ("map", |file| file.set_len(1 << 20).unwrap()),
        ("map", |file| file.write_all_at(b"x", 20).unwrap()),
        ("map", |file| file.write_all_at(&[3, 0, 0, 0], 64).unwrap()),
        ("data", |file| file.set_len(1000).unwrap()),
        ("data", |file| file.set_len(6 * UNIT).unwrap()),
    ];
    for (case, (extension, spoil)) in spoil.iter().enumerate() {
        let dir = tempfile::tempdir().unwrap();
        let cache = Cache::open(dir.path()).unwrap();
        store(
            &partial(&cache, identity(&bytes)),
            &bytes,
            UnitRange::new(0, 5),
        );
        let path = only_file(&dir, "partial", extension);
        spoil(&File::options().write(true).open(path).unwrap());
        let again = partial(&cache, identity(&bytes));
        assert_eq!(
            again.map().absent(UnitRange::new(0, 5)),
            [UnitRange::new(0, 5)],
            "case {case}"
        );
    }
    for lost in ["map", "data"] {
        let dir = tempfile::tempdir().unwrap();
        let cache = Cache::open(dir.path()).unwrap();
        store(
            &partial(&cache, identity(&bytes)),
            &bytes,
            UnitRange::new(0, 5),
        );
        fs::remove_file(only_file(&dir, "partial", lost)).unwrap();
        let again = partial(&cache, identity(&bytes));
        assert_eq!(
            again.map().absent(UnitRange::new(0, 5)),
            [UnitRange::new(0, 5)],
            "{lost}"
        );
    }
}

#[test]
fn a_wrong_length_is_refused_and_a_damaged_blob_fetched_again() {
    let dir = tempfile::tempdir().unwrap();
    let cache = Cache::open(dir.path()).unwrap();
    let bytes = content(2 * UNIT, 1);
    let liar = Identity::new(Digest::of(&bytes), 100).unwrap();
    partial(&cache, liar);
    fill(&cache, &bytes);
    let error = cache.entry(liar).unwrap_err();
    assert!(
        matches!(
            error,
            Error::Length {
                expected: 100,
                found: 131_072,
                ..
            }
        ),
        "{error}"
    );
    assert!(cache.entry(identity(&bytes)).unwrap().is_complete());
    let path = only_file(&dir, "blobs", "");
    fs::set_permissions(&path, fs::Permissions::from_mode(0o644)).unwrap();
    File::options()
        .write(true)
        .open(&path)
        .unwrap()
        .set_len(5)
        .unwrap();
    assert!(!cache.entry(identity(&bytes)).unwrap().is_complete());
}

#[test]
fn verify_removes_what_is_damaged() {
    let dir = tempfile::tempdir().unwrap();
    let cache = Cache::open(dir.path()).unwrap();
    let bytes = content(2 * UNIT, 1);
    let digest = Digest::of(&bytes);
    assert_eq!(cache.verify(&digest).unwrap(), None);
    fill(&cache, &bytes);
    assert_eq!(cache.verify(&digest).unwrap(), Some(true));
    let path = only_file(&dir, "blobs", "");
    fs::set_permissions(&path, fs::Permissions::from_mode(0o644)).unwrap();
    let file = File::options().write(true).open(&path).unwrap();
    file.write_all_at(b"!", 70_000).unwrap();
    assert_eq!(cache.verify(&digest).unwrap(), Some(false));
    assert_eq!(cache.verify(&digest).unwrap(), None);
    assert_eq!(fs::read_dir(dir.path().join("trash")).unwrap().count(), 0);
}

/// Four blobs, the oldest first; the last one partial.
fn four(cache: &Cache) -> Vec<Vec<u8>> {
    let blobs: Vec<_> = (1..5).map(|seed| content(4 * UNIT, seed)).collect();
    let start = SystemTime::now() - Duration::from_secs(1000);
    for (at, bytes) in blobs.iter().enumerate() {
        let entry = partial(cache, identity(bytes));
        store(&entry, bytes, UnitRange::new(0, 4));
        if at < 3 {
            assert_eq!(entry.publish().unwrap(), Publication::Published);
        }
        let time = start + Duration::from_secs(at as u64);
        entry.data.set_modified(time).unwrap();
    }
    blobs
}

#[test]
fn the_least_recently_used_go_first_and_those_in_use_never() {
    let dir = tempfile::tempdir().unwrap();
    let cache = Cache::open(dir.path()).unwrap();
    let blobs = four(&cache);
    let usage = cache.usage().unwrap();
    assert!((16 * UNIT..17 * UNIT).contains(&usage), "{usage}");
    let limit = |bytes| Limits {
        bytes,
        free_percent: 0,
        free_bytes: 0,
    };
    assert_eq!(cache.evict(limit(usage)).unwrap(), Evicted::default());
    // Opening the oldest makes it the newest, and holds it.
    let held = cache.entry(identity(&blobs[0])).unwrap();
    let evicted = cache.evict(limit(usage - 1)).unwrap();
    assert_eq!((evicted.files, evicted.missing), (1, 0));
    let digests: Vec<_> = cache
        .list()
        .unwrap()
        .iter()
        .map(|item| item.digest)
        .collect();
    assert!(!digests.contains(&Digest::of(&blobs[1])) && digests.len() == 3);
    let evicted = cache.evict(limit(1)).unwrap();
    assert_eq!(evicted.files, 2);
    assert!(evicted.missing >= 4 * UNIT - 1, "{evicted:?}");
    let items = cache.list().unwrap();
    assert!(items.len() == 1 && items[0].in_use && items[0].complete);
    drop(held);
    assert_eq!(cache.evict(limit(1)).unwrap().files, 1);
    assert_eq!(cache.usage().unwrap(), 0);
    assert_eq!(
        fs::read_dir(dir.path().join("partial/sha256"))
            .unwrap()
            .count(),
        0
    );
    assert_eq!(fs::read_dir(dir.path().join("trash")).unwrap().count(), 0);
}

#[test]
fn a_descriptor_that_was_handed_on_keeps_its_blob() {
    let dir = tempfile::tempdir().unwrap();
    let cache = Cache::open(dir.path()).unwrap();
    let bytes = content(4 * UNIT, 1);
    let entry = partial(&cache, identity(&bytes));
    store(&entry, &bytes, UnitRange::new(0, 4));
    let sent = entry.files().data.try_clone().unwrap();
    drop(entry);
    let digest = Digest::of(&bytes);
    assert_eq!(cache.remove(&digest).unwrap(), Removal::InUse);
    drop(sent);
    assert_eq!(cache.remove(&digest).unwrap(), Removal::Removed);
    assert_eq!(cache.remove(&digest).unwrap(), Removal::Absent);
}

#[test]
fn the_list_says_what_is_there() {
    let dir = tempfile::tempdir().unwrap();
    let cache = Cache::open(dir.path()).unwrap();
    let (whole, part) = (content(UNIT + 5, 1), content(9 * UNIT, 2));
    fill(&cache, &whole);
    store(
        &partial(&cache, identity(&part)),
        &part,
        UnitRange::new(2, 4),
    );
    let items = cache.list().unwrap();
    let facts = items
        .iter()
        .map(|item| (item.complete, item.len, item.present, item.in_use));
    assert_eq!(
        facts.collect::<Vec<_>>(),
        [
            (true, UNIT + 5, UNIT + 5, false),
            (false, 9 * UNIT, 2 * UNIT, false)
        ]
    );
}

#[test]
fn free_space_is_kept() {
    let dir = tempfile::tempdir().unwrap();
    let cache = Cache::open(dir.path()).unwrap();
    four(&cache);
    let all = Limits {
        bytes: u64::MAX,
        free_percent: 100,
        free_bytes: u64::MAX,
    };
    let evicted = cache.evict(all).unwrap();
    assert_eq!(evicted.files, 4);
    assert!(evicted.missing > 0);
}

#[test]
fn trash_left_by_a_killed_process_goes_at_the_next_start() {
    let dir = tempfile::tempdir().unwrap();
    Cache::open(dir.path()).unwrap();
    fs::write(dir.path().join("trash/old"), "x").unwrap();
    Cache::open(dir.path()).unwrap();
    assert!(!dir.path().join("trash/old").exists());
}

#[test]
fn what_is_no_regular_file_is_removed() {
    use rustix::fs::{CWD, FileType, Mode, mknodat};
    type Make = fn(&std::path::Path);
    let makes: [Make; 3] = [
        |path| fs::create_dir_all(path.join("full/of/directories")).unwrap(),
        |path| std::os::unix::fs::symlink("/etc/passwd", path).unwrap(),
        |path| mknodat(CWD, path, FileType::Fifo, Mode::RUSR, 0).unwrap(),
    ];
    let identity = identity(&content(3 * UNIT, 1));
    for make in makes {
        for name in ["blob", "data", "map"] {
            let dir = tempfile::tempdir().unwrap();
            let cache = Cache::open(dir.path()).unwrap();
            let path = match name {
                "blob" => cache.layout.blob(&identity.digest()),
                "data" => cache.layout.data(&identity),
                _ => cache.layout.map(&identity),
            };
            make(&path);
            let entry = cache.entry(identity).unwrap();
            assert!(!entry.is_complete(), "{name}");
            drop(entry);
            Cache::open(dir.path()).unwrap();
            let left = fs::read_dir(dir.path().join("trash")).unwrap().count();
            assert_eq!(left, 0, "{name}");
        }
    }
}
