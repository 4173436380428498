//! From an image's reference to its layers: asks the registry, or the cache while the registry is away.
//!
//! The cache keeps each manifest, and which one a reference named last: an image starts again while its
//! registry is away.

use std::thread;
use std::time::{Duration, Instant};

use serde::{Deserialize, Serialize};

use super::malformed::MalformedAnswers;
use super::registry_blob::failure;
use crate::cache::Cache;
use crate::format::digest::Digest;
use crate::ratelimited_log;
use crate::reason::reason;
use crate::registry::client::Client;
use crate::registry::error::Error as RegistryError;
use crate::registry::manifest::{Layer, Manifest};
use crate::registry::reference::Reference;
use crate::source::{FetchError, FetchErrorKind};

/// Time that the last attempt may take: a failure is reported before the owner gives up.
const ATTEMPT: Duration = Duration::from_secs(10);

/// Pauses between two requests for a manifest.
const FIRST_PAUSE: Duration = Duration::from_millis(100);
const LONGEST_PAUSE: Duration = Duration::from_secs(5);

/// What was found of an image; sent to the owner of the fetcher as JSON.
#[derive(Debug, Serialize, Deserialize)]
pub(super) enum Resolved {
    Found {
        manifest: String,
        /// Digest and size of each layer, bottom first.
        layers: Vec<(String, u64)>,
        /// The same of the layer that holds the image's trace.
        trace: Option<(String, u64)>,
    },
    Failed {
        kind: FetchErrorKind,
        reason: String,
    },
}

/// Finds the layers of an image. Waits for a registry that does not answer for at most `patience`.
pub(super) fn find(
    cache: &Cache,
    client: &Client,
    reference: &str,
    patience: Duration,
) -> Resolved {
    let named = |layer: &Layer| (layer.digest().to_string(), layer.size());
    match find_manifest(cache, client, reference, patience) {
        Ok((digest, manifest)) => Resolved::Found {
            manifest: digest.to_string(),
            layers: manifest.layers().iter().map(named).collect(),
            trace: manifest.acceleration().map(named),
        },
        Err(error) => Resolved::Failed {
            kind: error.kind(),
            reason: error.to_string(),
        },
    }
}

fn find_manifest(
    cache: &Cache,
    client: &Client,
    text: &str,
    patience: Duration,
) -> Result<(Digest, Manifest), FetchError> {
    let malformed = |error| FetchError::new(FetchErrorKind::System, reason(&error));
    let reference: Reference = text.parse().map_err(malformed)?;
    let kept = kept(cache, text);
    if reference.digest().is_some()
        && let Some(kept) = kept
    {
        return Ok(kept);
    }
    let deadline = Instant::now() + patience.saturating_sub(ATTEMPT);
    let (mut pause, mut malformed) = (FIRST_PAUSE, MalformedAnswers::default());
    loop {
        let error = match ask(cache, client, &reference) {
            Ok(found) => return Ok(found),
            Err(error) => error,
        };
        let away = !error.is_definite() || matches!(error, RegistryError::Resolve { .. });
        if let Some((digest, manifest)) = kept.clone().filter(|_| away) {
            ratelimited_log::warn(format_args!(
                "{}; using the cached manifest {digest} of {reference}",
                reason(&error)
            ));
            return Ok((digest, manifest));
        }
        let failure = malformed.judge(&failure(&error), Instant::now());
        let wait = failure.retry_after.unwrap_or_default().max(pause);
        if failure.ends_start || Instant::now() + wait > deadline {
            return Err(FetchError::new(failure.kind, failure.reason));
        }
        if pause == FIRST_PAUSE {
            let seconds = patience.as_secs();
            ratelimited_log::warn(format_args!(
                "{}; trying again for up to {seconds} s",
                reason(&error)
            ));
        }
        thread::sleep(wait);
        pause = (pause * 2).min(LONGEST_PAUSE);
    }
}

/// The manifest that the reference named last.
fn kept(cache: &Cache, reference: &str) -> Option<(Digest, Manifest)> {
    let digest = cache.last_named(reference)?;
    let manifest = Manifest::parse(&cache.manifest(&digest)?).ok()?;
    Some((digest, manifest))
}

/// Asks the registry, and keeps what it answers.
fn ask(
    cache: &Cache,
    client: &Client,
    reference: &Reference,
) -> Result<(Digest, Manifest), RegistryError> {
    let found = client.manifest(reference)?;
    let refused = |source| RegistryError::Manifest {
        what: reference.to_string(),
        source,
    };
    let manifest = Manifest::parse(&found.bytes).map_err(refused)?;
    if let Err(error) = cache.keep_manifest(&reference.to_string(), &found.bytes) {
        ratelimited_log::warn(format_args!(
            "cannot store the manifest of {reference} in the cache; the next start needs the registry: {}",
            reason(&error)
        ));
    }
    Ok((found.digest, manifest))
}
