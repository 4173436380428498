//! Certificates for tests, made by `openssl`: an authority, and what it signs.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::sync::Arc;

use rustls::ServerConfig;
use rustls::crypto::ring;
use rustls::pki_types::pem::PemObject;
use rustls::pki_types::{CertificateDer, PrivateKeyDer};
use rustls::server::WebPkiClientVerifier;
use rustls::version::{TLS12, TLS13};
use tempfile::TempDir;

/// An authority that no program trusts unless configured to.
#[derive(Debug)]
pub struct Authority {
    folder: TempDir,
}

/// A certificate and its key, as PEM files.
#[derive(Clone, Debug)]
pub struct Certificate {
    /// The certificate.
    pub certificate: PathBuf,
    /// Its private key.
    pub key: PathBuf,
}

/// What a TLS server asks of its clients.
#[derive(Clone, Copy, Debug, Default)]
pub struct Demands<'a> {
    /// Whose certificates clients must show.
    pub client: Option<&'a Authority>,
    /// Whether only TLS 1.2 is spoken.
    pub old: bool,
}

impl Authority {
    /// Makes a key and a certificate for it.
    pub fn new() -> Authority {
        let folder = tempfile::tempdir().expect("a folder");
        let path = |name: &str| folder.path().join(name);
        openssl(
            Command::new("openssl")
                .args(["req", "-x509", "-newkey", "ec"])
                .args([
                    "-pkeyopt",
                    "ec_paramgen_curve:prime256v1",
                    "-nodes",
                    "-days",
                    "2",
                ])
                .args(["-subj", "/CN=test authority", "-keyout"])
                .arg(path("ca.key"))
                .arg("-out")
                .arg(path("ca.crt")),
        );
        Authority { folder }
    }

    /// File with the authority's certificate.
    pub fn file(&self) -> PathBuf {
        self.folder.path().join("ca.crt")
    }

    /// A certificate for a subject's alternative names, such as `IP:127.0.0.1`.
    pub fn sign(&self, names: &str) -> Certificate {
        self.sign_until(names, "20990101000000Z")
    }

    /// The same, valid until a time in the form of ASN.1.
    pub fn sign_until(&self, names: &str, end: &str) -> Certificate {
        let path = |name: &str| self.folder.path().join(name);
        let number = fs::read_dir(self.folder.path())
            .expect("the folder")
            .count();
        let (key, request) = (
            path(&format!("{number}.key")),
            path(&format!("{number}.csr")),
        );
        let certificate = path(&format!("{number}.crt"));
        openssl(
            Command::new("openssl")
                .args([
                    "req",
                    "-newkey",
                    "ec",
                    "-pkeyopt",
                    "ec_paramgen_curve:prime256v1",
                ])
                .args(["-nodes", "-subj", "/CN=test", "-keyout"])
                .arg(&key)
                .arg("-out")
                .arg(&request),
        );
        let config = path("ca.conf");
        let text = format!(
            "[ca]\ndefault_ca=a\n[a]\ndir={0}\ndatabase={0}/index\nnew_certs_dir={0}\n\
             rand_serial=yes\ndefault_md=sha256\npolicy=p\nx509_extensions=e\n\
             certificate={0}/ca.crt\nprivate_key={0}/ca.key\nunique_subject=no\n\
             [p]\ncommonName=supplied\n[e]\nbasicConstraints=CA:FALSE\nsubjectAltName={names}\n",
            self.folder.path().display()
        );
        fs::write(&config, text).expect("a config");
        fs::write(path("index"), "").expect("a database");
        openssl(
            Command::new("openssl")
                .args(["ca", "-batch", "-notext", "-startdate", "20200101000000Z"])
                .args(["-enddate", end, "-config"])
                .arg(&config)
                .arg("-in")
                .arg(&request)
                .arg("-out")
                .arg(&certificate),
        );
        Certificate { certificate, key }
    }
}

impl Default for Authority {
    fn default() -> Authority {
        Authority::new()
    }
}

impl Certificate {
    /// The configuration of a TLS server that shows this certificate.
    pub fn server(&self, demands: Demands<'_>) -> Arc<ServerConfig> {
        let provider = Arc::new(ring::default_provider());
        let versions = if demands.old {
            &[&TLS12][..]
        } else {
            &[&TLS12, &TLS13]
        };
        let builder = ServerConfig::builder_with_provider(Arc::clone(&provider))
            .with_protocol_versions(versions)
            .expect("versions");
        let builder = match demands.client {
            None => builder.with_no_client_auth(),
            Some(authority) => {
                let mut roots = rustls::RootCertStore::empty();
                let root = pem(&authority.file()).remove(0);
                roots.add(root).expect("a root");
                let verifier =
                    WebPkiClientVerifier::builder_with_provider(Arc::new(roots), provider);
                builder.with_client_cert_verifier(verifier.build().expect("a verifier"))
            }
        };
        let key = PrivateKeyDer::from_pem_file(&self.key).expect("a key");
        let config = builder.with_single_cert(pem(&self.certificate), key);
        Arc::new(config.expect("a configuration"))
    }
}

fn pem(path: &Path) -> Vec<CertificateDer<'static>> {
    let certificates = CertificateDer::pem_file_iter(path).expect("a file");
    certificates
        .map(|one| one.expect("a certificate"))
        .collect()
}

fn openssl(command: &mut Command) {
    let output = command.stdin(Stdio::null()).output().expect("openssl");
    let said = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{command:?}: {said}");
}
