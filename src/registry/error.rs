//! Errors of requests to registries, and their classes: whether repeating the request can help.

use std::io;
use std::net::IpAddr;
use std::sync::Arc;
use std::time::Duration;

use thiserror::Error;

use super::repository::Host;
use super::url::Url;
use super::{credentials, manifest, token};
use crate::format::digest::Digest;

/// Why an address of this machine or its link is refused. Metadata services count as such.
const LOCAL_ADDRESS: &str = "only a server that the user named by an address of this machine or its link may name \
    others there";

/// Result of a request.
pub type Result<T> = std::result::Result<T, Error>;

/// Error of a request to a registry. Cheap to clone: several threads may wait for one login.
#[derive(Clone, Debug, Error)]
pub enum Error {
    /// The registry refuses the configured credentials, or requires some and there are none.
    #[error("{host} refuses access to {what} (HTTP status {status}{}); {hint}", said(.detail))]
    Denied {
        /// The registry.
        host: Host,
        /// Repository or token server.
        what: String,
        /// HTTP status.
        status: u16,
        /// The server's own words.
        detail: String,
        /// What to do.
        hint: &'static str,
    },
    /// The look-up of credentials failed.
    #[error("cannot get credentials for {host}")]
    Credentials {
        /// The registry.
        host: Host,
        /// Why.
        source: Arc<credentials::Error>,
    },
    /// The token server's reply holds no usable token.
    #[error("cannot get a token for {host} from {realm}")]
    Token {
        /// The registry.
        host: Host,
        /// The token server.
        realm: String,
        /// Why.
        source: token::Error,
    },
    /// The registry does not have the blob or manifest.
    #[error("{host} does not have {what}{}", said(.detail))]
    NotFound {
        /// The registry.
        host: Host,
        /// Path of the blob or manifest.
        what: String,
        /// The server's own words.
        detail: String,
    },
    /// The TLS handshake failed: a certificate is not trusted, has expired or is for another name.
    #[error("TLS handshake with {host} failed")]
    Tls {
        /// The server.
        host: Host,
        /// Why.
        source: Arc<ureq::Error>,
    },
    /// The host's name has no address, or no name server says.
    #[error("cannot resolve the host name {host}")]
    Resolve {
        /// The host.
        host: Host,
        /// What the resolver said.
        source: Arc<io::Error>,
        /// No name server answered, or one failed: the next look-up may succeed.
        temporary: bool,
    },
    /// A blob, manifest or token does not have the size or digest it should.
    #[error("{what} from {host}: expected {expected}, found {found}")]
    Mismatch {
        /// The server.
        host: Host,
        /// Path of the blob or manifest.
        what: String,
        /// Size or digest, as the image says.
        expected: String,
        /// Size or digest, as served.
        found: String,
    },
    /// A server redirects to a target that is refused.
    #[error("{host} redirects to {target}, which is refused: {reason}")]
    Redirect {
        /// The redirecting server.
        host: Host,
        /// The target without its query.
        target: String,
        /// Why it is refused.
        reason: String,
    },
    /// A host that a server named has addresses that only the user may name.
    #[error("{host}, which a server named, has the address {address}: {LOCAL_ADDRESS}")]
    LocalAddress {
        /// The host.
        host: Host,
        /// One of its addresses.
        address: IpAddr,
    },
    /// The manifest is not that of an OverlayBD image.
    #[error("cannot use the manifest of {what}")]
    Manifest {
        /// The reference.
        what: String,
        /// Why.
        source: manifest::Error,
    },
    /// The server does not serve ranges: it would send the whole blob from its first byte.
    #[error("{host} does not serve ranges of {digest}")]
    WithoutRanges {
        /// The server.
        host: Host,
        /// The blob.
        digest: Digest,
    },
    /// The server is overloaded or limits the rate: status 429 or 503.
    #[error("{host} answers HTTP status {status}, too many requests or overload")]
    Busy {
        /// The server.
        host: Host,
        /// HTTP status.
        status: u16,
        /// Its `Retry-After`, bounded.
        retry_after: Option<Duration>,
    },
    /// A status that does not answer the request.
    #[error("{host} answers HTTP status {status} for {what}{}", said(.detail))]
    Status {
        /// The server.
        host: Host,
        /// Path of the blob or manifest.
        what: String,
        /// HTTP status.
        status: u16,
        /// The server's own words.
        detail: String,
    },
    /// A malformed answer, or one that does not fit the request.
    #[error("unexpected answer from {host} for {what}: {detail}")]
    Unexpected {
        /// The server.
        host: Host,
        /// Path of the blob or manifest.
        what: String,
        /// What is wrong with it.
        detail: String,
    },
    /// The proxy that the environment names does not let requests through.
    #[error("proxy {proxy} does not connect to {host}: {answer}; see HTTPS_PROXY and NO_PROXY")]
    Proxy {
        /// The server.
        host: Host,
        /// The proxy.
        proxy: String,
        /// Its answer.
        answer: String,
    },
    /// The server did not answer in time.
    #[error("{host} did not answer in time ({phase})")]
    Timeout {
        /// The server.
        host: Host,
        /// Phase of the request.
        phase: String,
    },
    /// The connection could not be made, or broke.
    #[error("connection to {host} failed")]
    Connection {
        /// The server.
        host: Host,
        /// Why.
        source: Arc<ureq::Error>,
    },
    /// The circuit breaker of the server is open.
    #[error("{host} failed repeatedly; next attempt in {} ms", .retry_after.as_millis())]
    Resting {
        /// The server.
        host: Host,
        /// Time until the next attempt.
        retry_after: Duration,
        /// Its last failure.
        source: Box<Error>,
    },
    /// A credential service or the configuration cannot be used.
    #[error("{what}")]
    Setup {
        /// What was being set up.
        what: String,
        /// Why.
        source: Arc<io::Error>,
    },
}

/// What to do about an error.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Class {
    /// A repetition fails as well, for now. A start ends; a guest's read is repeated at long intervals,
    /// because credentials and registries are repaired.
    Definite,
    /// The next attempt may succeed.
    Passing {
        /// Not before so long, if the server said so.
        retry_after: Option<Duration>,
    },
}

impl Error {
    /// What to do about it.
    pub fn class(&self) -> Class {
        let retry_after = match self {
            Error::Busy { retry_after, .. } => *retry_after,
            Error::Resting { retry_after, .. } => Some(*retry_after),
            Error::WithoutRanges { .. }
            | Error::Status { .. }
            | Error::Unexpected { .. }
            | Error::Proxy { .. }
            | Error::Timeout { .. }
            | Error::Connection { .. }
            | Error::Resolve {
                temporary: true, ..
            } => None,
            Error::Credentials { source, .. } if source.is_passing() => None,
            Error::Denied { .. }
            | Error::Credentials { .. }
            | Error::Token { .. }
            | Error::NotFound { .. }
            | Error::Tls { .. }
            | Error::Resolve { .. }
            | Error::Mismatch { .. }
            | Error::Redirect { .. }
            | Error::LocalAddress { .. }
            | Error::Manifest { .. }
            | Error::Setup { .. } => return Class::Definite,
        };
        Class::Passing { retry_after }
    }

    /// The error of a request to the URL `to`, to which the server `from` redirected or pointed.
    pub(super) fn redirected(self, from: &Host, to: &Url) -> Error {
        match self {
            Error::LocalAddress { address, .. } => Error::Redirect {
                host: from.clone(),
                target: to.without_query(),
                reason: format!("{} has the address {address}: {LOCAL_ADDRESS}", to.host()),
            },
            error => error,
        }
    }

    /// Whether repeating the request soon gives the same.
    pub fn is_definite(&self) -> bool {
        self.class() == Class::Definite
    }

    /// Whether a start ends with it. A guest's read is repeated soon if the error is not definite: a
    /// name server that does not answer may be back in a moment.
    pub fn ends_start(&self) -> bool {
        match self {
            Error::Resolve { .. } => true,
            Error::Resting { source, .. } => source.ends_start(),
            error => error.is_definite(),
        }
    }

    /// Whether a server answered, and the answer cannot be one to the request. If there are no others
    /// for a while, there will be none soon.
    pub fn is_malformed(&self) -> bool {
        match self {
            Error::Unexpected { .. } => true,
            // Overload and failures inside the server pass.
            Error::Status { status, .. } => *status < 500 && !matches!(status, 408 | 425),
            Error::Resting { source, .. } => source.is_malformed(),
            _ => false,
        }
    }

    /// The words that upstream puts into an image's `resultFile` for the same class of error.
    pub fn upstream_words(&self) -> &'static str {
        match self {
            Error::Denied { .. } | Error::Credentials { .. } | Error::Token { .. } => {
                "Authentication failed"
            }
            Error::NotFound { .. } => "No such file or directory",
            Error::Tls { .. }
            | Error::Resolve { .. }
            | Error::Proxy { .. }
            | Error::Connection { .. } => "Connection failed",
            Error::Resting { source, .. } => source.upstream_words(),
            Error::Timeout { .. } => "Get meta timedout",
            Error::Busy { .. } => "Too many requests",
            Error::Mismatch { .. }
            | Error::Redirect { .. }
            | Error::LocalAddress { .. }
            | Error::Manifest { .. }
            | Error::WithoutRanges { .. }
            | Error::Status { .. }
            | Error::Unexpected { .. }
            | Error::Setup { .. } => "Unexpected response",
        }
    }

    /// Whether the error counts as a failure of the server for its circuit breaker.
    pub(super) fn is_outage(&self) -> bool {
        matches!(
            self,
            Error::Busy { .. }
                | Error::Timeout { .. }
                | Error::Connection { .. }
                | Error::Unexpected { .. }
                | Error::Proxy { .. }
                | Error::Resolve { .. }
        )
    }
}

/// For `io::Read` of a blob's body.
impl From<Error> for io::Error {
    fn from(error: Error) -> io::Error {
        let kind = match &error {
            Error::Timeout { .. } => io::ErrorKind::TimedOut,
            Error::NotFound { .. } => io::ErrorKind::NotFound,
            Error::Denied { .. } => io::ErrorKind::PermissionDenied,
            _ => io::ErrorKind::Other,
        };
        io::Error::new(kind, error)
    }
}

/// The server's words, to be appended.
fn said(detail: &str) -> String {
    if detail.is_empty() {
        String::new()
    } else {
        format!(", \"{detail}\"")
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn host() -> Host {
        "r.example".parse().unwrap()
    }

    #[test]
    fn errors_are_classed() {
        let busy = Error::Busy {
            host: host(),
            status: 429,
            retry_after: Some(Duration::from_secs(3)),
        };
        let retry_after = Some(Duration::from_secs(3));
        assert_eq!(busy.class(), Class::Passing { retry_after });
        assert_eq!(busy.upstream_words(), "Too many requests");
        let denied = Error::Denied {
            host: host(),
            what: "a/b".to_owned(),
            status: 403,
            detail: "no".to_owned(),
            hint: "check the credentials",
        };
        assert_eq!(denied.class(), Class::Definite);
        assert_eq!(
            denied.to_string(),
            "r.example refuses access to a/b (HTTP status 403, \"no\"); check the credentials"
        );
        for temporary in [true, false] {
            let resolve = Error::Resolve {
                host: host(),
                source: Arc::new(io::Error::other("x")),
                temporary,
            };
            assert_eq!(resolve.is_definite(), !temporary);
            assert!(resolve.ends_start());
        }
    }

    #[test]
    fn an_error_survives_a_reader() {
        let error = Error::Timeout {
            host: host(),
            phase: "body".to_owned(),
        };
        let error = io::Error::from(error);
        let inner = error
            .get_ref()
            .and_then(|inner| inner.downcast_ref::<Error>());
        assert!(matches!(inner, Some(Error::Timeout { .. })));
    }
}
