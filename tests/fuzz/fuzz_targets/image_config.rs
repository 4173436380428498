//! Any text as an image config: a stack or an error, and no file outside the list is looked for.
#![no_main]

use libfuzzer_sys::fuzz_target;
use ovbd_vhost::image::config::ImageConfig;

#[path = "../file.rs"]
mod file;

fuzz_target!(|bytes: &[u8]| {
    let held = file::Held::new(bytes);
    if let Ok(config) = ImageConfig::load(held.path()) {
        let _ = config.result_file();
        if let Ok((stack, upper)) = config.stack_and_upper() {
            assert!(!stack.layers().is_empty() || upper.is_some());
        }
    }
});
