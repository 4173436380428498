//! Mirrors and proxies from which blobs are requested before the registry. Each has its own connections.

use std::time::Duration;

use super::address::{NamedBy, names_this_machine};
use super::blob::BlobBody;
use super::error::{Error, Result};
use super::health::Health;
use super::http::{Answer, Ask, Timeouts};
use super::manifest::ACCEPT;
use super::mirror::{Mirror, Prefix};
use super::redirect::check_peer_target;
use super::repository::Repository;
use super::requests::Requests;
use super::url::Url;
use crate::format::digest::Digest;
use crate::reason::reason;

/// How long a peer-to-peer proxy may take until its answer: it is worth it only if it is fast.
const P2P_PATIENCE: Duration = Duration::from_millis(500);

/// How long a mirror may take, until its answer and for each piece of its body.
const MIRROR_PATIENCE: Duration = Duration::from_secs(3);

/// Another way to a registry's blobs.
#[derive(Debug)]
pub(super) struct Peer {
    form: Form,
    requests: Requests,
    health: Health,
}

#[derive(Debug)]
enum Form {
    Mirror(Mirror),
    Prefix(Prefix),
}

impl Peer {
    pub(super) fn mirror(
        mirror: Mirror,
        timeouts: Timeouts,
        requests: impl Fn(Timeouts) -> Result<Requests>,
    ) -> Result<Peer> {
        let name = mirror.own_host().to_string();
        let requests = requests(bounded(timeouts, MIRROR_PATIENCE))?;
        Ok(Peer::new(Form::Mirror(mirror), name, requests))
    }

    pub(super) fn prefix(
        prefix: Prefix,
        timeouts: Timeouts,
        requests: impl Fn(Timeouts) -> Result<Requests>,
    ) -> Result<Peer> {
        let name = prefix.own_host().to_string();
        let requests = requests(bounded(timeouts, P2P_PATIENCE))?;
        Ok(Peer::new(Form::Prefix(prefix), name, requests))
    }

    fn new(form: Form, name: String, requests: Requests) -> Peer {
        Peer {
            form,
            requests,
            health: Health::new(name),
        }
    }

    /// Asks for a range of a blob whose URL is `actual`: the registry's, or a signed one that is
    /// complete without credentials. `None`: the peer does not have this registry's blobs, or is
    /// skipped for now.
    pub(super) fn ask(
        &self,
        repository: &Repository,
        digest: &Digest,
        actual: &Url,
        signed: bool,
        range: &str,
    ) -> Option<Result<Answer>> {
        let (url, login, own) = match &self.form {
            Form::Mirror(mirror) => {
                let url = mirror.blob(repository, digest)?;
                (
                    url,
                    Some(mirror_login(mirror, repository)?),
                    mirror.headers(),
                )
            }
            Form::Prefix(prefix) => {
                let login = (!signed).then(|| repository.clone());
                (prefix.of(actual)?, login, [].as_slice())
            }
        };
        let (ask, header) = (Ask::Stream, ("range", range));
        self.request(&ask, actual, &url, login.as_ref(), own, header)
    }

    /// Asks a mirror for the manifest with this digest, whose URL at the registry is `actual`. `None` as
    /// for [`Peer::ask`]; a proxy is not asked.
    pub(super) fn ask_manifest(
        &self,
        repository: &Repository,
        digest: &Digest,
        actual: &Url,
    ) -> Option<Result<Answer>> {
        let Form::Mirror(mirror) = &self.form else {
            return None;
        };
        let url = mirror.manifest(repository, digest)?;
        let login = mirror_login(mirror, repository)?;
        let header = ("accept", ACCEPT);
        self.request(
            &Ask::Get,
            actual,
            &url,
            Some(&login),
            mirror.headers(),
            header,
        )
    }

    /// Makes a request with the peer's own headers and one more, and follows its redirects. `None`: the
    /// peer is skipped for now.
    fn request(
        &self,
        ask: &Ask<'_>,
        actual: &Url,
        url: &Url,
        login: Option<&Repository>,
        own: &[(String, String)],
        header: (&str, &str),
    ) -> Option<Result<Answer>> {
        if !self.health.admit() {
            return None;
        }
        let own = own.iter().map(|(name, value)| (&**name, &**value));
        let headers: Vec<_> = own.chain([header]).collect();
        let requests = &self.requests;
        let answer = match login {
            Some(login) => {
                let mut contact = requests.first_contact(login);
                requests.log_in_and_ask(&mut contact, login, ask, url, &headers)
            }
            None => requests.ask(ask, url, &headers, NamedBy::User),
        };
        let check = |_: &Url, next: &Url| check_peer_target(actual, url, next);
        Some(answer.and_then(|answer| {
            // The peer's headers are for the peer; what it redirects to does not get them.
            requests.follow(ask, url.clone(), answer, &[header], &check, &mut |_| {})
        }))
    }

    /// Records the outcome of a request whose answer was read to its end in the peer's health, and returns
    /// what was read.
    pub(super) fn outcome_of<T>(&self, result: Result<T>) -> Option<T> {
        match result {
            Ok(found) => {
                self.health.succeeded();
                Some(found)
            }
            Err(error) => {
                self.note(error);
                None
            }
        }
    }

    /// Records a failed answer in the peer's health. Returns the body of a good one, which records its
    /// outcome once it is read.
    pub(super) fn body_of(&self, result: Result<BlobBody>) -> Option<BlobBody> {
        match result {
            Ok(body) => Some(body.of_peer(&self.health)),
            Err(error) => {
                self.note(error);
                None
            }
        }
    }

    fn note(&self, error: Error) {
        log::debug!("{}: {}", self.health.name(), reason(&error));
        // A mirror may lack what it is asked for.
        if matches!(error, Error::NotFound { .. }) {
            self.health.succeeded();
        } else {
            self.health.failed(error);
        }
    }
}

/// Whose credentials a mirror gets: its own, or those of the registry if it is a proxy on this
/// machine, which passes the registry's challenge on.
fn mirror_login(mirror: &Mirror, repository: &Repository) -> Option<Repository> {
    let host = mirror.own_host();
    if names_this_machine(host) {
        return Some(repository.clone());
    }
    Repository::new(repository.scheme(), host.clone(), repository.name()).ok()
}

fn bounded(timeouts: Timeouts, patience: Duration) -> Timeouts {
    Timeouts {
        read: timeouts.read.min(MIRROR_PATIENCE),
        name: timeouts.name.min(patience),
        connect: timeouts.connect.min(patience),
        answer: timeouts.answer.min(patience),
        ..timeouts
    }
}
