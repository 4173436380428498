//! URLs of registries, token servers and redirect targets.
//!
//! A URL has the scheme `http` or `https`, a host without user information, a path and a query. Other
//! texts are refused, so that two parsers never find different hosts in one URL.

use std::fmt;

use serde::{Deserialize, Serialize};
use thiserror::Error;

use super::repository::{Host, Scheme};

/// Longest URL, in bytes. Signed URLs have about 2 KiB.
const MAX_URL: usize = 16 * 1024;

/// Error of a text that is not such a URL.
#[derive(Clone, Debug, Error, PartialEq, Eq)]
#[error("invalid URL {0:?}: expected http(s)://HOST/PATH without a user name")]
pub struct Error(String);

/// An absolute URL without a fragment.
#[derive(Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Url {
    scheme: Scheme,
    host: Host,
    /// Path and query; begins with a slash.
    path: String,
}

impl Url {
    /// Reads an absolute URL.
    ///
    /// # Errors
    /// Another scheme, user information, a malformed host, or bytes a request line cannot hold.
    pub fn parse(text: &str) -> Result<Url, Error> {
        let refuse = || Error(text.chars().take(200).collect());
        let (scheme, rest) = text.split_once("://").ok_or_else(refuse)?;
        let scheme = match scheme.to_ascii_lowercase().as_str() {
            "https" => Scheme::Https,
            "http" => Scheme::Http,
            _ => return Err(refuse()),
        };
        let end = rest.find(['/', '?', '#']).unwrap_or(rest.len());
        let (host, path) = rest.split_at(end);
        Url::new(scheme, host.parse().map_err(|_| refuse())?, path).ok_or_else(refuse)
    }

    /// The URL of `path` on `host`; nothing if a request line cannot hold it.
    pub fn new(scheme: Scheme, host: Host, path: &str) -> Option<Url> {
        let path = path.split('#').next().unwrap_or_default();
        let slash = if path.starts_with('/') { "" } else { "/" };
        let path = format!("{slash}{path}");
        // No valid URL or request line contains `<`, `>`, `"` and similar characters.
        let plain = |byte: u8| byte.is_ascii_graphic() && !b"\"<>\\^`{|}".contains(&byte);
        (path.len() <= MAX_URL && path.bytes().all(plain)).then_some(Url { scheme, host, path })
    }

    /// The URL that a `Location` header of this URL's answer names, absolute or relative.
    ///
    /// # Errors
    /// As [`Url::parse`].
    pub fn join(&self, location: &str) -> Result<Url, Error> {
        let refuse = || Error(location.chars().take(200).collect());
        let has_scheme = location
            .split(['/', '?', '#'])
            .next()
            .is_some_and(|start| start.contains(':'));
        if has_scheme {
            return Url::parse(location);
        }
        if location.starts_with("//") {
            return Url::parse(&format!("{}:{location}", self.scheme.as_str()));
        }
        let path = self.path.split('?').next().unwrap_or_default();
        let path = if location.starts_with('/') {
            location.to_owned()
        } else if location.starts_with('?') || location.is_empty() {
            format!("{path}{location}")
        } else {
            let folder = path.rfind('/').map_or("/", |slash| &path[..=slash]);
            format!("{folder}{location}")
        };
        let path = without_dot_segments(&path);
        Url::new(self.scheme, self.host.clone(), &path).ok_or_else(refuse)
    }

    /// The scheme.
    pub fn scheme(&self) -> Scheme {
        self.scheme
    }

    /// The host and its port.
    pub fn host(&self) -> &Host {
        &self.host
    }

    /// Path and query.
    pub fn path(&self) -> &str {
        &self.path
    }

    /// The undecoded value of a query parameter, by its name in lower case.
    pub fn parameter(&self, name: &str) -> Option<&str> {
        let (_, query) = self.path.split_once('?')?;
        query.split('&').find_map(|pair| {
            let (key, value) = pair.split_once('=')?;
            key.eq_ignore_ascii_case(name).then_some(value)
        })
    }

    /// The URL without its query, which may hold a signature.
    pub fn without_query(&self) -> String {
        let path = self.path.split('?').next().unwrap_or_default();
        format!("{}://{}{path}", self.scheme.as_str(), self.host)
    }
}

impl fmt::Display for Url {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}://{}{}", self.scheme.as_str(), self.host, self.path)
    }
}

/// Leaves the query out, which may hold a signature.
impl fmt::Debug for Url {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.without_query())
    }
}

/// A path, with a query or without, in which `.` and `..` are resolved (RFC 3986, 5.2.4): a server may
/// refuse them, or sign the path without them.
fn without_dot_segments(path: &str) -> String {
    let end = path.find(['?', '#']).unwrap_or(path.len());
    let (path, query) = path.split_at(end);
    let mut kept = Vec::new();
    for segment in path.split('/').skip(1) {
        match segment {
            "." => {}
            ".." => drop(kept.pop()),
            segment => kept.push(segment),
        }
    }
    // What ends in a dot segment names a directory.
    if path.ends_with("/.") || path.ends_with("/..") {
        kept.push("");
    }
    format!("/{}{query}", kept.join("/"))
}

/// Percent-encodes what is not unreserved (RFC 3986, 2.3).
pub fn encode(text: &str) -> String {
    let mut encoded = String::with_capacity(text.len());
    for byte in text.bytes() {
        if byte.is_ascii_alphanumeric() || b"-._~".contains(&byte) {
            encoded.push(char::from(byte));
        } else {
            encoded.push_str(&format!("%{byte:02X}"));
        }
    }
    encoded
}

/// Undoes percent-encoding; malformed escapes are left as they are.
pub fn decode(text: &str) -> String {
    let bytes = text.as_bytes();
    let mut decoded = Vec::with_capacity(bytes.len());
    let mut at = 0;
    while let Some(byte) = bytes.get(at) {
        let digits = bytes.get(at + 1..at + 3).filter(|_| *byte == b'%');
        let value = digits
            .filter(|digits| digits.iter().all(u8::is_ascii_hexdigit))
            .and_then(|digits| std::str::from_utf8(digits).ok())
            .and_then(|digits| u8::from_str_radix(digits, 16).ok());
        decoded.push(value.unwrap_or(*byte));
        at += if value.is_some() { 3 } else { 1 };
    }
    String::from_utf8_lossy(&decoded).into_owned()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn absolute_urls_are_read() {
        for (text, expected) in [
            ("https://h", "https://h/"),
            ("HTTP://H:80/p?q=1#f", "http://h:80/p?q=1"),
            ("https://h?q", "https://h/?q"),
            ("https://[::1]:5000/a", "https://[::1]:5000/a"),
            ("https://h/a//b/../c", "https://h/a//b/../c"),
        ] {
            assert_eq!(Url::parse(text).unwrap().to_string(), expected);
        }
    }

    #[test]
    fn other_texts_are_refused() {
        let long = format!("https://h/{}", "x".repeat(MAX_URL));
        for text in [
            "",
            "/",
            "h",
            "h/p",
            "ftp://h/",
            "file:///etc/passwd",
            "https://",
            "https:///p",
            "https://u@h/",
            "https://u:p@h/",
            "https://h@evil/",
            "https://h\\@evil/",
            "https://h /",
            "https://h/a b",
            "https://h/a\r\nX: y",
            "https://h/é",
            "https://h:x/",
            "https://h:/",
            "https://h%2f/",
            "https://h/\"",
            "gopher://h",
            "javascript:alert(1)",
            &long,
        ] {
            assert!(Url::parse(text).is_err(), "{text:.60}");
        }
    }

    #[test]
    fn locations_are_joined() {
        let base = Url::parse("https://h:5/v2/a/blobs/x?q=1").unwrap();
        for (location, expected) in [
            ("https://s/k?sig=1", "https://s/k?sig=1"),
            ("//s/k", "https://s/k"),
            ("/k?a=https://x/", "https://h:5/k?a=https://x/"),
            ("y", "https://h:5/v2/a/blobs/y"),
            ("?r", "https://h:5/v2/a/blobs/x?r"),
            ("", "https://h:5/v2/a/blobs/x"),
            ("../y", "https://h:5/v2/a/y"),
            ("../.././b//../c/./?d=/../e", "https://h:5/v2/b/c/?d=/../e"),
            ("..", "https://h:5/v2/a/"),
            (".", "https://h:5/v2/a/blobs/"),
            ("/../../k/../l..", "https://h:5/l.."),
        ] {
            assert_eq!(base.join(location).unwrap().to_string(), expected);
        }
        for location in ["mailto:x", "https:", "//", "//u@h/", "/a b", "http:///x"] {
            assert!(base.join(location).is_err(), "{location}");
        }
    }

    #[test]
    fn parameters_are_found() {
        let url = Url::parse("https://h/p?a=1&X-Amz-Expires=20&b").unwrap();
        assert_eq!(url.parameter("x-amz-expires"), Some("20"));
        assert_eq!(url.parameter("b"), None);
        assert_eq!(url.parameter("p"), None);
        assert!(!format!("{url:?}").contains("20"), "no signature in logs");
    }

    #[test]
    fn encoding_is_undone() {
        let text = "a b/é:%&+~";
        assert_eq!(encode(text), "a%20b%2F%C3%A9%3A%25%26%2B~");
        assert_eq!(decode(&encode(text)), text);
        for odd in ["%", "%1", "%zz", "%+1", "%%41"] {
            let expected = if odd == "%%41" { "%A" } else { odd };
            assert_eq!(decode(odd), expected);
        }
    }
}
