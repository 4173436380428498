//! A guest on an image in a registry, which reads on whatever dies: registry, fetcher or daemon.

use std::collections::hash_map::RandomState;
use std::fs;
use std::hash::BuildHasher;
use std::thread::sleep;
use std::time::Duration;

use rustix::process::{Signal, kill_process};
use serde_json::json;
use tempfile::tempdir;

use crate::linux::Linux;
use crate::recovery::{READERS, wait_for_reads};
use crate::{IMAGE, SERIAL, assert_no_disk_errors};
use common::golden;
use common::registries::{DockerRegistry, Storage};
use common::remote::{Place, REPOSITORY};
use ovbd_vhost::format::digest::Digest;

const ROUNDS: u32 = 3;

#[test]
fn a_guest_reads_on_whatever_dies() {
    let golden = golden::find(IMAGE);
    let (storage, place, dir) = (Storage::default(), Place::default(), tempdir().unwrap());
    let lowers = golden.layers.iter().map(|path| {
        let bytes = fs::read(path).unwrap();
        storage.blob(REPOSITORY, &bytes);
        json!({"digest": Digest::of(&bytes).to_string(), "size": bytes.len()})
    });
    let lowers: Vec<_> = lowers.collect();
    let mut registry = DockerRegistry::open(storage);
    place.config("http", registry.host(), &lowers, json!({}));
    let mut daemon = place.serve(&["--serial", SERIAL]);
    let mut linux = Linux::boot(dir.path(), &daemon.socket());
    // A mounted file system changes its superblock in memory.
    linux.run(
        "mount -t ext4 -o ro /dev/vda /mnt && find /mnt -type f | xargs cat >/dev/null && umount /mnt",
    );
    linux.run(READERS);
    let pause = || sleep(Duration::from_millis(RandomState::new().hash_one(()) % 300));
    for _ in 0..ROUNDS {
        wait_for_reads(&mut linux);
        daemon.kill();
        // All is to be fetched again.
        place.forget_cache();
        daemon.restart();
        pause();
        if let (_, Some(fetcher)) = daemon.fetcher() {
            let _ = kill_process(fetcher, Signal::KILL);
        }
        pause();
        registry.stop();
        pause();
        registry.restart();
    }
    wait_for_reads(&mut linux);
    linux.run("touch /tmp/stop; wait");
    assert_eq!(linux.run("cat /tmp/errors.*"), [""; 0]);
    let hashes = linux.run("cat /tmp/hashes");
    assert!(!hashes.is_empty());
    for hash in hashes {
        assert_eq!(hash, format!("{}  /dev/vda", golden.sha256));
    }
    assert_no_disk_errors(&mut linux);
}
