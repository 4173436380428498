//! A disk grows under a running guest.

use std::path::Path;

use tempfile::tempdir;

use crate::linux::Linux;
use crate::process::{command, output};
use crate::{IMAGE, assert_no_disk_errors};
use common::daemon::Daemon;
use common::golden;

/// Waits until the guest sees a disk of `size` bytes, writes to its end and reads that back from the device.
fn use_all(linux: &mut Linux, size: u64) {
    let sectors = size / 512;
    linux.run(&format!(
        "until [ $(cat /sys/block/vda/size) = {sectors} ]; do usleep 20000; done"
    ));
    let end = size / (1 << 20) - 1;
    linux.run(&format!(
        "dd if=/dev/urandom of=/tmp/new bs=1M count=1 2>/dev/null && \
         dd if=/tmp/new of=/dev/vda bs=1M seek={end} conv=fsync 2>/dev/null && \
         echo 3 >/proc/sys/vm/drop_caches && \
         dd if=/dev/vda of=/tmp/found bs=1M skip={end} iflag=direct 2>/dev/null && \
         cmp /tmp/new /tmp/found"
    ));
}

fn ovbd(arguments: &[&str]) {
    output(command(env!("CARGO_BIN_EXE_ovbd")).args(arguments));
}

fn text(path: &Path) -> &str {
    path.to_str().expect("UTF-8")
}

#[test]
fn a_guest_sees_its_disk_grow_and_uses_it() {
    let golden = golden::find(IMAGE);
    let dir = tempdir().unwrap();
    let (upper, control) = (dir.path().join("upper"), dir.path().join("control"));
    let options = ["--upper-auto", text(&upper), "--control", text(&control)];
    let mut daemon = Daemon::with(&golden.layers, &options);
    let mut linux = Linux::boot(dir.path(), &daemon.socket());
    let size = linux.run("cat /sys/block/vda/size");
    assert_eq!(size, [(golden.size / 512).to_string()]);

    ovbd(&["ctl", text(&control), "resize", "128M"]);
    use_all(&mut linux, 128 << 20);
    daemon.kill();
    daemon.restart();
    ovbd(&["ctl", text(&control), "resize", "192M"]);
    use_all(&mut linux, 192 << 20);

    // Not in use by any daemon: the guest sees it when the next one serves it.
    assert_eq!(daemon.terminate().code(), Some(0));
    let (data, index) = (upper.join("upper.data"), upper.join("upper.index"));
    let files = format!("data={},index={}", text(&data), text(&index));
    ovbd(&["resize", "--upper", &files, "256M"]);
    daemon.restart();
    use_all(&mut linux, 256 << 20);

    linux.run("echo 3 >/proc/sys/vm/drop_caches");
    let sectors = golden.size / 512;
    let order = format!("dd if=/dev/vda bs=512 count={sectors} 2>/dev/null | sha256sum");
    assert_eq!(linux.run(&order), [format!("{}  -", golden.sha256)]);
    assert_no_disk_errors(&mut linux);
}
