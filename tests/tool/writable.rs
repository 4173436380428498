//! Writable layers to operate on: golden ones, and ones written at random beside a model.

use super::*;
use ovbd_vhost::format::lsmt::Header;
use ovbd_vhost::format::lsmt::writable::Kind;
use ovbd_vhost::io::scatter::Scatter;
use ovbd_vhost::writable::{Options, Paths, WritableLayer, create};
use uuid::Uuid;
use vm_memory::VolatileSlice;

pub const KINDS: [Kind; 3] = [Kind::Append, Kind::Sparse, Kind::Hybrid];

/// The files that most tests use, in `dir`.
pub fn paths(dir: &TempDir) -> Paths {
    Paths {
        data: dir.path().join("u.data"),
        index: dir.path().join("u.index"),
    }
}

/// The same as an argument.
pub const UPPER: &str = "data=u.data,index=u.index";

/// Name of the layer that [`lower`] makes, and of the parent of the writable ones.
const LOWER: Uuid = Uuid::from_u128(0x66);

pub fn header(size: u64) -> Header {
    Header::empty(size, Uuid::from_u128(0x77), LOWER)
}

/// A writable layer of a process that was killed while it wrote: some of what it holds is only in
/// the journal. `disk` holds what lies below, and then what was written.
pub fn write_at_random(paths: &Paths, kind: Kind, random: &mut Random, disk: &mut [u8]) {
    create(paths, kind, &header(disk.len() as u64)).unwrap();
    let upper = open_upper(paths);
    let sectors = disk.len() as u64 / 512;
    for number in 0..random.within(1..=80) {
        let start = random.below(sectors);
        let most = [9, 300, 9000][random.below(3) as usize];
        let count = random.within(1..=most).min(sectors - start);
        let range = start as usize * 512..(start + count) as usize * 512;
        match random.below(5) {
            0 => upper.discard(common::sectors(start, count)).unwrap(),
            1 => upper.write_zeroes(common::sectors(start, count)).unwrap(),
            _ => {
                let mut bytes = tagged(range.len(), number);
                disk[range].copy_from_slice(&bytes);
                write(&upper, start, &mut bytes);
                continue;
            }
        }
        disk[range].fill(0);
        if random.below(10) == 0 {
            upper.flush().unwrap();
        }
    }
    close(upper);
}

/// Closes the layer and waits until its file is free.
pub fn close(upper: WritableLayer) {
    let path = upper.paths().data.clone();
    drop(upper);
    free(&path);
}

/// Waits until a closed data file is free: a child process of another test has all files of this
/// process open until it runs its program.
pub fn free(data: &Path) {
    let data = File::open(data).unwrap();
    data.lock().unwrap();
    data.unlock().unwrap();
}

pub fn open_upper(paths: &Paths) -> WritableLayer {
    WritableLayer::open(paths, None, &Options::default()).unwrap()
}

pub fn write(upper: &WritableLayer, start: u64, bytes: &mut [u8]) {
    let mut scatter = Scatter::new();
    let sectors = bytes.len() as u64 / 512;
    scatter.push(VolatileSlice::from(bytes));
    upper
        .write(common::sectors(start, sectors), scatter.cursor(0))
        .unwrap();
}

/// A layer `lower` of a disk of `len` bytes, and what it holds.
pub fn lower(dir: &TempDir, seed: u64, len: usize) -> Vec<u8> {
    let bytes = disk(seed, len);
    write_sparse(&dir.path().join("raw"), &bytes);
    let uuid = LOWER.to_string();
    let args = ["create", "--from", "raw", "--uuid", &uuid, "lower"];
    succeed(dir, &args, b"");
    fs::remove_file(dir.path().join("raw")).unwrap();
    bytes
}
