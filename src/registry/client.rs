//! The client: manifests and ranges of blobs, from registries, mirrors and redirect targets.

use std::path::PathBuf;
use std::sync::Arc;

use super::auth::{Contact, Logins};
use super::blob::{BlobBody, BlobRef, Wanted};
use super::credential_source::Source;
use super::error::{Error, Result};
use super::http::{Answer, Ask, Http, Timeouts, USER_AGENT};
use super::links::{BlobKey, Links, Renewal, Source as Place};
use super::manifest::{self, Document, MAX_MANIFEST};
use super::mirror::{Mirror, Prefix};
use super::peer::Peer;
use super::redirect::check_target;
use super::reference::Reference;
use super::repository::{Host, Repository};
use super::requests::{Requests, Target, successful};
use super::statuses::Statuses;
use super::tls::{ClientCertificate, Tls};
use super::url::Url;
use super::{http, tls};
use crate::format::digest::Digest;

/// Most places that are asked for one range: each may be a link that expires before it is used.
const MAX_TRIES: u32 = 8;

/// Most links of the registry's own answer that one range is asked at.
const MAX_NEW_LINKS: u32 = 2;

/// Options of a [`Client`].
#[derive(Debug, Default)]
pub struct Options {
    /// Source of credentials.
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
    links: Links,
}

impl Client {
    /// Reads certificates; connects to nothing.
    ///
    /// # Errors
    /// [`Error::Setup`]: a certificate, or the proxy that the environment names, cannot be used.
    pub fn new(options: Options) -> Result<Client> {
        let tls = Tls::new(options.ca.as_deref(), options.certificate.as_ref())?;
        let agent = options.user_agent.as_deref().unwrap_or(USER_AGENT);
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
            links: Links::default(),
        })
    }

    /// Checks what the user named, as [`Client::new`] does. The system's certificates are not read.
    ///
    /// # Errors
    /// As [`Client::new`].
    pub fn check(options: &Options) -> Result<()> {
        tls::check(options.ca.as_deref(), options.certificate.as_ref())?;
        http::check()
    }

    /// Counts of the answers so far, by their status.
    pub fn statuses(&self) -> &Arc<Statuses> {
        &self.statuses
    }

    /// The manifest of an image for this machine. An index is followed to it. Mirrors are asked first
    /// for what a digest pins; what a tag names, only the registry can say.
    ///
    /// # Errors
    /// [`Error::Mismatch`]: the text does not have the digest that pins it. [`Error::Manifest`]:
    /// not an image that can be served. Otherwise the error of the request.
    pub fn manifest(&self, reference: &Reference) -> Result<ManifestBytes> {
        let repository = reference.repository().reached(&self.insecure);
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
    /// then use [`Client::read_whole`]. Otherwise the error of the request.
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
    /// The error of the request.
    pub fn read_whole(&self, blob: &BlobRef) -> Result<BlobBody> {
        self.fetch(Wanted::whole(blob), &[])
    }

    fn document(
        &self,
        repository: &Repository,
        selector: &str,
        expected: Option<&Digest>,
    ) -> Result<ManifestBytes> {
        let path = repository.manifest_path(selector);
        let url = registry_url(repository, &path)?;
        if let Some(digest) = expected {
            let mut peers = self.peers.iter();
            let found = peers.find_map(|peer| {
                let answer = peer.ask_manifest(repository, digest, &url)?;
                peer.outcome_of(answer.and_then(|answer| manifest_bytes(answer, &path, expected)))
            });
            if let Some(found) = found {
                return Ok(found);
            }
        }
        let headers = [("accept", manifest::ACCEPT)];
        let (requests, ask) = (&self.requests, Ask::Get);
        let mut contact = requests.first_contact(repository);
        let answer = requests.log_in_and_ask(&mut contact, repository, &ask, &url, &headers)?;
        drop(contact);
        let answer = requests.follow(&ask, url, answer, &headers, &check_target, &mut |_| {})?;
        manifest_bytes(answer, &path, expected)
    }

    /// A range from a mirror or proxy, if it serves it. After any failure there, the registry is
    /// asked instead.
    fn ask_peer(&self, peer: &Peer, wanted: Wanted<'_>) -> Option<BlobBody> {
        let repository = wanted.blob.repository.reached(&self.insecure);
        let key = (repository, wanted.blob.digest);
        let target = self.links.known(&key).map(|target| target.url);
        let actual = match &target {
            Some(target) => target.clone(),
            None => registry_url(&key.0, &key.0.blob_path(&key.1)).ok()?,
        };
        let answer = peer.ask(&key.0, &key.1, &actual, target.is_some(), &wanted.range())?;
        peer.body_of(answer.and_then(|answer| body(wanted, answer)))
    }

    /// A blob's answer: from where the registry redirected to last time, else by asking it. The link
    /// is renewed if its server does not serve the blob: signed URLs expire.
    fn fetch(&self, wanted: Wanted<'_>, headers: &[(&str, &str)]) -> Result<BlobBody> {
        let repository = wanted.blob.repository.reached(&self.insecure);
        let key = (repository, wanted.blob.digest);
        let (mut tries, mut new_links) = (0, 0);
        loop {
            tries += 1;
            // Before the link is looked for: the first answer tells whether there are links.
            let mut contact = self.requests.first_contact(&key.0);
            let (answer, link) = match self.links.find(&key)? {
                Place::Link(link) => {
                    drop(contact);
                    (self.ask_at_link(&key, &link, headers)?, Some(link))
                }
                Place::Registry(renewal) => {
                    new_links += 1;
                    self.ask_registry(&key, &mut contact, renewal, headers)?
                }
            };
            match (body(wanted, answer), link) {
                (Err(error), Some(link)) if may_be_stale(&error) => {
                    self.links.expire(&key, &link);
                    if tries == MAX_TRIES || new_links == MAX_NEW_LINKS {
                        return Err(error);
                    }
                }
                (result, _) => return result,
            }
        }
    }

    fn ask_at_link(
        &self,
        key: &BlobKey,
        link: &Target,
        headers: &[(&str, &str)],
    ) -> Result<Answer> {
        let ask = Ask::Stream;
        let answer = self.requests.ask(&ask, &link.url, headers, link.named);
        let answer = answer.map_err(|error| error.redirected(key.0.host(), &link.url))?;
        let url = link.url.clone();
        let mut remember = |target: &Target| self.links.remember(key, target);
        self.requests
            .follow(&ask, url, answer, headers, &check_target, &mut remember)
    }

    /// Asks the registry, and gives the answer with the link that it is from, if the registry
    /// redirects. Ends the first contact and the renewal as soon as that is known.
    fn ask_registry(
        &self,
        key: &BlobKey,
        contact: &mut Contact,
        renewal: Option<Renewal<'_>>,
        headers: &[(&str, &str)],
    ) -> Result<(Answer, Option<Target>)> {
        let (requests, ask) = (&self.requests, Ask::Stream);
        let url = registry_url(&key.0, &key.0.blob_path(&key.1))?;
        let answer = match requests.log_in_and_ask(contact, &key.0, &ask, &url, headers) {
            Ok(answer) => answer,
            Err(error) => {
                if let Some(renewal) = renewal {
                    renewal.fail(error.clone());
                }
                return Err(error);
            }
        };
        let mut link = None;
        let mut redirected = |target: &Target| {
            self.links.remember(key, target);
            contact.end();
            link = Some(target.clone());
        };
        let check = &check_target;
        let answer = requests.follow(&ask, url, answer, headers, check, &mut redirected)?;
        if link.is_none() && matches!(answer.status(), 200 | 206) {
            self.links.forget(key);
        }
        Ok((answer, link))
    }
}

fn body(wanted: Wanted<'_>, answer: Answer) -> Result<BlobBody> {
    if matches!(answer.status(), 200 | 206 | 416) {
        return wanted.body(answer);
    }
    let answer = successful(answer, &format!("blob {}", wanted.blob.digest))?;
    wanted.body(answer)
}

/// The document that a server answers with, which must have the digest that pins it.
fn manifest_bytes(answer: Answer, path: &str, expected: Option<&Digest>) -> Result<ManifestBytes> {
    let answer = successful(answer, path)?;
    let host = answer.host().clone();
    let bytes = answer.bytes(path, MAX_MANIFEST)?;
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

fn registry_url(repository: &Repository, path: &str) -> Result<Url> {
    let url = Url::new(repository.scheme(), repository.host().clone(), path);
    url.ok_or_else(|| Error::Unexpected {
        host: repository.host().clone(),
        what: path.to_owned(),
        detail: "not a path of a URL".to_owned(),
    })
}

/// Whether the error suggests that a link expired, so that the registry is asked for another.
fn may_be_stale(error: &Error) -> bool {
    match error {
        Error::NotFound { .. } | Error::Mismatch { .. } => true,
        Error::Status { status, .. } => matches!(status, 400 | 401 | 403),
        _ => false,
    }
}
