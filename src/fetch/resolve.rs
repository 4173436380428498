//! From an image's reference to its layers: a process of its own asks the registry.
//!
//! ```text
//!  owner: resolve() -- question, a file in memory --> run(): manifest from the registry or the cache
//!                   <-- answer, on standard output --'
//! ```
//! The owner reads a short list of layers, and never what a registry wrote. The cache keeps each
//! manifest, and which one a reference named last: an image starts again while its registry is away.

use std::io::{self, Read, Write};
use std::os::fd::OwnedFd;
use std::path::Path;
use std::process::{ChildStdout, Stdio};
use std::sync::Arc;
use std::thread;
use std::time::{Duration, Instant};

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::io::Errno;
use rustix::process::{Signal, set_parent_process_death_signal};
use serde::{Deserialize, Serialize};
use thiserror::Error;

use super::process::{Config, MAX_TEXT, ProcessError, read, spawn, text};
use super::registry_blob::failure;
use crate::cache::Cache;
use crate::format::digest::Digest;
use crate::reason::reason;
use crate::registry::client::Client;
use crate::registry::error::Error as RegistryError;
use crate::registry::manifest::{Layer, Manifest};
use crate::registry::reference::Reference;
use crate::source::{FetchError, FetchErrorKind, RemoteBlob};

/// Name that the resolving process is called by.
pub(super) const NAME: &str = "ovbd-resolver";

/// How much longer than its question allows a resolver may run.
const GRACE: Duration = Duration::from_secs(5);

/// Time that the last attempt may take: a failure is reported before the owner gives up.
const ATTEMPT: Duration = Duration::from_secs(10);

/// Pauses between two requests for a manifest.
const FIRST_PAUSE: Duration = Duration::from_millis(100);
const LONGEST_PAUSE: Duration = Duration::from_secs(5);

/// The layers of an image in a registry.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ResolvedImage {
    /// Digest of the image's manifest.
    pub manifest: Digest,
    /// The layers, bottom first.
    pub layers: Vec<Arc<RemoteBlob>>,
    /// The layer that holds the image's trace.
    pub trace: Option<Arc<RemoteBlob>>,
}

/// An image cannot be resolved.
#[derive(Debug, Error)]
pub enum ResolveError {
    /// The resolving process cannot be started.
    #[error(transparent)]
    Process(#[from] ProcessError),
    /// The image cannot be had.
    #[error("cannot open {reference}")]
    Image {
        /// The image.
        reference: String,
        /// Why.
        source: FetchError,
    },
}

#[derive(Debug, Serialize, Deserialize)]
struct Question {
    config: Config,
    reference: String,
    patience: Duration,
}

#[derive(Debug, Serialize, Deserialize)]
enum Answer {
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

/// Finds the layers of an image. `program` is one whose `main` calls
/// [`run_if_asked`](super::process::run_if_asked). Waits for a registry that does not answer for at
/// most `patience`. Call it before the sandbox.
///
/// # Errors
/// [`ResolveError::Image`] if the registry refuses or does not answer, and the cache does not know
/// the image; [`ResolveError::Process`] if the system refuses a process.
pub fn resolve(
    program: &Path,
    config: &Config,
    reference: &Reference,
    patience: Duration,
) -> Result<ResolvedImage, ResolveError> {
    // Here, where it can be reported best.
    config.open()?;
    let question = Question {
        config: config.clone(),
        reference: reference.to_string(),
        patience,
    };
    let mut child = spawn(program, NAME, text(&question)?, Stdio::piped())?;
    let output = child.stdout.take();
    let answer = output.map_or_else(
        || Err(io::ErrorKind::BrokenPipe.into()),
        |output| read_to_end(output, Instant::now() + patience + GRACE),
    );
    // It has ended, or is late.
    let _ = child.kill();
    let _ = child.wait();
    let failed = |source| ResolveError::Image {
        reference: reference.to_string(),
        source,
    };
    let broken = |reason: String| failed(FetchError::new(FetchErrorKind::System, reason));
    let answer = answer.map_err(|error| broken(format!("the resolver failed: {error}")))?;
    let answer = serde_json::from_slice(&answer)
        .map_err(|error| broken(format!("the resolver ended without an answer: {error}")))?;
    let (manifest, layers, trace) = match answer {
        Answer::Found {
            manifest,
            layers,
            trace,
        } => (manifest, layers, trace),
        Answer::Failed { kind, reason } => return Err(failed(FetchError::new(kind, reason))),
    };
    let digest = |text: &str| text.parse().map_err(|error| broken(format!("{error}")));
    let blobs_url = reference.repository().blob_url();
    let blob = |(text, size): &(String, u64)| -> Result<_, ResolveError> {
        Ok(Arc::new(RemoteBlob {
            digest: digest(text)?,
            size: Some(*size),
            blobs_url: blobs_url.clone(),
        }))
    };
    Ok(ResolvedImage {
        manifest: digest(&manifest)?,
        layers: layers.iter().map(blob).collect::<Result<_, _>>()?,
        trace: trace.as_ref().map(blob).transpose()?,
    })
}

/// All bytes that come until the deadline, at most [`MAX_TEXT`].
fn read_to_end(output: ChildStdout, deadline: Instant) -> io::Result<Vec<u8>> {
    let mut bytes = Vec::new();
    let mut buffer = [0; 4096];
    let mut output = output.take(MAX_TEXT);
    loop {
        let left = deadline.saturating_duration_since(Instant::now());
        let timeout = Timespec::try_from(left).ok();
        let mut polled = [PollFd::new(output.get_ref(), PollFlags::IN)];
        match poll(&mut polled, timeout.as_ref()) {
            Ok(0) => return Err(io::ErrorKind::TimedOut.into()),
            Ok(_) => {}
            Err(Errno::INTR) => continue,
            Err(errno) => return Err(errno.into()),
        }
        match output.read(&mut buffer)? {
            0 => return Ok(bytes),
            len => bytes.extend_from_slice(&buffer[..len]),
        }
    }
}

/// Answers the question that is the standard input.
pub(super) fn run(input: OwnedFd) -> Result<(), ProcessError> {
    // An owner that ends without reading the answer is not waited for.
    set_parent_process_death_signal(Some(Signal::KILL)).map_err(io::Error::from)?;
    let question: Question = read(input)?;
    let named = |layer: &Layer| (layer.digest().to_string(), layer.size());
    let answer = match find(&question) {
        Ok((digest, manifest)) => Answer::Found {
            manifest: digest.to_string(),
            layers: manifest.layers().iter().map(named).collect(),
            trace: manifest.acceleration().map(named),
        },
        Err(error) => Answer::Failed {
            kind: error.kind(),
            reason: error.to_string(),
        },
    };
    Ok(io::stdout().write_all(&serde_json::to_vec(&answer)?)?)
}

fn find(question: &Question) -> Result<(Digest, Manifest), FetchError> {
    let system =
        |error: &dyn std::error::Error| FetchError::new(FetchErrorKind::System, reason(error));
    let reference: Reference = question.reference.parse().map_err(|error| system(&error))?;
    let access = question.config.open().map_err(|error| system(&error))?;
    access.confine().map_err(|error| system(&error))?;
    let (cache, client) = (&access.cache, &access.client);
    let kept = kept(cache, &question.reference);
    if reference.digest().is_some()
        && let Some(kept) = kept
    {
        return Ok(kept);
    }
    let deadline = Instant::now() + question.patience.saturating_sub(ATTEMPT);
    let mut pause = FIRST_PAUSE;
    loop {
        let error = match ask(cache, client, &reference) {
            Ok(found) => return Ok(found),
            Err(error) => error,
        };
        let away = !error.is_definite() || matches!(error, RegistryError::Resolve { .. });
        if let Some((digest, manifest)) = kept.clone().filter(|_| away) {
            log::warn!(
                "{}; using the cached manifest {digest} of {reference}",
                reason(&error)
            );
            return Ok((digest, manifest));
        }
        let failure = failure(&error);
        let wait = failure.retry_after.unwrap_or_default().max(pause);
        if failure.ends_start || Instant::now() + wait > deadline {
            return Err(FetchError::new(failure.kind, failure.reason));
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
        log::warn!(
            "cannot store the manifest of {reference} in the cache; the next start needs the registry: {}",
            reason(&error)
        );
    }
    Ok((found.digest, manifest))
}
