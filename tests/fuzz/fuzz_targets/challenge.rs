//! Any `WWW-Authenticate` header: some challenges, and requests for tokens that a header can hold.
#![no_main]

use libfuzzer_sys::fuzz_target;
use ovbd_vhost::registry::challenge::{Challenge, parse, strongest};
use ovbd_vhost::registry::token;

fuzz_target!(|bytes: &[u8]| {
    let text = String::from_utf8_lossy(bytes);
    let challenges = parse(&text);
    assert_eq!(strongest([&*text]).is_some(), !challenges.is_empty());
    for challenge in challenges {
        let Challenge::Bearer(bearer) = challenge else {
            continue;
        };
        assert!(!bearer.realm().is_empty());
        let plain = |text: &str| text.bytes().all(|byte| byte.is_ascii_graphic());
        assert!(plain(&token::query(&bearer, &text, Some(&text))));
        assert!(plain(&token::refresh_form(&bearer, &text, &text)));
    }
});
