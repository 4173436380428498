//! Links: the URLs that registries redirect to for blobs, often signed and good for minutes only.
//!
//! One thread at a time asks the registry for the link of a blob. The others wait for its answer, at
//! most [`PATIENCE`], and use it: a link that expires costs one request, however many reads it fails.

use std::collections::{HashMap, HashSet};
use std::sync::{Condvar, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use super::error::{Error, Result};
use super::repository::{Host, Repository};
use super::requests::Target;
use crate::format::digest::Digest;

/// Longest wait for a link that another thread asks for.
const PATIENCE: Duration = Duration::from_secs(10);

/// Most links that are remembered.
const MAX_LINKS: usize = 4096;

/// A blob in a repository.
pub(super) type BlobKey = (Repository, Digest);

/// The links of all blobs that registries redirected.
#[derive(Debug, Default)]
pub(super) struct Links {
    table: Mutex<Table>,
    renewed: Condvar,
}

#[derive(Debug, Default)]
struct Table {
    blobs: HashMap<BlobKey, Entry>,
    /// Registries that redirected the last request for a blob.
    redirecting: HashSet<Host>,
}

/// What is known of one blob.
#[derive(Debug, Default)]
struct Entry {
    last: Option<LastAnswer>,
    /// Whether a thread asks the registry.
    is_renewing: bool,
    /// Number of renewals that ended.
    renewals: u64,
}

/// What the registry answered last.
#[derive(Clone, Debug)]
enum LastAnswer {
    Link(Target),
    Failed(Error),
}

/// Where to ask for a blob.
#[derive(Debug)]
pub(super) enum Source<'a> {
    /// At the blob's link.
    Link(Target),
    /// At the registry. The renewal, if any, takes the answer: other threads wait for it.
    Registry(Option<Renewal<'a>>),
}

/// The right to ask the registry for a link, until dropped.
#[derive(Debug)]
pub(super) struct Renewal<'a> {
    links: &'a Links,
    key: BlobKey,
    /// Tells it apart from later renewals of the same link.
    number: u64,
}

impl Links {
    /// Where to ask for a blob. Waits if another thread asks the registry for its link.
    ///
    /// A registry that is not known to redirect is asked by all threads at once: none of them may need
    /// a link.
    ///
    /// # Errors
    /// The error of the other thread.
    pub(super) fn find(&self, key: &BlobKey) -> Result<Source<'_>> {
        let mut table = self.table();
        let known = table.blobs.get(key);
        if let Some(target) = known.and_then(Entry::fresh) {
            return Ok(Source::Link(target));
        }
        if known.is_none() && !table.redirecting.contains(key.0.host()) {
            return Ok(Source::Registry(None));
        }
        table.make_room();
        let entry = table.blobs.entry(key.clone()).or_default();
        if !entry.is_renewing {
            entry.is_renewing = true;
            let renewal = Renewal {
                links: self,
                key: key.clone(),
                number: entry.renewals,
            };
            return Ok(Source::Registry(Some(renewal)));
        }
        let before = entry.renewals;
        let is_under_way = |table: &mut Table| {
            let entry = table.blobs.get(key);
            entry.is_some_and(|entry| entry.is_renewing && entry.renewals == before)
        };
        let waited = self
            .renewed
            .wait_timeout_while(table, PATIENCE, is_under_way);
        let (table, _) = waited.unwrap_or_else(PoisonError::into_inner);
        let entry = table.blobs.get(key);
        let answered = entry.filter(|entry| entry.renewals != before);
        match answered.and_then(|entry| entry.last.clone()) {
            // Even one that expires at once: it is as new as if this thread had asked.
            Some(LastAnswer::Link(target)) => Ok(Source::Link(target)),
            Some(LastAnswer::Failed(error)) => Err(error),
            None => Ok(Source::Registry(None)),
        }
    }

    /// The link of a blob, if it is known and good. Never waits.
    pub(super) fn known(&self, key: &BlobKey) -> Option<Target> {
        self.table().blobs.get(key).and_then(Entry::fresh)
    }

    /// Records where the registry redirected to.
    pub(super) fn remember(&self, key: &BlobKey, target: &Target) {
        let mut table = self.table();
        table.make_room();
        table.redirecting.insert(key.0.host().clone());
        let entry = table.blobs.entry(key.clone()).or_default();
        entry.end(Some(LastAnswer::Link(target.clone())));
        drop(table);
        self.renewed.notify_all();
    }

    /// Records that the registry serves a blob itself.
    pub(super) fn forget(&self, key: &BlobKey) {
        let mut table = self.table();
        table.redirecting.remove(key.0.host());
        table.blobs.remove(key);
        drop(table);
        self.renewed.notify_all();
    }

    /// Records that a link has expired, unless another one is known since.
    pub(super) fn expire(&self, key: &BlobKey, expired: &Target) {
        if let Some(entry) = self.table().blobs.get_mut(key)
            && matches!(&entry.last, Some(LastAnswer::Link(last)) if last.url == expired.url)
        {
            entry.last = None;
        }
    }

    fn table(&self) -> MutexGuard<'_, Table> {
        self.table.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Table {
    fn make_room(&mut self) {
        if self.blobs.len() >= MAX_LINKS {
            self.blobs.retain(|_, entry| entry.is_renewing);
        }
    }
}

impl Entry {
    fn fresh(&self) -> Option<Target> {
        match &self.last {
            Some(LastAnswer::Link(target)) if Instant::now() < target.until => Some(target.clone()),
            _ => None,
        }
    }

    fn end(&mut self, outcome: Option<LastAnswer>) {
        self.last = outcome;
        self.is_renewing = false;
        self.renewals += 1;
    }
}

impl Renewal<'_> {
    /// Records that the registry cannot be asked. Threads that wait get the error.
    pub(super) fn fail(self, error: Error) {
        self.end(Some(LastAnswer::Failed(error)));
    }

    /// Ends the renewal, unless it has ended.
    fn end(&self, outcome: Option<LastAnswer>) {
        let mut table = self.links.table();
        let entry = table.blobs.get_mut(&self.key);
        let entry = entry.filter(|entry| entry.is_renewing && entry.renewals == self.number);
        if let Some(entry) = entry {
            entry.end(outcome);
        }
        drop(table);
        self.links.renewed.notify_all();
    }
}

impl Drop for Renewal<'_> {
    fn drop(&mut self) {
        self.end(None);
    }
}

#[cfg(test)]
mod tests {
    use std::sync::mpsc;
    use std::thread;

    use super::*;
    use crate::registry::address::NamedBy;
    use crate::registry::url::Url;

    fn key(blob: &str) -> BlobKey {
        let repository = Repository::from_blob_url("https://r.example/v2/a/blobs").unwrap();
        (repository, Digest::of(blob.as_bytes()))
    }

    fn target(url: &str, lifetime: Duration) -> Target {
        Target {
            url: Url::parse(url).unwrap(),
            named: NamedBy::Server,
            until: Instant::now() + lifetime,
        }
    }

    const LONG: Duration = Duration::from_secs(600);

    fn renewal<'a>(links: &'a Links, key: &BlobKey) -> Renewal<'a> {
        match links.find(key) {
            Ok(Source::Registry(Some(renewal))) => renewal,
            found => panic!("{found:?}"),
        }
    }

    fn link(links: &Links, key: &BlobKey) -> String {
        match links.find(key) {
            Ok(Source::Link(target)) => target.url.to_string(),
            found => panic!("{found:?}"),
        }
    }

    /// Lets threads wait for a renewal that `end` ends, and gives what they found.
    fn waiting(end: impl FnOnce(&Links, &BlobKey, Renewal<'_>)) -> Vec<Result<String>> {
        let (links, key) = (Links::default(), key("b"));
        let old = target("https://s.example/old", LONG);
        links.remember(&key, &old);
        links.expire(&key, &old);
        let renewal = renewal(&links, &key);
        let (ready, is_ready) = mpsc::channel();
        thread::scope(|scope| {
            let threads: Vec<_> = (0..8)
                .map(|_| {
                    let ready = ready.clone();
                    let (links, key) = (&links, &key);
                    scope.spawn(move || {
                        ready.send(()).unwrap();
                        links.find(key).map(|found| match found {
                            Source::Link(target) => target.url.to_string(),
                            Source::Registry(renewal) => format!("{}", renewal.is_some()),
                        })
                    })
                })
                .collect();
            (0..8).for_each(|_| is_ready.recv().unwrap());
            // Some threads may not wait yet; what they find is the same but for the failure.
            thread::sleep(Duration::from_millis(50));
            end(&links, &key, renewal);
            threads
                .into_iter()
                .map(|thread| thread.join().unwrap())
                .collect()
        })
    }

    #[test]
    fn one_thread_renews_a_link_for_all_that_wait() {
        let found = waiting(|links, key, _renewal| {
            links.remember(key, &target("https://s.example/new", LONG));
        });
        let new = "https://s.example/new";
        assert!(found.iter().all(|found| found.as_deref().unwrap() == new));
    }

    #[test]
    fn threads_ask_for_themselves_if_a_renewal_ends_without_an_answer() {
        let found = waiting(|links, key, renewal| {
            links.forget(key);
            drop(renewal);
        });
        assert!(
            found
                .iter()
                .all(|found| found.as_deref().unwrap() == "false")
        );
    }

    #[test]
    fn links_are_looked_for_only_at_registries_that_redirect() {
        let links = Links::default();
        let (one, two) = (key("1"), key("2"));
        let asks_alone = |key| matches!(links.find(key), Ok(Source::Registry(None)));
        assert!(asks_alone(&one) && asks_alone(&one));
        links.remember(&one, &target("https://s.example/1", LONG));
        assert_eq!(link(&links, &one), "https://s.example/1");
        drop(renewal(&links, &two));
        links.forget(&two);
        assert!(asks_alone(&two));
        assert_eq!(link(&links, &one), "https://s.example/1");
    }

    #[test]
    fn a_link_expires_by_time_and_by_refusal_but_not_a_newer_one() {
        let (links, key) = (Links::default(), key("b"));
        let [old, new] =
            ["old", "new"].map(|name| target(&format!("https://s.example/{name}"), LONG));
        links.remember(&key, &old);
        links.remember(&key, &new);
        links.expire(&key, &old);
        assert_eq!(link(&links, &key), "https://s.example/new");
        links.expire(&key, &new);
        drop(renewal(&links, &key));
        links.remember(&key, &target("https://s.example/short", Duration::ZERO));
        assert!(links.known(&key).is_none());
        drop(renewal(&links, &key));
    }

    #[test]
    fn a_renewal_that_ended_does_not_end_the_next_one() {
        let (links, key) = (Links::default(), key("b"));
        let short = target("https://s.example/short", Duration::ZERO);
        links.remember(&key, &short);
        let first = renewal(&links, &key);
        links.remember(&key, &short);
        let second = renewal(&links, &key);
        drop(first);
        assert!(links.table().blobs[&key].is_renewing);
        drop(second);
        assert!(!links.table().blobs[&key].is_renewing);
    }

    #[test]
    fn the_number_of_links_is_bounded() {
        let links = Links::default();
        let target = target("https://s.example/x", LONG);
        for number in 0..2 * MAX_LINKS {
            links.remember(&key(&number.to_string()), &target);
        }
        assert!(links.table().blobs.len() <= MAX_LINKS);
    }
}
