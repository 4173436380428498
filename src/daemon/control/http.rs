//! The subset of HTTP/1.1 that the control API uses: one request per connection, with a small body, and a response in
//! JSON. Bytes and time that a client can take are limited.

use std::io::{self, Read, Write};
use std::net::Shutdown;
use std::os::unix::net::{UnixListener, UnixStream};
use std::time::{Duration, Instant};

use serde_json::{Value, json};

use crate::daemon::handover;

/// How long a client may take in all to send its request, and again to read the response.
const LIMIT: Duration = Duration::from_secs(5);

/// Most bytes of request line and headers.
const MAX_HEAD: usize = 16 * 1024;

/// Most headers.
const MAX_HEADERS: usize = 64;

/// Most bytes of a body.
const MAX_BODY: usize = 64 * 1024;

/// Most bytes that are read from a client after its request was refused.
const MAX_DRAINED: usize = 1024 * 1024;

/// Bytes sent with one system call, which must complete within the time limit.
const PIECE: usize = 16 * 1024;

/// A request.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Request {
    /// Method, as `GET`.
    pub method: String,
    /// Path, as `/api/v1/device`, without the query.
    pub path: String,
    /// Value of the header `Accept`; empty without one.
    pub accept: String,
    /// Body of the announced length.
    pub body: Vec<u8>,
}

/// A response.
#[derive(Clone, Debug, PartialEq)]
pub struct Response {
    /// Status code, as 200.
    pub status: u16,
    /// Body.
    pub body: Body,
}

/// Body of a response.
#[derive(Clone, Debug, PartialEq)]
pub enum Body {
    /// JSON.
    Json(Value),
    /// Text of a type, as `Content-Type` names it.
    Text(&'static str, String),
}

/// A request cannot be read.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The connection failed, or the client took too long.
    #[error("the client disconnected, or took longer than {} s", LIMIT.as_secs())]
    Connection(#[from] io::Error),
    /// The bytes are not an HTTP/1.1 request.
    #[error("malformed request: expected HTTP/1.1")]
    Syntax(#[from] httparse::Error),
    /// Headers or body exceed their limit.
    #[error("the request has more than {MAX_HEAD} bytes of headers or {MAX_BODY} bytes of body")]
    TooLarge,
    /// The request has a body without a length.
    #[error("the request has a body and no content-length")]
    Length,
}

impl Error {
    /// Sends the response that reports the error.
    ///
    /// # Errors
    /// Those of the socket; the client disconnected, or does not read.
    pub fn send(&self, stream: &mut UnixStream) -> io::Result<()> {
        self.response().send(stream)?;
        match self {
            Error::Connection(_) => Ok(()),
            _ => drain(stream),
        }
    }

    fn response(&self) -> Response {
        let status = match self {
            Error::Connection(_) => 408,
            Error::Syntax(_) => 400,
            Error::TooLarge => 413,
            Error::Length => 411,
        };
        Response::error(status, &self.to_string())
    }
}

impl Response {
    /// A response that reports an error.
    pub fn error(status: u16, text: &str) -> Self {
        Self {
            status,
            body: Body::Json(json!({ "error": text })),
        }
    }

    /// Sends the response, which ends the connection.
    ///
    /// # Errors
    /// Those of the socket; the client disconnected, or does not read.
    pub fn send(&self, stream: &mut UnixStream) -> io::Result<()> {
        let (head, body) = self.text();
        send_all(stream, (head + &body).as_bytes(), Instant::now() + LIMIT)
    }

    /// Sends the response with a copy of `listener` (`SCM_RIGHTS`).
    ///
    /// # Errors
    /// Those of [`Response::send`].
    pub fn send_with(&self, stream: &UnixStream, listener: &UnixListener) -> io::Result<()> {
        let (head, body) = self.text();
        stream.set_write_timeout(Some(LIMIT))?;
        handover::send(stream, (head + &body).as_bytes(), listener)
    }

    /// Sends the response without its body, as for `HEAD`.
    ///
    /// # Errors
    /// Those of [`Response::send`].
    pub fn send_head(&self, stream: &mut UnixStream) -> io::Result<()> {
        let (head, _) = self.text();
        send_all(stream, head.as_bytes(), Instant::now() + LIMIT)
    }

    /// Returns the head and the body as they are sent.
    fn text(&self) -> (String, String) {
        let reason = match self.status {
            200 => "OK",
            400 => "Bad Request",
            404 => "Not Found",
            405 => "Method Not Allowed",
            408 => "Request Timeout",
            409 => "Conflict",
            411 => "Length Required",
            413 => "Content Too Large",
            _ => "Internal Server Error",
        };
        let (kind, body) = match &self.body {
            Body::Json(value) => ("application/json", format!("{value}\n")),
            Body::Text(kind, text) => (*kind, text.clone()),
        };
        let head = format!(
            "HTTP/1.1 {} {reason}\r\nServer: ovbd-vhost\r\nConnection: close\r\n\
             Content-Type: {kind}\r\nContent-Length: {}\r\n\r\n",
            self.status,
            body.len()
        );
        (head, body)
    }
}

/// Sends all bytes before `end`.
fn send_all(stream: &mut UnixStream, bytes: &[u8], end: Instant) -> io::Result<()> {
    let mut rest = bytes;
    while !rest.is_empty() {
        stream.set_write_timeout(Some(left(end)?))?;
        let count = stream.write(&rest[..rest.len().min(PIECE)])?;
        rest = &rest[count..];
    }
    Ok(())
}

/// Ends the response, and reads what the client still sends. Closing a connection with unread bytes resets it, and the
/// client may then lose the response.
fn drain(stream: &mut UnixStream) -> io::Result<()> {
    stream.shutdown(Shutdown::Write)?;
    let end = Instant::now() + LIMIT;
    let (mut drained, mut part) = (0, [0; 4096]);
    while drained < MAX_DRAINED {
        match receive(stream, &mut part, end)? {
            0 => break,
            count => drained += count,
        }
    }
    Ok(())
}

/// Returns the time left until `end`.
fn left(end: Instant) -> io::Result<Duration> {
    let left = end.saturating_duration_since(Instant::now());
    match left.is_zero() {
        true => Err(io::ErrorKind::TimedOut.into()),
        false => Ok(left),
    }
}

/// Receives the next bytes before `end`; 0 bytes at the end of the stream.
fn receive(stream: &mut UnixStream, into: &mut [u8], end: Instant) -> io::Result<usize> {
    stream.set_read_timeout(Some(left(end)?))?;
    stream.read(into)
}

/// Reads the request of a connection.
///
/// # Errors
/// As the variants of [`Error`] say.
pub fn read(stream: &mut UnixStream) -> Result<Request, Error> {
    let end = Instant::now() + LIMIT;
    let mut bytes = Vec::new();
    loop {
        let mut headers = [httparse::EMPTY_HEADER; MAX_HEADERS];
        let mut request = httparse::Request::new(&mut headers);
        if let httparse::Status::Complete(head) = request.parse(&bytes)? {
            // It may have arrived together with the body.
            if head > MAX_HEAD {
                return Err(Error::TooLarge);
            }
            let method = request.method.unwrap_or_default().to_owned();
            let path = path_of(request.path.unwrap_or_default()).to_owned();
            let accept = value_of(request.headers, "accept");
            let len = body_len(request.headers)?;
            while bytes.len() < head + len {
                receive_more(stream, &mut bytes, end)?;
            }
            let body = bytes[head..head + len].to_vec();
            return Ok(Request {
                method,
                path,
                accept,
                body,
            });
        }
        if bytes.len() >= MAX_HEAD {
            return Err(Error::TooLarge);
        }
        receive_more(stream, &mut bytes, end)?;
    }
}

/// Returns the path of a request's target, which may be a whole URL (RFC 9112, 3.2.2).
fn path_of(target: &str) -> &str {
    const SCHEME: &str = "http://";
    let scheme = target.get(..SCHEME.len());
    let path = match scheme.is_some_and(|scheme| scheme.eq_ignore_ascii_case(SCHEME)) {
        false => target,
        true => {
            let rest = &target[SCHEME.len()..];
            &rest[rest.find(['/', '?']).unwrap_or(rest.len())..]
        }
    };
    path.split('?').next().unwrap_or_default()
}

/// Returns the value of a header as text; empty without one.
fn value_of(headers: &[httparse::Header<'_>], name: &str) -> String {
    let mut found = headers.iter();
    let found = found.find(|header| header.name.eq_ignore_ascii_case(name));
    found.map_or_else(String::new, |header| {
        String::from_utf8_lossy(header.value).into_owned()
    })
}

fn body_len(headers: &[httparse::Header<'_>]) -> Result<usize, Error> {
    let named = |name: &str| {
        let found = headers.iter();
        let mut found = found.filter(|header| header.name.eq_ignore_ascii_case(name));
        (found.next(), found.next())
    };
    if named("transfer-encoding").0.is_some() {
        return Err(Error::Length);
    }
    match named("content-length") {
        (None, _) => Ok(0),
        (Some(_), Some(_)) => Err(Error::Length),
        (Some(header), None) => {
            let text = std::str::from_utf8(header.value).map_err(|_| Error::Length)?;
            match text.parse() {
                Ok(len) if !text.starts_with('+') && len <= MAX_BODY => Ok(len),
                Ok(_) if !text.starts_with('+') => Err(Error::TooLarge),
                _ => Err(Error::Length),
            }
        }
    }
}

/// Appends the next bytes of the stream to `bytes`.
fn receive_more(stream: &mut UnixStream, bytes: &mut Vec<u8>, end: Instant) -> io::Result<()> {
    let mut part = [0; 4096];
    match receive(stream, &mut part, end)? {
        0 => Err(io::ErrorKind::UnexpectedEof.into()),
        count => {
            bytes.extend_from_slice(&part[..count]);
            Ok(())
        }
    }
}

#[cfg(test)]
mod tests {
    use std::thread;

    use super::*;

    fn parse(text: &[u8]) -> Result<Request, Error> {
        let (mut client, mut server) = UnixStream::pair().unwrap();
        thread::scope(|scope| {
            scope.spawn(move || {
                for part in text.chunks(1000) {
                    // The server need not read all of what is too much.
                    let _ = client.write_all(part);
                }
            });
            let request = read(&mut server);
            drop(server);
            request
        })
    }

    #[test]
    fn requests_are_read_in_any_pieces() {
        let text = b"PUT /api/v1/x?y=1 HTTP/1.1\r\nHost: a\r\nContent-Length: 5\r\n\r\nhello";
        let request = parse(text).unwrap();
        assert_eq!(
            (request.method.as_str(), request.path.as_str()),
            ("PUT", "/api/v1/x")
        );
        assert_eq!(request.body, b"hello");
        let mut large = b"GET / HTTP/1.1\r\nA: ".to_vec();
        large.extend(vec![b'a'; 10_000]);
        large.extend(b"\r\n\r\n");
        assert_eq!(parse(&large).unwrap().body, b"");
    }

    #[test]
    fn a_whole_url_has_a_path_like_any_other() {
        for (target, path) in [
            ("http://localhost/api/v1/device", "/api/v1/device"),
            ("HTTP://a:80/b?c=/d", "/b"),
            ("http://a?/b", ""),
            ("http://a", ""),
            ("/http://a/b", "/http://a/b"),
            ("*", "*"),
        ] {
            assert_eq!(path_of(target), path, "{target}");
        }
    }

    /// A client that reads, but so slowly that no single wait is a long one.
    #[test]
    fn all_of_an_answer_has_a_time_in_which_it_must_be_read() {
        let (mut client, mut server) = UnixStream::pair().unwrap();
        thread::scope(|scope| {
            scope.spawn(move || {
                while client.read(&mut [0; 4096]).unwrap() > 0 {
                    thread::sleep(Duration::from_millis(1));
                }
            });
            let end = Instant::now() + Duration::from_millis(100);
            // It would take 16 s.
            let sent = send_all(&mut server, &vec![0; 64 << 20], end);
            drop(server);
            let kind = sent.unwrap_err().kind();
            let late = [io::ErrorKind::TimedOut, io::ErrorKind::WouldBlock];
            assert!(late.contains(&kind), "{kind}");
        });
    }

    #[test]
    fn what_is_too_much_or_no_http_is_refused() {
        let head = "POST / HTTP/1.1\r\n";
        for (text, status) in [
            ("hello\r\n\r\n".to_owned(), 400),
            (format!("{head}A: {}\r\n\r\n", "a".repeat(20_000)), 413),
            (format!("{head}{}\r\n", "A: b\r\n".repeat(65)), 400),
            (format!("{head}Content-Length: 65537\r\n\r\n"), 413),
            (format!("{head}Content-Length: -1\r\n\r\n"), 411),
            (format!("{head}Content-Length: +1\r\n\r\na"), 411),
            (
                format!("{head}Content-Length: 99999999999999999999\r\n\r\n"),
                411,
            ),
            (
                format!("{head}Content-Length: 1\r\nContent-Length: 2\r\n\r\nab"),
                411,
            ),
            (
                format!("{head}Transfer-Encoding: chunked\r\n\r\n0\r\n\r\n"),
                411,
            ),
            (format!("{head}Content-Length: 5\r\n\r\nhi"), 408),
            (String::new(), 408),
        ] {
            let error = parse(text.as_bytes()).unwrap_err();
            assert_eq!(error.response().status, status, "{text:.40}: {error}");
        }
    }
}
