//! Complete blobs that turn out damaged.

use std::fs::{self, File, Permissions};
use std::os::unix::fs::{FileExt, PermissionsExt};
use std::path::Path;

use super::{content, fill, identity, only_file, partial, store};
use crate::cache::{Cache, Demotion, Publication, Removal};
use crate::format::digest::Digest;
use crate::format::presence::{UNIT, UnitRange};
use crate::source::presence::Bitmap;

/// Changes one byte of a file with any permissions.
fn damage(path: &Path, at: u64) {
    fs::set_permissions(path, Permissions::from_mode(0o600)).unwrap();
    let file = File::options().read(true).write(true).open(path).unwrap();
    let mut byte = [0];
    file.read_exact_at(&mut byte, at).unwrap();
    file.write_all_at(&[byte[0] ^ 1], at).unwrap();
    fs::set_permissions(path, Permissions::from_mode(0o444)).unwrap();
}

#[test]
fn a_complete_blob_that_is_damaged_becomes_partial_and_complete_again() {
    let dir = tempfile::tempdir().unwrap();
    let cache = Cache::open(dir.path()).unwrap();
    let whole = content(3 * UNIT + 5, 1);
    fill(&cache, &whole);
    let (identity, units) = (identity(&whole), UnitRange::one(1));
    let entry = cache.entry(identity).unwrap();
    let intact = cache.demote(&entry, &identity, units).unwrap();
    assert!(matches!(intact, Demotion::Intact), "{intact:?}");

    let path = only_file(&dir, "blobs", "");
    damage(&path, UNIT + 7);
    let reader = File::open(&path).unwrap();
    let Demotion::Demoted(partial) = cache.demote(&entry, &identity, units).unwrap() else {
        panic!("not demoted")
    };
    assert_eq!(partial.map().absent(identity.all_units()), [units]);
    assert!(!path.exists() && !cache.entry(identity).unwrap().is_complete());
    // Another process that found damage takes the same entry.
    let other = Cache::open(dir.path()).unwrap();
    let second = other.demote(&entry, &identity, UnitRange::one(2)).unwrap();
    assert!(matches!(second, Demotion::Demoted(_)), "{second:?}");
    drop(second);

    store(&partial, &whole, units);
    assert_eq!(partial.publish().unwrap(), Publication::Published);
    let mut found = vec![0; whole.len()];
    reader.read_exact_at(&mut found, 0).unwrap();
    assert!(
        found == whole,
        "readers see the bytes that replaced the damaged ones"
    );
    let mode = reader.metadata().unwrap().permissions().mode();
    assert_eq!((mode & 0o777, path.exists()), (0o444, true));
}

#[test]
fn a_blob_with_more_damage_than_was_found_is_fetched_whole() {
    let dir = tempfile::tempdir().unwrap();
    let cache = Cache::open(dir.path()).unwrap();
    let whole = content(3 * UNIT, 1);
    fill(&cache, &whole);
    let identity = identity(&whole);
    let entry = cache.entry(identity).unwrap();
    let path = only_file(&dir, "blobs", "");
    for at in [7, UNIT + 7] {
        damage(&path, at);
    }
    let demoted = cache.demote(&entry, &identity, UnitRange::one(0)).unwrap();
    let Demotion::Demoted(partial) = demoted else {
        panic!("{demoted:?}")
    };
    store(&partial, &whole, UnitRange::one(0));
    let publication = partial.publish().unwrap();
    assert!(
        matches!(publication, Publication::Mismatch { .. }),
        "{publication:?}"
    );
    assert_eq!(
        partial.map().absent(identity.all_units()),
        [identity.all_units()]
    );
    store(&partial, &whole, identity.all_units());
    assert_eq!(partial.publish().unwrap(), Publication::Published);
    // The file of an entry that is not in the cache any more.
    damage(&path, 5);
    fs::remove_file(&path).unwrap();
    let removed = cache.demote(&entry, &identity, UnitRange::one(0)).unwrap();
    assert!(matches!(removed, Demotion::Removed), "{removed:?}");
}

/// What a crash leaves between the steps of a demotion is a complete blob.
#[test]
fn a_map_without_data_beside_a_complete_blob_is_harmless() {
    let dir = tempfile::tempdir().unwrap();
    let cache = Cache::open(dir.path()).unwrap();
    let whole = content(2 * UNIT, 1);
    fill(&cache, &whole);
    let identity = identity(&whole);
    let (_, map) = cache.create_map(&identity).unwrap();
    map.mark(Bitmap::Live, identity.all_units());
    map.mark(Bitmap::Durable, identity.all_units());
    assert!(cache.entry(identity).unwrap().is_complete());
    let digest = Digest::of(&whole);
    assert_eq!(cache.remove(&digest).unwrap(), Removal::Removed);
    let begun = partial(&cache, identity);
    assert_eq!(
        begun.map().absent(identity.all_units()),
        [identity.all_units()]
    );
}
