//! A guest writes to its disk: a second machine reads the same, and the file system is whole.

use common::volume::BlockingIo as _;
use std::collections::hash_map::RandomState;
use std::fs;
use std::hash::BuildHasher;
use std::path::{Path, PathBuf};
use std::thread::sleep;
use std::time::Duration;

use ovbd_vhost::image::config::Stack;
use ovbd_vhost::image::reader::Reader;
use ovbd_vhost::units::Sector;
use ovbd_vhost::writable::{Options, Paths};
use tempfile::tempdir;

use crate::assert_no_disk_errors;
use crate::linux::Linux;
use crate::process::{command, output, tool};
use common::daemon::Daemon;

/// Times the daemon is killed under the guest.
const KILLS: u32 = 5;

const MOUNT: &str = "mount -t ext4 -o rw,discard /dev/vda /mnt";

/// What the file system holds: names and hashes.
const LIST: &str = "cd /mnt && find . -type f | sort | xargs sha256sum; cd /";

/// Writers that never rest: each writes a file, makes it last, and puts it in the last one's place.
const WRITERS: &str = "\
    for part in 0 1 2; do \
      ( round=0; until [ -e /tmp/stop ]; do \
          dd if=/dev/urandom of=/mnt/new.$part bs=20k count=$((1 + round % 30)) conv=fsync 2>&1 \
            | grep -v -e records -e bytes; \
          mv /mnt/new.$part /mnt/file.$part.$((round % 4)) || echo failed; \
          [ $((round % 5)) = 3 ] && rm /mnt/file.$part.$((round % 4)); \
          round=$((round + 1)); \
        done >/tmp/errors.$part 2>&1 ) & \
    done";

/// Makes a layer that holds an ext4 file system without a fault, of the sources of this program.
fn file_system(dir: &Path) -> PathBuf {
    let (raw, layer) = (dir.join("ext4.img"), dir.join("ext4.obd"));
    let sources = Path::new(env!("CARGO_MANIFEST_DIR")).join("src");
    output(
        tool("mkfs.ext4")
            .args(["-q", "-d"])
            .arg(sources)
            .arg(&raw)
            .arg("96M"),
    );
    let mut create = command(env!("CARGO_BIN_EXE_ovbd"));
    output(create.arg("create").arg("--from").arg(&raw).arg(&layer));
    layer
}

fn serve(layer: &Path, folder: &Path) -> Daemon {
    let folder = folder.to_str().expect("UTF-8");
    Daemon::with(&[layer], &["--upper-auto", folder])
}

/// Asserts that what the layer in `folder` makes of the image is a file system without a fault.
fn assert_file_system(layer: &Path, folder: &Path) {
    let first = Paths {
        data: folder.join("upper.data"),
        index: folder.join("upper.index"),
    };
    let (volume, _) =
        common::volume::open(&Stack::new([layer]), &first, Options::default()).unwrap();
    let mut content = vec![0; usize::try_from(volume.size()).unwrap()];
    volume
        .read(&mut Reader::new(), Sector(0), &mut content)
        .unwrap();
    let raw = folder.join("raw.img");
    fs::write(&raw, content).unwrap();
    // Everything is looked at, and nothing mended.
    output(tool("e2fsck").arg("-fn").arg(&raw));
}

#[test]
fn a_second_machine_reads_what_the_first_one_wrote_from_a_committed_layer() {
    let dir = tempdir().unwrap();
    let layer = file_system(dir.path());
    let upper = dir.path().join("upper");
    let mut daemon = serve(&layer, &upper);
    let mut linux = Linux::boot(dir.path(), &daemon.socket());
    assert_eq!(linux.run("cat /sys/block/vda/ro"), ["0"]);
    assert_eq!(
        linux.run("cat /sys/block/vda/queue/write_cache"),
        ["write back"]
    );
    linux.run(MOUNT);
    linux.run(
        "mkdir /mnt/new && cp -r /modules /bin/busybox /mnt/new && \
         dd if=/dev/urandom of=/mnt/new/random bs=1k count=3001 2>/dev/null && \
         rm -r /mnt/engine",
    );
    let written = linux.run(LIST);
    linux.run("fstrim /mnt; umount /mnt");
    assert_no_disk_errors(&mut linux);
    linux.power_off();
    assert_eq!(daemon.terminate().code(), Some(0));

    // The second one has no writable layer, but a layer made of it.
    let committed = dir.path().join("committed.obd");
    let files = |name: &str| upper.join(name).display().to_string();
    let pair = format!(
        "data={},index={}",
        files("upper.data"),
        files("upper.index")
    );
    let mut commit = command(env!("CARGO_BIN_EXE_ovbd"));
    output(
        commit
            .args(["commit", "--upper", &pair, "-o"])
            .arg(&committed),
    );
    let mut daemon = Daemon::with(&[&layer, &committed], &[]);
    let mut linux = Linux::boot(dir.path(), &daemon.socket());
    linux.run("mount -t ext4 -o ro /dev/vda /mnt");
    assert_eq!(linux.run(LIST), written);
    assert!(written.iter().any(|line| line.ends_with("new/busybox")));
    linux.run("umount /mnt");
    linux.power_off();
    daemon.terminate();
    assert_file_system(&layer, &upper);
}

#[test]
fn a_killed_daemon_is_restarted_and_the_guest_writes_on() {
    write_on_after_kills("hybrid");
}

#[test]
fn so_is_one_whose_layer_is_sparse() {
    write_on_after_kills("sparse");
}

#[test]
fn so_is_one_whose_layer_only_grows() {
    write_on_after_kills("append");
}

fn write_on_after_kills(kind: &str) {
    let dir = tempdir().unwrap();
    let layer = file_system(dir.path());
    let upper = dir.path().join("upper");
    fs::create_dir(&upper).unwrap();
    let mut create = command(env!("CARGO_BIN_EXE_ovbd"));
    create.current_dir(&upper).args(["upper", "create"]);
    create.args([
        "data=upper.data,index=upper.index",
        "--type",
        kind,
        "--parent",
    ]);
    output(create.arg(&layer));
    let mut daemon = serve(&layer, &upper);
    let mut linux = Linux::boot(dir.path(), &daemon.socket());
    linux.run(MOUNT);
    linux.run(WRITERS);
    for _ in 0..KILLS {
        wait_for_writes(&mut linux);
        let moment = RandomState::new().hash_one(()) % 300;
        sleep(Duration::from_millis(moment));
        daemon.kill();
        daemon.restart();
    }
    wait_for_writes(&mut linux);
    linux.run("touch /tmp/stop; wait");
    assert_eq!(linux.run("cat /tmp/errors.*"), [""; 0]);
    linux.run("sync; echo 3 >/proc/sys/vm/drop_caches");
    let written = linux.run(LIST);
    linux.run("umount /mnt");
    assert_no_disk_errors(&mut linux);

    // Once more, with the machine gone as well: its file system mends itself when mounted.
    linux.run(MOUNT);
    linux.run("dd if=/dev/urandom of=/mnt/last bs=1k count=999 conv=fsync 2>/dev/null");
    linux.run(&WRITERS.replace("/tmp/stop", "/tmp/never"));
    wait_for_writes(&mut linux);
    daemon.kill();
    drop(linux);
    daemon.restart();
    let mut linux = Linux::boot(dir.path(), &daemon.socket());
    linux.run(MOUNT);
    let kept = |lines: Vec<String>| -> Vec<String> {
        let steady = |line: &String| !line.contains("./file.") && !line.contains("./new.");
        lines.into_iter().filter(steady).collect()
    };
    let mut found = kept(linux.run(LIST));
    let last = found.iter().position(|line| line.ends_with("./last"));
    found.remove(last.expect("what was made to last"));
    assert_eq!(found, kept(written));
    linux.run("umount /mnt");
    assert_no_disk_errors(&mut linux);
    linux.power_off();
    daemon.terminate();
    assert_file_system(&layer, &upper);
}

/// Returns once the guest has written more to its disk than it had at the call.
fn wait_for_writes(linux: &mut Linux) {
    // Seventh field: sectors written.
    linux.run(
        "sectors() { set -- $(cat /sys/block/vda/stat); echo $7; }; \
         before=$(sectors); while [ $(sectors) -le $((before + 4096)) ]; do usleep 20000; done",
    );
}
