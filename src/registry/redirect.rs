//! Where a server may send this program: the target of a redirect, the realm of a challenge.

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

#[cfg(test)]
mod tests {
    use super::*;

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
