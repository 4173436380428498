//! Any manifest or index: an image within limits, the digest of one, or an error.
#![no_main]

use libfuzzer_sys::fuzz_target;
use ovbd_vhost::registry::manifest::{Document, Manifest};

fuzz_target!(|bytes: &[u8]| {
    match Document::parse(bytes) {
        Ok(Document::Image(manifest)) => {
            assert!((1..=256).contains(&manifest.layers().len()));
            assert!(manifest.layers().iter().all(|layer| layer.size() > 0));
            assert_eq!(Manifest::parse(bytes), Ok(manifest));
        }
        Ok(Document::Index(_)) => assert!(Manifest::parse(bytes).is_err()),
        Err(error) => assert!(error.to_string().len() < 4096),
    }
});
