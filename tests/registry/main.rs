//! The client of registries against real ones and against one that misbehaves on purpose.

mod real;

use std::io::Read;

use ovbd_vhost::registry::blob::{BlobBody, BlobRef};
use ovbd_vhost::registry::client::{Client, Options};
use ovbd_vhost::registry::repository::{Repository, Scheme};

use ovbd_vhost::format::digest::Digest;

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

/// All bytes of a body.
fn read(mut body: BlobBody) -> Vec<u8> {
    let mut bytes = Vec::new();
    body.read_to_end(&mut bytes).expect("the body");
    bytes
}
