//! The client: manifests and ranges of blobs, from registries as they are.

use std::collections::HashMap;
use std::path::PathBuf;
use std::sync::{Mutex, PoisonError};
use std::time::Instant;

use super::auth::{Logins, denied};
use super::blob::{BlobBody, BlobRef, Wanted};
use super::breaker::Breakers;
use super::credentials::Source;
use super::detail;
use super::error::{Error, Result};
use super::http::{Answer, Ask, Http, Named, Timeouts};
use super::manifest::{self, Document, MAX_MANIFEST};
use super::redirect::check_target;
use super::reference::Reference;
use super::repository::{Host, Repository, Scheme};
use super::tls::{ClientCertificate, Tls};
use super::url::Url;
use super::waiting::{retry_after, target_lifetime};
use crate::format::digest::Digest;

/// Most redirects that are followed for one request.
const MAX_HOPS: usize = 5;

/// Requests to a registry for one answer: the first, one after a login, one after a second login
/// with credentials read again.
const MAX_LOGINS: usize = 3;

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
    http: Http,
    logins: Logins,
    insecure: Vec<Host>,
    breakers: Breakers,
    targets: Mutex<HashMap<(Repository, Digest), Target>>,
}

/// Where a registry redirected to, for a blob.
#[derive(Clone, Debug)]
struct Target {
    url: Url,
    named: Named,
    until: Instant,
}

impl Client {
    /// Reads certificates; connects to nothing.
    ///
    /// # Errors
    /// [`Error::Setup`]: a certificate, or the proxy that the environment names, cannot be used.
    pub fn new(options: Options) -> Result<Client> {
        let tls = Tls::new(options.ca.as_deref(), options.certificate.as_ref())?;
        let user_agent = options.user_agent.as_deref().unwrap_or(super::USER_AGENT);
        Ok(Client {
            http: Http::new(&tls, user_agent, options.timeouts)?,
            logins: Logins::new(options.credentials),
            insecure: options.insecure,
            breakers: Breakers::default(),
            targets: Mutex::default(),
        })
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
    /// [`BlobBody::len`].
    ///
    /// # Errors
    /// [`Error::WithoutRanges`]: the server would send the whole blob; ask again after a second,
    /// then use [`Client::read_whole`]. Else what the registry or the way to it failed with.
    pub fn read_blob(&self, blob: &BlobRef, offset: u64, len: u64) -> Result<BlobBody> {
        let beyond = offset
            .checked_add(len)
            .is_none_or(|end| blob.size.is_some_and(|size| end > size));
        if len == 0 || beyond {
            return Err(Error::Mismatch {
                host: blob.repository.host().clone(),
                what: format!("the range asked of blob {}", blob.digest),
                expected: format!("1 byte or more within {:?} bytes", blob.size),
                found: format!("{len} bytes from {offset} on"),
            });
        }
        let wanted = Wanted { blob, offset, len };
        self.fetch(wanted, &[("range", &wanted.range())])
    }

    /// The whole blob from its first byte on, without a range, for servers that serve none.
    ///
    /// # Errors
    /// What the registry or the way to it failed with.
    pub fn read_whole(&self, blob: &BlobRef) -> Result<BlobBody> {
        let len = blob.size.unwrap_or(u64::MAX);
        let offset = 0;
        self.fetch(Wanted { blob, offset, len }, &[])
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
        let (url, answer) = self.ask_registry(
            repository,
            &Ask::Get,
            &path,
            &[("accept", manifest::ACCEPT)],
        )?;
        let (answer, _) = self.follow(&Ask::Get, url, answer, &[("accept", manifest::ACCEPT)])?;
        let answer = self.successful(answer, &path)?;
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

    /// A blob's answer: from where the registry redirected to last time, else by asking it. Once
    /// more if the target does not serve it: signed URLs expire.
    fn fetch(&self, wanted: Wanted<'_>, headers: &[(&str, &str)]) -> Result<BlobBody> {
        let repository = self.repository(&wanted.blob.repository);
        let key = (repository, wanted.blob.digest);
        if let Some(target) = self.target(&key) {
            let answer = self.ask(&Ask::Stream, &target.url, headers, target.named)?;
            match self.body(wanted, answer) {
                Err(error) if may_be_stale(&error) => self.forget(&key),
                result => return result,
            }
        }
        let mut again = true;
        loop {
            let path = key.0.blob_path(&key.1);
            let (url, answer) = self.ask_registry(&key.0, &Ask::Stream, &path, headers)?;
            let (answer, target) = self.follow(&Ask::Stream, url, answer, headers)?;
            let redirected = target.is_some();
            if let Some(target) = target {
                self.remember(&key, target);
            }
            match self.body(wanted, answer) {
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

    fn body(&self, wanted: Wanted<'_>, answer: Answer) -> Result<BlobBody> {
        match answer.status() {
            200 | 206 | 416 => wanted.body(answer),
            _ => {
                let what = format!("blob {}", wanted.blob.digest);
                self.successful(answer, &what)
                    .and_then(|answer| wanted.body(answer))
            }
        }
    }

    /// Asks the registry itself, logging in as far as it wants that.
    fn ask_registry(
        &self,
        repository: &Repository,
        ask: &Ask<'_>,
        path: &str,
        headers: &[(&str, &str)],
    ) -> Result<(Url, Answer)> {
        let url = Url::new(repository.scheme(), repository.host().clone(), path);
        let url = url.ok_or_else(|| Error::Unexpected {
            host: repository.host().clone(),
            what: path.to_owned(),
            detail: "not a path of a URL".to_owned(),
        })?;
        let _contact = self.logins.first_contact(repository);
        let mut attempt = 1;
        loop {
            let authorization = self.logins.authorization(&self.http, repository)?;
            let mut all = headers.to_vec();
            all.extend(
                authorization
                    .as_deref()
                    .map(|value| ("authorization", value)),
            );
            let answer = self.ask(ask, &url, &all, Named::ByUser)?;
            if !matches!(answer.status(), 401 | 403) {
                self.logins.accepted(repository);
                return Ok((url, answer));
            }
            let again = self
                .logins
                .refused(repository, &answer, authorization.as_deref())?;
            if !again || attempt == MAX_LOGINS {
                return Err(denied(repository, answer, repository.name().to_owned()));
            }
            answer.drain();
            attempt += 1;
        }
    }

    /// Follows redirects, without credentials. Gives where they led to, if anywhere.
    fn follow(
        &self,
        ask: &Ask<'_>,
        mut url: Url,
        mut answer: Answer,
        headers: &[(&str, &str)],
    ) -> Result<(Answer, Option<Target>)> {
        let mut target: Option<Target> = None;
        for _ in 0..=MAX_HOPS {
            if !matches!(answer.status(), 301 | 302 | 303 | 307 | 308) {
                return Ok((answer, target));
            }
            let unexpected = |detail: String| Error::Unexpected {
                host: url.host().clone(),
                what: url.without_query(),
                detail,
            };
            let location = answer.header("location");
            let location =
                location.ok_or_else(|| unexpected("a redirect without Location".to_owned()))?;
            let next = url
                .join(location)
                .map_err(|error| unexpected(error.to_string()))?;
            let mut named = check_target(&url, &next)?;
            let mut until = Instant::now() + target_lifetime(&next, answer.header("date"));
            if let Some(before) = &target {
                until = until.min(before.until);
                if before.named == Named::ByServer {
                    named = Named::ByServer;
                }
            }
            answer.drain();
            answer = self.ask(ask, &next, headers, named)?;
            target = Some(Target {
                url: next.clone(),
                named,
                until,
            });
            url = next;
        }
        Err(Error::Redirect {
            host: url.host().clone(),
            target: url.without_query(),
            reason: "more than 5 redirects",
        })
    }

    /// One request, if its host is not spared just now.
    fn ask(
        &self,
        ask: &Ask<'_>,
        url: &Url,
        headers: &[(&str, &str)],
        named: Named,
    ) -> Result<Answer> {
        let host = url.host();
        let spared = |retry_after| Error::Resting {
            host: host.clone(),
            retry_after,
        };
        self.breakers
            .admit(host.as_str(), Instant::now())
            .map_err(spared)?;
        let result = self.http.send(ask, url, headers, named);
        let failed = match &result {
            Ok(answer) => answer.status() >= 500 || matches!(answer.status(), 408 | 425 | 429),
            Err(error) => error.is_outage(),
        };
        if failed {
            if self.breakers.failed(host.as_str(), Instant::now()) {
                log::warn!("{host} stopped answering; it is asked again now and then");
            }
        } else if self.breakers.succeeded(host.as_str()) {
            log::info!("{host} answers again");
        }
        result
    }

    /// The answer if its status is 200, else the error that it stands for.
    fn successful(&self, answer: Answer, what: &str) -> Result<Answer> {
        let (host, status) = (answer.host().clone(), answer.status());
        let what = what.to_owned();
        match status {
            200 => Ok(answer),
            404 | 410 => {
                let detail = detail::of(answer);
                Err(Error::NotFound { host, what, detail })
            }
            429 | 503 => {
                let date = answer.header("date");
                let wait = answer.header("retry-after");
                let retry_after = wait.and_then(|value| retry_after(value, date));
                answer.drain();
                Err(Error::Busy {
                    host,
                    status,
                    retry_after,
                })
            }
            status => {
                let detail = detail::of(answer);
                Err(Error::Status {
                    host,
                    what,
                    status,
                    detail,
                })
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

/// Whether a redirect's target may have expired or changed, so that the registry is to be asked.
fn may_be_stale(error: &Error) -> bool {
    match error {
        Error::NotFound { .. } | Error::Mismatch { .. } => true,
        Error::Status { status, .. } => matches!(status, 400 | 401 | 403),
        _ => false,
    }
}
