//! Authentication at registries: the `Authorization` of each request, and what a refusal changes.

use std::collections::HashMap;
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use super::challenge::{self, Bearer, Challenge};
use super::credentials::{Credential, Source};
use super::error::{Error, Result};
use super::http::{Answer, Ask, Http, NamedBy};
use super::redirect::check_target;
use super::repository::Repository;
use super::token::{self, Token};
use super::url::Url;
use super::waiting::retry_after;

/// Largest reply of a token server, in bytes.
const MAX_REPLY: u64 = 64 << 10;

/// How long a thread waits for what another learns of a registry: as long as that takes at most, since a
/// registry that lets one thread wait lets all wait.
const FIRST_CONTACT: Duration = Duration::from_secs(30);

/// Advice in the error of a refusal.
const HINT: &str = "check the credentials (--credentials) and that they may pull this repository";

/// The state of authentication at each registry.
#[derive(Debug)]
pub(super) struct Logins {
    source: Source,
    hosts: Mutex<HashMap<String, Arc<HostState>>>,
}

/// Authentication that a registry requires.
#[derive(Clone, Debug, PartialEq, Eq)]
enum Mode {
    /// No request was answered yet.
    Unknown,
    /// None: it answered without credentials.
    Anonymous,
    /// User name and password; the value of the header.
    Basic(String),
    /// A token.
    Bearer(Bearer),
}

#[derive(Debug)]
struct HostState {
    mode: Mutex<Mode>,
    /// Whether a thread is making the first request.
    contact: Mutex<bool>,
    contact_ended: Condvar,
    tokens: Mutex<HashMap<String, Arc<Mutex<Slot>>>>,
}

/// The token for one repository. Locked while one is fetched, so that one thread does.
#[derive(Debug, Default)]
struct Slot {
    token: Option<Token>,
    /// The scope that the registry asked for.
    scope: Option<String>,
    /// The last failure, for threads that waited for it.
    failure: Option<(Instant, Error)>,
}

/// A request to a registry, from the moment at which it was wanted.
pub(super) struct Contact {
    began: Instant,
    first: Option<FirstContact>,
}

impl Contact {
    /// When the request was wanted. A token that could not be had since then is not asked for again.
    pub(super) fn began(&self) -> Instant {
        self.began
    }

    /// Lets the threads go on that wait for the first request to the registry.
    pub(super) fn end(&mut self) {
        self.first = None;
    }
}

/// The first request to a registry; the threads that wait for it go on when this is dropped.
struct FirstContact(Arc<HostState>);

impl Drop for FirstContact {
    fn drop(&mut self) {
        *lock(&self.0.contact) = false;
        self.0.contact_ended.notify_all();
    }
}

impl Logins {
    pub(super) fn new(source: Source) -> Logins {
        let hosts = Mutex::default();
        Logins { source, hosts }
    }

    /// Lets one thread make the first request to a registry. The others wait, and then know how
    /// to log in: without this, opening many layers at once would be as many refusals.
    pub(super) fn first_contact(&self, repository: &Repository) -> Contact {
        let began = Instant::now();
        let first = self.first(repository);
        Contact { began, first }
    }

    fn first(&self, repository: &Repository) -> Option<FirstContact> {
        let host = self.host(repository);
        if *lock(&host.mode) != Mode::Unknown {
            return None;
        }
        let mut underway = lock(&host.contact);
        if !*underway {
            *underway = true;
            drop(underway);
            return Some(FirstContact(host));
        }
        let waited = host
            .contact_ended
            .wait_timeout_while(underway, FIRST_CONTACT, |underway| *underway);
        drop(waited);
        None
    }

    /// The `Authorization` for a request to a repository, as far as it is known.
    ///
    /// # Errors
    /// A token is needed and cannot be had.
    pub(super) fn authorization(
        &self,
        http: &Http,
        repository: &Repository,
        began: Instant,
    ) -> Result<Option<String>> {
        let host = self.host(repository);
        let mode = lock(&host.mode).clone();
        match mode {
            Mode::Unknown | Mode::Anonymous => Ok(None),
            Mode::Basic(value) => Ok(Some(value)),
            Mode::Bearer(bearer) => {
                let token = self.token(http, repository, &host, &bearer, began);
                token.map(Some)
            }
        }
    }

    /// Records that a registry answered a request without refusing it.
    pub(super) fn accepted(&self, repository: &Repository) {
        let host = self.host(repository);
        let mut mode = lock(&host.mode);
        if *mode == Mode::Unknown {
            *mode = Mode::Anonymous;
        }
    }

    /// Learns from a 401 or 403 to a request that had `used` as its `Authorization`. `true` if
    /// the request may be repeated.
    ///
    /// # Errors
    /// The credentials cannot be had.
    pub(super) fn refused(
        &self,
        repository: &Repository,
        answer: &Answer,
        used: Option<&str>,
    ) -> Result<bool> {
        let host = self.host(repository);
        let challenge = challenge::strongest(answer.headers("www-authenticate"));
        let mut mode = lock(&host.mode);
        match (challenge, mode.clone()) {
            (Some(Challenge::Bearer(bearer)), _) => {
                let slot = host.slot(repository);
                let mut slot = lock(&slot);
                slot.scope = bearer.scope().map(str::to_owned);
                slot.drop_token(used);
                *mode = Mode::Bearer(bearer);
                Ok(true)
            }
            // Harbor asks for a password where a token has expired. Without the token it asks for
            // another one.
            (Some(Challenge::Basic), Mode::Bearer(_)) => {
                *mode = Mode::Unknown;
                lock(&host.tokens).clear();
                Ok(used.is_some())
            }
            (Some(Challenge::Basic), before) => {
                let value = match self.credential(repository)? {
                    Some(
                        Credential::Password { user, password }
                        | Credential::Identity {
                            user,
                            token: password,
                        },
                    ) => Credential::basic(&user, &password),
                    Some(Credential::Registry(_)) | None => return Ok(false),
                };
                // The file may have been replaced; the same password again is of no use.
                let mode_now = Mode::Basic(value);
                let changed = mode_now != before || used.is_none();
                *mode = mode_now;
                Ok(changed)
            }
            // Some registries answer 403 without a challenge to an expired token (ECR).
            (None, Mode::Bearer(_)) => {
                lock(&host.slot(repository)).drop_token(used);
                Ok(used.is_some())
            }
            (None, Mode::Basic(before)) => {
                *mode = Mode::Unknown;
                Ok(used == Some(before.as_str()))
            }
            (None, Mode::Unknown | Mode::Anonymous) => Ok(false),
        }
    }

    fn token(
        &self,
        http: &Http,
        repository: &Repository,
        host: &HostState,
        bearer: &Bearer,
        began: Instant,
    ) -> Result<String> {
        let slot = host.slot(repository);
        let mut slot = lock(&slot);
        if let Some(token) = slot
            .token
            .as_ref()
            .filter(|token| token.is_fresh(Instant::now()))
        {
            return Ok(token.authorization());
        }
        if let Some((_, error)) = slot.failure.as_ref().filter(|(at, _)| *at > began) {
            return Err(error.clone());
        }
        let scope = slot
            .scope
            .clone()
            .unwrap_or_else(|| repository.pull_scope());
        match self.fetch_token(http, repository, bearer, &scope) {
            Ok(token) => {
                let value = token.authorization();
                slot.token = Some(token);
                slot.failure = None;
                Ok(value)
            }
            Err(error) => {
                slot.failure = Some((Instant::now(), error.clone()));
                Err(error)
            }
        }
    }

    fn fetch_token(
        &self,
        http: &Http,
        repository: &Repository,
        bearer: &Bearer,
        scope: &str,
    ) -> Result<Token> {
        let request = TokenRequest::new(http, repository, bearer, scope)?;
        match self.credential(repository)? {
            Some(Credential::Registry(token)) => {
                let reply = serde_json::json!({ "token": token }).to_string();
                request.read(reply.as_bytes())
            }
            Some(Credential::Identity { user, token }) => match request.refresh(&token)? {
                Some(token) => Ok(token),
                None => {
                    let user = if user.is_empty() { "<token>" } else { &user };
                    request.get(Some((user, &token)))
                }
            },
            Some(Credential::Password { user, password }) => request.get(Some((&user, &password))),
            None => request.get(None),
        }
    }

    fn credential(&self, repository: &Repository) -> Result<Option<Credential>> {
        self.source
            .look_up(repository)
            .map_err(|error| Error::Credentials {
                host: repository.host().clone(),
                source: Arc::new(error),
            })
    }

    fn host(&self, repository: &Repository) -> Arc<HostState> {
        // Registries are named by the user, so that there are few.
        let key = repository.host().as_str();
        let mut hosts = lock(&self.hosts);
        if let Some(host) = hosts.get(key) {
            return Arc::clone(host);
        }
        let host = Arc::new(HostState {
            mode: Mutex::new(Mode::Unknown),
            contact: Mutex::default(),
            contact_ended: Condvar::new(),
            tokens: Mutex::default(),
        });
        hosts.insert(key.to_owned(), Arc::clone(&host));
        host
    }
}

/// The error for a registry that refuses after all that can be tried.
pub(super) fn denied(repository: &Repository, answer: Answer, what: String) -> Error {
    let status = answer.status();
    Error::Denied {
        host: repository.host().clone(),
        what,
        status,
        detail: super::detail::of(answer),
        hint: HINT,
    }
}

impl HostState {
    fn slot(&self, repository: &Repository) -> Arc<Mutex<Slot>> {
        let mut tokens = lock(&self.tokens);
        let slot = tokens.entry(repository.name().to_owned()).or_default();
        Arc::clone(slot)
    }
}

impl Slot {
    /// Drops the token that a request used, unless another thread renewed it since.
    fn drop_token(&mut self, used: Option<&str>) {
        let same = |token: &Token| Some(token.authorization().as_str()) == used;
        if self.token.as_ref().is_some_and(same) {
            self.token = None;
        }
    }
}

/// A request to a token server.
struct TokenRequest<'a> {
    http: &'a Http,
    repository: &'a Repository,
    bearer: &'a Bearer,
    scope: &'a str,
    realm: Url,
    named: NamedBy,
}

impl<'a> TokenRequest<'a> {
    /// # Errors
    /// The realm is malformed, or where a registry must not send this program.
    fn new(
        http: &'a Http,
        repository: &'a Repository,
        bearer: &'a Bearer,
        scope: &'a str,
    ) -> Result<TokenRequest<'a>> {
        let unexpected = |detail: String| Error::Unexpected {
            host: repository.host().clone(),
            what: "WWW-Authenticate".to_owned(),
            detail,
        };
        let registry = Url::parse(&repository.blob_url());
        let registry = registry.map_err(|error| unexpected(error.to_string()))?;
        let realm = Url::parse(bearer.realm()).map_err(|error| unexpected(error.to_string()))?;
        let named = check_target(&registry, &realm)?;
        Ok(TokenRequest {
            http,
            repository,
            bearer,
            scope,
            realm,
            named,
        })
    }

    fn get(&self, login: Option<(&str, &str)>) -> Result<Token> {
        let query = token::query(self.bearer, self.scope, login.map(|(user, _)| user));
        let url = Url::parse(&format!("{}{query}", self.realm))
            .map_err(|error| self.unexpected(error.to_string()))?;
        let basic = login.map(|(user, password)| Credential::basic(user, password));
        let header = basic
            .as_ref()
            .map(|value| ("authorization", value.as_str()));
        let answer = self
            .http
            .send(&Ask::Get, &url, header.as_slice(), self.named)?;
        self.token(answer)
    }

    /// Exchanges a refresh token. `None`: the server does not do that.
    fn refresh(&self, refresh_token: &str) -> Result<Option<Token>> {
        let form = token::refresh_form(self.bearer, self.scope, refresh_token);
        let answer = self
            .http
            .send(&Ask::Form(&form), &self.realm, &[], self.named)?;
        if matches!(answer.status(), 404 | 405) {
            answer.drain();
            return Ok(None);
        }
        self.token(answer).map(Some)
    }

    fn token(&self, answer: Answer) -> Result<Token> {
        match answer.status() {
            200 => self.read(&answer.bytes("a token", MAX_REPLY)?),
            401 | 403 | 400 => Err(denied(self.repository, answer, self.realm.without_query())),
            status @ (429 | 503) => {
                let date = answer.header("date");
                let wait = answer.header("retry-after");
                let retry_after = wait.and_then(|value| retry_after(value, date));
                let host = self.realm.host().clone();
                answer.drain();
                Err(Error::Busy {
                    host,
                    status,
                    retry_after,
                })
            }
            status => {
                let host = self.realm.host().clone();
                let detail = super::detail::of(answer);
                Err(Error::Status {
                    host,
                    what: "a token".to_owned(),
                    status,
                    detail,
                })
            }
        }
    }

    fn read(&self, reply: &[u8]) -> Result<Token> {
        Token::from_reply(reply, Instant::now()).map_err(|source| Error::Token {
            host: self.repository.host().clone(),
            realm: self.realm.without_query(),
            source,
        })
    }

    fn unexpected(&self, detail: String) -> Error {
        Error::Unexpected {
            host: self.realm.host().clone(),
            what: "a token".to_owned(),
            detail,
        }
    }
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}
