//! The client: manifests and ranges of blobs, from registries as they are.

use std::collections::HashMap;
use std::path::PathBuf;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Instant;

use super::auth::Logins;
use super::blob::{BlobBody, BlobRef, Wanted};
use super::credentials::Source;
use super::error::{Error, Result};
use super::http::{Answer, Ask, Http, Timeouts};
use super::manifest::{self, Document, MAX_MANIFEST};
use super::mirror::{Mirror, Prefix};
use super::peer::Peer;
use super::redirect::check_target;
use super::reference::Reference;
use super::repository::{Host, Repository, Scheme};
use super::requests::{Requests, Target, successful};
use super::statuses::Statuses;
use super::tls::{ClientCertificate, Tls};
use super::url::Url;
use crate::format::digest::Digest;

/// Most redirect targets that are remembered.
const MAX_TARGETS: usize = 4096;

/// How to talk to registries.
#[derive(Debug, Default)]
pub struct Options {
    /// Where credentials come from.
    pub credentials: Source,
    /// Registries that are reached by plain HTTP.
    pub insecure: Vec<Host>,
    /// File with certificates that are trusted besides the system's.
    pub ca: Option<PathBuf>,
    /// Certificate that registries may ask for.
    pub certificate: Option<ClientCertificate>,
    /// Mirrors, in the order in which they are tried.
    pub mirrors: Vec<Mirror>,
    /// Peer-to-peer proxy, tried before the mirrors.
    pub p2p: Option<Prefix>,
    /// Value of the `User-Agent` header; this program's name if absent.
    pub user_agent: Option<String>,
    /// How long requests may take.
    pub timeouts: Timeouts,
}

/// A manifest as a registry serves it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ManifestBytes {
    /// The JSON text; its SHA-256 is `digest`.
    pub bytes: Vec<u8>,
    /// Digest of the manifest, which pins the image.
    pub digest: Digest,
}

/// Fetches from registries; shared by threads.
#[derive(Debug)]
pub struct Client {
    requests: Requests,
    peers: Vec<Peer>,
    insecure: Vec<Host>,
    statuses: Arc<Statuses>,
    targets: Mutex<HashMap<(Repository, Digest), Target>>,
}

impl Client {
    /// Reads certificates; connects to nothing.
    ///
    /// # Errors
    /// [`Error::Setup`]: a certificate, or the proxy that the environment names, cannot be used.
    pub fn new(options: Options) -> Result<Client> {
        let tls = Tls::new(options.ca.as_deref(), options.certificate.as_ref())?;
        let agent = options.user_agent.as_deref().unwrap_or(super::USER_AGENT);
        let logins = Arc::new(Logins::new(options.credentials));
        let statuses = Arc::<Statuses>::default();
        let requests = |timeouts| {
            let http = Http::new(&tls, agent, timeouts)?;
            Ok(Requests::new(
                http,
                Arc::clone(&logins),
                Arc::clone(&statuses),
            ))
        };
        let timeouts = options.timeouts;
        let p2p = options.p2p.into_iter();
        let p2p = p2p.map(|prefix| Peer::prefix(prefix, timeouts, requests));
        let mirrors = options.mirrors.into_iter();
        let mirrors = mirrors.map(|mirror| Peer::mirror(mirror, timeouts, requests));
        Ok(Client {
            peers: p2p.chain(mirrors).collect::<Result<_>>()?,
            requests: requests(timeouts)?,
            insecure: options.insecure,
            statuses: Arc::clone(&statuses),
            targets: Mutex::default(),
        })
    }

    /// Counts of the answers so far, by their status.
    pub fn statuses(&self) -> &Arc<Statuses> {
        &self.statuses
    }

    /// The manifest of an image for this machine. An index is followed to it.
    ///
    /// # Errors
    /// [`Error::Mismatch`]: the text does not have the digest that pins it. [`Error::Manifest`]:
    /// not an image that can be served. Else what the registry or the way to it failed with.
    pub fn manifest(&self, reference: &Reference) -> Result<ManifestBytes> {
        let repository = self.repository(reference.repository());
        let found = self.document(&repository, &reference.selector(), reference.digest())?;
        let refused = |source| Error::Manifest {
            what: reference.to_string(),
            source,
        };
        let chosen = match Document::parse(&found.bytes).map_err(refused)? {
            Document::Image(_) => return Ok(found),
            Document::Index(chosen) => chosen,
        };
        let found = self.document(&repository, &chosen.to_string(), Some(&chosen))?;
        manifest::Manifest::parse(&found.bytes).map_err(refused)?;
        Ok(found)
    }

    /// Bytes of a blob, `len` from `offset` on; fewer only if the server decides so, see
    /// [`BlobBody::len`]. Mirrors are tried before the registry.
    ///
    /// # Errors
    /// [`Error::WithoutRanges`]: the server would send the whole blob; ask again after a second,
    /// then use [`Client::read_whole`]. Else what the registry or the way to it failed with.
    pub fn read_blob(&self, blob: &BlobRef, offset: u64, len: u64) -> Result<BlobBody> {
        let wanted = Wanted::new(blob, offset, len)?;
        let mut peers = self.peers.iter();
        match peers.find_map(|peer| self.ask_peer(peer, wanted)) {
            Some(body) => Ok(body),
            None => self.fetch(wanted, &[("range", &wanted.range())]),
        }
    }

    /// As [`Client::read_blob`], from the registry itself: a mirror served wrong bytes.
    ///
    /// # Errors
    /// As [`Client::read_blob`].
    pub fn read_blob_past_mirrors(
        &self,
        blob: &BlobRef,
        offset: u64,
        len: u64,
    ) -> Result<BlobBody> {
        let wanted = Wanted::new(blob, offset, len)?;
        self.fetch(wanted, &[("range", &wanted.range())])
    }

    /// The whole blob from its first byte on, without a range, for servers that serve none.
    ///
    /// # Errors
    /// What the registry or the way to it failed with.
    pub fn read_whole(&self, blob: &BlobRef) -> Result<BlobBody> {
        self.fetch(Wanted::whole(blob), &[])
    }

    /// The repository, by plain HTTP if its host is among the insecure ones.
    fn repository(&self, repository: &Repository) -> Repository {
        if self.insecure.contains(repository.host()) {
            repository.clone().with_scheme(Scheme::Http)
        } else {
            repository.clone()
        }
    }

    fn document(
        &self,
        repository: &Repository,
        selector: &str,
        expected: Option<&Digest>,
    ) -> Result<ManifestBytes> {
        let path = repository.manifest_path(selector);
        let url = registry_url(repository, &path)?;
        let headers = [("accept", manifest::ACCEPT)];
        let answer = self
            .requests
            .log_in_and_ask(repository, &Ask::Get, &url, &headers)?;
        let (answer, _) = self
            .requests
            .follow(&Ask::Get, url, answer, &headers, &check_target)?;
        let answer = successful(answer, &path)?;
        let host = answer.host().clone();
        let bytes = answer.bytes(&path, MAX_MANIFEST)?;
        let digest = Digest::of(&bytes);
        match expected.filter(|expected| **expected != digest) {
            None => Ok(ManifestBytes { bytes, digest }),
            Some(expected) => Err(Error::Mismatch {
                host,
                what: "the digest of the manifest".to_owned(),
                expected: expected.to_string(),
                found: digest.to_string(),
            }),
        }
    }

    /// A range from a mirror or proxy, if it serves it. Whatever goes wrong there, the registry is
    /// asked instead.
    fn ask_peer(&self, peer: &Peer, wanted: Wanted<'_>) -> Option<BlobBody> {
        let repository = self.repository(&wanted.blob.repository);
        let key = (repository, wanted.blob.digest);
        let target = self.target(&key).map(|target| target.url);
        let actual = match &target {
            Some(target) => target.clone(),
            None => registry_url(&key.0, &key.0.blob_path(&key.1)).ok()?,
        };
        let answer = peer.ask(&key.0, &key.1, &actual, target.is_some(), &wanted.range())?;
        peer.body_of(answer.and_then(|answer| body(wanted, answer)))
    }

    /// A blob's answer: from where the registry redirected to last time, else by asking it. Once
    /// more if the target does not serve it: signed URLs expire.
    fn fetch(&self, wanted: Wanted<'_>, headers: &[(&str, &str)]) -> Result<BlobBody> {
        let repository = self.repository(&wanted.blob.repository);
        let key = (repository, wanted.blob.digest);
        let ask = Ask::Stream;
        if let Some(target) = self.target(&key) {
            let answer = self
                .requests
                .ask(&ask, &target.url, headers, target.named)?;
            match body(wanted, answer) {
                Err(error) if may_be_stale(&error) => self.forget(&key),
                result => return result,
            }
        }
        let mut again = true;
        loop {
            let url = registry_url(&key.0, &key.0.blob_path(&key.1))?;
            let answer = self.requests.log_in_and_ask(&key.0, &ask, &url, headers)?;
            let (answer, target) =
                self.requests
                    .follow(&ask, url, answer, headers, &check_target)?;
            let redirected = target.is_some();
            if let Some(target) = target {
                self.remember(&key, target);
            }
            match body(wanted, answer) {
                Err(error) if redirected && may_be_stale(&error) => {
                    self.forget(&key);
                    if !again {
                        return Err(error);
                    }
                    again = false;
                }
                result => return result,
            }
        }
    }

    fn target(&self, key: &(Repository, Digest)) -> Option<Target> {
        let targets = self.targets.lock().unwrap_or_else(PoisonError::into_inner);
        let target = targets.get(key)?;
        (Instant::now() < target.until).then(|| target.clone())
    }

    fn remember(&self, key: &(Repository, Digest), target: Target) {
        let mut targets = self.targets.lock().unwrap_or_else(PoisonError::into_inner);
        if targets.len() >= MAX_TARGETS {
            targets.clear();
        }
        targets.insert(key.clone(), target);
    }

    fn forget(&self, key: &(Repository, Digest)) {
        let mut targets = self.targets.lock().unwrap_or_else(PoisonError::into_inner);
        targets.remove(key);
    }
}

fn body(wanted: Wanted<'_>, answer: Answer) -> Result<BlobBody> {
    if matches!(answer.status(), 200 | 206 | 416) {
        return wanted.body(answer);
    }
    let answer = successful(answer, &format!("blob {}", wanted.blob.digest))?;
    wanted.body(answer)
}

fn registry_url(repository: &Repository, path: &str) -> Result<Url> {
    let url = Url::new(repository.scheme(), repository.host().clone(), path);
    url.ok_or_else(|| Error::Unexpected {
        host: repository.host().clone(),
        what: path.to_owned(),
        detail: "not a path of a URL".to_owned(),
    })
}

/// Whether a redirect's target may have expired or changed, so that the registry is to be asked.
fn may_be_stale(error: &Error) -> bool {
    match error {
        Error::NotFound { .. } | Error::Mismatch { .. } => true,
        Error::Status { status, .. } => matches!(status, 400 | 401 | 403),
        _ => false,
    }
}
