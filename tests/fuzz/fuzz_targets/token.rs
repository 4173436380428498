//! Any reply of a token server: a token that a header can hold, or an error.
#![no_main]

use std::time::Instant;

use libfuzzer_sys::fuzz_target;
use ovbd_vhost::registry::credentials::Credentials;
use ovbd_vhost::registry::token::Token;

fuzz_target!(|bytes: &[u8]| {
    if let Ok(token) = Token::from_reply(bytes, Instant::now()) {
        let value = token.authorization();
        let secret = value.strip_prefix("Bearer ").expect("a bearer token");
        assert!(!secret.is_empty() && secret.bytes().all(|byte| byte.is_ascii_graphic()));
    }
    let _ = Credentials::parse(bytes, "fuzz");
});
