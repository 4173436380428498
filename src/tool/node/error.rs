//! Errors of requests to a node.

use std::io;
use std::path::PathBuf;

use thiserror::Error;

/// A request failed, or there is no answer.
#[derive(Debug, Error)]
pub enum Error {
    /// The node cannot be reached.
    #[error(
        "cannot reach a node at {}; is ovbd-node running with this --control?",
        path.display()
    )]
    Connection {
        /// Control socket of the node.
        path: PathBuf,
        /// Error of the system.
        source: io::Error,
    },
    /// The node did not answer in time.
    #[error(
        "no answer from the node at {} within {seconds} s; the request may still complete; \
         `ovbd node list` shows its outcome",
        path.display()
    )]
    Late {
        /// Control socket of the node.
        path: PathBuf,
        /// Time limit.
        seconds: u64,
    },
    /// The socket is not that of a node, or of another version.
    #[error("{}: expected the control socket of ovbd-node; its answer is {found}", path.display())]
    Answer {
        /// The socket.
        path: PathBuf,
        /// What is wrong with the answer.
        found: &'static str,
    },
    /// The node refused the request.
    #[error("the node refused the request ({status} {code}): {text}")]
    Refused {
        /// HTTP status, such as 409.
        status: u16,
        /// Stable word for the reason, such as `in_use`.
        code: String,
        /// Reason and its causes.
        text: String,
    },
}
