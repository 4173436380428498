//! Any file as the presence map of a blob: refused, or a map whose every answer lies in the blob.
//!
//! The first four bytes are the blob's length; the file follows, with the checksum mended.
#![no_main]

use std::fs::File;

use libfuzzer_sys::{fuzz_mutator, fuzz_target, fuzzer_mutate};
use ovbd_vhost::format::crc;
use ovbd_vhost::format::digest::Digest;
use ovbd_vhost::format::presence::{Header, Identity, STATE_OFFSET};
use ovbd_vhost::io::mapped_file::Access;
use ovbd_vhost::source::presence::{Bitmap, PresenceMap};

#[path = "../file.rs"]
mod file;

/// Bytes of the blob's length before the file.
const PREFIX: usize = 4;

/// Offset of the checksum in the header.
const CRC: usize = 12;

fn mend(map: &mut [u8]) {
    if map.len() < STATE_OFFSET {
        return;
    }
    map[CRC..CRC + 4].fill(0);
    let sum = crc::raw(crc::BLOCK_SEED, &map[..STATE_OFFSET]);
    map[CRC..CRC + 4].copy_from_slice(&sum.to_le_bytes());
}

fuzz_mutator!(|data: &mut [u8], size: usize, max_size: usize, seed: u32| {
    let size = fuzzer_mutate(data, size, max_size);
    if seed % 8 != 0 && size > PREFIX {
        mend(&mut data[PREFIX..size]);
    }
    size
});

fuzz_target!(|bytes: &[u8]| {
    let Some((len, map)) = bytes.split_first_chunk::<PREFIX>() else {
        return;
    };
    let len = u64::from(u32::from_le_bytes(*len));
    let Ok(identity) = Identity::new(Digest::of(b"fuzz"), len) else {
        return;
    };
    let decoded = Header::decode(map, map.len() as u64, &identity);
    let held = file::Held::new(map);
    let file = File::options().read(true).write(true).open(held.path());
    let opened = PresenceMap::open(&file.expect("memfd"), identity, Access::ReadWrite);
    assert_eq!(decoded.is_ok(), opened.is_ok());
    let Ok(opened) = opened else { return };
    let all = identity.all_units();
    let mut absent = 0;
    for run in opened.absent(all) {
        assert!(!run.is_empty() && all.contains(run));
        let bytes = identity.bytes_of(run);
        assert!(!opened.is_present(bytes.start, bytes.end - bytes.start));
        absent += run.len();
    }
    assert_eq!(opened.count(Bitmap::Live) + absent, all.len());
    assert!(!opened.is_present(0, len + 1) && !opened.is_present(len, 1));
    opened.forget_unsynced();
    assert_eq!(opened.count(Bitmap::Live), opened.count(Bitmap::Durable));
    opened.mark(Bitmap::Live, all);
    assert!(opened.is_present(0, len));
});
