//! Requests with authentication, redirects and circuit breakers.

use std::sync::Arc;
use std::time::Instant;

use super::address::NamedBy;
use super::auth::{Contact, Logins};
use super::breaker::{Breakers, SERVERS, Spared};
use super::detail;
use super::error::{Error, Result};
use super::http::{Answer, Ask, Http};
use super::repository::Repository;
use super::statuses::Statuses;
use super::token_request::denied;
use super::url::Url;
use super::waiting::{retry_after, target_lifetime};

use crate::ratelimited_log;

/// Most redirects that are followed for one request.
const MAX_HOPS: usize = 5;

/// Requests to a registry for one answer: the first, one after a login, one after a second login
/// with credentials read again.
const MAX_LOGINS: usize = 3;

/// Connections, authentication and circuit breakers.
#[derive(Debug)]
pub(super) struct Requests {
    http: Http,
    logins: Arc<Logins>,
    breakers: Breakers,
    statuses: Arc<Statuses>,
}

/// Target of a redirect.
#[derive(Clone, Debug)]
pub(super) struct Target {
    pub(super) url: Url,
    pub(super) named: NamedBy,
    /// End of its lifetime.
    pub(super) until: Instant,
}

/// Checks a redirect from one URL to another, and returns how far the target is trusted.
pub(super) type Check<'a> = &'a dyn Fn(&Url, &Url) -> Result<NamedBy>;

impl Requests {
    pub(super) fn new(http: Http, logins: Arc<Logins>, statuses: Arc<Statuses>) -> Requests {
        let breakers = Breakers::new(SERVERS);
        Requests {
            http,
            logins,
            breakers,
            statuses,
        }
    }

    /// Lets one thread make the first request to a registry; the others wait until it is dropped.
    pub(super) fn first_contact(&self, repository: &Repository) -> Contact {
        self.logins.first_contact(repository)
    }

    /// Sends a request to a registry, with the login to `repository` that it requires. The first contact ends
    /// as soon as the kind of login is known.
    pub(super) fn log_in_and_ask(
        &self,
        contact: &mut Contact,
        repository: &Repository,
        ask: &Ask<'_>,
        url: &Url,
        headers: &[(&str, &str)],
    ) -> Result<Answer> {
        let mut attempt = 1;
        loop {
            let authorization =
                self.logins
                    .authorization(&self.http, repository, contact.began())?;
            let mut all = headers.to_vec();
            all.extend(
                authorization
                    .as_deref()
                    .map(|value| ("authorization", value)),
            );
            let answer = self.ask(ask, url, &all, NamedBy::User)?;
            if !matches!(answer.status(), 401 | 403) {
                self.logins.accepted(repository);
                return Ok(answer);
            }
            let used = authorization.as_deref();
            let again = self.logins.refused(repository, contact, &answer, used)?;
            if !again || attempt == MAX_LOGINS {
                return Err(denied(repository, answer, repository.name().to_owned()));
            }
            answer.drain();
            attempt += 1;
        }
    }

    /// Follows the redirects of an answer from `url`, without credentials. Calls `redirected` with
    /// each target before it is asked.
    pub(super) fn follow(
        &self,
        ask: &Ask<'_>,
        mut url: Url,
        mut answer: Answer,
        headers: &[(&str, &str)],
        check: Check<'_>,
        redirected: &mut dyn FnMut(&Target),
    ) -> Result<Answer> {
        let mut target: Option<Target> = None;
        for _ in 0..=MAX_HOPS {
            if !matches!(answer.status(), 301 | 302 | 303 | 307 | 308) {
                return Ok(answer);
            }
            let next = next(&url, &answer)?;
            let mut named = check(&url, &next)?;
            let mut until = Instant::now() + target_lifetime(&next, answer.header("date"));
            if let Some(before) = &target {
                until = until.min(before.until);
                named = named.max(before.named);
            }
            let found = Target {
                url: next.clone(),
                named,
                until,
            };
            redirected(&found);
            target = Some(found);
            answer.drain();
            let asked = self.ask(ask, &next, headers, named);
            answer = asked.map_err(|error| error.redirected(url.host(), &next))?;
            url = next;
        }
        Err(Error::Redirect {
            host: url.host().clone(),
            target: url.without_query(),
            reason: "more than 5 redirects".to_owned(),
        })
    }

    /// Sends one request, unless the circuit breaker of its host is open.
    pub(super) fn ask(
        &self,
        ask: &Ask<'_>,
        url: &Url,
        headers: &[(&str, &str)],
        named: NamedBy,
    ) -> Result<Answer> {
        let host = url.host();
        let resting = |spared: Spared| Error::Resting {
            host: host.clone(),
            retry_after: spared.retry_after,
            source: Box::new(spared.error),
        };
        self.breakers
            .admit(host.as_str(), Instant::now())
            .map_err(resting)?;
        let result = self.http.send(ask, url, headers, named);
        self.statuses
            .count(result.as_ref().ok().map(Answer::status));
        if let Some(error) = outage(url, &result) {
            if self.breakers.failed(host.as_str(), Instant::now(), error) {
                ratelimited_log::warn(format_args!(
                    "{host} stopped answering; probing it at intervals"
                ));
            }
        } else if self.breakers.succeeded(host.as_str()) {
            ratelimited_log::info(format_args!("{host} answers again"));
        }
        result
    }
}

/// The error of a request that shows that its server is overloaded or does not work.
fn outage(url: &Url, result: &Result<Answer>) -> Option<Error> {
    let host = url.host().clone();
    match result {
        Err(error) => error.is_outage().then(|| error.clone()),
        Ok(answer) => match answer.status() {
            status @ (429 | 503) => Some(Error::Busy {
                host,
                status,
                retry_after: None,
            }),
            status if status >= 500 || matches!(status, 408 | 425) => Some(Error::Status {
                host,
                what: url.without_query(),
                status,
                detail: String::new(),
            }),
            _ => None,
        },
    }
}

/// The target of a redirect.
fn next(url: &Url, answer: &Answer) -> Result<Url> {
    let unexpected = |detail: String| Error::Unexpected {
        host: url.host().clone(),
        what: url.without_query(),
        detail,
    };
    let location = answer.header("location");
    let location = location.ok_or_else(|| unexpected("a redirect without Location".to_owned()))?;
    url.join(location)
        .map_err(|error| unexpected(error.to_string()))
}

/// Returns an answer of status 200; otherwise the error of the status.
pub(super) fn successful(answer: Answer, what: &str) -> Result<Answer> {
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
