//! Checks of URLs that servers choose: the target of a redirect, the realm of a challenge.

use super::address::{Locality, NamedBy, locality};
use super::error::{Error, Result};
use super::repository::{Host, Scheme};
use super::url::Url;

/// Whether a server at `from` may send this program to `to`, and how far `to` is then trusted.
///
/// # Errors
/// [`Error::Redirect`]: from TLS to plain HTTP, or to this machine or its link, unless `from` is there.
pub(super) fn check_target(from: &Url, to: &Url) -> Result<NamedBy> {
    let refuse = |reason: &str| {
        Err(Error::Redirect {
            host: from.host().clone(),
            target: to.without_query(),
            reason: reason.to_owned(),
        })
    };
    if from.scheme() == Scheme::Https && to.scheme() == Scheme::Http {
        return refuse("from https to plain http");
    }
    named_from(from.host(), to.host()).map_or_else(|| refuse(ASTRAY), Ok)
}

/// Whether a mirror or proxy at `peer` may send this program to `to` for what the registry has at
/// `actual`. Peers of its network speak plain HTTP.
///
/// # Errors
/// [`Error::Redirect`]: to this machine or its link, other than to the proxy itself.
pub(super) fn check_peer_target(actual: &Url, peer: &Url, to: &Url) -> Result<NamedBy> {
    if to.host() == peer.host() {
        return Ok(NamedBy::User);
    }
    named_from(actual.host(), to.host()).ok_or_else(|| Error::Redirect {
        host: peer.host().clone(),
        target: to.without_query(),
        reason: ASTRAY.to_owned(),
    })
}

const ASTRAY: &str = "the target is loopback, link-local or a metadata service";

/// How far `to` is trusted if a server at `from` names it; `None`: not at all. A server on this machine
/// may use others on it, but not the services that only this machine reaches.
fn named_from(from: &Host, to: &Host) -> Option<NamedBy> {
    match (locality(from), locality(to)) {
        (Some(Locality::Machine), Some(Locality::Machine) | None) => Some(NamedBy::Neighbor),
        (Some(Locality::Link), Some(Locality::Link)) => Some(NamedBy::User),
        (None | Some(Locality::Link), None) => Some(NamedBy::Server),
        (_, Some(_)) => None,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_peer_may_name_other_peers_but_not_this_machine() {
        let url = |text: &str| Url::parse(text).unwrap();
        let (actual, peer) = (url("https://r.example/b"), url("http://127.0.0.1:19145/p"));
        let check = |to: &str| check_peer_target(&actual, &peer, &url(to));
        assert_eq!(check("http://10.0.0.5:19145/p").unwrap(), NamedBy::Server);
        assert_eq!(check("http://127.0.0.1:19145/q").unwrap(), NamedBy::User);
        for to in ["http://127.0.0.1:80/", "http://169.254.169.254/"] {
            assert!(check(to).is_err(), "{to}");
        }
        let actual = url("http://127.0.0.1:5000/b");
        let check = |to: &str| check_peer_target(&actual, &peer, &url(to));
        assert_eq!(check("http://127.0.0.1:80/").unwrap(), NamedBy::Neighbor);
        assert!(check("http://169.254.169.254/").is_err());
    }

    fn check(from: &str, to: &str) -> Result<NamedBy> {
        check_target(&Url::parse(from).unwrap(), &Url::parse(to).unwrap())
    }

    #[test]
    fn targets_elsewhere_are_allowed() {
        for (from, to, named) in [
            ("https://r.example/", "https://s.example/k", NamedBy::Server),
            ("http://r.example/", "https://s.example/k", NamedBy::Server),
            ("http://r.example/", "http://10.0.0.1/k", NamedBy::Server),
            (
                "http://127.0.0.1:5000/",
                "http://127.0.0.1:9000/k",
                NamedBy::Neighbor,
            ),
            (
                "http://localhost:5000/",
                "https://s.example/k",
                NamedBy::Neighbor,
            ),
            ("http://169.254.7.7/", "http://169.254.7.8/k", NamedBy::User),
            ("http://[fe80::7]/", "https://s.example/k", NamedBy::Server),
        ] {
            assert_eq!(check(from, to).unwrap(), named, "{from} {to}");
        }
    }

    #[test]
    fn local_targets_and_plain_ones_are_refused() {
        for (from, to) in [
            ("https://r.example/", "http://r.example/"),
            ("https://127.0.0.1/", "http://127.0.0.1/"),
            ("https://r.example/", "https://127.0.0.1/"),
            (
                "http://r.example/",
                "http://169.254.169.254/latest/meta-data",
            ),
            ("http://r.example/", "http://[fe80::1]/"),
            ("http://r.example/", "http://[::ffff:127.0.0.1]/"),
            ("http://r.example/", "http://localhost/"),
            ("http://r.example/", "http://0/"),
            ("http://127.0.0.1/", "http://169.254.169.254/"),
            ("http://localhost/", "http://[fe80::1]/"),
            ("http://[::1]/", "http://100.100.100.200/"),
            ("http://169.254.7.7/", "http://127.0.0.1/"),
        ] {
            let refused = check(from, to).unwrap_err();
            assert!(matches!(refused, Error::Redirect { .. }), "{from} {to}");
            assert!(refused.is_definite());
        }
    }
}
