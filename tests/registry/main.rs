//! The client of registries against real ones and against one that misbehaves on purpose.

mod answers;
mod fetching;
mod logins;
mod mirrors;
mod proxy;
mod real;
mod redirects;
mod servers;
mod serving;
mod tls;

use std::fs;
use std::io::Read;
use std::path::Path;

use ovbd_vhost::format::digest::Digest;
use ovbd_vhost::registry::blob::{BlobBody, BlobRef};
use ovbd_vhost::registry::client::{Client, Options};
use ovbd_vhost::registry::credential_source::Source;
use ovbd_vhost::registry::repository::{Repository, Scheme};
use tempfile::TempDir;

/// A blob of a repository of a registry that speaks plain HTTP.
fn blob(host: &str, name: &str, bytes: &[u8]) -> BlobRef {
    let host = host.parse().expect("a host");
    BlobRef {
        repository: Repository::new(Scheme::Http, host, name).expect("a repository"),
        digest: Digest::of(bytes),
        size: Some(bytes.len() as u64),
    }
}

/// A client with nothing configured.
fn client() -> Client {
    Client::new(Options::default()).expect("a client")
}

/// A client that knows a password for a registry.
fn with_password(host: &str) -> (Client, TempDir) {
    let folder = tempfile::tempdir().expect("a folder");
    let path = folder.path().join("config.json");
    password_file(&path, host, "user", "pass");
    let options = Options {
        credentials: Source::File(path),
        ..Options::default()
    };
    (Client::new(options).expect("a client"), folder)
}

/// Writes a file of credentials.
fn password_file(path: &Path, host: &str, user: &str, password: &str) {
    let text =
        format!(r#"{{"auths":{{"{host}":{{"username":"{user}","password":"{password}"}}}}}}"#);
    fs::write(path, text).expect("a file of credentials");
}

/// All bytes of a body.
fn read(mut body: BlobBody) -> Vec<u8> {
    let mut bytes = Vec::new();
    body.read_to_end(&mut bytes).expect("the body");
    bytes
}
