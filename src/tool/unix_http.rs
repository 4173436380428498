//! Exchanges one HTTP/1.1 request and its answer over a unix socket, within a time limit.

use std::io::{self, Read, Write};
use std::path::Path;
use std::time::{Duration, Instant};

use crate::io::unix_stream;

/// Longest answer, in bytes.
const MAX_ANSWER: u64 = 64 << 20;

/// Status and body of an answer.
#[derive(Debug)]
pub(super) struct Answer {
    pub(super) status: u16,
    pub(super) body: Vec<u8>,
}

/// There is no answer.
#[derive(Debug)]
pub(super) enum Failure {
    /// The server cannot be reached, or closed the connection.
    Connection(io::Error),
    /// The server did not answer in time.
    Late,
    /// The answer is not HTTP.
    NotHttp,
}

/// Sends a request to the server at `path`, and receives the answer up to the end of the connection, within `limit`.
pub(super) fn exchange(
    path: &Path,
    method: &str,
    target: &str,
    body: &str,
    limit: Duration,
) -> Result<Answer, Failure> {
    let request = format!(
        "{method} {target} HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\
         Content-Length: {}\r\n\r\n{body}",
        body.len()
    );
    let answer = send(path, request.as_bytes(), limit).map_err(|error| match error.kind() {
        io::ErrorKind::WouldBlock | io::ErrorKind::TimedOut => Failure::Late,
        _ => Failure::Connection(error),
    })?;
    parse(answer).ok_or(Failure::NotHttp)
}

fn send(path: &Path, request: &[u8], limit: Duration) -> io::Result<Vec<u8>> {
    let end = Instant::now() + limit;
    // A connection waits while the server serves others.
    let mut stream = unix_stream::connect(path, limit)?;
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

fn parse(mut answer: Vec<u8>) -> Option<Answer> {
    let mut headers = [httparse::EMPTY_HEADER; 32];
    let mut response = httparse::Response::new(&mut headers);
    let httparse::Status::Complete(head) = response.parse(&answer).ok()? else {
        return None;
    };
    let status = response.code?;
    answer.drain(..head);
    Some(Answer {
        status,
        body: answer,
    })
}

#[cfg(test)]
mod tests {
    use std::os::unix::net::UnixListener;

    use super::*;

    #[test]
    fn a_silent_server_is_given_up() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("control");
        let _silent = UnixListener::bind(&path).unwrap();
        let answer = exchange(&path, "GET", "/", "", Duration::from_millis(20));
        assert!(matches!(answer, Err(Failure::Late)), "{answer:?}");
    }

    #[test]
    fn an_answer_without_a_body_and_other_protocols_are_told_apart() {
        let none = parse(b"HTTP/1.1 204 No Content\r\nA: b\r\n\r\n".to_vec()).unwrap();
        assert_eq!((none.status, none.body.len()), (204, 0));
        assert!(parse(b"SSH-2.0-OpenSSH\r\n".to_vec()).is_none());
        assert!(parse(b"HTTP/1.1 200".to_vec()).is_none());
    }
}
