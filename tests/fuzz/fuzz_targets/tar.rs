//! Any bytes as the head of a tar file.
#![no_main]

use libfuzzer_sys::fuzz_target;
use ovbd_vhost::format::tar;

fuzz_target!(|bytes: &[u8]| {
    let head = &bytes[..bytes.len().min(tar::PREFIX)];
    if let Ok(Some(payload)) = tar::payload(head) {
        assert!(payload.offset >= 512 && payload.offset <= tar::PREFIX as u64);
    }
});
