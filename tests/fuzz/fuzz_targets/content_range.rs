//! Any `Content-Range` header: bounds that agree with each other, or nothing.
#![no_main]

use libfuzzer_sys::fuzz_target;
use ovbd_vhost::registry::content_range::ContentRange;

fuzz_target!(|bytes: &[u8]| {
    let text = String::from_utf8_lossy(bytes);
    if let Some(ContentRange::Part { first, last, total }) = ContentRange::parse(&text) {
        assert!(first <= last && last < u64::MAX);
        assert!(total.is_none_or(|total| last < total));
    }
});
