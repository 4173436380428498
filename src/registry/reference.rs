//! Image references, `host[:port]/repository[:tag][@digest]`, with the defaults Docker gives them.

use std::fmt;
use std::str::FromStr;

use thiserror::Error;

use super::repository::{self, DOCKER_HUB, MAX_HOST, MAX_NAME, Repository, Scheme};
use crate::format::digest::{Digest, DigestError};

/// Most characters of a tag, from the distribution specification.
const MAX_TAG: usize = 128;

/// Error of a text that is not an image reference.
#[derive(Clone, Debug, Error, PartialEq, Eq)]
pub enum Error {
    /// The text is empty or too long.
    #[error("an image reference has 1 to {MAX_REFERENCE} characters; found {0}")]
    Length(usize),
    /// The host or the repository's name is malformed.
    #[error(transparent)]
    Repository(#[from] repository::Error),
    /// The tag is malformed.
    #[error("invalid tag {0:?}; expected at most {MAX_TAG} of letters, digits, _ . and -")]
    Tag(String),
    /// The digest is malformed.
    #[error(transparent)]
    Digest(#[from] DigestError),
}

/// Most characters of a reference: the longest of each part.
const MAX_REFERENCE: usize = MAX_HOST + 6 + 1 + MAX_NAME + 1 + MAX_TAG + 1 + 71;

/// An image: a repository and a tag, a digest, or both.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Reference {
    repository: Repository,
    tag: Option<String>,
    digest: Option<Digest>,
}

impl Reference {
    /// The repository; HTTPS unless changed by [`Repository::with_scheme`].
    pub fn repository(&self) -> &Repository {
        &self.repository
    }

    /// The digest that pins the manifest.
    pub fn digest(&self) -> Option<&Digest> {
        self.digest.as_ref()
    }

    /// What selects the manifest in its repository: the digest, else the tag.
    pub fn selector(&self) -> String {
        match (&self.digest, &self.tag) {
            (Some(digest), _) => digest.to_string(),
            (None, Some(tag)) => tag.clone(),
            (None, None) => "latest".to_owned(),
        }
    }
}

impl FromStr for Reference {
    type Err = Error;

    fn from_str(text: &str) -> Result<Reference, Error> {
        if text.is_empty() || text.len() > MAX_REFERENCE {
            return Err(Error::Length(text.len()));
        }
        let (rest, digest) = match text.split_once('@') {
            Some((rest, digest)) => (rest, Some(digest.parse()?)),
            None => (text, None),
        };
        // A colon after the last slash divides off a tag; one before it, a port.
        let after_slash = rest.rfind('/').map_or(0, |slash| slash + 1);
        let (rest, tag) = match rest[after_slash..].rfind(':') {
            Some(colon) => {
                let (rest, tag) = rest.split_at(after_slash + colon);
                (rest, Some(checked_tag(&tag[1..])?))
            }
            None => (rest, None),
        };
        let (host, name) = split_host(rest);
        let name = if host == DOCKER_HUB && !name.contains('/') {
            format!("library/{name}")
        } else {
            name.to_owned()
        };
        let tag = tag.or_else(|| digest.is_none().then(|| "latest".to_owned()));
        Ok(Reference {
            repository: Repository::new(Scheme::Https, host.parse()?, &name)?,
            tag,
            digest,
        })
    }
}

impl fmt::Display for Reference {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let repository = &self.repository;
        write!(f, "{}/{}", repository.host(), repository.name())?;
        if let Some(tag) = &self.tag {
            write!(f, ":{tag}")?;
        }
        match &self.digest {
            Some(digest) => write!(f, "@{digest}"),
            None => Ok(()),
        }
    }
}

/// The host and the rest. As Docker decides it: the first of several parts is a host if it has a
/// dot or a colon, or is `localhost`.
fn split_host(text: &str) -> (&str, &str) {
    match text.split_once('/') {
        Some((host, name)) if host.contains(['.', ':']) || host == "localhost" => match host {
            "index.docker.io" => (DOCKER_HUB, name),
            host => (host, name),
        },
        _ => (DOCKER_HUB, text),
    }
}

fn checked_tag(tag: &str) -> Result<String, Error> {
    let first = tag.bytes().next();
    let start = first.is_some_and(|byte| byte.is_ascii_alphanumeric() || byte == b'_');
    let rest = |byte: u8| byte.is_ascii_alphanumeric() || matches!(byte, b'_' | b'.' | b'-');
    if !start || tag.len() > MAX_TAG || !tag.bytes().all(rest) {
        return Err(Error::Tag(tag.to_owned()));
    }
    Ok(tag.to_owned())
}

#[cfg(test)]
mod tests {
    use super::*;

    const DIGEST: &str = "sha256:e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855";

    fn parsed(text: &str) -> (String, String, Option<String>, bool) {
        let reference: Reference = text.parse().unwrap_or_else(|e| panic!("{text}: {e}"));
        let again: Reference = reference.to_string().parse().unwrap();
        assert_eq!(again, reference, "{text}");
        (
            reference.repository.host().to_string(),
            reference.repository.name().to_owned(),
            reference.tag,
            reference.digest.is_some(),
        )
    }

    #[test]
    fn defaults_are_those_of_docker() {
        let hub = "registry-1.docker.io";
        let pinned = format!("redis@{DIGEST}");
        let both = format!("r.example/a/b:1.2@{DIGEST}");
        for (text, host, name, tag, digest) in [
            ("redis", hub, "library/redis", Some("latest"), false),
            ("docker.io/redis:7", hub, "library/redis", Some("7"), false),
            ("index.docker.io/a/b", hub, "a/b", Some("latest"), false),
            (
                "overlaybd/redis",
                hub,
                "overlaybd/redis",
                Some("latest"),
                false,
            ),
            (&pinned, hub, "library/redis", None, true),
            ("localhost/a", "localhost", "a", Some("latest"), false),
            (
                "h:5000/a/b/c:T_1.x-",
                "h:5000",
                "a/b/c",
                Some("T_1.x-"),
                false,
            ),
            ("[::1]:5000/a", "[::1]:5000", "a", Some("latest"), false),
            ("R.Example/a", "r.example", "a", Some("latest"), false),
            (&both, "r.example", "a/b", Some("1.2"), true),
            (
                "r.example/a--b/c__d/e.f_g",
                "r.example",
                "a--b/c__d/e.f_g",
                Some("latest"),
                false,
            ),
        ] {
            let tag = tag.map(str::to_owned);
            assert_eq!(
                parsed(text),
                (host.to_owned(), name.to_owned(), tag, digest),
                "{text}"
            );
        }
    }

    #[test]
    fn a_digest_wins_over_a_tag() {
        let both: Reference = format!("r.example/a:1@{DIGEST}").parse().unwrap();
        assert_eq!(both.selector(), DIGEST);
        assert_eq!(
            "r.example/a:1".parse::<Reference>().unwrap().selector(),
            "1"
        );
    }

    #[test]
    fn malformed_references_are_refused() {
        let long_tag = format!("a:{}", "x".repeat(129));
        let long_name = format!("r.example/{}", "x".repeat(256));
        let longest = "x".repeat(1 << 20);
        for text in [
            "",
            "/",
            "a/",
            "/a",
            "a//b",
            "Redis",
            "r.example/A",
            "a:",
            "a:b:c",
            "a:-x",
            "a@",
            "a@b",
            "a b",
            "a/../b",
            "r.example/../../etc",
            "a/.",
            "a/_b",
            "a/b_",
            "a/b___c",
            "a/b._c",
            "r.example:/a",
            "r.example:0/a",
            "r.example:99999/a",
            "r.example:+5/a",
            "-r.example/a",
            "r..example/a",
            "[::g]/a",
            "[::1/a",
            "u:p@r.example/a",
            "https://r.example/a",
            "a?b=c",
            "a#b",
            "a%2fb",
            "é",
            "r.example/é",
            "a:é",
            "\u{0}",
            "r.example\r\nX: y/a",
            &long_tag,
            &long_name,
            &longest,
        ] {
            let refused = text.parse::<Reference>();
            assert!(refused.is_err(), "{text:.90?} is taken as {refused:?}");
            assert!(refused.unwrap_err().to_string().len() < 2000);
        }
    }
}
