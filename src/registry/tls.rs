//! Trust in servers' certificates, and the client certificate.

use std::io;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use rustls::crypto::ring;
use rustls::pki_types::pem::PemObject;
use rustls::pki_types::{CertificateDer, PrivateKeyDer};
use ureq::tls::{Certificate, ClientCert, PrivateKey, RootCerts, TlsConfig};

use super::error::{Error, Result};
use crate::io::regular::read_regular;

/// Longest file of certificates or of a key.
const MAX_PEM: u64 = 16 << 20;

/// A client certificate in PEM files.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ClientCertificate {
    /// File with the certificate and those that lead to its root.
    pub certificate: PathBuf,
    /// File with its private key.
    pub key: PathBuf,
}

/// Configuration of TLS connections; read from files once.
pub(super) struct Tls(TlsConfig);

impl Tls {
    /// Reads the system's roots, `ca` besides them, and the client's certificate.
    ///
    /// # Errors
    /// [`Error::Setup`]: a named file is missing or holds no usable certificate or key. A system
    /// without roots is no error: registries may be plain, or trusted by `ca`.
    pub(super) fn new(ca: Option<&Path>, client: Option<&ClientCertificate>) -> Result<Tls> {
        let native = rustls_native_certs::load_native_certs();
        for error in &native.errors {
            log::debug!("cannot load a certificate of the system: {error}");
        }
        let mut roots: Vec<_> = native.certs.iter().map(certificate).collect();
        if let Some(path) = ca {
            let certificates = certificates(path)?;
            roots.extend(certificates.iter().map(certificate));
        }
        let client = client.map(client_certificate).transpose()?;
        let config = TlsConfig::builder()
            .unversioned_rustls_crypto_provider(Arc::new(ring::default_provider()))
            .root_certs(RootCerts::new_with_certs(&roots))
            .client_cert(client)
            .build();
        Ok(Tls(config))
    }

    /// The configuration of an agent.
    pub(super) fn config(&self) -> TlsConfig {
        self.0.clone()
    }
}

/// Checks the files that the user names.
///
/// # Errors
/// As [`Tls::new`].
pub(super) fn check(ca: Option<&Path>, client: Option<&ClientCertificate>) -> Result<()> {
    ca.map(certificates).transpose()?;
    client.map(client_certificate).transpose()?;
    Ok(())
}

fn certificate(der: &CertificateDer<'_>) -> Certificate<'static> {
    Certificate::from_der(der).to_owned()
}

/// The certificates in a PEM file, at least one.
fn certificates(path: &Path) -> Result<Vec<CertificateDer<'static>>> {
    let refuse = |source| {
        setup(
            format!("cannot use the certificates in {}", path.display()),
            source,
        )
    };
    let pem = read_regular(path, MAX_PEM).map_err(refuse)?;
    let certificates: std::result::Result<Vec<_>, _> =
        CertificateDer::pem_slice_iter(&pem).collect();
    let certificates = certificates.map_err(|error| refuse(io::Error::other(error)))?;
    if certificates.is_empty() {
        return Err(refuse(io::Error::other("the file has no PEM certificate")));
    }
    let mut store = rustls::RootCertStore::empty();
    let (added, _) = store.add_parsable_certificates(certificates.iter().cloned());
    if added == 0 {
        return Err(refuse(io::Error::other(
            "no certificate in the file is valid",
        )));
    }
    Ok(certificates)
}

fn client_certificate(files: &ClientCertificate) -> Result<ClientCert> {
    let chain = certificates(&files.certificate)?;
    let what = || format!("cannot use the private key in {}", files.key.display());
    let pem = read_regular(&files.key, MAX_PEM).map_err(|error| setup(what(), error))?;
    let key = PrivateKeyDer::from_pem_slice(&pem)
        .map_err(|error| setup(what(), io::Error::other(error)))?;
    // What follows panics on a key that does not fit, so that is found out here.
    rustls::ClientConfig::builder_with_provider(Arc::new(ring::default_provider()))
        .with_safe_default_protocol_versions()
        .and_then(|builder| {
            let builder = builder.with_root_certificates(rustls::RootCertStore::empty());
            builder.with_client_auth_cert(chain.clone(), key)
        })
        .map_err(|error| setup(what(), io::Error::other(error)))?;
    let chain: Vec<_> = chain.iter().map(certificate).collect();
    let key = PrivateKey::from_pem(&pem).map_err(|error| setup(what(), io::Error::other(error)))?;
    Ok(ClientCert::new_with_certs(&chain, key))
}

fn setup(what: String, source: io::Error) -> Error {
    let source = Arc::new(source);
    Error::Setup { what, source }
}
