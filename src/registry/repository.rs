//! Registries' hosts and the repositories in them, with the URLs of what they hold.

use std::fmt;
use std::net::Ipv6Addr;
use std::str::FromStr;

use serde::{Deserialize, Serialize};
use thiserror::Error;

use crate::format::digest::Digest;

/// The registry of references that name none.
pub(super) const DOCKER_HUB: &str = "docker.io";

/// Host that serves the API of [`DOCKER_HUB`].
const DOCKER_HUB_API: &str = "registry-1.docker.io";

/// Most characters of a repository's name; the limit of common registries.
pub(super) const MAX_NAME: usize = 255;

/// Most characters of a host name, from RFC 1035.
pub(super) const MAX_HOST: usize = 253;

/// Error of a text that is not a host or a repository.
#[derive(Clone, Debug, Error, PartialEq, Eq)]
pub enum Error {
    /// The text is not `HOST[:PORT]`.
    #[error("invalid registry {0:?}; expected HOST[:PORT]")]
    Host(String),
    /// The repository's name is malformed.
    #[error(
        "{0:?} is not a repository name: lower-case letters, digits and single separators \
         (. _ __ -) between them, parts divided by slashes, at most {MAX_NAME} characters"
    )]
    Name(String),
    /// A URL of blobs is not `https://HOST/v2/REPOSITORY/blobs`.
    #[error("invalid blob URL {0:?}; expected https://HOST/v2/REPOSITORY/blobs")]
    BlobUrl(String),
}

/// A host with an optional port, lower case.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub struct Host(String);

/// The URL scheme of a registry.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub enum Scheme {
    /// Plain HTTP.
    Http,
    /// HTTP over TLS.
    Https,
}

/// A repository in a registry.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct Repository {
    scheme: Scheme,
    host: Host,
    name: String,
}

impl Host {
    /// The host without its port; IPv6 addresses in brackets.
    pub fn name(&self) -> &str {
        split_port(&self.0).0
    }

    /// The host that serves the API of the registry of this name.
    pub(super) fn into_api(self) -> Host {
        match self.as_str() {
            DOCKER_HUB => Host(DOCKER_HUB_API.to_owned()),
            _ => self,
        }
    }

    /// `HOST[:PORT]`.
    pub fn as_str(&self) -> &str {
        &self.0
    }
}

impl FromStr for Host {
    type Err = Error;

    fn from_str(text: &str) -> Result<Host, Error> {
        let refuse = || Error::Host(text.chars().take(MAX_HOST).collect());
        let (name, port) = split_port(text);
        let address = name
            .strip_prefix('[')
            .and_then(|rest| rest.strip_suffix(']'));
        let valid_name = match address {
            Some(address) => address.parse::<Ipv6Addr>().is_ok(),
            None => name.len() <= MAX_HOST && name.split('.').all(is_label),
        };
        let valid_port = port.is_none_or(|port| {
            port.bytes().all(|byte| byte.is_ascii_digit())
                && port.parse::<u16>().is_ok_and(|port| port != 0)
        });
        if !valid_name || !valid_port {
            return Err(refuse());
        }
        Ok(Host(text.to_ascii_lowercase()))
    }
}

impl fmt::Display for Host {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

impl Scheme {
    /// The name before `://`.
    pub const fn as_str(self) -> &'static str {
        match self {
            Scheme::Http => "http",
            Scheme::Https => "https",
        }
    }
}

impl Repository {
    /// The repository `name` of the registry at `host`.
    ///
    /// # Errors
    /// [`Error::Name`]: `name` is malformed.
    pub fn new(scheme: Scheme, host: Host, name: &str) -> Result<Repository, Error> {
        if name.len() > MAX_NAME || !name.split('/').all(is_name_part) {
            return Err(Error::Name(name.chars().take(MAX_NAME).collect()));
        }
        Ok(Repository {
            scheme,
            host: host.into_api(),
            name: name.to_owned(),
        })
    }

    /// The repository of an image config's `repoBlobUrl`. A missing scheme means HTTPS.
    ///
    /// # Errors
    /// [`Error::BlobUrl`]: not of the form `[SCHEME://]HOST/v2/REPOSITORY/blobs[/]`.
    /// [`Error::Host`] and [`Error::Name`]: a part of it is malformed.
    pub fn from_blob_url(url: &str) -> Result<Repository, Error> {
        let refuse = || Error::BlobUrl(url.chars().take(2 * MAX_NAME).collect());
        let (scheme, rest) = if let Some(rest) = url.strip_prefix("https://") {
            (Scheme::Https, rest)
        } else if let Some(rest) = url.strip_prefix("http://") {
            (Scheme::Http, rest)
        } else {
            (Scheme::Https, url)
        };
        let (host, path) = rest.split_once('/').ok_or_else(refuse)?;
        let path = path.strip_prefix("v2/").ok_or_else(refuse)?;
        let path = path.strip_suffix('/').unwrap_or(path);
        let name = path.strip_suffix("/blobs").ok_or_else(refuse)?;
        Repository::new(scheme, host.parse()?, name)
    }

    /// The same repository by another scheme.
    pub fn with_scheme(self, scheme: Scheme) -> Repository {
        Repository { scheme, ..self }
    }

    /// The same repository by plain HTTP, if its host is among `insecure`.
    pub fn reached(&self, insecure: &[Host]) -> Repository {
        match insecure.contains(&self.host) {
            true => self.clone().with_scheme(Scheme::Http),
            false => self.clone(),
        }
    }

    /// Scheme of its URLs.
    pub fn scheme(&self) -> Scheme {
        self.scheme
    }

    /// The registry's host.
    pub fn host(&self) -> &Host {
        &self.host
    }

    /// Name within the registry.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// Path of a blob on the registry's host.
    pub fn blob_path(&self, digest: &Digest) -> String {
        format!("/v2/{}/blobs/{digest}", self.name)
    }

    /// Path of a manifest on the registry's host; `selector` is a tag or a digest.
    pub fn manifest_path(&self, selector: &str) -> String {
        format!("/v2/{}/manifests/{selector}", self.name)
    }

    /// URL of what is at `path` on the registry's host.
    pub fn url(&self, path: &str) -> String {
        format!("{}://{}{path}", self.scheme.as_str(), self.host)
    }

    /// Value of `repoBlobUrl` in an image config.
    pub fn blob_url(&self) -> String {
        self.url(&format!("/v2/{}/blobs", self.name))
    }

    /// The scope of a token that lets this repository be read.
    pub fn pull_scope(&self) -> String {
        format!("repository:{}:pull", self.name)
    }
}

fn split_port(text: &str) -> (&str, Option<&str>) {
    let name_end = text.rfind(']').map_or(0, |bracket| bracket + 1);
    match text[name_end..].find(':') {
        Some(colon) => {
            let (name, port) = text.split_at(name_end + colon);
            (name, Some(&port[1..]))
        }
        None => (text, None),
    }
}

fn is_label(label: &str) -> bool {
    let bytes = label.as_bytes();
    let edge = |byte: Option<&u8>| byte.is_some_and(u8::is_ascii_alphanumeric);
    let inner = |byte: &u8| byte.is_ascii_alphanumeric() || matches!(byte, b'-' | b'_');
    edge(bytes.first()) && edge(bytes.last()) && bytes.iter().all(inner)
}

/// Runs of lower-case letters and digits, divided by `.`, `_`, `__` or any number of `-`.
fn is_name_part(part: &str) -> bool {
    let is_word = |byte: u8| byte.is_ascii_lowercase() || byte.is_ascii_digit();
    let edge = |byte: Option<u8>| byte.is_some_and(is_word);
    let known = |byte: u8| is_word(byte) || matches!(byte, b'.' | b'_' | b'-');
    let separators = part.split(|char: char| char.is_ascii_lowercase() || char.is_ascii_digit());
    edge(part.bytes().next())
        && edge(part.bytes().last())
        && part.bytes().all(known)
        && separators
            .filter(|separator| !separator.is_empty())
            .all(|separator| {
                matches!(separator, "." | "_" | "__") || separator.bytes().all(|byte| byte == b'-')
            })
}

#[cfg(test)]
mod tests {
    use super::*;

    const DIGEST: &str = "sha256:e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855";

    #[test]
    fn a_repository_gives_urls() {
        let repository =
            Repository::new(Scheme::Https, "docker.io".parse().unwrap(), "library/redis").unwrap();
        let digest = DIGEST.parse().unwrap();
        assert_eq!(
            repository.url(&repository.blob_path(&digest)),
            format!("https://registry-1.docker.io/v2/library/redis/blobs/{DIGEST}")
        );
        assert_eq!(
            repository.manifest_path("1"),
            "/v2/library/redis/manifests/1"
        );
        assert_eq!(repository.pull_scope(), "repository:library/redis:pull");
        assert_eq!(
            Repository::from_blob_url(&repository.blob_url()).unwrap(),
            repository
        );
    }

    #[test]
    fn a_blob_url_gives_a_repository() {
        for (url, expected) in [
            (
                "https://r.example/v2/a/b/blobs",
                "https://r.example/v2/a/b/blobs",
            ),
            (
                "http://localhost:5000/v2/a/blobs/",
                "http://localhost:5000/v2/a/blobs",
            ),
            (
                "r.example:5000/v2/a/blobs",
                "https://r.example:5000/v2/a/blobs",
            ),
            (
                "https://docker.io/v2/l/a/blobs",
                "https://registry-1.docker.io/v2/l/a/blobs",
            ),
        ] {
            assert_eq!(Repository::from_blob_url(url).unwrap().blob_url(), expected);
        }
        for url in [
            "",
            "https://",
            "https://r.example",
            "https://r.example/v2/blobs",
            "ftp://r/v2/a/blobs",
            "https://r.example/v1/a/blobs",
            "https://r.example/v2/a",
            "https:///v2/a/blobs",
            "https://r.example/v2/../a/blobs",
            "https://u:p@r.example/v2/a/blobs",
        ] {
            assert!(Repository::from_blob_url(url).is_err(), "{url}");
        }
    }
}
