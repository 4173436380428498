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
use common::content::Random;
use common::daemon::Daemon;
use common::golden::{self, Case};
use common::registries::{DockerRegistry, Storage};
use common::remote::{Place, REPOSITORY};
use ovbd_vhost::format::digest::Digest;

/// Deaths of each kind.
const ROUNDS: usize = 3;

/// Mounts the disk, and hashes its files again and again. The first hashes are what the others must be.
const FILES: &str = "\
    mount -t ext4 -o ro /dev/vda /mnt; \
    files() { find /mnt -type f | sort | xargs sha256sum | sha256sum; }; \
    files >/tmp/first; \
    ( until [ -e /tmp/stop ]; do echo 3 >/proc/sys/vm/drop_caches; files; done >/tmp/files ) &";

#[derive(Clone, Copy, Debug)]
enum Death {
    Daemon,
    Fetcher,
    Registry,
}

/// Lets each of the three die some times, in an order of its own, while the guest reads.
#[allow(clippy::print_stdout)] // Shown by the test runner with a failed test.
fn kill_all(linux: &mut Linux, daemon: &mut Daemon, place: &Place, registry: &mut DockerRegistry) {
    let seed = RandomState::new().hash_one(());
    println!("seed of the deaths: {seed}");
    let mut random = Random::new(seed);
    let mut deaths = [Death::Daemon, Death::Fetcher, Death::Registry].repeat(ROUNDS);
    for last in (1..deaths.len()).rev() {
        deaths.swap(last, random.below(last as u64 + 1) as usize);
    }
    for death in deaths {
        wait_for_reads(linux);
        match death {
            Death::Daemon => {
                daemon.kill();
                // All is to be fetched again.
                place.forget_cache();
                daemon.restart();
            }
            Death::Fetcher => {
                if let (_, Some(fetcher)) = daemon.fetcher() {
                    let _ = kill_process(fetcher, Signal::KILL);
                }
            }
            Death::Registry => {
                registry.stop();
                sleep(Duration::from_millis(random.below(600)));
                registry.restart();
            }
        }
        sleep(Duration::from_millis(random.below(300)));
    }
    wait_for_reads(linux);
}

fn layers(golden: &Case) -> Vec<Vec<u8>> {
    let layers = golden.layers.iter();
    layers
        .map(|path| fs::read(path).expect("a layer"))
        .collect()
}

#[test]
fn a_guest_reads_on_whatever_dies() {
    let golden = golden::find(IMAGE);
    let (storage, place, dir) = (Storage::default(), Place::default(), tempdir().unwrap());
    let lowers = layers(&golden).into_iter().map(|bytes| {
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
    kill_all(&mut linux, &mut daemon, &place, &mut registry);
    linux.run("touch /tmp/stop; wait");
    assert_eq!(linux.run("cat /tmp/errors.*"), [""; 0]);
    let hashes = linux.run("cat /tmp/hashes");
    assert!(!hashes.is_empty());
    for hash in hashes {
        assert_eq!(hash, format!("{}  /dev/vda", golden.sha256));
    }
    assert_no_disk_errors(&mut linux);
}

/// The same by the image's name, under a mounted file system.
#[test]
fn a_mounted_image_is_read_on_whatever_dies() {
    let golden = golden::find(IMAGE);
    let (storage, place, dir) = (Storage::default(), Place::default(), tempdir().unwrap());
    let layers = layers(&golden);
    let layers: Vec<_> = layers.iter().map(Vec::as_slice).collect();
    let digest = storage.image(REPOSITORY, "1", &layers);
    let mut registry = DockerRegistry::open(storage);
    let host = registry.host().to_owned();
    let options = ["--serial", SERIAL];
    let mut daemon = place.serve_image(&host, &format!("@{digest}"), &options);
    let mut linux = Linux::boot(dir.path(), &daemon.socket());
    linux.run(FILES);
    kill_all(&mut linux, &mut daemon, &place, &mut registry);
    linux.run("touch /tmp/stop; wait");
    let first = linux.run("cat /tmp/first");
    let hashes = linux.run("cat /tmp/files");
    assert!(!hashes.is_empty() && first.len() == 1, "{first:?}");
    assert!(
        hashes.iter().all(|hash| *hash == first[0]),
        "{first:?}: {hashes:?}"
    );
    assert_no_disk_errors(&mut linux);
}
