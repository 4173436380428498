//! The daemon is killed and restarted before the guest's driver has started: the machine is paused,
//! or its firmware runs. QEMU 7.2 then connects again without what it agreed upon at first.

use std::path::Path;

use tempfile::tempdir;

use crate::linux::Linux;
use crate::machine::{Board, Machine};
use crate::{IMAGE, assert_no_disk_errors, assert_read, content_of, serve, tiny};
use common::golden;

/// Debian's package `ovmf`.
const FIRMWARE: &str = "/usr/share/ovmf/OVMF.fd";

/// Waits until QEMU has its connection to the daemon, or has lost it.
fn wait_for_connection(machine: &Machine, connected: bool) {
    let lost = |answer: &str| answer.contains("disconnected:unix");
    machine.wait_until("info chardev", |answer| lost(answer) != connected);
}

#[test]
fn a_machine_that_starts_paused() {
    let golden = golden::find(IMAGE);
    let dir = tempdir().unwrap();
    let mut daemon = serve(&golden);
    let order = "mib=4 kib=64 qd=8 seg=2";
    let socket = daemon.socket();
    let machine = tiny::start(dir.path(), &socket, Board::Pc, order, &["-S"]);
    wait_for_connection(&machine, true);
    for _ in 0..2 {
        daemon.kill();
        wait_for_connection(&machine, false);
        daemon.restart();
        wait_for_connection(&machine, true);
    }
    machine.monitor("cont");
    let report = tiny::report(machine);
    assert_read(&report, &content_of(&golden)[..4 << 20]);
}

#[test]
fn a_machine_whose_firmware_runs() {
    assert!(
        Path::new(FIRMWARE).exists(),
        "{FIRMWARE} is missing: run contrib/install-packages"
    );
    let golden = golden::find(IMAGE);
    let dir = tempdir().unwrap();
    let mut daemon = serve(&golden);
    let options = ["-bios", FIRMWARE];
    let machine = Linux::machine(dir.path(), &daemon.socket(), &options);
    wait_for_connection(&machine, true);
    // The first instructions of the firmware: its own driver for the disk comes soon after.
    daemon.kill();
    wait_for_connection(&machine, false);
    daemon.restart();
    wait_for_connection(&machine, true);
    let mut linux = Linux::started(machine);
    let whole = linux.run("sha256sum /dev/vda");
    assert_eq!(whole, [format!("{}  /dev/vda", golden.sha256)]);
    assert_no_disk_errors(&mut linux);
}
