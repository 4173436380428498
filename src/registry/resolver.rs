//! The resolver of `ureq`'s agents: addresses of hosts, without those to which a server may not send this program.
//!
//! `ureq` resolves for every request, also where it then takes an idle connection; [`Names`] remembers
//! addresses, so that a range does not cost a look-up.

use std::fmt;
use std::io;
use std::net::IpAddr;
use std::sync::Arc;
use std::time::Duration;

use ureq::Error;
use ureq::config::Config;
use ureq::http::Uri;
use ureq::unversioned::resolver::{ResolvedSocketAddrs, Resolver};
use ureq::unversioned::transport::NextTimeout;

use super::address::NamedBy;
use super::names::Names;

/// Longest wait for a look-up, even if the request allows more.
const MAX_WAIT: Duration = Duration::from_secs(30);

/// Resolver of one agent.
#[derive(Debug)]
pub(super) struct NameResolver {
    names: Names,
    /// Addresses that the party may not name are left out.
    named: NamedBy,
}

/// The resolver's failure, apart from those of connections.
#[derive(Debug)]
pub(super) enum Failure {
    /// The name has no address, or the look-up failed.
    Lookup(Arc<io::Error>),
    /// All addresses are local; this is one of them.
    Local(IpAddr),
}

impl NameResolver {
    /// A resolver of hosts that this party named.
    pub(super) fn new(names: Names, named: NamedBy) -> NameResolver {
        NameResolver { names, named }
    }
}

impl Resolver for NameResolver {
    fn resolve(
        &self,
        uri: &Uri,
        _: &Config,
        timeout: NextTimeout,
    ) -> Result<ResolvedSocketAddrs, Error> {
        let host = uri
            .host()
            .ok_or_else(|| Error::BadUri("no host".to_owned()))?;
        let secure = uri.scheme_str() == Some("https");
        let port = uri.port_u16().unwrap_or(if secure { 443 } else { 80 });
        let addresses = self
            .names
            .look_up(&format!("{host}:{port}"), (*timeout.after).min(MAX_WAIT))
            .map_err(|error| Error::Other(Box::new(Failure::Lookup(error))))?;
        let mut found = self.empty();
        let mut local = None;
        for address in addresses {
            if self.named.may_reach(address.ip()) {
                found.push(address);
            } else {
                local = Some(address.ip());
            }
        }
        match local.filter(|_| found.is_empty()) {
            Some(address) => Err(Error::Other(Box::new(Failure::Local(address)))),
            None => Ok(found),
        }
    }
}

impl fmt::Display for Failure {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Failure::Lookup(_) => f.write_str("look-up failed"),
            Failure::Local(address) => write!(f, "the name has only local addresses: {address}"),
        }
    }
}

impl std::error::Error for Failure {}

#[cfg(test)]
mod tests {
    use std::net::SocketAddr;

    use super::*;

    fn resolve(resolver: &NameResolver, uri: &str) -> Result<Vec<SocketAddr>, Error> {
        let (uri, config) = (uri.parse().unwrap(), Config::default());
        let found = resolver.resolve(&uri, &config, NextTimeout::default())?;
        Ok(found.iter().copied().collect())
    }

    #[test]
    fn ports_have_their_defaults() {
        let resolver = NameResolver::new(Names::default(), NamedBy::User);
        for (uri, expected) in [
            ("http://127.0.0.1/", "127.0.0.1:80"),
            ("https://127.0.0.1/", "127.0.0.1:443"),
            ("http://[::1]:5000/", "[::1]:5000"),
        ] {
            let expected: SocketAddr = expected.parse().unwrap();
            assert_eq!(resolve(&resolver, uri).unwrap(), [expected]);
        }
    }

    #[test]
    fn local_addresses_are_left_out_if_guarded() {
        let names = Names::default();
        let [open, nearby, guarded] = [NamedBy::User, NamedBy::Neighbor, NamedBy::Server]
            .map(|named| NameResolver::new(names.clone(), named));
        assert!(resolve(&open, "http://localhost/").is_ok());
        assert!(resolve(&open, "http://169.254.169.254/").is_ok());
        assert!(resolve(&nearby, "http://localhost/").is_ok());
        assert!(resolve(&nearby, "http://169.254.169.254/").is_err());
        for uri in [
            "http://localhost/",
            "http://127.0.0.1/",
            "http://169.254.169.254/",
        ] {
            let Err(Error::Other(refused)) = resolve(&guarded, uri) else {
                panic!("{uri} is resolved");
            };
            assert!(
                matches!(refused.downcast_ref(), Some(Failure::Local(_))),
                "{uri}"
            );
        }
        assert!(resolve(&guarded, "http://10.0.0.1/").is_ok());
    }
}
