//! Credentials for registries: Docker's `config.json`, upstream's `cred.json`, and replies of
//! upstream's credential services, which share one form.

use std::collections::BTreeMap;
use std::fmt;
use std::io;
use std::path::PathBuf;
use std::sync::Arc;

use base64::Engine;
use base64::engine::general_purpose::{STANDARD, STANDARD_NO_PAD};
use serde::Deserialize;
use thiserror::Error;

use super::repository::{Host, Repository};
use super::token;

/// Largest file or reply with credentials, in bytes.
pub(super) const MAX_CREDENTIALS: u64 = 1 << 20;

/// Names of Docker Hub in files, besides the host of its API.
const DOCKER_HUB: [&str; 2] = ["docker.io", "index.docker.io"];

/// Error of a look-up of credentials.
#[derive(Clone, Debug, Error)]
pub enum Error {
    /// The file cannot be read.
    #[error("cannot read {}", path.display())]
    Read {
        /// The file.
        path: PathBuf,
        /// Error of the system.
        source: Arc<io::Error>,
    },
    /// The file or reply is too long.
    #[error("{0} has more than {MAX_CREDENTIALS} bytes; not a credentials file")]
    TooLong(String),
    /// Not JSON of the right shape. Does not quote it: it holds secrets.
    #[error("{0}: line {1}, column {2}: not a JSON object with \"auths\"")]
    Syntax(String, usize, usize),
    /// An entry cannot be used.
    #[error("{0}: the entry of {1} is malformed: {2}")]
    Entry(String, String, &'static str),
    /// A helper program keeps the credentials.
    #[error(
        "{origin}: the credentials of {host} are kept by docker-credential-{program}; \
         credential helpers are not run; use a credential service on a unix socket \
         (credentialConfig with mode \"uds\" in --service-config), or put the credentials into \
         the file"
    )]
    Helper {
        /// The file.
        origin: String,
        /// The registry.
        host: Host,
        /// The program's name.
        program: String,
    },
    /// The credential service does not answer.
    #[error("credential service {service} does not answer: {reason}")]
    Silent {
        /// The service.
        service: String,
        /// Cause.
        reason: String,
    },
    /// The credential service answers that it has none.
    #[error("credential service {service} refuses: {reason}")]
    Refused {
        /// The service.
        service: String,
        /// Its message.
        reason: String,
    },
}

impl Error {
    /// Whether the next attempt may succeed.
    pub fn is_passing(&self) -> bool {
        matches!(self, Error::Silent { .. })
    }
}

/// Proves the identity of a client to a registry.
#[derive(Clone, PartialEq, Eq)]
pub enum Credential {
    /// User name and password.
    Password {
        /// User name.
        user: String,
        /// Password.
        password: String,
    },
    /// A refresh token, to be exchanged for tokens.
    Identity {
        /// User name; may be empty.
        user: String,
        /// The refresh token.
        token: String,
    },
    /// A token that the registry itself takes.
    Registry(String),
}

/// The entries of one file or reply.
#[derive(Debug)]
pub struct Credentials {
    entries: Vec<Entry>,
    helpers: BTreeMap<String, String>,
    store: Option<String>,
    /// Name of the file or service.
    origin: String,
}

#[derive(Debug)]
struct Entry {
    host: String,
    /// Leading parts of the repositories' names; empty for all.
    path: String,
    /// Absent if the entry only says that a program keeps it.
    credential: Option<Credential>,
}

impl Credential {
    /// Value of an `Authorization` header with these as user name and password.
    pub(super) fn basic(user: &str, password: &str) -> String {
        format!("Basic {}", STANDARD.encode(format!("{user}:{password}")))
    }
}

/// Leaves the secrets out.
impl fmt::Debug for Credential {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Credential::Password { .. } => "Password(..)",
            Credential::Identity { .. } => "Identity(..)",
            Credential::Registry(_) => "Registry(..)",
        })
    }
}

#[derive(Deserialize)]
struct RawFile {
    #[serde(default)]
    auths: BTreeMap<String, RawEntry>,
    #[serde(default, rename = "credHelpers")]
    helpers: BTreeMap<String, String>,
    #[serde(rename = "credsStore")]
    store: Option<String>,
}

#[derive(Deserialize)]
struct RawEntry {
    username: Option<String>,
    password: Option<String>,
    auth: Option<String>,
    identitytoken: Option<String>,
    registrytoken: Option<String>,
}

impl Credentials {
    /// Reads a file's text. `origin` is the file's name, for errors.
    ///
    /// # Errors
    /// [`Error::Syntax`], [`Error::Entry`].
    pub fn parse(bytes: &[u8], origin: &str) -> Result<Credentials, Error> {
        let raw: RawFile = serde_json::from_slice(bytes)
            .map_err(|error| Error::Syntax(origin.to_owned(), error.line(), error.column()))?;
        let mut entries = Vec::new();
        for (key, entry) in raw.auths {
            let credential = entry
                .credential()
                .map_err(|reason| Error::Entry(origin.to_owned(), key.clone(), reason))?;
            let (host, path) = normalized(&key);
            entries.push(Entry {
                host,
                path,
                credential,
            });
        }
        let helpers = raw.helpers.into_iter();
        Ok(Credentials {
            entries,
            helpers: helpers
                .map(|(key, name)| (normalized(&key).0, name))
                .collect(),
            store: raw.store.filter(|name| !name.is_empty()),
            origin: origin.to_owned(),
        })
    }

    /// The credentials of the entry that names the most of a repository.
    ///
    /// # Errors
    /// [`Error::Helper`]: a program keeps them.
    pub fn find(&self, repository: &Repository) -> Result<Option<Credential>, Error> {
        let host = repository.host().as_str();
        let helper = |program: &String| Error::Helper {
            origin: self.origin.clone(),
            host: repository.host().clone(),
            program: program.clone(),
        };
        if let Some(program) = self.helpers.get(host) {
            return Err(helper(program));
        }
        let fits = |entry: &&Entry| {
            let rest = repository.name().strip_prefix(&entry.path);
            let whole =
                |rest: &str| entry.path.is_empty() || rest.is_empty() || rest.starts_with('/');
            entry.host == host && rest.is_some_and(whole)
        };
        let entries = self.entries.iter().filter(fits);
        // Of two keys for one host, one may be an empty leftover.
        let best = entries.max_by_key(|entry| (entry.path.len(), entry.credential.is_some()));
        match (best, &self.store) {
            (None, _) => Ok(None),
            (
                Some(Entry {
                    credential: None, ..
                }),
                Some(program),
            ) => Err(helper(program)),
            (Some(entry), _) => Ok(entry.credential.clone()),
        }
    }
}

impl RawEntry {
    fn credential(self) -> Result<Option<Credential>, &'static str> {
        let given = |text: Option<String>| text.filter(|text| !text.is_empty());
        if let Some(token) = given(self.registrytoken) {
            let usable = token::is_usable(&token);
            return if usable {
                Ok(Some(Credential::Registry(token)))
            } else {
                Err("registrytoken")
            };
        }
        let mut user = given(self.username);
        let mut password = given(self.password);
        if let Some(auth) = given(self.auth) {
            let decoded = decode(&auth).ok_or("auth is not base64 of USER:PASSWORD")?;
            let (name, secret) = decoded
                .split_once(':')
                .ok_or("auth is not base64 of USER:PASSWORD")?;
            // Docker itself pads passwords with zeros at the end.
            let secret = secret.trim_end_matches('\0');
            user = user.or_else(|| given(Some(name.to_owned())));
            password = password.or_else(|| given(Some(secret.to_owned())));
        }
        if let Some(token) = given(self.identitytoken) {
            let user = user.unwrap_or_default();
            return Ok(Some(Credential::Identity { user, token }));
        }
        match (user, password) {
            // What credential helpers call a refresh token.
            (Some(user), Some(token)) if user == "<token>" => {
                let user = String::new();
                Ok(Some(Credential::Identity { user, token }))
            }
            (Some(user), _) if user.contains(':') => Err("a user name cannot have a colon"),
            (Some(user), Some(password)) => Ok(Some(Credential::Password { user, password })),
            (None, None) => Ok(None),
            (Some(_), None) => Err("no password"),
            (None, Some(_)) => Err("no user name"),
        }
    }
}

fn decode(text: &str) -> Option<String> {
    let text = text.trim();
    let bytes = STANDARD
        .decode(text)
        .or_else(|_| STANDARD_NO_PAD.decode(text));
    String::from_utf8(bytes.ok()?).ok()
}

/// Host and path of a key, without scheme and API version; Docker Hub by its API's host.
fn normalized(key: &str) -> (String, String) {
    let key = key.split_once("://").map_or(key, |(_, rest)| rest);
    let key = key.trim_end_matches('/');
    let key = key
        .strip_suffix("/v1")
        .or_else(|| key.strip_suffix("/v2"))
        .unwrap_or(key);
    let (host, path) = key.split_once('/').unwrap_or((key, ""));
    let host = host.to_ascii_lowercase();
    if DOCKER_HUB.contains(&host.as_str()) {
        return ("registry-1.docker.io".to_owned(), path.to_owned());
    }
    (host, path.to_owned())
}

#[cfg(test)]
mod tests;
