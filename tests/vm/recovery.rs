//! The daemon is killed and restarted while a guest reads: the guest notices a pause, no more.

use std::collections::hash_map::RandomState;
use std::env;
use std::hash::BuildHasher;
use std::thread::sleep;
use std::time::Duration;

use tempfile::tempdir;

use crate::linux::Linux;
use crate::{IMAGE, assert_no_disk_errors, serve};
use common::golden;

/// Rounds, unless `OVBD_TEST_KILLS` says otherwise.
const KILLS: u32 = 5;

/// Hashes the disk over and over while four readers keep many requests in flight past the cache.
pub const READERS: &str = "\
    ( until [ -e /tmp/stop ]; do \
        echo 3 >/proc/sys/vm/drop_caches; sha256sum /dev/vda || echo failed; \
      done >/tmp/hashes ) & \
    for part in 0 1 2 3; do \
      ( until [ -e /tmp/stop ]; do \
          dd if=/dev/vda of=/dev/null bs=256k skip=$((part * 64)) count=64 iflag=direct || echo failed; \
        done 2>&1 | grep -v records >/tmp/errors.$part ) & \
    done";

#[test]
fn a_killed_daemon_is_restarted_and_the_guest_reads_on() {
    let kills = env::var("OVBD_TEST_KILLS").map_or(KILLS, |kills| kills.parse().expect("a number"));
    let golden = golden::find(IMAGE);
    let dir = tempdir().unwrap();
    let mut daemon = serve(&golden);
    let mut linux = Linux::boot(dir.path(), &daemon.socket());

    linux.run(READERS);
    for _ in 0..kills {
        wait_for_reads(&mut linux);
        let moment = RandomState::new().hash_one(()) % 300;
        sleep(Duration::from_millis(moment));
        daemon.kill();
        daemon.restart();
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

/// Returns once the guest has read more of its disk than it had at the call.
pub fn wait_for_reads(linux: &mut Linux) {
    // Third field: sectors read.
    linux.run(
        "sectors() { set -- $(cat /sys/block/vda/stat); echo $3; }; \
         before=$(sectors); while [ $(sectors) -le $((before + 4096)) ]; do usleep 20000; done",
    );
}
