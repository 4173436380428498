//! The version that the programs report.

/// Version of the programs.
///
/// A package build names its commit too, such as `0.1.0+4b7efb2c01d3`: it sets `OVBD_VERSION` for
/// the compiler. Other builds report the version of the crate.
pub const VERSION: &str = match option_env!("OVBD_VERSION") {
    Some(version) => version,
    None => env!("CARGO_PKG_VERSION"),
};
