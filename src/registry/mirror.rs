//! Mirrors and peer-to-peer proxies: other ways to the same blobs, each tried before the registry.
//!
//! Two forms are in use. A mirror serves the registry API and learns from `ns` which registry is
//! meant (containerd's form: Dragonfly, spegel, zot, Harbor, Artifactory). A prefix proxy gets the
//! whole URL of the blob appended to its own (upstream's `p2pConfig`: dadi-p2proxy, peerd).

use std::str::FromStr;

use serde::{Deserialize, Serialize};
use thiserror::Error;

use super::address::names_this_machine;
use super::repository::{self, Host, Repository};
use super::url::{self, Url};
use crate::format::digest::Digest;

/// Most headers of one mirror.
const MAX_HEADERS: usize = 16;

/// Headers that only this program sets.
const RESERVED: [&str; 7] = [
    "accept-encoding",
    "authorization",
    "connection",
    "content-length",
    "host",
    "range",
    "transfer-encoding",
];

/// Error of an option that does not name a mirror or a proxy.
#[derive(Clone, Debug, Error, PartialEq, Eq)]
pub enum Error {
    /// No equals sign between registry and URL.
    #[error("invalid mirror {0:?}; expected HOST=URL[,header=NAME:VALUE]...")]
    Form(String),
    /// The registry's host is malformed.
    #[error(transparent)]
    Host(#[from] repository::Error),
    /// The URL is malformed.
    #[error(transparent)]
    Url(#[from] url::Error),
    /// The URL has a query, behind which nothing can be appended.
    #[error("the URL {0} has a query; the URL of a mirror or proxy must have none")]
    Query(String),
    /// A header is malformed or reserved.
    #[error("header {0:?} is malformed or not allowed for a mirror; expected header=NAME:VALUE")]
    Header(String),
    /// A proxy that is not on this machine would get the registry's tokens.
    #[error(
        "peer-to-peer proxy {0} has no loopback address; expected one, because the proxy receives \
         credentials of registries; allow it with --p2p-host {0}"
    )]
    Remote(Host),
}

/// A mirror of one registry: `HOST=URL[,header=NAME:VALUE]...`.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Mirror {
    host: Host,
    base: Url,
    headers: Vec<(String, String)>,
}

/// A peer-to-peer proxy that gets URLs behind its own.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Prefix(Url);

impl Mirror {
    /// The mirror's own host.
    pub fn own_host(&self) -> &Host {
        self.base.host()
    }

    /// Headers that its requests get.
    pub fn headers(&self) -> &[(String, String)] {
        &self.headers
    }

    /// URL of a blob at the mirror; `None` if it mirrors another registry.
    pub(super) fn blob(&self, repository: &Repository, digest: &Digest) -> Option<Url> {
        self.url(repository, "blobs", digest)
    }

    /// URL of a manifest at the mirror; `None` if it mirrors another registry.
    pub(super) fn manifest(&self, repository: &Repository, digest: &Digest) -> Option<Url> {
        self.url(repository, "manifests", digest)
    }

    fn url(&self, repository: &Repository, kind: &str, digest: &Digest) -> Option<Url> {
        if self.host != *repository.host() {
            return None;
        }
        let base = self.base.path().trim_end_matches('/');
        let api = if base == "/v2" || base.starts_with("/v2/") {
            ""
        } else {
            "/v2"
        };
        let mut path = format!("{base}{api}/{}/{kind}/{digest}", repository.name());
        if self.base.host() != repository.host() {
            path.push_str(&format!("?ns={}", namespace(repository.host())));
        }
        Url::new(self.base.scheme(), self.base.host().clone(), &path)
    }
}

/// Name of a registry in `ns`.
fn namespace(host: &Host) -> &str {
    match host.as_str() {
        "registry-1.docker.io" => "docker.io",
        host => host,
    }
}

impl FromStr for Mirror {
    type Err = Error;

    fn from_str(text: &str) -> Result<Mirror, Error> {
        let mut parts = text.split(',');
        let first = parts.next().unwrap_or_default();
        let (host, base) = first
            .split_once('=')
            .ok_or_else(|| Error::Form(text.to_owned()))?;
        let host: Host = host.parse()?;
        let headers: Vec<_> = parts.map(header).collect::<Result<_, _>>()?;
        if headers.len() > MAX_HEADERS {
            return Err(Error::Form(text.chars().take(200).collect()));
        }
        Ok(Mirror {
            host: host.into_api(),
            base: base_url(base)?,
            headers,
        })
    }
}

impl Prefix {
    /// URL that makes the proxy fetch `url`.
    pub(super) fn of(&self, url: &Url) -> Option<Url> {
        let base = self.0.path().trim_end_matches('/');
        Url::new(
            self.0.scheme(),
            self.0.host().clone(),
            &format!("{base}/{url}"),
        )
    }

    /// The proxy's own host.
    pub fn own_host(&self) -> &Host {
        self.0.host()
    }

    /// Checks that the proxy may get credentials of registries: it is on this machine, or at one of the
    /// `allowed` hosts.
    ///
    /// # Errors
    /// [`Error::Remote`].
    pub(super) fn check_allowed(&self, allowed: &[Host]) -> Result<(), Error> {
        let host = self.0.host();
        match names_this_machine(host) || allowed.contains(host) {
            true => Ok(()),
            false => Err(Error::Remote(host.clone())),
        }
    }
}

impl FromStr for Prefix {
    type Err = Error;

    fn from_str(text: &str) -> Result<Prefix, Error> {
        let url = if text.contains("://") {
            base_url(text)?
        } else {
            // Upstream's own example has no scheme.
            base_url(&format!("http://{text}"))?
        };
        Ok(Prefix(url))
    }
}

fn base_url(text: &str) -> Result<Url, Error> {
    let url = Url::parse(text)?;
    if url.path().contains('?') {
        return Err(Error::Query(url.without_query()));
    }
    Ok(url)
}

fn header(part: &str) -> Result<(String, String), Error> {
    let refuse = || Error::Header(part.chars().take(200).collect());
    let field = part.strip_prefix("header=").ok_or_else(refuse)?;
    let (name, value) = field.split_once(':').ok_or_else(refuse)?;
    let name = name.trim().to_ascii_lowercase();
    let value = value.trim();
    let valid_name = !name.is_empty()
        && name
            .bytes()
            .all(|byte| byte.is_ascii_alphanumeric() || b"-_".contains(&byte));
    let valid_value = value
        .bytes()
        .all(|byte| byte.is_ascii_graphic() || byte == b' ');
    if !valid_name || !valid_value || RESERVED.contains(&name.as_str()) {
        return Err(refuse());
    }
    Ok((name, value.to_owned()))
}

#[cfg(test)]
mod tests {
    use super::super::repository::Scheme;
    use super::*;

    fn blob(mirror: &str, host: &str) -> Option<String> {
        let mirror: Mirror = mirror.parse().unwrap();
        let repository = Repository::new(Scheme::Https, host.parse().unwrap(), "a/b").unwrap();
        let url = mirror.blob(&repository, &Digest::from_bytes([0; 32]))?;
        Some(url.to_string().replace(&"0".repeat(64), "0"))
    }

    #[test]
    fn a_mirror_serves_the_registry_it_is_for() {
        for (mirror, host, expected) in [
            (
                "r.example=http://m:4001",
                "r.example",
                "http://m:4001/v2/a/b/blobs/sha256:0?ns=r.example",
            ),
            (
                "docker.io=http://m/",
                "docker.io",
                "http://m/v2/a/b/blobs/sha256:0?ns=docker.io",
            ),
            (
                "r.example=https://h/v2/proxy",
                "r.example",
                "https://h/v2/proxy/a/b/blobs/sha256:0?ns=r.example",
            ),
            (
                "r.example=https://h/art/r",
                "r.example",
                "https://h/art/r/v2/a/b/blobs/sha256:0?ns=r.example",
            ),
            (
                "r.example=https://r.example",
                "r.example",
                "https://r.example/v2/a/b/blobs/sha256:0",
            ),
        ] {
            assert_eq!(blob(mirror, host).as_deref(), Some(expected), "{mirror}");
        }
        assert_eq!(blob("r.example=http://m", "other.example"), None);
        assert_eq!(blob("r.example=http://m", "r.example:5000"), None);
    }

    #[test]
    fn headers_are_kept() {
        let text = "r.example=http://m,header=X-Dragonfly-Registry: https://r.example,header=x-a:";
        let mirror: Mirror = text.parse().unwrap();
        let expected = [("x-dragonfly-registry", "https://r.example"), ("x-a", "")];
        let expected = expected.map(|(name, value)| (name.to_owned(), value.to_owned()));
        assert_eq!(mirror.headers(), expected);
    }

    #[test]
    fn malformed_mirrors_are_refused() {
        for text in [
            "",
            "http://m",
            "r.example=",
            "r.example=m",
            "=http://m",
            "r/x=http://m",
            "r.example=http://m?x=y",
            "r.example=http://m,x",
            "r.example=http://m,header=x",
            "r.example=http://m,header=:y",
            "r.example=http://m,header=Authorization: Basic x",
            "r.example=http://m,header=host:x",
            "r.example=http://m,header=x: a\r\nb: c",
            "r.example=ftp://m",
            "r.example=http://u:p@m",
        ] {
            assert!(text.parse::<Mirror>().is_err(), "{text:?}");
        }
        let many = format!("r.example=http://m{}", ",header=a:b".repeat(17));
        assert!(many.parse::<Mirror>().is_err());
    }

    #[test]
    fn a_prefix_stands_before_the_url() {
        let url = Url::parse("https://s.example/k?sig=x%2F").unwrap();
        for (prefix, expected) in [
            (
                "localhost:19145/dadip2p",
                "http://localhost:19145/dadip2p/https://s.example/k?sig=x%2F",
            ),
            (
                "http://127.0.0.1:30000/blobs/",
                "http://127.0.0.1:30000/blobs/https://s.example/k?sig=x%2F",
            ),
        ] {
            let prefix: Prefix = prefix.parse().unwrap();
            assert_eq!(prefix.of(&url).unwrap().to_string(), expected);
        }
        for text in [
            "http://p2p.example/x",
            "10.0.0.1:80",
            "169.254.169.254/x",
            "[fe80::1]/x",
        ] {
            let prefix: Prefix = text.parse().unwrap();
            let refused = prefix.check_allowed(&["p.example".parse().unwrap()]);
            assert!(matches!(refused, Err(Error::Remote(_))), "{text}");
            let own = prefix.own_host().clone();
            prefix.check_allowed(&[own]).unwrap();
        }
        let near: Prefix = "localhost:19145/x".parse().unwrap();
        near.check_allowed(&[]).unwrap();
        for text in ["", "localhost?x", "http://"] {
            assert!(text.parse::<Prefix>().is_err(), "{text}");
        }
    }
}
