//! Virtual machines that read images through the daemon: QEMU by emulation, so it runs anywhere.
//!
//! `common` holds what must be read and the daemon that serves it, `machine` is QEMU, and two guests
//! run on it: `linux` (a real driver, a real file system) and `tiny` (a driver that breaks the rules).

mod before_driver;
mod growing;
mod hot_plug;
mod linux;
mod machine;
mod microvm;
mod migration;
mod private_memory;
mod process;
mod recovery;
mod registry;
mod tiny;
mod writable;

use std::fs;
use std::path::Path;

use ovbd_vhost::image::Image;
use ovbd_vhost::image::config::Stack;
use ovbd_vhost::image::reader::Reader;
use ovbd_vhost::units::Sector;
use sha2::{Digest, Sha256};
use tempfile::tempdir;

use crate::linux::Linux;
use crate::process::{output, tool};
use common::daemon::Daemon;
use common::golden::{self, Case};

/// An ext4 file system in three layers.
const IMAGE: &str = "07s-ext4-3layer-small";

/// The serial number that the daemon is told to show.
const SERIAL: &str = "golden-07s";

/// The daemon, serving `golden`.
fn serve(golden: &Case) -> Daemon {
    Daemon::with(&golden.layers, &["--serial", SERIAL])
}

#[test]
fn linux_sees_the_image_byte_for_byte_and_file_for_file() {
    let golden = golden::find(IMAGE);
    let dir = tempdir().unwrap();
    let daemon = serve(&golden);
    let mut linux = Linux::boot(dir.path(), &daemon.socket());

    let disk = linux.run(
        "cd /sys/block/vda && for name in size ro serial queue/logical_block_size \
         queue/physical_block_size queue/minimum_io_size; \
         do echo $name $(cat $name); done; echo queues $(ls mq | wc -l); cd /",
    );
    let expected = [
        format!("size {}", golden.size / 512),
        "ro 1".to_owned(),
        format!("serial {SERIAL}"),
        "queue/logical_block_size 512".to_owned(),
        "queue/physical_block_size 4096".to_owned(),
        "queue/minimum_io_size 4096".to_owned(),
        "queues 2".to_owned(),
    ];
    assert_eq!(disk, expected);

    let whole = linux.run("sha256sum /dev/vda");
    assert_eq!(whole, [format!("{}  /dev/vda", golden.sha256)]);

    linux.run("mount -t ext4 -o ro /dev/vda /mnt && echo 3 >/proc/sys/vm/drop_caches");
    let files = linux.run(
        "cd /mnt && find . -type f | xargs sha256sum && \
         find . -type l | while read name; do echo \"$(readlink $name)  $name\"; done; cd /",
    );
    compare_sorted(files, files_of(&content_of(&golden), dir.path()));
    assert_no_disk_errors(&mut linux);
}

#[test]
fn the_tiny_guest_reads_right_and_its_bad_requests_are_refused() {
    let golden = golden::find(IMAGE);
    let dir = tempdir().unwrap();
    let daemon = serve(&golden);
    let content = content_of(&golden);

    let report = tiny::run(
        dir.path(),
        &daemon.socket(),
        "mib=0 kib=128 qd=16 seg=4 neg",
    );
    assert_eq!(report.value("dev", "ro"), "1");
    assert_eq!(
        report.value("dev", "sectors"),
        (golden.size / 512).to_string()
    );
    assert_eq!(report.value("id", "serial"), format!("'{SERIAL}'"));
    assert_eq!(report.value("id", "used_len"), "21");
    for (request, status) in [
        ("past_end", "1"),
        ("straddle", "1"),
        ("huge_sector", "1"),
        ("unknown_type", "2"),
        ("ro_write", "1"),
    ] {
        assert_eq!(report.value("neg", request), status, "status of {request}");
    }
    assert_read(&report, &content);
    assert_eq!(
        report.value("read", "used_len_last"),
        "131073",
        "data and status"
    );

    // Odd splits, small requests, a range inside; then one request at a time.
    let report = tiny::run(
        dir.path(),
        &daemon.socket(),
        "off=5 mib=7 kib=20 qd=32 seg=6",
    );
    assert_read(&report, &content[5 << 20..12 << 20]);
    let report = tiny::run(
        dir.path(),
        &daemon.socket(),
        "off=63 mib=4 kib=256 qd=1 seg=1",
    );
    assert_read(&report, &content[63 << 20..]);
}

/// The guest summed up `bytes` and met no error.
fn assert_read(report: &tiny::Report, bytes: &[u8]) {
    assert_eq!(report.value("read", "errors"), "0");
    assert_eq!(
        report.value("read", "crc32"),
        format!("{:08x}", crc32(bytes))
    );
}

/// CRC-32 as in zlib, which the tiny guest computes.
fn crc32(bytes: &[u8]) -> u32 {
    let table: Vec<u32> = (0..256u32)
        .map(|byte| {
            (0..8).fold(byte, |crc, _| {
                crc >> 1 ^ if crc & 1 == 1 { 0xedb8_8320 } else { 0 }
            })
        })
        .collect();
    !bytes.iter().fold(!0, |crc, byte| {
        table[(crc as u8 ^ byte) as usize] ^ crc >> 8
    })
}

/// The image's content as read on this machine, checked against the manifest.
fn content_of(golden: &Case) -> Vec<u8> {
    let image = Image::open(&Stack::new(&golden.layers)).unwrap();
    let mut content = vec![0; usize::try_from(image.size()).unwrap()];
    Reader::new()
        .read(image.at_own_size(), Sector(0), &mut content)
        .unwrap();
    assert_eq!(sha256(&content), golden.sha256);
    content
}

/// SHA-256 in hexadecimal.
fn sha256(bytes: &[u8]) -> String {
    Sha256::digest(bytes)
        .iter()
        .map(|byte| format!("{byte:02x}"))
        .collect()
}

/// The files of an ext4 file system, as the guest lists them, read without any kernel's help.
fn files_of(content: &[u8], dir: &Path) -> Vec<String> {
    let (raw, root) = (dir.join("raw.img"), dir.join("files"));
    fs::write(&raw, content).unwrap();
    fs::create_dir(&root).unwrap();
    output(
        tool("debugfs")
            .arg("-R")
            .arg(format!("rdump / {}", root.display()))
            .arg(raw),
    );
    let mut found = Vec::new();
    let mut folders = vec![root.clone()];
    while let Some(folder) = folders.pop() {
        for entry in fs::read_dir(folder).unwrap() {
            let path = entry.unwrap().path();
            let name = path.strip_prefix(&root).unwrap().display().to_string();
            if path.is_symlink() {
                found.push(format!(
                    "{}  ./{name}",
                    fs::read_link(&path).unwrap().display()
                ));
            } else if path.is_dir() {
                folders.push(path);
            } else {
                found.push(format!("{}  ./{name}", sha256(&fs::read(&path).unwrap())));
            }
        }
    }
    found
}

fn compare_sorted(mut found: Vec<String>, mut expected: Vec<String>) {
    found.sort();
    expected.sort();
    assert!(
        expected.len() > 100,
        "the image has files: {}",
        expected.len()
    );
    assert_eq!(found, expected);
}

/// The guest's kernel has not complained about its disk.
fn assert_no_disk_errors(linux: &mut Linux) {
    let complaints =
        linux.run("dmesg | grep -iE 'i/o error|blocked for more|vda.*(error|timeout|reset)'; true");
    assert_eq!(complaints, [""; 0]);
}
