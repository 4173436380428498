//! Any file as the image tables of a small stack: refused, or an image of which every read gives bytes or
//! an error, and never a panic or a read outside a layer.
//!
//! Key and checksum of the header are mended, and the checksum of the content is not looked at: all that a
//! forger can write is tried.
#![no_main]

use std::fs::File;
use std::sync::{Arc, LazyLock};

use libfuzzer_sys::{fuzz_mutator, fuzz_target, fuzzer_mutate};
use ovbd_vhost::format::crc;
use ovbd_vhost::format::digest::Digest;
use ovbd_vhost::format::tables;
use ovbd_vhost::image::reader::Reader;
use ovbd_vhost::image::tables::TablesFile;
use ovbd_vhost::image::{Image, OpenStack};
use ovbd_vhost::units::Sector;

#[path = "../file.rs"]
mod file;
#[path = "../small_stack.rs"]
mod small_stack;

static STACK: LazyLock<(OpenStack, Digest)> = LazyLock::new(|| {
    let stack = small_stack::open();
    let identities = stack.identities().expect("open files");
    let key = tables::key(&identities.expect("identities"));
    (stack, key)
});

/// Mended tables may declare any size of the disk: this much of it is read.
const MOST: u64 = 2 << 20;

/// Bytes of the header that its checksum, which lies before them, covers.
const COVERED: std::ops::Range<usize> = 12..88;

fn mend(file: &mut [u8]) {
    if file.len() < COVERED.end {
        return;
    }
    file[..8].copy_from_slice(b"ovbdtab1");
    file[16..48].copy_from_slice(STACK.1.as_bytes());
    let sum = crc::raw(!0, &file[COVERED]);
    file[8..12].copy_from_slice(&sum.to_le_bytes());
}

fuzz_mutator!(|data: &mut [u8], size: usize, max_size: usize, seed: u32| {
    let size = fuzzer_mutate(data, size, max_size);
    if seed % 16 != 0 {
        mend(&mut data[..size]);
    }
    size
});

fuzz_target!(|bytes: &[u8]| {
    let held = file::Held::new(bytes);
    let tables = TablesFile::new(File::open(held.path()).expect("memfd"));
    let stack = STACK.0.clone().with_tables(Some(Arc::new(tables)));
    let Ok(image) = Image::load_in_any_order(stack) else {
        return;
    };
    let disk = image.sized(image.size().min(MOST));
    let mut reader = Reader::new();
    let mut buffer = [0; 32 << 10];
    for start in (0..disk.sectors().0).step_by(61) {
        let len = (disk.sectors().0 - start).min(64) as usize * 512;
        let _ = reader.read(disk, Sector(start), &mut buffer[..len]);
    }
    let last = image.at_own_size().sectors().0.saturating_sub(1);
    let _ = reader.read(image.at_own_size(), Sector(last), &mut buffer[..512]);
    let _ = image.serial(usize::MAX);
});
