//! Upstream's global configuration (`overlaybd.json`): the keys that mean something here.
//!
//! The rest of the file configures upstream's own daemon and is passed over.

use std::io::{self, Read};
use std::path::{Path, PathBuf};
use std::time::Duration;

use serde::Deserialize;
use serde::de::Error as _;
use thiserror::Error;

use super::credential_service::Service;
use super::credentials::{self, Source};
use super::mirror::{self, Prefix};
use super::tls::ClientCertificate;
use crate::format::download::Download;
use crate::io::regular::open_to_read;

/// Largest file, in bytes.
const MAX_CONFIG: u64 = 1 << 20;

/// Longest wait for a credential service that can be configured, in seconds.
const MAX_TIMEOUT: u64 = 60;

/// Most workers of a replay that can be configured.
const MAX_CONCURRENCY: u32 = 256;

/// Why the configuration cannot be used.
#[derive(Debug, Error)]
pub enum Error {
    /// The file cannot be read.
    #[error("cannot read {}", path.display())]
    Read {
        /// The file.
        path: PathBuf,
        /// What the system said.
        source: io::Error,
    },
    /// Not JSON, or values of wrong types.
    #[error("{} is not a valid service configuration", path.display())]
    Syntax {
        /// The file.
        path: PathBuf,
        /// What is wrong, with line and column.
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
        /// What is allowed.
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
}

/// What the configuration says.
#[derive(Debug, Default)]
pub struct ServiceConfig {
    /// Where credentials come from.
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
}

#[derive(Default, Deserialize)]
#[serde(default, rename_all = "camelCase")]
struct Raw {
    credential_config: RawCredentials,
    credential_file_path: String,
    cache_config: RawCache,
    registry_cache_dir: String,
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
    address: String,
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
        if !super::is_object(text) {
            return Err(syntax(serde_json::Error::custom("expected a JSON object")));
        }
        let raw: Raw = serde_json::from_slice(text).map_err(syntax)?;
        // The older names hold only where the newer group says nothing.
        let legacy = raw.cache_config.cache_type.is_empty();
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
            Some(raw.p2p_config.address.parse().map_err(source)?)
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
        })
    }
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

fn source(raw: RawCredentials, legacy: String, path: &Path) -> Result<Source, Error> {
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
        "" => Ok(given(legacy).map_or(Source::None, |file| Source::File(file.into()))),
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

#[cfg(test)]
mod tests {
    use super::*;

    fn parse(text: &str) -> Result<ServiceConfig, Error> {
        ServiceConfig::parse(text.as_bytes(), Path::new("F"))
    }

    #[test]
    fn the_keys_that_matter_are_taken() {
        let config = parse(
            r#"{
            "logLevel": 1, "ioEngine": 0, "exporterConfig": {"enable": false},
            "credentialConfig": {"mode": "uds", "path": "/run/c.sock", "timeout": 3},
            "cacheConfig": {"cacheType": "file", "cacheDir": "/c", "cacheSizeGB": 7, "refillSize": 262144},
            "registryCacheDir": "/old", "registryCacheSizeGB": 9,
            "download": {"enable": true, "delay": 600, "maxMBps": 10},
            "p2pConfig": {"enable": true, "address": "localhost:19145/dadip2p"},
            "prefetchConfig": {"concurrency": 8},
            "certConfig": {"certFile": "/a.crt", "keyFile": "/a.key"},
            "userAgent": "x/1 (y)"
        }"#,
        )
        .unwrap();
        assert!(matches!(config.credentials, Source::Service(_)));
        assert_eq!(config.cache_dir.as_deref(), Some(Path::new("/c")));
        assert_eq!(config.cache_size, Some(7 << 30));
        assert_eq!(config.refill_size, Some(262_144));
        let download = config.download.unwrap();
        assert!(download.enabled());
        assert_eq!(download.delay(), Duration::from_secs(600));
        assert_eq!(download.delay_extra(), Duration::from_secs(30));
        assert_eq!((download.rate(), download.attempts()), (Some(10 << 20), 5));
        assert!(config.p2p.is_some());
        assert_eq!(config.prefetch_concurrency, Some(8));
        assert!(config.certificate.is_some());
        assert_eq!(config.user_agent.as_deref(), Some("x/1 (y)"));
    }

    #[test]
    fn older_names_hold_where_the_newer_say_nothing() {
        let config = parse(
            r#"{"credentialFilePath":"/opt/overlaybd/cred.json","registryCacheDir":"/old","registryCacheSizeGB":9}"#,
        )
        .unwrap();
        assert!(matches!(config.credentials, Source::File(path) if path.ends_with("cred.json")));
        assert_eq!(config.cache_dir.as_deref(), Some(Path::new("/old")));
        assert_eq!(config.cache_size, Some(9 << 30));

        let empty = parse("{}").unwrap();
        assert!(matches!(empty.credentials, Source::None));
        assert!(empty.download.is_none() && empty.p2p.is_none() && empty.cache_dir.is_none());
        let off =
            parse(r#"{"p2pConfig":{"enable":false,"address":"http://far.example"}}"#).unwrap();
        assert!(off.p2p.is_none());
    }

    #[test]
    fn values_that_cannot_be_used_are_refused() {
        for text in [
            "",
            "[]",
            "{",
            r#"{"download":5}"#,
            r#"{"download":{"delay":-1}}"#,
            r#"{"cacheConfig":{"refillSize":1000}}"#,
            r#"{"cacheConfig":{"refillSize":0}}"#,
            r#"{"cacheConfig":{"refillSize":9223372036854775808}}"#,
            r#"{"credentialConfig":{"mode":"ftp"}}"#,
            r#"{"credentialConfig":{"mode":"http","path":""}}"#,
            r#"{"credentialConfig":{"mode":"https","path":"h/x","client_cert_path":"/a"}}"#,
            r#"{"credentialConfig":{"mode":"https","path":"h/x","server_ca_path":"/no/such/file"}}"#,
            r#"{"p2pConfig":{"enable":true,"address":"http://far.example"}}"#,
            r#"{"p2pConfig":{"enable":true,"address":""}}"#,
            r#"{"certConfig":{"certFile":"/a"}}"#,
            "{\"userAgent\":\"a\\r\\nb\"}",
        ] {
            assert!(parse(text).is_err(), "{text}");
        }
        let extreme = parse(
            r#"{"cacheConfig":{"cacheSizeGB":18446744073709551615},
                "prefetchConfig":{"concurrency":4294967295},
                "download":{"maxMBps":0,"tryCnt":0,"blockSize":18446744073709551615}}"#,
        )
        .unwrap();
        assert_eq!(extreme.cache_size, Some(u64::MAX));
        assert_eq!(extreme.prefetch_concurrency, Some(MAX_CONCURRENCY));
        let download = extreme.download.unwrap();
        assert_eq!((download.rate(), download.attempts()), (None, 1));
        assert_eq!(download.block_size(), 64 << 20);
    }

    #[test]
    fn a_file_is_read_within_its_bound() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("overlaybd.json");
        assert!(matches!(
            ServiceConfig::load(&path),
            Err(Error::Read { .. })
        ));
        std::fs::write(&path, "{}").unwrap();
        assert!(ServiceConfig::load(&path).is_ok());
        std::fs::write(&path, vec![b' '; MAX_CONFIG as usize + 1]).unwrap();
        assert!(matches!(
            ServiceConfig::load(&path),
            Err(Error::Read { .. })
        ));
    }
}
