//! Errors of the node's start, and failures of requests.

use std::io;
use std::net::SocketAddr;
use std::path::PathBuf;
use std::time::Duration;

use hyper::StatusCode;
use rustix::io::Errno;
use rustix::process::{Resource, getrlimit};
use serde_json::{Value, json};

use super::socket::BindError;

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
    /// The control socket cannot be given to its owner.
    #[error("cannot bind {}", path.display())]
    ControlOwner {
        /// The socket.
        path: PathBuf,
        /// Why not.
        source: BindError,
    },
    /// Two labels of disks have the same name in the metrics.
    #[error("--metrics-label: two labels are both {0} in the metrics; name one of them")]
    SameLabel(String),
    /// Metrics would be served to other hosts.
    #[error("--metrics-listen {0}: expected a loopback address, such as 127.0.0.1 or [::1]")]
    MetricsAddress(SocketAddr),
    /// The address of the metrics cannot be bound.
    #[error("cannot serve metrics on {address}")]
    MetricsListen {
        /// The address.
        address: SocketAddr,
        /// Error of the system.
        source: io::Error,
    },
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
    /// Returns whether the storage is full.
    pub fn is_full(&self) -> bool {
        let source = match self {
            Self::File { source, .. } => Some(source),
            _ => None,
        };
        source.and_then(code_of) == Some(Code::NoSpace)
    }

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
    /// The request has a field or parameter that does not exist.
    UnknownField,
    /// No disk, snapshot or route of that name.
    NotFound,
    /// The route does not have that method.
    Method,
    /// A disk of that name has another specification.
    Conflict,
    /// The field of a disk cannot be changed.
    Immutable,
    /// The disk has no writable layer.
    ReadOnly,
    /// A condition of the request does not hold.
    Changed,
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
    /// The process of the disk is being started.
    Starting,
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
            Self::UnknownField => "unknown_field",
            Self::NotFound => "not_found",
            Self::Method => "method",
            Self::Conflict => "conflict",
            Self::Immutable => "immutable",
            Self::ReadOnly => "read_only",
            Self::Changed => "changed",
            Self::InUse => "in_use",
            Self::TooLarge => "too_large",
            Self::NoLayer => "no_layer",
            Self::Limit => "limit",
            Self::NoSpace => "no_space",
            Self::Starting => "starting",
            Self::Timeout => "timeout",
            Self::Internal => "internal",
        }
    }

    /// Returns whether the same operation may succeed later.
    pub fn may_pass(self) -> bool {
        matches!(self, Self::Limit | Self::NoSpace | Self::Timeout)
    }

    /// Status of the answer.
    pub fn status(self) -> StatusCode {
        match self {
            Self::BadRequest | Self::UnknownField => StatusCode::BAD_REQUEST,
            Self::NotFound => StatusCode::NOT_FOUND,
            Self::Method => StatusCode::METHOD_NOT_ALLOWED,
            Self::Conflict | Self::Immutable | Self::ReadOnly | Self::InUse => StatusCode::CONFLICT,
            Self::Changed => StatusCode::PRECONDITION_FAILED,
            Self::TooLarge => StatusCode::PAYLOAD_TOO_LARGE,
            Self::NoLayer => StatusCode::UNPROCESSABLE_ENTITY,
            Self::Limit | Self::Starting => StatusCode::SERVICE_UNAVAILABLE,
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

    /// The failure of a disk process that ended while it started, with the last line of its log.
    pub fn of_disk_process(line: String) -> Self {
        Self::reported(line, Code::NoLayer)
    }

    /// A failure that a disk process reports. The text ends with the error of the system, if there was one; a limit of
    /// the system decides the code, otherwise `code`.
    pub fn reported(text: String, code: Code) -> Self {
        let number = text.rsplit_once("(os error ").and_then(|(_, rest)| {
            let (number, _) = rest.split_once(')')?;
            number.parse::<i32>().ok()
        });
        let error = number.map(io::Error::from_raw_os_error);
        let code = error.as_ref().and_then(code_of).unwrap_or(code);
        let mut failure = Self::new(code, text);
        failure.causes.extend(error.as_ref().and_then(limit));
        failure
    }

    /// The body of the answer.
    pub fn body(&self) -> Value {
        json!({ "error": self.text, "code": self.code.word(), "causes": self.causes })
    }
}

impl From<Error> for Failure {
    fn from(error: Error) -> Self {
        let code = match &error {
            Error::File { source, .. } => code_of(source).unwrap_or(Code::Internal),
            Error::LongPath { .. } => Code::BadRequest,
            _ => Code::Internal,
        };
        let mut failure = Self::caused(code, &error);
        if let Error::File { source, .. } = &error {
            failure.causes.extend(limit(source));
        }
        failure
    }
}

/// The code for an error of the system that tells of a limit.
fn code_of(error: &io::Error) -> Option<Code> {
    match error.kind() {
        io::ErrorKind::StorageFull | io::ErrorKind::QuotaExceeded => Some(Code::NoSpace),
        _ => limit(error).map(|_| Code::Limit),
    }
}

/// The limit of the system that an error reports, with its value where the node knows it.
fn limit(error: &io::Error) -> Option<String> {
    let errno = Errno::from_io_error(error)?;
    let value = |resource: Resource| {
        let limit = getrlimit(resource).current;
        limit.map_or("unlimited".to_owned(), |limit| limit.to_string())
    };
    let text = match errno {
        Errno::MFILE => {
            let value = value(Resource::Nofile);
            format!("limit: open files of a process (RLIMIT_NOFILE, {value})")
        }
        Errno::NFILE => "limit: open files of the host (fs.file-max)".to_owned(),
        Errno::AGAIN => {
            let value = value(Resource::Nproc);
            format!(
                "limit: processes and threads (RLIMIT_NPROC, {value}; TasksMax of the unit; kernel.threads-max)"
            )
        }
        Errno::NOMEM => "limit: memory".to_owned(),
        _ => return None,
    };
    Some(text)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_limit_of_the_system_is_named() {
        let failed = |errno: Errno| {
            let source = io::Error::from(errno);
            let what = "start";
            Failure::from(Error::File {
                what,
                path: "/p".into(),
                source,
            })
        };
        for (errno, name) in [
            (Errno::MFILE, "RLIMIT_NOFILE"),
            (Errno::NFILE, "fs.file-max"),
            (Errno::AGAIN, "RLIMIT_NPROC"),
            (Errno::NOMEM, "memory"),
        ] {
            let failure = failed(errno);
            assert_eq!(failure.code, Code::Limit);
            let named = failure.causes.iter().any(|cause| cause.contains(name));
            assert!(named, "{failure:?}");
        }
        assert_eq!(failed(Errno::NOSPC).code, Code::NoSpace);
        assert_eq!(failed(Errno::ACCESS).code, Code::Internal);
    }

    #[test]
    fn the_last_line_of_a_disk_process_decides_the_code() {
        let code = |line: &str| Failure::of_disk_process(line.to_owned()).code;
        assert_eq!(code("x: Too many open files (os error 24)"), Code::Limit);
        assert_eq!(code("x: No space left (os error 28)"), Code::NoSpace);
        assert_eq!(code("x: not found (os error 2)"), Code::NoLayer);
        assert_eq!(code("(os error x)"), Code::NoLayer);
        assert_eq!(code("not a layer"), Code::NoLayer);
    }
}
