//! A disk that is plugged into a running machine and unplugged again, as `docs/vmm.md` says.

use tempfile::tempdir;

use crate::linux::Linux;
use crate::{IMAGE, assert_no_disk_errors, serve};
use common::daemon::Daemon;
use common::golden;

/// A slot for a disk: devices cannot be plugged into the root bus.
const SLOT: [&str; 2] = ["-device", "pcie-root-port,id=port1,chassis=1"];

fn plug(linux: &Linux, daemon: &Daemon) {
    let socket = daemon.socket();
    let chardev = format!(
        "chardev-add socket,id=disk2,path={},reconnect=1",
        socket.display()
    );
    let device = "device_add vhost-user-blk-pci,chardev=disk2,id=blk2,bus=port1";
    for command in [chardev.as_str(), device] {
        let answer = linux.hardware().monitor(command);
        assert!(!answer.contains("Error"), "{command}: {answer}");
    }
}

fn unplug(linux: &mut Linux) {
    linux.hardware().monitor("device_del blk2");
    linux.run("until [ ! -e /sys/block/vdb ]; do sleep 0.1; done");
    let machine = linux.hardware();
    machine.wait_until("info qtree", |tree| !tree.contains("blk2"));
    let answer = machine.monitor("chardev-remove disk2");
    assert!(!answer.contains("Error"), "{answer}");
}

#[test]
fn a_disk_is_plugged_in_and_out() {
    let golden = golden::find(IMAGE);
    let dir = tempdir().unwrap();
    let (first, second) = (serve(&golden), serve(&golden));
    let mut linux = Linux::started(Linux::machine(dir.path(), &first.socket(), &SLOT));
    for _ in 0..3 {
        plug(&linux, &second);
        linux.run("until [ -e /dev/vdb ]; do sleep 0.1; done");
        let hash = linux.run("sha256sum /dev/vdb");
        assert_eq!(hash, [format!("{}  /dev/vdb", golden.sha256)]);
        unplug(&mut linux);
    }
    assert_no_disk_errors(&mut linux);
    linux.power_off();
}
