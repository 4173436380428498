//! Any bytes as the head of a tar file.
#![no_main]

use libfuzzer_sys::{fuzz_mutator, fuzz_target, fuzzer_mutate};
use ovbd_vhost::format::tar;

#[path = "../file.rs"]
mod file;
#[path = "../mend.rs"]
mod mend;

fuzz_mutator!(|data: &mut [u8], size: usize, max_size: usize, seed: u32| {
    let size = fuzzer_mutate(data, size, max_size);
    if seed % 8 != 0 {
        mend::tar(&mut data[..size]);
    }
    size
});

fuzz_target!(|bytes: &[u8]| {
    let head = &bytes[..bytes.len().min(tar::PREFIX)];
    if let Ok(Some(payload)) = tar::payload(head) {
        assert!(payload.offset == 512 || payload.offset == tar::PREFIX as u64);
    }
});
