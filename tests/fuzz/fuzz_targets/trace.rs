//! Any prefetch trace: reads whose ranges do not overflow, which are written as they were read.
#![no_main]

use libfuzzer_sys::fuzz_target;
use ovbd_vhost::format::trace::{MAX_RECORDS, encode, parse};

fuzz_target!(|bytes: &[u8]| {
    if let Ok(reads) = parse(bytes) {
        assert!(reads.len() <= MAX_RECORDS);
        for read in &reads {
            read.offset.checked_add(read.len).expect("an end");
        }
        assert_eq!(parse(&encode(&reads)), Ok(reads));
    }
});
