//! Live migration between two machines of one host, with one daemon that both are connected to.

use std::fs;
use std::path::Path;

use tempfile::tempdir;

use crate::linux::Linux;
use crate::machine::Machine;
use crate::recovery::{READERS, wait_for_reads};
use crate::{IMAGE, SERIAL, assert_no_disk_errors};
use common::daemon::Daemon;
use common::golden;

/// A machine that waits for a guest to move in.
fn destination(dir: &Path, name: &str, socket: &Path) -> Machine {
    let dir = dir.join(name);
    fs::create_dir(&dir).unwrap();
    let listen = format!("unix:{}", dir.join("incoming").display());
    Linux::machine(&dir, socket, &["-incoming", &listen])
}

fn begin(linux: &Linux, dir: &Path, name: &str) {
    let target = dir.join(name).join("incoming");
    let answer = linux
        .hardware()
        .monitor(&format!("migrate -d unix:{}", target.display()));
    assert!(!answer.contains("Error"), "{answer}");
}

/// Moves the guest to `machine`, the destination of that name.
fn migrate(linux: Linux, machine: Machine, dir: &Path, name: &str) -> Linux {
    machine.wait_until("info status", |status| status.contains("inmigrate"));
    begin(&linux, dir, name);
    let source = linux.hardware();
    source.wait_until("info migrate", |answer| {
        assert!(!answer.contains("Migration status: failed"), "{answer}");
        answer.contains("Migration status: completed")
    });
    machine.wait_until("info status", |status| status.contains("running"));
    Linux::moved(machine)
}

fn there_and_back(options: &[&str]) {
    let golden = golden::find(IMAGE);
    let dir = tempdir().unwrap();
    let dir = dir.path();
    let options = [&["--serial", SERIAL], options].concat();
    let mut daemon = Daemon::with(&golden.layers, &options);
    let socket = daemon.socket();
    let home = dir.join("home");
    fs::create_dir(&home).unwrap();
    let mut linux = Linux::boot(&home, &socket);
    linux.run(READERS);
    wait_for_reads(&mut linux);

    // Cancelled: the source goes on, and the destination leaves.
    let machine = destination(dir, "cancelled", &socket);
    linux
        .hardware()
        .monitor("migrate_set_parameter max-bandwidth 64K");
    machine.wait_until("info status", |status| status.contains("inmigrate"));
    begin(&linux, dir, "cancelled");
    linux
        .hardware()
        .wait_until("info migrate", |answer| answer.contains("active"));
    linux.hardware().monitor("migrate_cancel");
    linux
        .hardware()
        .wait_until("info migrate", |answer| answer.contains("cancelled"));
    drop(machine);
    linux
        .hardware()
        .monitor("migrate_set_parameter max-bandwidth 1G");
    wait_for_reads(&mut linux);

    for name in ["there", "back"] {
        let machine = destination(dir, name, &socket);
        linux = migrate(linux, machine, dir, name);
        wait_for_reads(&mut linux);
    }
    linux.run("touch /tmp/stop; wait");
    assert_eq!(linux.run("cat /tmp/errors.*"), [""; 0]);
    let hashes = linux.run("cat /tmp/hashes");
    assert!(!hashes.is_empty());
    for hash in hashes {
        assert_eq!(hash, format!("{}  /dev/vda", golden.sha256));
    }
    assert_no_disk_errors(&mut linux);
    daemon.assert_alive();
}

#[test]
fn a_guest_moves_there_and_back() {
    there_and_back(&[]);
}

#[test]
fn a_guest_with_a_writable_disk_moves_there_and_back() {
    let folder = tempdir().unwrap();
    let folder = folder.path().join("upper");
    there_and_back(&["--upper-auto", folder.to_str().expect("UTF-8")]);
}
