//! Any packet between a disk process and the fetcher: refused, or exactly the message it encodes.
#![no_main]

use libfuzzer_sys::fuzz_target;
use ovbd_vhost::source::protocol::{MAX_FETCH, Reply, Request};

fuzz_target!(|bytes: &[u8]| {
    if let Ok(request) = Request::decode(bytes) {
        assert_eq!(request.encode(), bytes);
        if let Request::Fetch { offset, len, .. } = request {
            assert!((1..=MAX_FETCH).contains(&len) && offset.checked_add(len).is_some());
        }
    }
    if let Ok(reply) = Reply::decode(bytes) {
        assert_eq!(reply.encode(), bytes);
    }
});
