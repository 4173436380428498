//! Commands for registries and the cache.

use std::error::Error;
use std::path::PathBuf;

use super::options::JsonArgs;
use clap::{Args, Subcommand};
use ovbd_vhost::cache::{Cache, Limits};
use ovbd_vhost::format::digest::Digest;
use ovbd_vhost::registry::args::RegistryArgs;
use ovbd_vhost::registry::reference::Reference;
use ovbd_vhost::tool::pull::{Pull, pull};
use ovbd_vhost::tool::{cache, progress};
use ovbd_vhost::units::parse_size;

/// Fetch the layers of an image into the cache and verify them.
///
/// Prints the digest of the image's manifest. Bytes that are in the cache are not fetched again.
#[derive(Args)]
pub struct PullArgs {
    /// Image, as REGISTRY/REPOSITORY[:TAG][@DIGEST]
    #[arg(value_name = "REF")]
    reference: Reference,
    #[command(flatten)]
    cache: CacheDir,
    #[command(flatten)]
    registry: RegistryArgs,
    #[command(flatten)]
    json: JsonArgs,
}

impl PullArgs {
    /// Runs the command; returns its output.
    pub fn run(self) -> Result<String, Box<dyn Error>> {
        let task = Pull {
            reference: self.reference,
            cache: self.cache.cache,
            registry: self.registry,
        };
        let pulled = pull(&task, &progress::bar("pulling"))?;
        Ok(self.json.text(&pulled)?)
    }
}

/// A cache directory.
#[derive(Args)]
struct CacheDir {
    /// Cache directory; created if missing
    #[arg(long, value_name = "DIR")]
    cache: PathBuf,
}

/// List, shrink and verify the cache of blobs and image tables.
#[derive(Subcommand)]
pub enum CacheCommand {
    Ls(LsArgs),
    Gc(GcArgs),
    Verify(VerifyArgs),
    Rm(RmArgs),
}

/// List the blobs and image tables in the cache.
#[derive(Args)]
pub struct LsArgs {
    #[command(flatten)]
    cache: CacheDir,
    #[command(flatten)]
    json: JsonArgs,
}

/// Remove blobs and image tables that are not in use, the least recently used first.
#[derive(Args)]
pub struct GcArgs {
    #[command(flatten)]
    cache: CacheDir,
    /// Size to shrink the cache to, in bytes, also as 512M, 10G or 1T
    #[arg(long, value_name = "N", value_parser = parse_size)]
    size: u64,
    #[command(flatten)]
    json: JsonArgs,
}

/// Verify complete blobs and image tables, and remove damaged ones.
///
/// The exit code is 1 if one of them was damaged.
#[derive(Args)]
pub struct VerifyArgs {
    #[command(flatten)]
    cache: CacheDir,
    /// Digests of the blobs, or keys of the image tables, to verify [default: all complete ones]
    #[arg(value_name = "DIGEST")]
    digests: Vec<Digest>,
    #[command(flatten)]
    json: JsonArgs,
}

/// Remove blobs and image tables from the cache.
///
/// The exit code is 1 if one of them is in use or not in the cache; the others are removed.
#[derive(Args)]
pub struct RmArgs {
    #[command(flatten)]
    cache: CacheDir,
    /// Digests of the blobs, or keys of the image tables, to remove
    #[arg(value_name = "DIGEST", required = true)]
    digests: Vec<Digest>,
    #[command(flatten)]
    json: JsonArgs,
}

impl CacheCommand {
    /// Runs the command; returns its output, and whether no blob is damaged or missing.
    pub fn run(self) -> Result<(String, bool), Box<dyn Error>> {
        match self {
            Self::Ls(args) => {
                let listing = cache::list(&Cache::open_existing(&args.cache.cache)?)?;
                Ok((args.json.text(&listing)?, true))
            }
            Self::Gc(args) => {
                let limits = Limits {
                    bytes: args.size,
                    free_percent: 0,
                    free_bytes: 0,
                };
                let evicted = Cache::open_existing(&args.cache.cache)?.evict(limits)?;
                let shrunk = cache::Shrunk::from(evicted);
                Ok((args.json.text(&shrunk)?, true))
            }
            Self::Verify(args) => {
                let cache = Cache::open_existing(&args.cache.cache)?;
                let bar = progress::bar("verifying");
                let verified = cache::verify(&cache, &args.digests, &bar)?;
                Ok((args.json.text(&verified)?, verified.is_ok()))
            }
            Self::Rm(args) => {
                let cache = Cache::open_existing(&args.cache.cache)?;
                let removed = cache::remove(&cache, &args.digests)?;
                Ok((args.json.text(&removed)?, removed.is_ok()))
            }
        }
    }
}
