//! Requests to token servers.

use std::time::Instant;

use super::address::NamedBy;
use super::challenge::Bearer;
use super::credentials::Credential;
use super::detail;
use super::error::{Error, Result};
use super::http::{Answer, Ask, Http};
use super::redirect::check_target;
use super::repository::Repository;
use super::token::{self, Token};
use super::url::Url;
use super::waiting::retry_after;

/// Largest reply of a token server, in bytes.
const MAX_REPLY: u64 = 64 << 10;

/// Advice in the error of a refusal.
const HINT: &str = "check the credentials (--credentials) and that they may pull this repository";

/// A request to a token server.
pub(super) struct TokenRequest<'a> {
    http: &'a Http,
    repository: &'a Repository,
    bearer: &'a Bearer,
    scope: &'a str,
    realm: Url,
    named: NamedBy,
}

impl<'a> TokenRequest<'a> {
    /// # Errors
    /// The realm is malformed, or a registry must not send this program there.
    pub(super) fn new(
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

    pub(super) fn get(&self, login: Option<(&str, &str)>) -> Result<Token> {
        let query = token::query(self.bearer, self.scope, login.map(|(user, _)| user));
        let url = Url::parse(&format!("{}{query}", self.realm))
            .map_err(|error| self.unexpected(error.to_string()))?;
        let basic = login.map(|(user, password)| Credential::basic(user, password));
        let header = basic
            .as_ref()
            .map(|value| ("authorization", value.as_str()));
        let answer = self.send(&Ask::Get, &url, header.as_slice())?;
        self.token(answer)
    }

    /// Exchanges a refresh token. Returns `None` if the server does not support that.
    pub(super) fn refresh(&self, refresh_token: &str) -> Result<Option<Token>> {
        let form = token::refresh_form(self.bearer, self.scope, refresh_token);
        let answer = self.send(&Ask::Form(&form), &self.realm, &[])?;
        if matches!(answer.status(), 404 | 405) {
            answer.drain();
            return Ok(None);
        }
        self.token(answer).map(Some)
    }

    fn send(&self, ask: &Ask<'_>, url: &Url, headers: &[(&str, &str)]) -> Result<Answer> {
        let answer = self.http.send(ask, url, headers, self.named);
        answer.map_err(|error| error.redirected(self.repository.host(), &self.realm))
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
                let detail = detail::of(answer);
                Err(Error::Status {
                    host,
                    what: "a token".to_owned(),
                    status,
                    detail,
                })
            }
        }
    }

    pub(super) fn read(&self, reply: &[u8]) -> Result<Token> {
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

/// The error for a registry that refuses after all that can be tried.
pub(super) fn denied(repository: &Repository, answer: Answer, what: String) -> Error {
    let status = answer.status();
    Error::Denied {
        host: repository.host().clone(),
        what,
        status,
        detail: detail::of(answer),
        hint: HINT,
    }
}
