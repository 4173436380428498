//! A layer that is full.

use std::fs::{self, File};
use std::io::Write;
use std::path::Path;
use std::process::Command;

use tempfile::TempDir;

use super::assert_disk;
use super::{part, write, zero};
use common::blk::{DISCARD, IOERR, OK, OUT, SECTOR, range};
use common::content::tagged;
use common::guest::Guest;
use common::writable::Writable;

const PIECE: u64 = 128;

/// Fills the disk from sector 0 on until a write fails; returns the sector after the last that was
/// written.
fn fill(guest: &mut Guest, model: &mut [u8], seed: u64) -> u64 {
    let sectors = model.len() as u64 / SECTOR;
    for sector in (0..sectors).step_by(PIECE as usize) {
        let data = tagged((PIECE * SECTOR) as usize, seed + sector);
        match guest.send(0, OUT, sector, &data) {
            OK => part(model, sector, PIECE).copy_from_slice(&data),
            status => {
                assert_eq!(status, IOERR);
                return sector;
            }
        }
    }
    panic!("it is never full");
}

/// Fills the disk, and asserts that what was answered stays, that what there is room for can be
/// written, and that room makes writes work again, also after a crash.
fn full_and_again(mut disk: Writable, make_room: impl Fn(&Writable)) {
    let mut model = disk.content.to_vec();
    let mut guest = disk.plain_guest();
    let end = fill(&mut guest, &mut model, 0);
    assert!(end >= PIECE, "there was room for something");
    // What failed is old or new, sector by sector: here it must be old, or else it was there.
    let failed = guest.read(0, end, (PIECE * SECTOR) as u32);
    part(&mut model, end, PIECE).copy_from_slice(&failed);
    assert_disk(&mut guest, &model);
    let over = tagged((PIECE * SECTOR) as usize, 99);
    write(&mut guest, &mut model, 0, &over);
    assert_disk(&mut guest, &model);

    make_room(&disk);
    disk.crash();
    let mut guest = disk.plain_guest();
    assert_disk(&mut guest, &model);
    zero(
        &mut guest,
        &mut model,
        DISCARD,
        PIECE,
        3 * PIECE as u32,
        false,
    );
    guest.flush(0);
    write(&mut guest, &mut model, end, &over);
    guest.flush(0);
    assert_disk(&mut guest, &model);
    drop(guest);
    disk.lose_power();
    assert_disk(&mut disk.plain_guest(), &model);
}

#[test]
fn as_much_as_it_may_hold() {
    let disk = Writable::serve_with(&["--upper-limit", "3M"]);
    full_and_again(disk, |_| ());
}

/// A file system of so many bytes, mounted on a fresh folder.
pub(super) struct Small(TempDir);

fn run(command: &mut Command) {
    let output = command.output().expect("the program starts");
    let said = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{command:?}: {said}");
}

impl Small {
    pub(super) fn mount(bytes: u64) -> Self {
        let folder = tempfile::tempdir().expect("temporary directory");
        run(Command::new("mount")
            .args(["-t", "tmpfs", "-o", &format!("size={bytes}"), "tmpfs"])
            .arg(folder.path()));
        Self(folder)
    }

    pub(super) fn path(&self) -> &Path {
        self.0.path()
    }
}

impl Drop for Small {
    fn drop(&mut self) {
        run(Command::new("umount").arg("--lazy").arg(self.path()));
    }
}

/// Fills all of the file system but what is less than a block.
pub(super) fn stuff(path: &Path) {
    let mut file = File::options()
        .create(true)
        .append(true)
        .open(path)
        .expect("file");
    while file.write_all(&[1; 4096]).is_ok() {}
}

/// A process that dies on a full disk: the next one serves what was answered, and flushes it when
/// there is room.
#[test]
fn killed_on_a_full_disk() {
    let small = Small::mount(4 << 20);
    let inside = tempfile::tempdir_in(small.path()).expect("folder");
    let mut disk = Writable::serve_in(inside, &[]);
    let mut model = disk.content.to_vec();
    let mut guest = disk.plain_guest();
    let mut put = |guest: &mut Guest, sector: u64, sectors: u64, seed: u64| {
        let data = tagged((sectors * SECTOR) as usize, seed);
        write(guest, &mut model, sector, &data);
    };
    // More mappings than a block of the index takes.
    for number in 0..600 {
        put(&mut guest, 20000 + 2 * number, 1, number);
    }
    put(&mut guest, 0, PIECE, 1000);
    let ballast = small.path().join("ballast");
    for round in 0..3 {
        disk.daemon.kill();
        // As if room for the index had not been taken ahead.
        let index = File::options().write(true).open(disk.file("upper.index"));
        let index = index.expect("index");
        index
            .set_len(index.metadata().expect("index").len())
            .expect("index");
        stuff(&ballast);
        disk.daemon.restart();
        guest = disk.plain_guest();
        // Over what is there already.
        put(&mut guest, 10 * round, 20, 2000 + round);
    }
    assert!(
        disk.daemon.log().contains("no space"),
        "{}",
        disk.daemon.log()
    );
    assert_disk(&mut guest, &model);
    fs::remove_file(&ballast).expect("ballast");
    guest.flush(0);
    disk.lose_power();
    assert_disk(&mut disk.plain_guest(), &model);
}

/// What a full disk refuses, it refuses at once: a write that was taken can be flushed.
#[test]
fn a_flush_finds_room_for_what_was_written() {
    let small = Small::mount(4 << 20);
    let inside = tempfile::tempdir_in(small.path()).expect("folder");
    let mut disk = Writable::serve_in(inside, &[]);
    let mut model = disk.content.to_vec();
    let mut guest = disk.plain_guest();
    guest.write(0, 0, &tagged(SECTOR as usize, 1));
    part(&mut model, 0, 1).copy_from_slice(&tagged(SECTOR as usize, 1));
    let ballast = small.path().join("ballast");
    stuff(&ballast);
    let mut refused = 0;
    // Each takes a mapping and no data; flushed so often, a page is enough for the journal.
    for number in 0..6000 {
        let sector = 1000 + 2 * number;
        match guest.send(0, DISCARD, 0, &range(sector, 1, 0)) {
            OK => part(&mut model, sector, 1).fill(0),
            _ => refused += 1,
        }
        if number.is_multiple_of(50) {
            guest.flush(0);
        }
    }
    assert!(refused > 0, "there was room for everything");
    guest.flush(0);
    assert_disk(&mut guest, &model);
    fs::remove_file(&ballast).expect("ballast");
    let data = tagged(SECTOR as usize, 9999);
    write(&mut guest, &mut model, 30000, &data);
    guest.flush(0);
    disk.lose_power();
    assert_disk(&mut disk.plain_guest(), &model);
}

#[test]
fn as_much_as_the_file_system_has() {
    let small = Small::mount(4 << 20);
    let inside = tempfile::tempdir_in(small.path()).expect("folder");
    fs::write(small.path().join("ballast"), vec![1; 256 << 10]).expect("ballast");
    let ballast = small.path().join("ballast");
    let disk = Writable::serve_in(inside, &[]);
    full_and_again(disk, |_| fs::remove_file(&ballast).expect("ballast"));
}
