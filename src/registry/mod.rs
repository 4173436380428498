//! OCI registries: references, manifests, authentication and ranges of blobs over HTTP.
//!
//! Parsers are pure and take hostile input. Only the client opens
//! connections. Nothing here caches blobs or retries for long: the fetcher does.

pub mod challenge;
pub mod reference;
pub mod repository;
pub mod token;
pub mod url;
