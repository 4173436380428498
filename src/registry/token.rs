//! Tokens: requests to token servers, parsing of their replies, and the lifetime of a token.

use std::fmt;
use std::time::{Duration, Instant};

use serde::Deserialize;
use serde_json::Value;
use thiserror::Error;

use super::challenge::Bearer;
use super::json::is_object;
use super::url::encode;

/// Lifetime of a token whose reply names none, from the distribution specification.
const DEFAULT_LIFETIME: Duration = Duration::from_secs(60);

/// Longest time for which a token is kept.
const MAX_LIFETIME: Duration = Duration::from_secs(24 * 3600);

/// Time before its expiry at which a token is renewed; half of its lifetime if that is shorter.
const RENEWAL_MARGIN: Duration = Duration::from_secs(30);

/// Longest token, in bytes: it must fit a request's header.
const MAX_TOKEN: usize = 16 * 1024;

/// Name of this program at token servers.
const CLIENT_ID: &str = "ovbd-vhost";

/// Error of a reply without a usable token.
#[derive(Clone, Debug, Error, PartialEq, Eq)]
pub enum Error {
    /// The reply is not JSON of the right shape.
    #[error("the token server's reply is not a JSON object with a token: {0}")]
    Syntax(String),
    /// Neither `token` nor `access_token`.
    #[error("the token server's reply has neither token nor access_token")]
    Missing,
    /// The token cannot be sent in a header.
    #[error("the token server's token is empty, too long or has characters a header cannot hold")]
    Unusable,
}

/// A token, and the time to renew it.
#[derive(Clone)]
pub struct Token {
    value: String,
    renew_at: Instant,
}

impl Token {
    /// Reads a token server's reply that arrived at `now`.
    ///
    /// # Errors
    /// [`Error::Syntax`], [`Error::Missing`], [`Error::Unusable`]: the reply holds no token.
    pub fn from_reply(reply: &[u8], now: Instant) -> Result<Token, Error> {
        #[derive(Deserialize)]
        struct Reply {
            token: Option<String>,
            access_token: Option<String>,
            expires_in: Option<Value>,
        }
        if !is_object(reply) {
            return Err(Error::Syntax("expected a JSON object".to_owned()));
        }
        let reply: Reply =
            serde_json::from_slice(reply).map_err(|error| Error::Syntax(error.to_string()))?;
        let given = |token: &String| !token.is_empty();
        let value = reply.token.filter(given).or(reply.access_token);
        let value = value.ok_or(Error::Missing)?;
        if !is_usable(&value) {
            return Err(Error::Unusable);
        }
        let lifetime = lifetime(reply.expires_in.as_ref());
        let margin = RENEWAL_MARGIN.min(lifetime / 2);
        Ok(Token {
            value,
            renew_at: now + (lifetime - margin),
        })
    }

    /// Whether the token need not be renewed yet at `now`.
    pub fn is_fresh(&self, now: Instant) -> bool {
        now < self.renew_at
    }

    /// Value of the `Authorization` header.
    pub fn authorization(&self) -> String {
        format!("Bearer {}", self.value)
    }
}

/// Leaves the secret out.
impl fmt::Debug for Token {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Token")
            .field("renew_at", &self.renew_at)
            .finish_non_exhaustive()
    }
}

/// Whether `token` can be the value of an `Authorization` header.
pub fn is_usable(token: &str) -> bool {
    let in_bounds = (1..=MAX_TOKEN).contains(&token.len());
    in_bounds && token.bytes().all(|byte| byte.is_ascii_graphic())
}

/// Query part of a token request: what to append to the realm's URL.
pub fn query(bearer: &Bearer, scope: &str, account: Option<&str>) -> String {
    let mut query = String::new();
    let mut add = |name: &str, value: &str| {
        query.push(if query.is_empty() { '?' } else { '&' });
        query.push_str(&format!("{name}={}", encode(value)));
    };
    if let Some(service) = bearer.service() {
        add("service", service);
    }
    add("scope", scope);
    if let Some(account) = account {
        add("account", account);
    }
    if bearer.realm().contains('?') {
        query.replace_range(..1, "&");
    }
    query
}

/// Form of a token request with a refresh token (the `POST` of the OAuth2 flow).
pub fn refresh_form(bearer: &Bearer, scope: &str, refresh_token: &str) -> String {
    format!(
        "grant_type=refresh_token&service={}&client_id={CLIENT_ID}&scope={}&refresh_token={}",
        encode(bearer.service().unwrap_or_default()),
        encode(scope),
        encode(refresh_token)
    )
}

/// Lifetime by `expires_in`; the default if it is absent, zero or not a number of seconds.
fn lifetime(expires_in: Option<&Value>) -> Duration {
    let seconds = match expires_in {
        Some(Value::Number(number)) => number
            .as_u64()
            .or_else(|| number.as_f64().map(|seconds| seconds.max(0.0) as u64)),
        Some(Value::String(text)) => text.parse().ok(),
        _ => None,
    };
    match seconds {
        None | Some(0) => DEFAULT_LIFETIME,
        Some(seconds) => Duration::from_secs(seconds).min(MAX_LIFETIME),
    }
}

#[cfg(test)]
mod tests {
    use super::super::challenge::{Challenge, parse};
    use super::*;

    fn fresh_for(reply: &str) -> Duration {
        let now = Instant::now();
        let token = Token::from_reply(reply.as_bytes(), now).unwrap();
        assert_eq!(token.authorization(), "Bearer T");
        assert!(token.is_fresh(now), "{reply}");
        token.renew_at - now
    }

    #[test]
    fn a_token_is_renewed_before_it_expires() {
        for (expires_in, expected) in [
            ("", 30.0),
            (r#","expires_in":300"#, 270.0),
            (r#","expires_in":"300""#, 270.0),
            (r#","expires_in":300.9"#, 270.0),
            (r#","expires_in":1"#, 0.5),
            (r#","expires_in":0"#, 30.0),
            (r#","expires_in":-5"#, 30.0),
            (r#","expires_in":null"#, 30.0),
            (r#","expires_in":[]"#, 30.0),
            (r#","expires_in":18446744073709551615"#, 86370.0),
            (r#","expires_in":1e300"#, 86370.0),
        ] {
            let reply = format!(r#"{{"token":"T"{expires_in}}}"#);
            assert_eq!(fresh_for(&reply).as_secs_f64(), expected, "{reply}");
        }
    }

    #[test]
    fn either_name_of_the_token_is_taken() {
        fresh_for(r#"{"access_token":"T","issued_at":"x"}"#);
        fresh_for(r#"{"token":"","access_token":"T"}"#);
        fresh_for(r#"{"token":"T","access_token":"U"}"#);
    }

    #[test]
    fn replies_without_a_token_are_refused() {
        let long = format!(r#"{{"token":"{}"}}"#, "x".repeat(MAX_TOKEN + 1));
        for (reply, expected) in [
            ("{}", Some(Error::Missing)),
            (r#"{"token":null}"#, Some(Error::Missing)),
            (r#"{"access_token":""}"#, Some(Error::Unusable)),
            (r#"{"token":"a\r\nX: y"}"#, Some(Error::Unusable)),
            (r#"{"token":"a b"}"#, Some(Error::Unusable)),
            (r#"{"token":"é"}"#, Some(Error::Unusable)),
            (&long, Some(Error::Unusable)),
            ("", None),
            ("[]", None),
            (r#"["T","U",60]"#, None),
            (r#"{"token":5}"#, None),
            ("<html>", None),
            (r#"{"token":"T""#, None),
        ] {
            let refused = Token::from_reply(reply.as_bytes(), Instant::now()).unwrap_err();
            match expected {
                Some(expected) => assert_eq!(refused, expected, "{reply:.80}"),
                None => assert!(matches!(refused, Error::Syntax(_)), "{reply}"),
            }
        }
    }

    #[test]
    fn requests_are_encoded() {
        let bearer = |header: &str| match parse(header).remove(0) {
            Challenge::Bearer(bearer) => bearer,
            Challenge::Basic => unreachable!(),
        };
        let with_service = bearer(r#"Bearer realm="https://a/t",service="a b&c""#);
        assert_eq!(
            query(&with_service, "repository:a/b:pull", Some("u+1")),
            "?service=a%20b%26c&scope=repository%3Aa%2Fb%3Apull&account=u%2B1"
        );
        let bare = bearer(r#"Bearer realm="https://a/t?x=y""#);
        assert_eq!(query(&bare, "s", None), "&scope=s");
        assert_eq!(
            refresh_form(&with_service, "s", "R=&"),
            "grant_type=refresh_token&service=a%20b%26c&client_id=ovbd-vhost&scope=s\
             &refresh_token=R%3D%26"
        );
    }

    #[test]
    fn a_token_is_not_printed() {
        let token = Token::from_reply(br#"{"token":"SECRET"}"#, Instant::now()).unwrap();
        assert!(!format!("{token:?}").contains("SECRET"));
    }
}
