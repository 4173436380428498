//! Checks of URLs that servers choose: the target of a redirect, the realm of a challenge.

use super::address::names_local;
use super::error::{Error, Result};
use super::http::Named;
use super::repository::Scheme;
use super::url::Url;

/// Whether a server at `from` may send this program to `to`, and how far `to` is then trusted.
///
/// # Errors
/// [`Error::Redirect`]: from TLS to plain HTTP, or to this machine or its link.
pub(super) fn check_target(from: &Url, to: &Url) -> Result<Named> {
    let refuse = |reason| {
        Err(Error::Redirect {
            host: from.host().clone(),
            target: to.without_query(),
            reason,
        })
    };
    if from.scheme() == Scheme::Https && to.scheme() == Scheme::Http {
        return refuse("from https to plain http");
    }
    // A registry on this machine was named by the user, and may use others on it.
    if names_local(from.host()) {
        return Ok(Named::ByUser);
    }
    if names_local(to.host()) {
        return refuse("the target is loopback, link-local or a metadata service");
    }
    Ok(Named::ByServer)
}

/// Whether a mirror or proxy at `peer` may send this program to `to` for what the registry has at
/// `actual`. Peers of its network speak plain HTTP.
///
/// # Errors
/// [`Error::Redirect`]: to this machine or its link, other than to the proxy itself.
pub(super) fn check_peer_target(actual: &Url, peer: &Url, to: &Url) -> Result<Named> {
    if to.host() == peer.host() || names_local(actual.host()) {
        return Ok(Named::ByUser);
    }
    if names_local(to.host()) {
        return Err(Error::Redirect {
            host: peer.host().clone(),
            target: to.without_query(),
            reason: "the target is loopback, link-local or a metadata service",
        });
    }
    Ok(Named::ByServer)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_peer_may_name_other_peers_but_not_this_machine() {
        let url = |text: &str| Url::parse(text).unwrap();
        let (actual, peer) = (url("https://r.example/b"), url("http://127.0.0.1:19145/p"));
        let check = |to: &str| check_peer_target(&actual, &peer, &url(to));
        assert_eq!(check("http://10.0.0.5:19145/p").unwrap(), Named::ByServer);
        assert_eq!(check("http://127.0.0.1:19145/q").unwrap(), Named::ByUser);
        for to in ["http://127.0.0.1:80/", "http://169.254.169.254/"] {
            assert!(check(to).is_err(), "{to}");
        }
    }

    fn check(from: &str, to: &str) -> Result<Named> {
        check_target(&Url::parse(from).unwrap(), &Url::parse(to).unwrap())
    }

    #[test]
    fn targets_elsewhere_are_allowed() {
        for (from, to, named) in [
            ("https://r.example/", "https://s.example/k", Named::ByServer),
            ("http://r.example/", "https://s.example/k", Named::ByServer),
            ("http://r.example/", "http://10.0.0.1/k", Named::ByServer),
            (
                "http://127.0.0.1:5000/",
                "http://127.0.0.1:9000/k",
                Named::ByUser,
            ),
            (
                "http://localhost:5000/",
                "https://s.example/k",
                Named::ByUser,
            ),
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
        ] {
            let refused = check(from, to).unwrap_err();
            assert!(matches!(refused, Error::Redirect { .. }), "{from} {to}");
            assert!(refused.is_definite());
        }
    }
}
