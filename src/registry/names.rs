//! Addresses of host names, looked up by the C library and remembered for a while.
//!
//! The C library waits for a silent name server as its configuration says: from seconds to minutes,
//! and nothing can interrupt it. So each look-up runs in a thread of its own, and a caller waits for
//! it until a deadline. Callers with the same name share one look-up, also one that hangs. This limits
//! the number of threads.

use std::collections::HashMap;
use std::io;
use std::net::{SocketAddr, ToSocketAddrs};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, OnceLock, PoisonError};
use std::thread;
use std::time::{Duration, Instant};

/// Age at which addresses are looked up again.
const MAX_AGE: Duration = Duration::from_secs(60);

/// Most names that are remembered.
const MAX_NAMES: usize = 256;

/// Most addresses of a host that are tried; `ureq` holds 16.
const MAX_ADDRESSES: usize = 8;

/// Most look-ups at a time, each in a thread.
const MAX_LOOKUPS: usize = 8;

/// Addresses by `HOST:PORT`.
#[derive(Clone, Debug, Default)]
pub(super) struct Names(Arc<Shared>);

/// The addresses of a host, or why there are none. Several callers may wait for one look-up.
pub(super) type Found = Result<Vec<SocketAddr>, Arc<io::Error>>;

#[derive(Debug, Default)]
struct Shared {
    table: Mutex<Table>,
    /// Notified when a look-up ends.
    ended: Condvar,
}

#[derive(Debug, Default)]
struct Table {
    /// When a name was looked up, and what was found.
    known: HashMap<String, (Instant, Vec<SocketAddr>)>,
    running: HashMap<String, Arc<OnceLock<Found>>>,
}

impl Names {
    /// Forgets all addresses: a connection failed, and they may have changed.
    pub(super) fn forget(&self) {
        self.0.table().known.clear();
    }

    /// The addresses of `name`, which is `HOST:PORT`.
    ///
    /// # Errors
    /// [`io::ErrorKind::TimedOut`] after `patience`; otherwise the error of the C library.
    pub(super) fn look_up(&self, name: &str, patience: Duration) -> Found {
        match name.parse() {
            Ok(address) => Ok(vec![address]),
            Err(_) => self.look_up_by(name, patience, |name| Ok(name.to_socket_addrs()?.collect())),
        }
    }

    fn look_up_by(
        &self,
        name: &str,
        patience: Duration,
        find: impl FnOnce(&str) -> io::Result<Vec<SocketAddr>> + Send + 'static,
    ) -> Found {
        let deadline = Instant::now() + patience;
        let mut table = self.0.table();
        let lookup = loop {
            if let Some(addresses) = table.known(name) {
                return Ok(addresses);
            }
            if let Some(running) = table.running.get(name) {
                break Arc::clone(running);
            }
            if table.running.len() < MAX_LOOKUPS {
                break self.start(&mut table, name, find)?;
            }
            table = self.0.wait(table, deadline, patience)?;
        };
        loop {
            if let Some(found) = lookup.get() {
                return found.clone();
            }
            table = self.0.wait(table, deadline, patience)?;
        }
    }

    /// Starts the thread of a look-up.
    fn start(
        &self,
        table: &mut Table,
        name: &str,
        find: impl FnOnce(&str) -> io::Result<Vec<SocketAddr>> + Send + 'static,
    ) -> Result<Arc<OnceLock<Found>>, Arc<io::Error>> {
        let lookup = Arc::<OnceLock<Found>>::default();
        let (shared, result, owned) = (Arc::clone(&self.0), Arc::clone(&lookup), name.to_owned());
        thread::Builder::new()
            .name("name-lookup".to_owned())
            .spawn(move || {
                let mut found = find(&owned);
                if let Ok(addresses) = &mut found {
                    addresses.truncate(MAX_ADDRESSES);
                    if addresses.is_empty() {
                        found = Err(io::Error::new(io::ErrorKind::NotFound, "no address"));
                    }
                }
                let mut table = shared.table();
                table.running.remove(&owned);
                if let Ok(addresses) = &found {
                    table.remember(owned, addresses.clone());
                }
                let _ = result.set(found.map_err(Arc::new));
                shared.ended.notify_all();
            })?;
        table.running.insert(name.to_owned(), Arc::clone(&lookup));
        Ok(lookup)
    }
}

impl Shared {
    fn table(&self) -> MutexGuard<'_, Table> {
        self.table.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Waits until a look-up ends.
    fn wait<'a>(
        &self,
        table: MutexGuard<'a, Table>,
        deadline: Instant,
        patience: Duration,
    ) -> Result<MutexGuard<'a, Table>, Arc<io::Error>> {
        let left = deadline.saturating_duration_since(Instant::now());
        if left.is_zero() {
            let reason = format!("the name server did not answer within {patience:.1?}");
            return Err(Arc::new(io::Error::new(io::ErrorKind::TimedOut, reason)));
        }
        let waited = self.ended.wait_timeout(table, left);
        Ok(waited.unwrap_or_else(PoisonError::into_inner).0)
    }
}

impl Table {
    fn known(&self, name: &str) -> Option<Vec<SocketAddr>> {
        let (since, addresses) = self.known.get(name)?;
        (since.elapsed() < MAX_AGE).then(|| addresses.clone())
    }

    fn remember(&mut self, name: String, addresses: Vec<SocketAddr>) {
        if self.known.len() >= MAX_NAMES {
            self.known.clear();
        }
        self.known.insert(name, (Instant::now(), addresses));
    }
}

#[cfg(test)]
mod tests {
    use std::sync::mpsc;

    use super::*;

    const PATIENCE: Duration = Duration::from_secs(60);
    const MOMENT: Duration = Duration::from_millis(20);

    fn address() -> Vec<SocketAddr> {
        vec!["10.0.0.1:80".parse().unwrap()]
    }

    fn unasked(_: &str) -> io::Result<Vec<SocketAddr>> {
        panic!("a second look-up");
    }

    #[test]
    fn names_are_remembered_until_they_are_forgotten() {
        let names = Names::default();
        let found = names.look_up_by("a:80", PATIENCE, |_| Ok(address()));
        assert_eq!(found.unwrap(), address());
        let found = names.look_up_by("a:80", PATIENCE, unasked);
        assert_eq!(found.unwrap(), address());
        names.forget();
        let none = names.look_up_by("a:80", PATIENCE, |_| Ok(Vec::new()));
        assert_eq!(none.unwrap_err().kind(), io::ErrorKind::NotFound);
        for number in 0..2 * MAX_NAMES {
            let name = format!("a:{number}");
            names
                .look_up_by(&name, PATIENCE, |_| Ok(address()))
                .unwrap();
        }
        assert!(names.0.table().known.len() <= MAX_NAMES);
        assert_eq!(names.look_up("10.0.0.1:80", MOMENT).unwrap(), address());
    }

    #[test]
    fn a_look_up_that_hangs_is_shared_and_waited_for_until_the_deadline() {
        let names = Names::default();
        let (answer, silent) = mpsc::channel();
        let hangs = move |_: &str| Ok(silent.recv().unwrap());
        let late = names.look_up_by("a:80", MOMENT, hangs).unwrap_err();
        assert_eq!(late.kind(), io::ErrorKind::TimedOut);
        assert_eq!(
            late.to_string(),
            "the name server did not answer within 20.0ms"
        );
        let again = names.look_up_by("a:80", MOMENT, unasked).unwrap_err();
        assert_eq!(again.kind(), io::ErrorKind::TimedOut);
        thread::scope(|scope| {
            let waiting = scope.spawn(|| names.look_up_by("a:80", PATIENCE, unasked));
            answer.send(address()).unwrap();
            assert_eq!(waiting.join().unwrap().unwrap(), address());
        });
        let found = names.look_up_by("a:80", PATIENCE, unasked);
        assert_eq!(found.unwrap(), address());
    }

    #[test]
    fn look_ups_that_hang_have_a_limit() {
        let names = Names::default();
        let mut answers = Vec::new();
        for number in 0..MAX_LOOKUPS {
            let (answer, silent) = mpsc::channel();
            answers.push(answer);
            let name = format!("a:{number}");
            let hangs = move |_: &str| Ok(silent.recv().unwrap());
            assert!(names.look_up_by(&name, MOMENT, hangs).is_err());
        }
        let late = names.look_up_by("b:80", MOMENT, unasked).unwrap_err();
        assert_eq!(late.kind(), io::ErrorKind::TimedOut);
        answers[0].send(address()).unwrap();
        let found = names.look_up_by("b:80", PATIENCE, |_| Ok(address()));
        assert_eq!(found.unwrap(), address());
        for answer in &answers[1..] {
            answer.send(address()).unwrap();
        }
    }
}
