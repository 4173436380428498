//! What an idle disk keeps: one thread and few descriptors, also after front-ends and clients have left.

use std::fs;
use std::thread;
use std::time::{Duration, Instant};

use common::PATIENCE;
use common::blk::{IN, OK};
use common::disk::Disk;
use common::guest::Options;
use ovbd_vhost::tool::ctl::{Ask, ask};

/// Layers of the disk, each of which has a descriptor.
const LAYERS: usize = 64;

/// Descriptors of a disk with one queue, beside those of its layers.
const MOST_DESCRIPTORS: usize = 11;

fn count(disk: &Disk, what: &str) -> usize {
    let pid = disk.daemon.pid().as_raw_nonzero();
    fs::read_dir(format!("/proc/{pid}/{what}")).unwrap().count()
}

#[test]
fn an_idle_disk_has_one_thread_and_few_descriptors() {
    let folder = tempfile::tempdir().unwrap();
    let control = folder.path().join("control");
    let control_text = control.to_str().unwrap();
    let disk = Disk::serve_with(&["--control", control_text, "--num-queues", "1"]);
    assert_eq!(count(&disk, "task"), 1);
    let descriptors = count(&disk, "fd");
    assert!(descriptors <= LAYERS + MOST_DESCRIPTORS, "{descriptors}");
    for _ in 0..20 {
        ask(&control, &Ask::Device).unwrap();
    }
    let mut guest = disk.guest(Options::default());
    assert_eq!(guest.request(0, IN, 0, 4096).status, OK);
    assert!(count(&disk, "task") > 1);
    drop(guest);
    let start = Instant::now();
    // Threads end a moment after the answers that they sent.
    while count(&disk, "task") > 1 || count(&disk, "fd") > descriptors {
        assert!(
            start.elapsed() < PATIENCE,
            "threads or descriptors are left"
        );
        thread::sleep(Duration::from_millis(2));
    }
    ask(&control, &Ask::Device).unwrap();
}
