//! Upstream's global configuration (`overlaybd.json`).
//!
//! Each key is taken, or refused if its value cannot be used, or has no effect here because it configures
//! upstream's own daemon. [`ServiceConfig::report_ignored`] logs the names of the latter.

mod ignored;
#[cfg(test)]
mod tests;

use std::io::{self, Read};
use std::path::{Path, PathBuf};
use std::time::Duration;

use serde::Deserialize;
use serde::de::Error as _;
use thiserror::Error;

use super::credential_service::Service;
use super::credential_source::Source;
use super::credentials;
use super::json::is_object;
use super::mirror::{self, Prefix};
use super::tls::ClientCertificate;
use crate::format::download::Download;
use crate::io::regular::open_to_read;

/// Largest file, in bytes.
const MAX_CONFIG: u64 = 1 << 20;

/// Longest wait for a credential service that can be configured, in seconds.
const MAX_TIMEOUT: u64 = 60;

/// Values of upstream's daemon for keys that the file does not have.
const DEFAULT_CREDENTIALS: &str = "/opt/overlaybd/cred.json";
const DEFAULT_P2P: &str = "http://localhost:9731/accelerator";

/// Most workers of a replay that can be configured.
const MAX_CONCURRENCY: u32 = 256;

/// Error of a configuration that cannot be used.
#[derive(Debug, Error)]
pub enum Error {
    /// The file cannot be read.
    #[error("cannot read {}", path.display())]
    Read {
        /// The file.
        path: PathBuf,
        /// Error of the system.
        source: io::Error,
    },
    /// Not JSON, or values of wrong types.
    #[error("{} is not a valid service configuration", path.display())]
    Syntax {
        /// The file.
        path: PathBuf,
        /// Description, with line and column.
        source: serde_json::Error,
    },
    /// A key has a value that cannot be used.
    #[error("{}: {key} is {found}; expected {expected}", path.display())]
    Value {
        /// The file.
        path: PathBuf,
        /// The key.
        key: &'static str,
        /// Its value.
        found: String,
        /// Allowed values.
        expected: &'static str,
    },
    /// The credential service cannot be set up.
    #[error("{}: credentialConfig cannot be used", path.display())]
    Credentials {
        /// The file.
        path: PathBuf,
        /// Why.
        source: credentials::Error,
    },
    /// The peer-to-peer proxy's address cannot be used.
    #[error("{}: p2pConfig.address cannot be used", path.display())]
    P2p {
        /// The file.
        path: PathBuf,
        /// Why.
        source: mirror::Error,
    },
    /// The peer-to-peer proxy may not be used.
    #[error(transparent)]
    Proxy(#[from] mirror::Error),
}

/// Settings of the configuration.
#[derive(Debug, Default)]
pub struct ServiceConfig {
    /// Source of credentials.
    pub credentials: Source,
    /// Folder of upstream's cache; ours is a folder of its own in it.
    pub cache_dir: Option<PathBuf>,
    /// Size of the cache in bytes.
    pub cache_size: Option<u64>,
    /// Bytes of one demand request: a power of two, at least 4096.
    pub refill_size: Option<u64>,
    /// Background download of images that say nothing about it.
    pub download: Option<Download>,
    /// Peer-to-peer proxy.
    pub p2p: Option<Prefix>,
    /// Requests of a replay that are under way at once.
    pub prefetch_concurrency: Option<u32>,
    /// Certificate for registries.
    pub certificate: Option<ClientCertificate>,
    /// Value of the `User-Agent` header.
    pub user_agent: Option<String>,
    /// The file, and its keys without effect.
    ignored: Option<(PathBuf, Vec<String>)>,
}

#[derive(Default, Deserialize)]
#[serde(default, rename_all = "camelCase")]
struct Raw {
    credential_config: RawCredentials,
    credential_file_path: Option<String>,
    cache_config: RawCache,
    registry_cache_dir: String,
    cache_type: String,
    #[serde(rename = "registryCacheSizeGB")]
    registry_cache_size_gb: Option<u64>,
    download: Option<Download>,
    p2p_config: RawP2p,
    prefetch_config: RawPrefetch,
    cert_config: RawCertificate,
    user_agent: String,
}

#[derive(Default, Deserialize)]
#[serde(default)]
struct RawCredentials {
    mode: String,
    path: String,
    timeout: Option<u64>,
    client_cert_path: String,
    client_key_path: String,
    server_ca_path: String,
}

#[derive(Default, Deserialize)]
#[serde(default, rename_all = "camelCase")]
struct RawCache {
    cache_type: String,
    cache_dir: String,
    #[serde(rename = "cacheSizeGB")]
    cache_size_gb: Option<u64>,
    refill_size: Option<u64>,
}

#[derive(Default, Deserialize)]
#[serde(default)]
struct RawP2p {
    enable: bool,
    address: Option<String>,
}

#[derive(Default, Deserialize)]
#[serde(default)]
struct RawPrefetch {
    concurrency: Option<u32>,
}

#[derive(Default, Deserialize)]
#[serde(default, rename_all = "camelCase")]
struct RawCertificate {
    cert_file: String,
    key_file: String,
}

impl ServiceConfig {
    /// Directory of our cache, if the file names upstream's: a directory in it, because upstream's files
    /// have another format.
    pub fn our_cache(&self) -> Option<PathBuf> {
        self.cache_dir.as_ref().map(|dir| dir.join("ovbd"))
    }

    /// Logs the keys without effect, in one line. Call it once for each process.
    pub fn report_ignored(&self) {
        if let Some((path, keys)) = &self.ignored {
            let keys = keys.join(", ");
            log::info!("{}: without effect: {keys}", path.display());
        }
    }

    /// Reads a file.
    ///
    /// # Errors
    /// It cannot be read, or a key that is used has a value that cannot be: see [`Error`].
    pub fn load(path: &Path) -> Result<ServiceConfig, Error> {
        let failed = |source| Error::Read {
            path: path.to_owned(),
            source,
        };
        let mut text = Vec::new();
        let mut bounded = open_to_read(path).map_err(failed)?.take(MAX_CONFIG + 1);
        bounded.read_to_end(&mut text).map_err(failed)?;
        if text.len() as u64 > MAX_CONFIG {
            return Err(failed(io::Error::other(
                "longer than 1 MiB; not a configuration",
            )));
        }
        ServiceConfig::parse(&text, path)
    }

    /// Reads a file's text. `path` is the file's name, for errors.
    ///
    /// # Errors
    /// As [`ServiceConfig::load`].
    pub fn parse(text: &[u8], path: &Path) -> Result<ServiceConfig, Error> {
        let syntax = |source| Error::Syntax {
            path: path.to_owned(),
            source,
        };
        if !is_object(text) {
            return Err(syntax(serde_json::Error::custom("expected a JSON object")));
        }
        let raw: Raw = serde_json::from_slice(text).map_err(syntax)?;
        // The older names hold only where the newer group says nothing.
        let legacy = raw.cache_config.cache_type.is_empty();
        let cache_type = match legacy {
            true => ("cacheType", raw.cache_type.as_str()),
            false => (
                "cacheConfig.cacheType",
                raw.cache_config.cache_type.as_str(),
            ),
        };
        let ignored = ignored(text, cache_type, path)?;
        let legacy_dir = given(raw.registry_cache_dir).filter(|_| legacy);
        let legacy_size = raw.registry_cache_size_gb.filter(|_| legacy);
        let refuse = |key, found: String, expected| Error::Value {
            path: path.to_owned(),
            key,
            found,
            expected,
        };
        let size = raw.cache_config.cache_size_gb.or(legacy_size);
        let refill = raw.cache_config.refill_size;
        let fits = |size: u64| size.is_power_of_two() && (4096..=64 << 20).contains(&size);
        if let Some(size) = refill.filter(|size| !fits(*size)) {
            let expected = "a power of two from 4096 to 67108864";
            return Err(refuse("cacheConfig.refillSize", size.to_string(), expected));
        }
        let p2p = if raw.p2p_config.enable {
            let source = |source| Error::P2p {
                path: path.to_owned(),
                source,
            };
            let address = raw.p2p_config.address;
            let address = address.as_deref().unwrap_or(DEFAULT_P2P);
            Some(address.parse().map_err(source)?)
        } else {
            None
        };
        let concurrency = raw.prefetch_config.concurrency;
        Ok(ServiceConfig {
            credentials: source(raw.credential_config, raw.credential_file_path, path)?,
            cache_dir: given(raw.cache_config.cache_dir)
                .or(legacy_dir)
                .map(PathBuf::from),
            cache_size: size.map(|size| size.saturating_mul(1 << 30)),
            refill_size: refill,
            download: raw.download,
            p2p,
            prefetch_concurrency: concurrency.map(|count| count.clamp(1, MAX_CONCURRENCY)),
            certificate: certificate(raw.cert_config.cert_file, raw.cert_config.key_file)
                .map_err(|()| refuse("certConfig", "half given".to_owned(), "both files"))?,
            user_agent: user_agent(raw.user_agent)
                .map_err(|found| refuse("userAgent", found, "visible ASCII characters"))?,
            ignored: (!ignored.is_empty()).then(|| (path.to_owned(), ignored)),
        })
    }
}

/// The keys of a configuration without effect, among them the kind of cache, unless it is unknown.
fn ignored(
    text: &[u8],
    (key, kind): (&'static str, &str),
    path: &Path,
) -> Result<Vec<String>, Error> {
    let mut ignored = ignored::keys(text);
    match kind {
        "" | "file" => {}
        "ocf" | "download" => {
            ignored.insert(0, format!("{key} {kind:?} (the cache is as for \"file\")"));
        }
        _ => {
            return Err(Error::Value {
                path: path.to_owned(),
                key,
                found: format!("{kind:.100?}"),
                expected: "file, ocf or download",
            });
        }
    }
    Ok(ignored)
}

fn given(text: String) -> Option<String> {
    Some(text).filter(|text| !text.is_empty())
}

fn certificate(certificate: String, key: String) -> Result<Option<ClientCertificate>, ()> {
    match (given(certificate), given(key)) {
        (Some(certificate), Some(key)) => Ok(Some(ClientCertificate {
            certificate: certificate.into(),
            key: key.into(),
        })),
        (None, None) => Ok(None),
        _ => Err(()),
    }
}

fn user_agent(text: String) -> Result<Option<String>, String> {
    let visible = |byte: u8| byte.is_ascii_graphic() || byte == b' ';
    if text.len() > 200 || !text.bytes().all(visible) {
        return Err(format!("{:?}", text.chars().take(200).collect::<String>()));
    }
    Ok(given(text))
}

/// The file of credentials that the older key names. Without the key, upstream's default, if that file
/// is there.
fn legacy_file(named: Option<String>) -> Source {
    let file = match named {
        Some(named) => given(named).map(PathBuf::from),
        None => Some(PathBuf::from(DEFAULT_CREDENTIALS)).filter(|file| file.exists()),
    };
    file.map_or(Source::None, Source::File)
}

fn source(raw: RawCredentials, legacy: Option<String>, path: &Path) -> Result<Source, Error> {
    let timeout = Duration::from_secs(raw.timeout.unwrap_or(1).clamp(1, MAX_TIMEOUT));
    let failed = |source| Error::Credentials {
        path: path.to_owned(),
        source,
    };
    let client = certificate(raw.client_cert_path, raw.client_key_path);
    let ca = given(raw.server_ca_path).map(PathBuf::from);
    let half = || Error::Value {
        path: path.to_owned(),
        key: "credentialConfig.client_cert_path",
        found: "half given".to_owned(),
        expected: "also client_key_path",
    };
    match raw.mode.as_str() {
        "" => Ok(legacy_file(legacy)),
        "file" => Ok(Source::File(raw.path.into())),
        "http" => Service::http(&raw.path, false, timeout, None, None)
            .map(Source::Service)
            .map_err(failed),
        "https" => {
            let client = client.map_err(|()| half())?;
            Service::http(&raw.path, true, timeout, ca.as_deref(), client.as_ref())
                .map(Source::Service)
                .map_err(failed)
        }
        "uds" => Ok(Source::Service(Service::unix(raw.path.into(), timeout))),
        other => Err(Error::Value {
            path: path.to_owned(),
            key: "credentialConfig.mode",
            found: format!("{other:.100?}"),
            expected: "file, http, https or uds",
        }),
    }
}
