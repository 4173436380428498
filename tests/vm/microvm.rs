//! A microvm: QEMU makes the in-flight area for queues of 128, and the driver takes longer ones.

use tempfile::tempdir;

use crate::machine::Board;
use crate::{IMAGE, assert_read, content_of, serve, tiny};
use common::golden;

#[test]
fn queues_longer_than_the_in_flight_area_was_made_for() {
    let golden = golden::find(IMAGE);
    let dir = tempdir().unwrap();
    let daemon = serve(&golden);
    let order = "mib=8 kib=128 qd=16 seg=4";
    let machine = tiny::start(dir.path(), &daemon.socket(), Board::Microvm, order, &[]);
    let report = tiny::report(machine);
    assert_eq!(report.value("dev", "qsize"), "1024");
    assert_read(&report, &content_of(&golden)[..8 << 20]);
    let log = daemon.log();
    assert!(!log.contains("no place in the in-flight area"), "{log}");
}
