//! A blob in a registry as an origin.

use std::io::{self, Read};
use std::sync::Arc;

use super::origin::{Body, Failure, From, Origin};
use crate::reason::reason;
use crate::registry::blob::BlobRef;
use crate::registry::client::Client;
use crate::registry::error::{Class, Error};
use crate::source::FetchErrorKind;

/// A blob in a registry, and the client that reaches it.
#[derive(Debug)]
pub struct RegistryBlob {
    client: Arc<Client>,
    blob: BlobRef,
}

impl RegistryBlob {
    /// The blob `blob`, reached by `client`.
    pub fn new(client: Arc<Client>, blob: BlobRef) -> Self {
        Self { client, blob }
    }
}

impl Origin for RegistryBlob {
    fn read(&self, offset: u64, len: u64, from: From) -> Result<Body, Failure> {
        let body = match from {
            From::Nearest => self.client.read_blob(&self.blob, offset, len),
            From::Registry => self.client.read_blob_past_mirrors(&self.blob, offset, len),
        };
        let body = body.map_err(|error| failure(&error))?;
        Ok(Body {
            len: body.len(),
            reader: Box::new(Classed(body)),
        })
    }

    fn read_whole(&self) -> Result<Body, Failure> {
        let body = self.client.read_whole(&self.blob);
        let body = body.map_err(|error| failure(&error))?;
        Ok(Body {
            len: body.len(),
            reader: Box::new(Classed(body)),
        })
    }

    fn blob_len(&self) -> Result<u64, Failure> {
        let body = self.client.read_blob(&self.blob, 0, 1);
        let body = body.map_err(|error| failure(&error))?;
        body.total().ok_or_else(|| {
            let reason = format!("{} does not report the length of the blob", body.host());
            Failure::definite(FetchErrorKind::Unreachable, reason)
        })
    }
}

/// A body whose errors are failures.
struct Classed<R>(R);

impl<R: Read> Read for Classed<R> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        self.0.read(buffer).map_err(|error| {
            let inner = error
                .get_ref()
                .and_then(|inner| inner.downcast_ref::<Error>());
            match inner {
                Some(inner) => io::Error::new(error.kind(), failure(inner)),
                None => error,
            }
        })
    }
}

fn kind_of(error: &Error) -> FetchErrorKind {
    match error {
        Error::Denied { .. } | Error::Credentials { .. } | Error::Token { .. } => {
            FetchErrorKind::Unauthorized
        }
        Error::NotFound { .. } => FetchErrorKind::NotFound,
        Error::Timeout { .. } => FetchErrorKind::Timeout,
        Error::Mismatch { .. } => FetchErrorKind::Damaged,
        Error::Setup { .. } => FetchErrorKind::System,
        Error::Busy { .. } => FetchErrorKind::Busy,
        Error::Status { .. }
        | Error::Unexpected { .. }
        | Error::Redirect { .. }
        | Error::LocalAddress { .. }
        | Error::Manifest { .. }
        | Error::WithoutRanges { .. } => FetchErrorKind::Unexpected,
        Error::Tls { .. }
        | Error::Resolve { .. }
        | Error::Proxy { .. }
        | Error::Connection { .. } => FetchErrorKind::Unreachable,
        Error::Resting { source, .. } => kind_of(source),
    }
}

/// What an error of the client means for a fetch.
pub(super) fn failure(error: &Error) -> Failure {
    let kind = kind_of(error);
    let mut failure = match error.class() {
        Class::Definite => Failure::definite(kind, reason(error)),
        Class::Passing { retry_after } => Failure {
            retry_after,
            ends_start: error.ends_start(),
            ..Failure::passing(kind, reason(error))
        },
    };
    failure.resting = matches!(error, Error::Resting { .. });
    failure.malformed = error.is_malformed();
    failure.without_ranges = matches!(error, Error::WithoutRanges { .. });
    failure
}
