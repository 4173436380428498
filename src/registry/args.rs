//! Command-line options for registries, shared by the programs.

use std::path::PathBuf;
use std::sync::Arc;

use clap::Args;
use serde::{Deserialize, Serialize};

use super::client::Options;
use super::credential_source::Source;
use super::mirror::{Mirror, Prefix};
use super::repository::{Host, Repository};
use super::service_config::{Error, ServiceConfig};
use crate::source::RemoteBlob;

/// Access to registries.
#[derive(Args, Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[command(next_help_heading = "Registries")]
pub struct RegistryArgs {
    /// Credentials file: Docker's config.json or upstream's cred.json [default: those of
    /// --service-config]
    #[arg(long, value_name = "FILE")]
    pub credentials: Option<PathBuf>,
    /// Use plain HTTP for this registry; repeatable
    #[arg(long, value_name = "HOST[:PORT]")]
    pub insecure_registry: Vec<Host>,
    /// PEM file of certificates to trust in addition to the system's
    #[arg(long, value_name = "FILE")]
    pub registry_ca: Option<PathBuf>,
    /// Request blobs of HOST from the mirror at URL first; repeatable
    ///
    /// A mirror serves the registry API; the query parameter `ns` names the registry. Request
    /// headers can follow: HOST=URL,header=NAME:VALUE.
    #[arg(long, value_name = "HOST=URL")]
    pub mirror: Vec<Mirror>,
    /// Request blobs from the peer-to-peer proxy at URL first; the blob URL is appended. URL must have
    /// a loopback address, or a host that --p2p-host allows
    #[arg(long, value_name = "URL")]
    pub p2p: Option<Prefix>,
    /// Allow a peer-to-peer proxy at this host, which then receives credentials of registries;
    /// repeatable
    #[arg(long, value_name = "HOST[:PORT]")]
    pub p2p_host: Vec<Host>,
    /// Upstream's overlaybd.json. Used are its keys for credentials, client certificate, cache,
    /// download, peer-to-peer and user agent
    #[arg(long, value_name = "FILE")]
    pub service_config: Option<PathBuf>,
}

impl RegistryArgs {
    /// The repository by the scheme that is used for it.
    pub fn reached(&self, repository: &Repository) -> Repository {
        repository.reached(&self.insecure_registry)
    }

    /// The blob with the URL that is used for it.
    pub fn reached_blob(&self, blob: &Arc<RemoteBlob>) -> Arc<RemoteBlob> {
        match Repository::from_blob_url(&blob.blobs_url) {
            Ok(repository) => Arc::new(RemoteBlob {
                blobs_url: self.reached(&repository).blob_url(),
                ..RemoteBlob::clone(blob)
            }),
            // The fetcher refuses it, with the reason.
            Err(_) => Arc::clone(blob),
        }
    }

    /// Reads the service configuration, if one is named. Gives the options for a client, in which
    /// the command line wins, and the configuration for its other keys.
    ///
    /// # Errors
    /// The service configuration cannot be read or used, or the peer-to-peer proxy is not allowed: see
    /// [`Error`].
    pub fn into_options(self) -> Result<(Options, ServiceConfig), Error> {
        let mut config = match &self.service_config {
            Some(path) => ServiceConfig::load(path)?,
            None => ServiceConfig::default(),
        };
        let configured = std::mem::take(&mut config.credentials);
        let p2p = self.p2p.or(config.p2p.take());
        if let Some(proxy) = &p2p {
            proxy.check_allowed(&self.p2p_host)?;
        }
        let options = Options {
            credentials: self.credentials.map_or(configured, Source::File),
            insecure: self.insecure_registry,
            ca: self.registry_ca,
            certificate: config.certificate.take(),
            mirrors: self.mirror,
            p2p,
            user_agent: config.user_agent.take(),
            ..Options::default()
        };
        Ok((options, config))
    }
}

#[cfg(test)]
mod tests {
    use clap::Parser;

    use super::*;

    #[derive(Parser)]
    struct Program {
        #[command(flatten)]
        registry: RegistryArgs,
    }

    fn parse(args: &[&str]) -> Result<RegistryArgs, clap::Error> {
        let program = Program::try_parse_from([&["program"], args].concat());
        program.map(|program| program.registry)
    }

    #[test]
    fn the_command_line_wins_over_the_configuration() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("overlaybd.json");
        let text = r#"{"credentialFilePath":"/c","userAgent":"u","cacheConfig":{"cacheDir":"/d"},
            "p2pConfig":{"enable":true,"address":"localhost:1/x"}}"#;
        std::fs::write(&path, text).unwrap();
        let path = path.to_str().unwrap();

        let (options, config) = parse(&["--service-config", path])
            .unwrap()
            .into_options()
            .unwrap();
        assert!(matches!(options.credentials, Source::File(file) if file.ends_with("c")));
        assert_eq!(options.user_agent.as_deref(), Some("u"));
        assert_eq!(options.p2p, Some("localhost:1/x".parse().unwrap()));
        assert!(config.cache_dir.is_some());

        let more = [
            "--service-config",
            path,
            "--credentials",
            "/e",
            "--p2p",
            "localhost:2",
        ];
        let (options, _) = parse(&more).unwrap().into_options().unwrap();
        assert!(matches!(options.credentials, Source::File(file) if file.ends_with("e")));
        assert_eq!(options.p2p, Some("localhost:2".parse().unwrap()));
    }

    /// A proxy on another machine would get credentials, whichever option names it.
    #[test]
    fn a_proxy_elsewhere_is_used_only_if_its_host_is_allowed() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("overlaybd.json");
        let text = r#"{"p2pConfig":{"enable":true,"address":"p.example:19145/x"}}"#;
        std::fs::write(&path, text).unwrap();
        let path = path.to_str().unwrap();
        for named in [["--service-config", path], ["--p2p", "p.example:19145/x"]] {
            let options =
                |more: &[&str]| parse(&[&named[..], more].concat()).unwrap().into_options();
            for refused in [&[][..], &["--p2p-host", "p.example"]] {
                let error = options(refused).unwrap_err().to_string();
                assert!(error.contains("--p2p-host p.example:19145"), "{error}");
            }
            let (options, _) = options(&["--p2p-host", "p.example:19145"]).unwrap();
            assert_eq!(options.p2p, Some("p.example:19145/x".parse().unwrap()));
        }
    }

    #[test]
    fn wrong_values_are_wrong_usage() {
        for args in [
            ["--insecure-registry", "http://h"],
            ["--mirror", "http://h"],
            ["--p2p", "http://far.example?x"],
            ["--p2p-host", "http://far.example"],
        ] {
            assert!(parse(&args).is_err(), "{args:?}");
        }
        let absent = parse(&["--service-config", "/no/such/file"]).unwrap();
        assert!(absent.into_options().is_err());
        let (options, _) = parse(&[]).unwrap().into_options().unwrap();
        assert!(matches!(options.credentials, Source::None) && options.mirrors.is_empty());
    }
}
