//! OCI registries: references, manifests, authentication and ranges of blobs over HTTP.
//!
//! Parsers are pure and take hostile input. Only [`client`] and the modules below it open connections; they
//! block, and threads share them. Nothing here caches blobs or retries for long: the fetcher does.
//!
//! A module uses only modules below it in this table. `tests/project/architecture.rs` holds the code to
//! that.
//!
//! | module | content |
//! |---|---|
//! | [`args`] | command-line options about registries |
//! | [`service_config`] | upstream's service configuration |
//! | [`client`] | manifests and ranges of blobs, from registries, mirrors and redirect targets |
//! | [`peer`] | a mirror or proxy in use |
//! | [`links`] | redirect targets of blobs, until they expire |
//! | [`requests`] | requests with authentication, redirects and circuit breakers |
//! | [`auth`] | the state of the logins at each registry |
//! | [`token_request`] | requests to token servers |
//! | [`credential_source`] | the source of credentials that the user names |
//! | [`credential_service`] | upstream's credential services |
//! | [`blob`] | the body of a blob's response |
//! | [`health`] | failures of a mirror |
//! | [`breaker`] | circuit breakers |
//! | [`redirect`] | checks of URLs that servers choose |
//! | [`detail`] | the words of a server in a refusal |
//! | [`http`] | HTTP with time limits, TLS and proxies |
//! | [`tls`] | certificates |
//! | [`error`] | errors of requests, and their classes |
//! | [`credentials`] | files and replies with credentials |
//! | [`token`] | replies of token servers |
//! | [`manifest`] | manifests and indexes of images |
//! | [`mirror`] | options that name mirrors and proxies |
//! | [`reference`] | references to images |
//! | [`waiting`] | pauses and lifetimes that servers ask for |
//! | [`resolver`] | addresses of hosts, without those that a server must not name |
//! | [`address`] | addresses of this machine and its link |
//! | [`url`] | URLs |
//! | [`repository`] | hosts of registries, and repositories in them |
//! | [`challenge`] | the header `WWW-Authenticate` |
//! | [`content_range`] | the header `Content-Range` |
//! | [`date`] | dates of HTTP and of signed URLs |
//! | [`json`] | what JSON documents have in common |
//! | [`names`] | addresses of host names, remembered for a while |
//! | [`statuses`] | counts of answers by status |

mod address;
pub mod args;
mod auth;
pub mod blob;
mod breaker;
pub mod challenge;
pub mod client;
pub mod content_range;
mod credential_service;
pub mod credential_source;
pub mod credentials;
mod date;
mod detail;
pub mod error;
mod health;
mod http;
mod json;
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
mod token_request;
pub mod url;
mod waiting;

pub use credential_service::Service;
pub use http::Timeouts;
pub use tls::ClientCertificate;
