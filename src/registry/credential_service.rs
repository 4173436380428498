//! Upstream's credential services: a local HTTP server that is asked for each repository.

use std::fmt;
use std::io::{self, Read, Write};
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use serde::Deserialize;
use serde_json::Value;

use super::address::NamedBy;
use super::credentials::{Credentials, Error, MAX_CREDENTIALS};
use super::http::{Ask, Http, Timeouts, USER_AGENT};
use super::repository::Repository;
use super::tls::{ClientCertificate, Tls};
use super::url::Url;
use crate::io::unix_stream;

/// Longest time to wait for a service; the configuration can only shorten it.
const MAX_TIMEOUT: Duration = Duration::from_secs(60);

/// Most header fields of a reply.
const MAX_FIELDS: usize = 64;

/// A credential service.
pub struct Service {
    name: String,
    reach: Reach,
}

enum Reach {
    Http { url: Url, http: Box<Http> },
    Unix { path: PathBuf, timeout: Duration },
}

impl Service {
    /// A service at `address`, `HOST[:PORT]/PATH` with or without `http://` or `https://`.
    ///
    /// # Errors
    /// The address is malformed, or a certificate cannot be used.
    pub fn http(
        address: &str,
        secure: bool,
        timeout: Duration,
        ca: Option<&Path>,
        certificate: Option<&ClientCertificate>,
    ) -> Result<Service, Error> {
        let refuse = |reason: String| Error::Refused {
            service: address.to_owned(),
            reason,
        };
        let scheme = if secure { "https" } else { "http" };
        let rest = address.split_once("://").map_or(address, |(_, rest)| rest);
        let url = Url::parse(&format!("{scheme}://{rest}"));
        let url = url.map_err(|error| refuse(error.to_string()))?;
        let timeout = timeout.min(MAX_TIMEOUT);
        let timeouts = Timeouts {
            name: timeout,
            connect: timeout,
            tls: timeout,
            answer: timeout,
            read: timeout,
            small: timeout,
        };
        let failed = |error: super::error::Error| refuse(crate::reason::reason(&error));
        let tls = Tls::new(ca, certificate).map_err(failed)?;
        let http = Http::new(&tls, USER_AGENT, timeouts).map_err(failed)?;
        Ok(Service {
            name: address.to_owned(),
            reach: Reach::Http {
                url,
                http: Box::new(http),
            },
        })
    }

    /// A service that listens on the unix socket at `path`.
    pub fn unix(path: PathBuf, timeout: Duration) -> Service {
        Service {
            name: path.display().to_string(),
            reach: Reach::Unix {
                path,
                timeout: timeout.min(MAX_TIMEOUT),
            },
        }
    }

    /// Asks for the credentials of a repository.
    pub(super) fn ask(&self, repository: &Repository) -> Result<Credentials, Error> {
        // Not percent-encoded: upstream's services expect it so, and a query may hold it.
        let query = format!("?remote_url={}", repository.blob_url());
        let (status, body) = match &self.reach {
            Reach::Http { url, http } => self.ask_http(http, url, &query)?,
            Reach::Unix { path, timeout } => {
                let deadline = Instant::now() + *timeout;
                ask_unix(path, &query, deadline).map_err(|error| self.silent(error.to_string()))?
            }
        };
        self.parse(status, &body)
    }

    fn ask_http(&self, http: &Http, url: &Url, query: &str) -> Result<(u16, Vec<u8>), Error> {
        let failed = |error: super::error::Error| self.silent(crate::reason::reason(&error));
        let url =
            Url::parse(&format!("{url}{query}")).map_err(|error| self.silent(error.to_string()))?;
        let answer = http
            .send(&Ask::Get, &url, &[], NamedBy::User)
            .map_err(failed)?;
        let status = answer.status();
        let body = answer
            .bytes("credentials", MAX_CREDENTIALS)
            .map_err(failed)?;
        Ok((status, body))
    }

    fn parse(&self, status: u16, body: &[u8]) -> Result<Credentials, Error> {
        #[derive(Deserialize)]
        struct Reply {
            success: bool,
            #[serde(default)]
            data: Value,
        }
        let refuse = |reason: String| {
            let service = self.name.clone();
            Err(Error::Refused { service, reason })
        };
        if status >= 500 {
            return Err(self.silent(format!("HTTP status {status}")));
        }
        if status != 200 {
            return refuse(format!("HTTP status {status}"));
        }
        let reply: Reply = serde_json::from_slice(body)
            .map_err(|error| Error::Syntax(self.name.clone(), error.line(), error.column()))?;
        if !reply.success {
            return refuse("\"success\" is false".to_owned());
        }
        if !reply.data["auths"].is_object() {
            return refuse("the reply has no data.auths".to_owned());
        }
        Credentials::parse(reply.data.to_string().as_bytes(), &self.name)
    }

    fn silent(&self, reason: String) -> Error {
        Error::Silent {
            service: self.name.clone(),
            reason,
        }
    }
}

impl fmt::Debug for Service {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_tuple("Service").field(&self.name).finish()
    }
}

/// One request over a unix socket; the connection ends with it.
fn ask_unix(path: &Path, query: &str, deadline: Instant) -> io::Result<(u16, Vec<u8>)> {
    let limit = deadline.saturating_duration_since(Instant::now());
    let mut stream = unix_stream::connect(path, limit)?;
    let left = || {
        let left = deadline.saturating_duration_since(Instant::now());
        if left.is_zero() {
            return Err(io::Error::from(io::ErrorKind::TimedOut));
        }
        Ok(Some(left))
    };
    stream.set_write_timeout(left()?)?;
    write!(
        stream,
        "GET /auth{query} HTTP/1.1\r\nHost: localhost\r\nAccept: */*\r\nConnection: close\r\n\r\n"
    )?;
    let mut bytes = Vec::new();
    let mut piece = [0; 8192];
    loop {
        stream.set_read_timeout(left()?)?;
        let len = match stream.read(&mut piece) {
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => {
                return Err(io::ErrorKind::TimedOut.into());
            }
            read => read?,
        };
        bytes.extend_from_slice(&piece[..len]);
        if let Some(reply) = reply(&bytes, len == 0)? {
            return Ok(reply);
        }
        if len == 0 {
            return Err(io::ErrorKind::UnexpectedEof.into());
        }
        if bytes.len() as u64 > MAX_CREDENTIALS {
            return Err(io::Error::other("the reply is too long"));
        }
    }
}

/// Status and body, once they are complete; `ended` if nothing follows `bytes`.
fn reply(bytes: &[u8], ended: bool) -> io::Result<Option<(u16, Vec<u8>)>> {
    let mut fields = [httparse::EMPTY_HEADER; MAX_FIELDS];
    let mut response = httparse::Response::new(&mut fields);
    let parsed = response.parse(bytes).map_err(io::Error::other)?;
    let (httparse::Status::Complete(start), Some(status)) = (parsed, response.code) else {
        return Ok(None);
    };
    let body = &bytes[start..];
    let field = |name: &str| {
        let mut fields = response.headers.iter();
        let field = fields.find(|field| field.name.eq_ignore_ascii_case(name))?;
        std::str::from_utf8(field.value).ok()
    };
    if field("transfer-encoding").is_some_and(|value| value.eq_ignore_ascii_case("chunked")) {
        return Ok(unchunked(body)?.map(|body| (status, body)));
    }
    let len = field("content-length").and_then(|value| value.trim().parse().ok());
    let complete = match len {
        Some(len) => body.get(..len),
        None => ended.then_some(body),
    };
    Ok(complete.map(|body| (status, body.to_vec())))
}

/// The body of a chunked reply, once it is complete.
fn unchunked(mut rest: &[u8]) -> io::Result<Option<Vec<u8>>> {
    let mut body = Vec::new();
    loop {
        if rest.first().is_some_and(|digit| !digit.is_ascii_hexdigit()) {
            return Err(io::Error::other("malformed chunk"));
        }
        let parsed = httparse::parse_chunk_size(rest);
        let parsed = parsed.map_err(|_| io::Error::other("malformed chunk"))?;
        let httparse::Status::Complete((start, len)) = parsed else {
            return Ok(None);
        };
        if len == 0 {
            return Ok(Some(body));
        }
        let len = usize::try_from(len).unwrap_or(usize::MAX);
        let end = start.saturating_add(len);
        let Some(chunk) = rest.get(start..end) else {
            return Ok(None);
        };
        body.extend_from_slice(chunk);
        let Some(after) = rest.get(end.saturating_add(2)..) else {
            return Ok(None);
        };
        rest = after;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn ok(bytes: &str, ended: bool) -> Option<(u16, String)> {
        let reply = reply(bytes.as_bytes(), ended).unwrap();
        reply.map(|(status, body)| (status, String::from_utf8(body).unwrap()))
    }

    #[test]
    fn replies_end_by_length_by_chunks_or_by_closing() {
        let body = Some((200, "abc".to_owned()));
        let by_length = "HTTP/1.1 200 OK\r\nContent-Length: 3\r\n\r\nabc";
        let chunked =
            "HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n2\r\nab\r\n1\r\nc\r\n0\r\n\r\n";
        for whole in [by_length, chunked] {
            for end in 0..whole.len() {
                let cut = ok(&whole[..end], false);
                assert!(cut.is_none() || cut == body, "{end}: {cut:?}");
            }
            assert_eq!(ok(whole, false), body);
        }
        let by_closing = "HTTP/1.0 200 OK\r\n\r\nabc";
        assert_eq!(ok(by_closing, false), None);
        assert_eq!(ok(by_closing, true), body);
    }

    #[test]
    fn garbage_is_an_error_or_incomplete() {
        for text in ["garbage\r\n\r\n", "HTTP/9.9 x\r\n\r\n", "\u{0}"] {
            assert!(reply(text.as_bytes(), true).is_err(), "{text:?}");
        }
        for body in ["zz\r\n", "ffffffffffffffff\r\nab", "\r\n", "5\r\nab"] {
            let text = format!("HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n{body}");
            assert!(
                !matches!(reply(text.as_bytes(), true), Ok(Some(_))),
                "{body:?}"
            );
        }
    }

    #[test]
    fn only_success_gives_credentials() {
        let service = Service::unix(PathBuf::from("/S"), Duration::from_secs(1));
        let reply = |status, text: &str| service.parse(status, text.as_bytes());
        let good = r#"{"traceId":"x","success":true,"data":{"auths":{"a":{"username":"u","password":"p"}}}}"#;
        assert!(reply(200, good).is_ok());
        for (status, text) in [
            (200, r#"{"success":false,"data":{"auths":{}}}"#),
            (200, r#"{"success":true}"#),
            (200, r#"{"success":true,"data":{"auths":[]}}"#),
            (200, "{}"),
            (200, ""),
            (404, good),
            (302, good),
        ] {
            let refused = reply(status, text).unwrap_err();
            assert!(!refused.is_passing(), "{refused}");
        }
        assert!(reply(500, good).unwrap_err().is_passing());
    }
}
