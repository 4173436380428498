//! Host names to addresses, remembered for a while, and refused where a server may not send us.
//!
//! `ureq` resolves for every request, also where it then takes an idle connection; without memory
//! each range would cost a look-up. The look-ups themselves are bounded by the C library.

use std::collections::HashMap;
use std::fmt;
use std::io;
use std::net::{SocketAddr, ToSocketAddrs};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use ureq::Error;
use ureq::config::Config;
use ureq::http::Uri;
use ureq::unversioned::resolver::{ResolvedSocketAddrs, Resolver};
use ureq::unversioned::transport::NextTimeout;

use super::address::is_local;

/// Addresses are looked up again after so long.
const MAX_AGE: Duration = Duration::from_secs(60);

/// Most names that are remembered.
const MAX_NAMES: usize = 256;

/// Most addresses of a host that are tried; [`ResolvedSocketAddrs`] holds 16.
const MAX_ADDRESSES: usize = 8;

/// Addresses by `HOST:PORT`.
#[derive(Clone, Debug, Default)]
pub(super) struct Names(Arc<Mutex<HashMap<String, Known>>>);

/// When a name was looked up, and what was found.
type Known = (Instant, Vec<SocketAddr>);

/// Resolves for an agent.
#[derive(Debug)]
pub(super) struct NameResolver {
    names: Names,
    /// Whether local addresses are left out.
    guarded: bool,
}

/// The resolver's failure, apart from those of connections.
#[derive(Debug)]
pub(super) enum Failure {
    /// The name has no address, or the look-up failed.
    Lookup(io::Error),
    /// All addresses are local ones.
    Local,
}

impl Names {
    /// Forgets all addresses: a connection failed, and they may have changed.
    pub(super) fn forget(&self) {
        self.0
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .clear();
    }

    fn look_up(&self, name: &str) -> io::Result<Vec<SocketAddr>> {
        let known = || self.0.lock().unwrap_or_else(PoisonError::into_inner);
        let now = Instant::now();
        if let Some((since, addresses)) = known().get(name)
            && now.duration_since(*since) < MAX_AGE
        {
            return Ok(addresses.clone());
        }
        // Not under the lock: a look-up can take long.
        let addresses: Vec<_> = name.to_socket_addrs()?.take(MAX_ADDRESSES).collect();
        if addresses.is_empty() {
            return Err(io::Error::new(io::ErrorKind::NotFound, "no address"));
        }
        let mut known = known();
        if known.len() >= MAX_NAMES {
            known.clear();
        }
        known.insert(name.to_owned(), (now, addresses.clone()));
        Ok(addresses)
    }
}

impl NameResolver {
    /// A resolver of hosts that the user named.
    pub(super) fn open(names: Names) -> NameResolver {
        NameResolver {
            names,
            guarded: false,
        }
    }

    /// A resolver of hosts that a server named.
    pub(super) fn guarded(names: Names) -> NameResolver {
        NameResolver {
            names,
            guarded: true,
        }
    }
}

impl Resolver for NameResolver {
    fn resolve(&self, uri: &Uri, _: &Config, _: NextTimeout) -> Result<ResolvedSocketAddrs, Error> {
        let host = uri
            .host()
            .ok_or_else(|| Error::BadUri("no host".to_owned()))?;
        let secure = uri.scheme_str() == Some("https");
        let port = uri.port_u16().unwrap_or(if secure { 443 } else { 80 });
        let addresses = self
            .names
            .look_up(&format!("{host}:{port}"))
            .map_err(|error| Error::Other(Box::new(Failure::Lookup(error))))?;
        let mut found = self.empty();
        for address in addresses {
            if !self.guarded || !is_local(address.ip()) {
                found.push(address);
            }
        }
        if found.is_empty() {
            return Err(Error::Other(Box::new(Failure::Local)));
        }
        Ok(found)
    }
}

impl fmt::Display for Failure {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Failure::Lookup(_) => f.write_str("look-up failed"),
            Failure::Local => f.write_str("the name has only local addresses"),
        }
    }
}

impl std::error::Error for Failure {}

#[cfg(test)]
mod tests {
    use super::*;

    fn resolve(resolver: &NameResolver, uri: &str) -> Result<Vec<SocketAddr>, Error> {
        let (uri, config) = (uri.parse().unwrap(), Config::default());
        let found = resolver.resolve(&uri, &config, NextTimeout::default())?;
        Ok(found.iter().copied().collect())
    }

    #[test]
    fn ports_have_their_defaults() {
        let resolver = NameResolver::open(Names::default());
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
        let (open, guarded) = (
            NameResolver::open(names.clone()),
            NameResolver::guarded(names),
        );
        assert!(resolve(&open, "http://localhost/").is_ok());
        for uri in [
            "http://localhost/",
            "http://127.0.0.1/",
            "http://169.254.169.254/",
        ] {
            let Err(Error::Other(refused)) = resolve(&guarded, uri) else {
                panic!("{uri} is resolved");
            };
            assert!(
                matches!(refused.downcast_ref(), Some(Failure::Local)),
                "{uri}"
            );
        }
        assert!(resolve(&guarded, "http://10.0.0.1/").is_ok());
    }

    #[test]
    fn names_are_remembered_until_they_are_forgotten() {
        let names = Names::default();
        let resolver = NameResolver::open(names.clone());
        resolve(&resolver, "http://127.0.0.1/").unwrap();
        let held = || names.0.lock().unwrap().len();
        assert_eq!(held(), 1);
        let planted = vec!["10.0.0.1:80".parse().unwrap()];
        let key = "127.0.0.1:80".to_owned();
        names
            .0
            .lock()
            .unwrap()
            .insert(key, (Instant::now(), planted.clone()));
        assert_eq!(resolve(&resolver, "http://127.0.0.1/").unwrap(), planted);
        names.forget();
        assert_eq!(held(), 0);
        for number in 0..2 * MAX_NAMES {
            let uri = format!("http://127.0.0.1:{}/", number + 1);
            resolve(&resolver, &uri).unwrap();
        }
        assert!(held() <= MAX_NAMES);
    }
}
