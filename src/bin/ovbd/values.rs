//! Values of options, parsed and checked.

use std::num::NonZero;

use clap::builder::{OsStringValueParser, TypedValueParser};
use ovbd_vhost::format::zfile::BLOCK_SIZES;
use ovbd_vhost::units::parse_size;
use ovbd_vhost::writable::Paths;

/// Largest number of threads.
const MAX_THREADS: usize = 256;

/// Longest commit message in bytes: the size of the field in a layer's header.
const MAX_MESSAGE: usize = 256;

/// Parses the size of a compressed block.
pub fn block_size(text: &str) -> Result<u32, String> {
    let size = parse_size(text)
        .ok()
        .and_then(|size| u32::try_from(size).ok());
    size.filter(|size| size.is_power_of_two() && BLOCK_SIZES.contains(size))
        .ok_or_else(|| "expected a power of two from 4096 to 65536".to_owned())
}

/// The files of a writable layer, whose paths need not be UTF-8.
pub fn pair() -> impl TypedValueParser<Value = Paths> {
    OsStringValueParser::new().try_map(Paths::try_from)
}

/// Checks a commit message.
pub fn message(text: &str) -> Result<String, String> {
    match text.len() {
        0..=MAX_MESSAGE => Ok(text.to_owned()),
        len => Err(format!("{len} bytes; expected at most {MAX_MESSAGE}")),
    }
}

/// Whether a text starts with the name of a registry, as a reference may and a path rarely does.
pub fn names_registry(text: &str) -> bool {
    let host = text.split_once('/').map(|(host, _)| host);
    host.is_some_and(|host| {
        host == "localhost" || (host.contains(['.', ':']) && !host.starts_with('.'))
    })
}

/// Parses a number of threads.
pub fn threads(text: &str) -> Result<NonZero<usize>, String> {
    let number = text
        .parse()
        .ok()
        .filter(|n: &NonZero<usize>| n.get() <= MAX_THREADS);
    number.ok_or_else(|| format!("expected a number from 1 to {MAX_THREADS}"))
}
