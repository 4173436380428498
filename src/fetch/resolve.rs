//! From an image's reference to its layers, for the owner of a fetcher.
//!
//! The fetcher asks the registry (`image_lookup`), and answers with a list of digests and sizes. The list
//! is checked like anything that a registry sends: a fetcher may be taken over by one.

use std::io::{self, Read};
use std::os::unix::net::UnixStream;
use std::sync::Arc;
use std::time::{Duration, Instant};

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::io::Errno;
use thiserror::Error;

use super::image_lookup::Resolved;
use super::process::{MAX_TEXT, Process, ProcessError};
use crate::format::digest::Digest;
use crate::registry::reference::Reference;
use crate::source::{FetchError, FetchErrorKind, RemoteBlob};

/// How much longer than its order allows a fetcher may take.
const GRACE: Duration = Duration::from_secs(5);

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
    /// The fetcher cannot be asked.
    #[error(transparent)]
    Process(#[from] ProcessError),
    /// The registry refuses the image, or does not answer.
    #[error("cannot open {reference}")]
    Image {
        /// The image.
        reference: String,
        /// Why.
        source: FetchError,
    },
}

/// Finds the layers of an image. Waits for a registry that does not answer for at most `patience`.
/// Call it before the sandbox.
///
/// # Errors
/// [`ResolveError::Image`] if the registry refuses or does not answer, and the cache does not know
/// the image; [`ResolveError::Process`] if the fetcher cannot be asked.
pub fn resolve(
    process: &Process,
    reference: &Reference,
    patience: Duration,
) -> Result<ResolvedImage, ResolveError> {
    let answer = process.ask_for_image(reference, patience)?;
    let answer = read_to_end(answer, Instant::now() + patience + GRACE);
    let blobs_url = process.registry().reached(reference.repository());
    let image = answer.and_then(|answer| checked(&answer, &blobs_url.blob_url()));
    image.map_err(|source| ResolveError::Image {
        reference: reference.to_string(),
        source,
    })
}

/// The image that an answer names.
fn checked(answer: &[u8], blobs_url: &str) -> Result<ResolvedImage, FetchError> {
    let broken = |reason: String| FetchError::new(FetchErrorKind::System, reason);
    let answer = serde_json::from_slice(answer);
    let answer = answer.map_err(|error| broken(format!("malformed list of layers: {error}")))?;
    let (manifest, layers, trace) = match answer {
        Resolved::Found {
            manifest,
            layers,
            trace,
        } => (manifest, layers, trace),
        Resolved::Failed { kind, reason } => return Err(FetchError::new(kind, reason)),
    };
    let digest = |text: &str| text.parse().map_err(|error| broken(format!("{error}")));
    let blob = |(text, size): &(String, u64)| {
        Ok(Arc::new(RemoteBlob {
            digest: digest(text)?,
            size: Some(*size),
            blobs_url: blobs_url.to_owned(),
        }))
    };
    Ok(ResolvedImage {
        manifest: digest(&manifest)?,
        layers: layers.iter().map(blob).collect::<Result<_, _>>()?,
        trace: trace.as_ref().map(blob).transpose()?,
    })
}

/// All bytes that come until the deadline, at most [`MAX_TEXT`].
fn read_to_end(answer: UnixStream, deadline: Instant) -> Result<Vec<u8>, FetchError> {
    let system = |error: io::Error| {
        let reason = format!("cannot read the fetcher's list of layers: {error}");
        FetchError::new(FetchErrorKind::System, reason)
    };
    let mut bytes = Vec::new();
    let mut buffer = [0; 4096];
    let mut answer = answer.take(MAX_TEXT);
    loop {
        let left = deadline.saturating_duration_since(Instant::now());
        let timeout = Timespec::try_from(left).ok();
        let mut polled = [PollFd::new(answer.get_ref(), PollFlags::IN)];
        match poll(&mut polled, timeout.as_ref()) {
            Ok(0) => {
                let reason = "the fetcher did not list the layers of the image in time";
                return Err(FetchError::new(FetchErrorKind::Timeout, reason));
            }
            Ok(_) => {}
            Err(Errno::INTR) => continue,
            Err(errno) => return Err(system(errno.into())),
        }
        match answer.read(&mut buffer).map_err(system)? {
            0 => return Ok(bytes),
            len => bytes.extend_from_slice(&buffer[..len]),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const URL: &str = "https://r.example/v2/a/blobs";

    #[test]
    fn a_list_of_layers_is_checked() {
        let digest = Digest::of(b"m").to_string();
        let found = format!(
            r#"{{"Found":{{"manifest":"{digest}","layers":[["{digest}",7]],"trace":null}}}}"#
        );
        let image = checked(found.as_bytes(), URL).unwrap();
        assert_eq!(image.manifest, Digest::of(b"m"));
        assert_eq!((image.layers.len(), image.layers[0].size), (1, Some(7)));
        assert_eq!(image.layers[0].blobs_url, URL);
        let failed = br#"{"Failed":{"kind":"NotFound","reason":"no such tag"}}"#;
        assert_eq!(
            checked(failed, URL).unwrap_err().kind(),
            FetchErrorKind::NotFound
        );
        for wrong in [
            "",
            "{}",
            r#"{"Found":{"manifest":"sha256:../x","layers":[],"trace":null}}"#,
            &found.replace("7", "-7"),
            &format!("{found}{found}"),
        ] {
            let error = checked(wrong.as_bytes(), URL).unwrap_err();
            assert_eq!(error.kind(), FetchErrorKind::System, "{wrong}");
        }
    }

    #[test]
    fn an_answer_is_read_to_its_end_or_to_the_deadline() {
        let (ours, theirs) = UnixStream::pair().unwrap();
        io::Write::write_all(&mut &theirs, b"text").unwrap();
        theirs.shutdown(std::net::Shutdown::Write).unwrap();
        let deadline = Instant::now() + Duration::from_secs(60);
        assert_eq!(read_to_end(ours, deadline).unwrap(), b"text");
        let (ours, _theirs) = UnixStream::pair().unwrap();
        let late = read_to_end(ours, Instant::now()).unwrap_err();
        assert_eq!(late.kind(), FetchErrorKind::Timeout);
    }
}
