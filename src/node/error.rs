//! Errors of the node's start, and failures of requests.

use std::io;
use std::path::PathBuf;
use std::time::Duration;

use hyper::StatusCode;
use serde_json::{Value, json};

/// The node cannot start or continue.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The runtime or its signal handlers cannot be set up.
    #[error("cannot start the runtime")]
    Runtime(#[source] io::Error),
    /// A directory or file of the node cannot be used.
    #[error("cannot {what} {}", path.display())]
    File {
        /// The operation: a verb.
        what: &'static str,
        /// The directory or file.
        path: PathBuf,
        /// Error of the system.
        source: io::Error,
    },
    /// Another node uses the state directory.
    #[error("another node uses the state directory {}; stop it or choose another --state", .0.display())]
    StateInUse(PathBuf),
    /// Another node serves the control socket.
    #[error("another process serves {}; stop it or choose another --control", .0.display())]
    ControlInUse(PathBuf),
    /// Another kind of file is at the path of the control socket.
    #[error("{} exists and is not a socket: remove it or choose another --control", .0.display())]
    NotASocket(PathBuf),
    /// Another process holds the lock of the control socket.
    #[error(
        "another process held {} for {} s; stop that process or choose another --control",
        lock.display(), limit.as_secs()
    )]
    ControlLocked {
        /// The lock file.
        lock: PathBuf,
        /// How long the node waited.
        limit: Duration,
    },
    /// A socket path is too long for the system.
    #[error("socket path {} has {} bytes; the limit is {limit}", path.display(), path.as_os_str().len())]
    LongPath {
        /// The path.
        path: PathBuf,
        /// Most bytes.
        limit: usize,
    },
}

impl Error {
    /// Makes the error of the operation `what` on `path`.
    pub fn file(what: &'static str, path: impl Into<PathBuf>) -> impl FnOnce(io::Error) -> Self {
        let path = path.into();
        move |source| Self::File { what, path, source }
    }
}

/// Kind of a failure: a stable word and an HTTP status.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Code {
    /// The request is malformed or its values are invalid.
    BadRequest,
    /// No disk, snapshot or route of that name.
    NotFound,
    /// The route does not have that method.
    Method,
    /// A disk of that name has another specification.
    Conflict,
    /// A front-end is connected, or another disk uses the files.
    InUse,
    /// The body is longer than the limit.
    TooLarge,
    /// A layer, config or directory that the request names cannot be used.
    NoLayer,
    /// A limit of the system is reached.
    Limit,
    /// The storage is full.
    NoSpace,
    /// The disk process did not answer in time.
    Timeout,
    /// Any other error.
    Internal,
}

impl Code {
    /// The word in the answer's `code`.
    pub fn word(self) -> &'static str {
        match self {
            Self::BadRequest => "bad_request",
            Self::NotFound => "not_found",
            Self::Method => "method",
            Self::Conflict => "conflict",
            Self::InUse => "in_use",
            Self::TooLarge => "too_large",
            Self::NoLayer => "no_layer",
            Self::Limit => "limit",
            Self::NoSpace => "no_space",
            Self::Timeout => "timeout",
            Self::Internal => "internal",
        }
    }

    /// Status of the answer.
    pub fn status(self) -> StatusCode {
        match self {
            Self::BadRequest => StatusCode::BAD_REQUEST,
            Self::NotFound => StatusCode::NOT_FOUND,
            Self::Method => StatusCode::METHOD_NOT_ALLOWED,
            Self::Conflict | Self::InUse => StatusCode::CONFLICT,
            Self::TooLarge => StatusCode::PAYLOAD_TOO_LARGE,
            Self::NoLayer => StatusCode::UNPROCESSABLE_ENTITY,
            Self::Limit => StatusCode::SERVICE_UNAVAILABLE,
            Self::NoSpace => StatusCode::INSUFFICIENT_STORAGE,
            Self::Timeout => StatusCode::GATEWAY_TIMEOUT,
            Self::Internal => StatusCode::INTERNAL_SERVER_ERROR,
        }
    }
}

/// Failure of a request.
#[derive(Debug)]
pub struct Failure {
    /// The kind.
    pub code: Code,
    /// Description, one sentence.
    pub text: String,
    /// Causes, outermost first.
    pub causes: Vec<String>,
}

impl Failure {
    /// A failure without a deeper cause.
    pub fn new(code: Code, text: impl Into<String>) -> Self {
        Self {
            code,
            text: text.into(),
            causes: Vec::new(),
        }
    }

    /// A failure caused by `error`.
    pub fn caused(code: Code, error: &dyn std::error::Error) -> Self {
        let causes = std::iter::successors(error.source(), |error| error.source());
        Self {
            code,
            text: error.to_string(),
            causes: causes.map(ToString::to_string).collect(),
        }
    }

    /// The body of the answer.
    pub fn body(&self) -> Value {
        json!({ "error": self.text, "code": self.code.word(), "causes": self.causes })
    }
}

impl From<Error> for Failure {
    fn from(error: Error) -> Self {
        let code = match &error {
            Error::File { source, .. } => match source.kind() {
                io::ErrorKind::StorageFull | io::ErrorKind::QuotaExceeded => Code::NoSpace,
                _ => Code::Internal,
            },
            Error::LongPath { .. } => Code::BadRequest,
            _ => Code::Internal,
        };
        Self::caused(code, &error)
    }
}
