//! Authentication at registries: the `Authorization` of each request, and what a refusal changes.

use std::collections::HashMap;
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use super::challenge::{self, Bearer, Challenge};
use super::credential_source::Source;
use super::credentials::Credential;
use super::error::{Error, Result};
use super::http::{Answer, Http};
use super::repository::Repository;
use super::token::Token;
use super::token_request::TokenRequest;

/// Longest wait of a thread for another thread's first request to the same registry.
const FIRST_CONTACT: Duration = Duration::from_secs(30);

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
    /// User name and password.
    Basic,
    /// A token.
    Bearer(Bearer),
}

#[derive(Debug)]
struct HostState {
    mode: Mutex<Mode>,
    /// Whether a thread is making the first request.
    contact: Mutex<bool>,
    contact_ended: Condvar,
    /// By the names of repositories: each may have credentials of its own.
    logins: Mutex<HashMap<String, Arc<Mutex<Login>>>>,
}

/// The login for one repository. Locked while a token is fetched or credentials are looked up, so that one
/// thread does.
#[derive(Debug, Default)]
struct Login {
    /// User name and password, as the value of the header.
    password: Option<String>,
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
            Mode::Basic => self.password(repository, &host, began),
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
    /// the request may be repeated. Other threads go on as soon as the registry's authentication is known.
    ///
    /// # Errors
    /// The credentials cannot be looked up.
    pub(super) fn refused(
        &self,
        repository: &Repository,
        contact: &mut Contact,
        answer: &Answer,
        used: Option<&str>,
    ) -> Result<bool> {
        let host = self.host(repository);
        let challenge = challenge::strongest(answer.headers("www-authenticate"));
        let mut mode = lock(&host.mode);
        match (challenge, mode.clone()) {
            (Some(Challenge::Bearer(bearer)), _) => {
                let scope = bearer.scope().map(str::to_owned);
                *mode = Mode::Bearer(bearer);
                drop(mode);
                contact.end();
                // Another thread may hold it while it fetches a token.
                let login = host.login(repository);
                let mut login = lock(&login);
                login.scope = scope;
                login.drop_token(used);
                Ok(true)
            }
            // Harbor asks for a password where a token has expired. Without the token it asks for
            // another one.
            (Some(Challenge::Basic), Mode::Bearer(_)) => {
                *mode = Mode::Unknown;
                lock(&host.logins).clear();
                Ok(used.is_some())
            }
            (Some(Challenge::Basic), _) => {
                *mode = Mode::Basic;
                drop(mode);
                contact.end();
                self.renew_password(repository, &host, used)
            }
            // Some registries answer 403 without a challenge to an expired token (ECR).
            (None, Mode::Bearer(_)) => {
                drop(mode);
                lock(&host.login(repository)).drop_token(used);
                Ok(used.is_some())
            }
            (None, Mode::Basic) => {
                *mode = Mode::Unknown;
                Ok(used.is_some())
            }
            (None, Mode::Unknown | Mode::Anonymous) => Ok(false),
        }
    }

    /// User name and password for a repository, if there are any.
    fn password(
        &self,
        repository: &Repository,
        host: &HostState,
        began: Instant,
    ) -> Result<Option<String>> {
        let login = host.login(repository);
        let mut login = lock(&login);
        if login.password.is_none() {
            login.fails_again(began)?;
            let found = self.look_up_password(repository);
            login.password = login.noted(found)?;
        }
        Ok(login.password.clone())
    }

    /// Looks up user name and password again, after a refusal of `used`. `true` if there are others now.
    fn renew_password(
        &self,
        repository: &Repository,
        host: &HostState,
        used: Option<&str>,
    ) -> Result<bool> {
        let login = host.login(repository);
        let mut login = lock(&login);
        let differs = |password: &Option<String>| password.is_some() && password.as_deref() != used;
        if !differs(&login.password) {
            // The file may have been replaced. A refused password is not sent again.
            login.password = self.look_up_password(repository)?;
        }
        Ok(differs(&login.password))
    }

    fn look_up_password(&self, repository: &Repository) -> Result<Option<String>> {
        Ok(match self.credential(repository)? {
            Some(
                Credential::Password { user, password }
                | Credential::Identity {
                    user,
                    token: password,
                },
            ) => Some(Credential::basic(&user, &password)),
            Some(Credential::Registry(_)) | None => None,
        })
    }

    fn token(
        &self,
        http: &Http,
        repository: &Repository,
        host: &HostState,
        bearer: &Bearer,
        began: Instant,
    ) -> Result<String> {
        let login = host.login(repository);
        let mut login = lock(&login);
        let now = Instant::now();
        if let Some(token) = login.token.as_ref().filter(|token| token.is_fresh(now)) {
            return Ok(token.authorization());
        }
        login.fails_again(began)?;
        let scope = login.scope.clone();
        let scope = scope.unwrap_or_else(|| repository.pull_scope());
        let fetched = self.fetch_token(http, repository, bearer, &scope);
        let token = login.noted(fetched)?;
        Ok(login.token.insert(token).authorization())
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
        // Only the user names registries: the table stays small.
        let key = repository.host().as_str();
        let mut hosts = lock(&self.hosts);
        if let Some(host) = hosts.get(key) {
            return Arc::clone(host);
        }
        let host = Arc::new(HostState {
            mode: Mutex::new(Mode::Unknown),
            contact: Mutex::default(),
            contact_ended: Condvar::new(),
            logins: Mutex::default(),
        });
        hosts.insert(key.to_owned(), Arc::clone(&host));
        host
    }
}

impl HostState {
    fn login(&self, repository: &Repository) -> Arc<Mutex<Login>> {
        let mut logins = lock(&self.logins);
        let login = logins.entry(repository.name().to_owned()).or_default();
        Arc::clone(login)
    }
}

impl Login {
    /// Drops the token that a request used, unless another thread renewed it since.
    fn drop_token(&mut self, used: Option<&str>) {
        let same = |token: &Token| Some(token.authorization().as_str()) == used;
        if self.token.as_ref().is_some_and(same) {
            self.token = None;
        }
    }

    /// # Errors
    /// The last failure, if it is later than `began`: another thread tried meanwhile.
    fn fails_again(&self, began: Instant) -> Result<()> {
        let since = self.failure.as_ref().filter(|(at, _)| *at > began);
        since.map_or(Ok(()), |(_, error)| Err(error.clone()))
    }

    /// Notes whether an attempt failed, and returns its result.
    fn noted<T>(&mut self, result: Result<T>) -> Result<T> {
        let failure = result.as_ref().err().cloned();
        self.failure = failure.map(|error| (Instant::now(), error));
        result
    }
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}
