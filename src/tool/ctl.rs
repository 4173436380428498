//! Asks a running daemon something over its control socket (`docs/control.md`).

use std::io::{self, Read, Write};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};

use serde_json::{Value, json};
use thiserror::Error;

/// Most bytes of an answer.
const MAX_ANSWER: u64 = 64 << 20;

/// What to ask for.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Ask {
    /// What the device is and holds.
    Device,
    /// Its snapshots.
    Snapshots,
    /// A new snapshot.
    Snapshot {
        /// Its name.
        name: String,
        /// Whether to wait until its layer is sealed.
        wait: bool,
    },
}

/// Why there is no answer, or no good one.
#[derive(Debug, Error)]
pub enum Error {
    /// The daemon cannot be reached.
    #[error("cannot reach a daemon at {}", path.display())]
    Connection {
        /// The control socket.
        path: PathBuf,
        /// What the system said.
        source: io::Error,
    },
    /// Something else than a daemon answers.
    #[error("{} answers with no HTTP; expected the control socket of ovbd-vhost", path.display())]
    NoAnswer {
        /// The socket.
        path: PathBuf,
    },
    /// The daemon says why not.
    #[error("the daemon refuses ({status}): {text}")]
    Refused {
        /// As 409.
        status: u16,
        /// What it says.
        text: String,
    },
}

/// Asks the daemon whose control socket is at `path`; returns its answer.
///
/// # Errors
/// It cannot be reached, or refuses.
pub fn ask(path: &Path, ask: &Ask) -> Result<Value, Error> {
    let (method, resource, body) = match ask {
        Ask::Device => ("GET", "device", String::new()),
        Ask::Snapshots => ("GET", "snapshots", String::new()),
        Ask::Snapshot { name, wait } => {
            let body = json!({ "name": name, "wait": wait });
            ("POST", "snapshots", body.to_string())
        }
    };
    let request = format!(
        "{method} /api/v1/{resource} HTTP/1.1\r\nHost: localhost\r\n\
         Content-Length: {}\r\n\r\n{body}",
        body.len()
    );
    let failed = |source| Error::Connection {
        path: path.to_owned(),
        source,
    };
    let mut stream = UnixStream::connect(path).map_err(failed)?;
    stream.write_all(request.as_bytes()).map_err(failed)?;
    let mut answer = Vec::new();
    let read = stream.take(MAX_ANSWER).read_to_end(&mut answer);
    read.map_err(failed)?;
    let (status, body) = parse(&answer).ok_or_else(|| Error::NoAnswer {
        path: path.to_owned(),
    })?;
    match status {
        200 => Ok(body),
        _ => Err(Error::Refused {
            status,
            text: body["error"].as_str().unwrap_or_default().to_owned(),
        }),
    }
}

/// Status and body of an answer, which ends with its connection.
fn parse(answer: &[u8]) -> Option<(u16, Value)> {
    let mut headers = [httparse::EMPTY_HEADER; 32];
    let mut response = httparse::Response::new(&mut headers);
    let httparse::Status::Complete(head) = response.parse(answer).ok()? else {
        return None;
    };
    let body = serde_json::from_slice(answer.get(head..)?).ok()?;
    Some((response.code?, body))
}
