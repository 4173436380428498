//! `ovbd ctl`: sends requests to the control socket of a running daemon (`docs/control.md`).

use std::io::{self, Read, Write};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use rustix::net::sockopt::{Timeout, set_socket_timeout};
use rustix::net::{AddressFamily, SocketAddrUnix, SocketFlags, SocketType, connect, socket_with};
use serde_json::{Value, json};
use thiserror::Error;

/// Longest answer, in bytes.
const MAX_ANSWER: u64 = 64 << 20;

/// Time limit of an answer: a snapshot or a resize makes earlier writes durable.
const LIMIT: Duration = Duration::from_secs(120);

/// Time limit of an answer that waits until a layer is sealed.
const SEAL_LIMIT: Duration = Duration::from_secs(3600);

/// A request.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Ask {
    /// Describe the disk.
    Device,
    /// List the snapshots.
    Snapshots,
    /// Take a snapshot.
    Snapshot {
        /// Name of the snapshot.
        name: String,
        /// Whether to wait until the layer is sealed.
        wait: bool,
    },
    /// Set the size of the disk.
    Resize {
        /// Size in bytes.
        size: u64,
    },
    /// Replace the rate limits of the disk.
    SetLimits {
        /// The limits, as `PUT /api/v1/limits` takes them.
        limits: Value,
    },
}

/// The request failed, or there is no answer.
#[derive(Debug, Error)]
pub enum Error {
    /// The daemon cannot be reached.
    #[error("cannot reach a daemon at {}", path.display())]
    Connection {
        /// The control socket.
        path: PathBuf,
        /// Error of the system.
        source: io::Error,
    },
    /// The daemon did not answer in time.
    #[error(
        "no answer from {0} within {seconds} s; the request may still complete; check with \
         `ovbd ctl {0} device` and `snapshots`",
        path.display()
    )]
    Late {
        /// The control socket.
        path: PathBuf,
        /// Time limit.
        seconds: u64,
    },
    /// The socket is not that of a daemon.
    #[error("{}: reply is not HTTP; expected the control socket of ovbd-vhost", path.display())]
    NoAnswer {
        /// The socket.
        path: PathBuf,
    },
    /// The daemon refused the request.
    #[error("the daemon refused the request ({status}): {text}")]
    Refused {
        /// HTTP status, such as 409.
        status: u16,
        /// Reason of the daemon.
        text: String,
    },
}

/// Sends a request to the daemon whose control socket is at `path`; returns its answer.
///
/// # Errors
/// [`Error::Late`] after two minutes, or an hour to seal a layer; otherwise another [`Error`].
pub fn ask(path: &Path, ask: &Ask) -> Result<Value, Error> {
    let (method, resource, body) = match ask {
        Ask::Device => ("GET", "device", String::new()),
        Ask::Snapshots => ("GET", "snapshots", String::new()),
        Ask::Snapshot { name, wait } => {
            let body = json!({ "name": name, "wait": wait });
            ("POST", "snapshots", body.to_string())
        }
        Ask::Resize { size } => ("PUT", "size", json!({ "size_bytes": size }).to_string()),
        Ask::SetLimits { limits } => ("PUT", "limits", limits.to_string()),
    };
    let request = format!(
        "{method} /api/v1/{resource} HTTP/1.1\r\nHost: localhost\r\n\
         Content-Length: {}\r\n\r\n{body}",
        body.len()
    );
    let limit = match ask {
        Ask::Snapshot { wait: true, .. } => SEAL_LIMIT,
        _ => LIMIT,
    };
    let answer = exchange(path, request.as_bytes(), limit).map_err(|source| {
        let path = path.to_owned();
        match source.kind() {
            io::ErrorKind::WouldBlock | io::ErrorKind::TimedOut => Error::Late {
                path,
                seconds: limit.as_secs(),
            },
            _ => Error::Connection { path, source },
        }
    })?;
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

/// Sends a request and receives the answer up to its end, within `limit`.
fn exchange(path: &Path, request: &[u8], limit: Duration) -> io::Result<Vec<u8>> {
    let end = Instant::now() + limit;
    // A connection waits while the daemon serves others.
    let socket = socket_with(
        AddressFamily::UNIX,
        SocketType::STREAM,
        SocketFlags::CLOEXEC,
        None,
    )?;
    set_socket_timeout(&socket, Timeout::Send, Some(limit))?;
    connect(&socket, &SocketAddrUnix::new(path)?)?;
    let mut stream = UnixStream::from(socket);
    stream.write_all(request)?;
    let (mut answer, mut part) = (Vec::new(), [0; 4096]);
    while (answer.len() as u64) < MAX_ANSWER {
        let left = end.saturating_duration_since(Instant::now());
        // A timeout of zero would be no timeout.
        stream.set_read_timeout(Some(left.max(Duration::from_millis(1))))?;
        match stream.read(&mut part)? {
            0 => break,
            count => answer.extend_from_slice(&part[..count]),
        }
    }
    Ok(answer)
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

#[cfg(test)]
mod tests {
    use std::os::unix::net::UnixListener;

    use super::*;

    #[test]
    fn who_does_not_answer_is_not_waited_for_without_end() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("control");
        let _silent = UnixListener::bind(&path).unwrap();
        let answer = exchange(&path, b"GET / HTTP/1.1\r\n\r\n", Duration::from_millis(20));
        assert_eq!(answer.unwrap_err().kind(), io::ErrorKind::WouldBlock);
    }
}
