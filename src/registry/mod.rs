//! OCI registries: references, manifests, authentication and ranges of blobs over HTTP.
//!
//! Parsers are pure and take hostile input. Only [`client`], and what it is made of, opens
//! connections; it blocks, and is shared by threads. Nothing here caches blobs or retries for
//! long: the fetcher does.

mod address;
pub mod args;
mod auth;
pub mod blob;
mod breaker;
pub mod challenge;
pub mod client;
pub mod content_range;
mod credential_service;
pub mod credentials;
mod date;
mod detail;
pub mod error;
mod http;
mod links;
pub mod manifest;
pub mod mirror;
mod names;
mod peer;
mod redirect;
pub mod reference;
pub mod repository;
mod requests;
mod resolver;
pub mod service_config;
pub mod statuses;
mod tls;
pub mod token;
pub mod url;
mod waiting;

pub use credential_service::Service;
pub use http::Timeouts;
pub use tls::ClientCertificate;

/// Value of the `User-Agent` header, unless another is configured.
const USER_AGENT: &str = concat!("ovbd-vhost/", env!("CARGO_PKG_VERSION"));

/// Whether JSON text is an object. The derived readers of structs take an array of their fields'
/// values as well, which no registry means.
fn is_object(json: &[u8]) -> bool {
    json.trim_ascii_start().starts_with(b"{")
}
