//! HTTP/1.1 with the limits that a hostile or failing server calls for, on `ureq`.
//!
//! Redirects, authentication and repetition are decided elsewhere. Here are timeouts, limits on
//! headers, TLS with this machine's roots, proxies, and idle connections that are used again.

use std::io;
use std::sync::Arc;
use std::time::{Duration, Instant};

use ureq::config::Config;
use ureq::http::{HeaderMap, Request};
use ureq::unversioned::resolver::Resolver;
use ureq::unversioned::transport::time::Duration as Until;
use ureq::unversioned::transport::{
    ConnectProxyConnector, ConnectionDetails, Connector, NextTimeout, RustlsConnector,
    TcpConnector, Transport,
};
use ureq::{Agent, Body, Proxy, Timeout};

use super::address::{NamedBy, names_local};
use super::error::{Error, Result};
use super::names::Names;
use super::repository::Host;
use super::resolver::{Failure, NameResolver};
use super::tls::Tls;
use super::url::Url;

/// Value of the `User-Agent` header, unless another is configured.
pub(super) const USER_AGENT: &str = concat!("ovbd-vhost/", env!("CARGO_PKG_VERSION"));

/// Largest answer's header, in bytes.
const MAX_HEADER: usize = 64 << 10;

/// Idle connections kept, in all and to one host.
const MAX_IDLE: usize = 64;
const MAX_IDLE_PER_HOST: usize = 16;

/// An idle connection is closed after so long.
const MAX_IDLE_AGE: Duration = Duration::from_secs(60);

/// How long the body of a refusal or redirect is read. One piece may take [`Timeouts::read`] besides.
const SMALL_BODY: Duration = Duration::from_secs(1);

/// How long the parts of a request may take.
#[derive(Clone, Copy, Debug)]
pub struct Timeouts {
    /// For the addresses of a host name.
    pub name: Duration,
    /// For a TCP connection.
    pub connect: Duration,
    /// For the TLS handshake after it.
    pub tls: Duration,
    /// From the request to the end of the answer's header.
    pub answer: Duration,
    /// Between two pieces of a body.
    pub read: Duration,
    /// For a whole small answer: a token, a manifest.
    pub small: Duration,
}

impl Default for Timeouts {
    fn default() -> Timeouts {
        Timeouts {
            name: Duration::from_secs(5),
            connect: Duration::from_secs(3),
            tls: Duration::from_secs(5),
            answer: Duration::from_secs(10),
            read: Duration::from_secs(10),
            small: Duration::from_secs(30),
        }
    }
}

/// Kind of a request.
pub(super) enum Ask<'a> {
    /// `GET` of a whole small answer.
    Get,
    /// `GET` of a blob or a part of it, whose body may take long.
    Stream,
    /// `POST` of a form.
    Form(&'a str),
}

/// A request's answer: status, header, and a body that is still to be read.
pub(super) struct Answer {
    host: Host,
    status: u16,
    headers: HeaderMap,
    body: Body,
}

/// Connections to servers.
#[derive(Debug)]
pub(super) struct Http {
    open: Agent,
    nearby: Agent,
    guarded: Agent,
    proxied: Option<(Proxy, Agent)>,
    names: Names,
    timeouts: Timeouts,
}

impl Http {
    /// Connections with the system's and the user's certificates and the environment's proxy.
    pub(super) fn new(tls: &Tls, user_agent: &str, timeouts: Timeouts) -> Result<Http> {
        let names = Names::default();
        let config = |proxy| config(tls, user_agent, timeouts, proxy);
        let tcp = timeouts.connect;
        let proxied = environment_proxy()?.map(|proxy| {
            // The proxy is the user's choice; it resolves the hosts itself.
            let resolver = NameResolver::new(names.clone(), NamedBy::User);
            let agent = agent(config(Some(proxy.clone())), tcp, resolver);
            (proxy, agent)
        });
        let direct = |named| agent(config(None), tcp, NameResolver::new(names.clone(), named));
        Ok(Http {
            open: direct(NamedBy::User),
            nearby: direct(NamedBy::Neighbor),
            guarded: direct(NamedBy::Server),
            proxied,
            names,
            timeouts,
        })
    }

    /// Sends a request and reads the header of its answer.
    ///
    /// A connection that was idle may be closed by the server just then. So a request that breaks
    /// before its answer begins is repeated once, on a new connection.
    ///
    /// # Errors
    /// No connection, or no answer in time: see [`Error`]. Every HTTP status is an answer.
    pub(super) fn send(
        &self,
        ask: &Ask<'_>,
        url: &Url,
        headers: &[(&str, &str)],
        named: NamedBy,
    ) -> Result<Answer> {
        let first = self.attempt(ask, url, headers, named, false);
        let result = match first {
            Err(error) if broke_early(&error) => self.attempt(ask, url, headers, named, true),
            first => first,
        };
        result.map_err(|error| self.failure(url.host(), error))
    }

    fn attempt(
        &self,
        ask: &Ask<'_>,
        url: &Url,
        headers: &[(&str, &str)],
        named: NamedBy,
        fresh: bool,
    ) -> std::result::Result<Answer, ureq::Error> {
        let uri = url.to_string();
        let agent = self.agent(url, named);
        let mut request = match ask {
            Ask::Get | Ask::Stream => Request::get(&uri),
            Ask::Form(_) => {
                Request::post(&uri).header("content-type", "application/x-www-form-urlencoded")
            }
        };
        for (name, value) in headers {
            request = request.header(*name, *value);
        }
        let body = match ask {
            Ask::Get | Ask::Stream => "",
            Ask::Form(form) => *form,
        };
        let limit = match ask {
            Ask::Stream => None,
            Ask::Get | Ask::Form(_) => Some(self.timeouts.small),
        };
        let idle_age = if fresh { Duration::ZERO } else { MAX_IDLE_AGE };
        let answer = if let Ask::Form(_) = ask {
            let request = request.body(body)?;
            let config = agent.configure_request(request).timeout_global(limit);
            agent.run(config.max_idle_age(idle_age).build())?
        } else {
            let request = request.body(())?;
            let config = agent.configure_request(request).timeout_global(limit);
            agent.run(config.max_idle_age(idle_age).build())?
        };
        let (parts, body) = answer.into_parts();
        Ok(Answer {
            host: url.host().clone(),
            status: parts.status.as_u16(),
            headers: parts.headers,
            body,
        })
    }

    /// The agent for a URL. A proxy is never asked for this machine's own addresses.
    fn agent(&self, url: &Url, named: NamedBy) -> &Agent {
        let proxied = self.proxied.as_ref().filter(|(proxy, _)| {
            let exempt = url
                .to_string()
                .parse()
                .is_ok_and(|uri| proxy.is_no_proxy(&uri));
            !exempt && !names_local(url.host())
        });
        match (proxied, named) {
            (Some((_, agent)), _) => agent,
            (None, NamedBy::User) => &self.open,
            (None, NamedBy::Neighbor) => &self.nearby,
            (None, NamedBy::Server) => &self.guarded,
        }
    }

    fn failure(&self, host: &Host, error: ureq::Error) -> Error {
        let host = host.clone();
        match error {
            ureq::Error::ConnectProxyFailed(answer) => Error::Proxy {
                host,
                proxy: self
                    .proxied
                    .as_ref()
                    .map_or_else(String::new, |(proxy, _)| {
                        format!("{}:{}", proxy.host(), proxy.port())
                    }),
                answer,
            },
            ureq::Error::Other(other) => {
                match other.downcast::<Failure>().map(|failure| *failure) {
                    Ok(Failure::Lookup(source)) => resolve_failure(host, source),
                    Ok(Failure::Local(address)) => Error::LocalAddress { host, address },
                    Err(other) => connection_failure(host, ureq::Error::Other(other)),
                }
            }
            error => {
                self.names.forget();
                connection_failure(host, error)
            }
        }
    }
}

impl Answer {
    /// HTTP status.
    pub(super) fn status(&self) -> u16 {
        self.status
    }

    /// The server that answers.
    pub(super) fn host(&self) -> &Host {
        &self.host
    }

    /// A header's value, if it is text.
    pub(super) fn header(&self, name: &str) -> Option<&str> {
        self.headers.get(name)?.to_str().ok()
    }

    /// All values of a header that are text.
    pub(super) fn headers(&self, name: &str) -> impl Iterator<Item = &str> {
        let values = self.headers.get_all(name).into_iter();
        values.filter_map(|value| value.to_str().ok())
    }

    /// `Content-Length`, as far as the body is delimited by it.
    pub(super) fn content_length(&self) -> Option<u64> {
        self.body.content_length()
    }

    /// The body, to be read as it arrives.
    pub(super) fn into_reader(self) -> (Host, ureq::BodyReader<'static>) {
        (self.host, self.body.into_reader())
    }

    /// The whole body.
    ///
    /// # Errors
    /// It is longer than `limit` or breaks off.
    pub(super) fn bytes(self, what: &str, limit: u64) -> Result<Vec<u8>> {
        let host = self.host.clone();
        let mut bytes = Vec::new();
        let reader = self.body.into_reader();
        let mut bounded = io::Read::take(reader, limit + 1);
        match io::Read::read_to_end(&mut bounded, &mut bytes) {
            Ok(_) if bytes.len() as u64 <= limit => Ok(bytes),
            Ok(_) => Err(Error::Mismatch {
                host,
                what: what.to_owned(),
                expected: format!("at most {limit} bytes"),
                found: "a longer body".to_owned(),
            }),
            Err(error) if error.kind() == io::ErrorKind::UnexpectedEof => Err(Error::Unexpected {
                host,
                what: what.to_owned(),
                detail: format!("the body ends after {} bytes", bytes.len()),
            }),
            Err(error) => Err(body_failure(host, error)),
        }
    }

    /// Reads a short body to its end and drops it, so that the connection can be used again.
    pub(super) fn drain(self) {
        const MAX_DRAIN: u64 = 64 << 10;
        // A body that is longer, or lies about its length, closes the connection.
        if self.status != 416 && self.content_length().is_none_or(|len| len <= MAX_DRAIN) {
            self.start_of_body(MAX_DRAIN);
        }
    }

    /// What comes of the body of a refusal or redirect, at most `limit` bytes. A server that sends it
    /// slowly is not waited for, since something better can be asked meanwhile.
    pub(super) fn start_of_body(self, limit: u64) -> Vec<u8> {
        let mut bounded = io::Read::take(self.body.into_reader(), limit);
        let (mut bytes, mut piece) = (Vec::new(), [0; 4096]);
        let start = Instant::now();
        while start.elapsed() < SMALL_BODY {
            match io::Read::read(&mut bounded, &mut piece) {
                Ok(0) | Err(_) => break,
                Ok(len) => bytes.extend_from_slice(piece.get(..len).unwrap_or_default()),
            }
        }
        bytes
    }
}

/// The error of a body that breaks off.
pub(super) fn body_failure(host: Host, error: io::Error) -> Error {
    connection_failure(host, ureq::Error::from(error))
}

fn connection_failure(host: Host, error: ureq::Error) -> Error {
    match error {
        ureq::Error::Timeout(timeout) => Error::Timeout {
            host,
            phase: timeout.to_string(),
        },
        ureq::Error::Protocol(error) => Error::Unexpected {
            host,
            what: "HTTP".to_owned(),
            detail: error.to_string(),
        },
        ureq::Error::LargeResponseHeader(found, limit) => Error::Unexpected {
            host,
            what: "HTTP".to_owned(),
            detail: format!("a header of {found} bytes; the limit is {limit}"),
        },
        error if is_tls(&error) => Error::Tls {
            host,
            source: Arc::new(error),
        },
        error => Error::Connection {
            host,
            source: Arc::new(error),
        },
    }
}

fn is_tls(error: &ureq::Error) -> bool {
    match error {
        ureq::Error::Rustls(_) | ureq::Error::Tls(_) | ureq::Error::TlsRequired => true,
        ureq::Error::Io(error) => error
            .get_ref()
            .is_some_and(|inner| inner.is::<rustls::Error>()),
        _ => false,
    }
}

/// The C library's text is the only thing that tells a failed look-up from a name without address.
fn resolve_failure(host: Host, source: Arc<io::Error>) -> Error {
    let late = source.kind() == io::ErrorKind::TimedOut;
    let temporary = late || source.to_string().contains("Temporary failure");
    Error::Resolve {
        host,
        source,
        temporary,
    }
}

/// Whether the connection broke in a way that a server's idle timeout explains.
fn broke_early(error: &ureq::Error) -> bool {
    let ureq::Error::Io(error) = error else {
        return false;
    };
    matches!(
        error.kind(),
        io::ErrorKind::UnexpectedEof
            | io::ErrorKind::ConnectionReset
            | io::ErrorKind::ConnectionAborted
            | io::ErrorKind::BrokenPipe
    )
}

/// Checks what the environment says about proxies.
pub(super) fn check() -> Result<()> {
    environment_proxy().map(drop)
}

/// The proxy that `HTTPS_PROXY` and its relatives name.
fn environment_proxy() -> Result<Option<Proxy>> {
    let proxy = Proxy::try_from_env();
    let plain = |proxy: &Proxy| {
        proxy
            .uri()
            .scheme_str()
            .is_some_and(|name| name.starts_with("http"))
    };
    match proxy {
        Some(proxy) if !plain(&proxy) => Err(Error::Setup {
            what: format!(
                "the environment names the proxy {}, which is not an HTTP proxy",
                proxy.host()
            ),
            source: Arc::new(io::ErrorKind::Unsupported.into()),
        }),
        proxy => Ok(proxy),
    }
}

fn config(tls: &Tls, user_agent: &str, timeouts: Timeouts, proxy: Option<Proxy>) -> Config {
    Config::builder()
        .tls_config(tls.config())
        .proxy(proxy)
        .user_agent(user_agent)
        .accept_encoding("identity")
        .http_status_as_error(false)
        .max_redirects(0)
        .max_response_header_size(MAX_HEADER)
        .max_idle_connections(MAX_IDLE)
        .max_idle_connections_per_host(MAX_IDLE_PER_HOST)
        .max_idle_age(MAX_IDLE_AGE)
        .timeout_resolve(Some(timeouts.name))
        .timeout_connect(Some(timeouts.connect + timeouts.tls))
        .timeout_send_request(Some(timeouts.answer))
        .timeout_send_body(Some(timeouts.answer))
        .timeout_recv_response(Some(timeouts.answer))
        .timeout_per_read(Some(timeouts.read))
        .build()
}

fn agent(config: Config, connect: Duration, resolver: impl Resolver) -> Agent {
    let connector = ().chain(ConnectProxyConnector::default());
    let connector = connector.chain(BoundedTcp::new(connect));
    Agent::with_parts(
        config,
        connector.chain(RustlsConnector::default()),
        resolver,
    )
}

/// TCP connections with a limit of their own, so that most of the time is left for TLS.
#[derive(Debug)]
struct BoundedTcp {
    tcp: TcpConnector,
    limit: Duration,
}

impl BoundedTcp {
    fn new(limit: Duration) -> BoundedTcp {
        let tcp = TcpConnector::default();
        BoundedTcp { tcp, limit }
    }
}

impl<In: Transport> Connector<In> for BoundedTcp {
    type Out = <TcpConnector as Connector<In>>::Out;

    fn connect(
        &self,
        details: &ConnectionDetails<'_>,
        chained: Option<In>,
    ) -> std::result::Result<Option<Self::Out>, ureq::Error> {
        let bounded = ConnectionDetails {
            uri: details.uri,
            addrs: details.addrs.clone(),
            config: details.config,
            request_level: details.request_level,
            resolver: details.resolver,
            now: details.now,
            timeout: NextTimeout {
                after: Until::Exact(self.limit).min(details.timeout.after),
                reason: Timeout::Connect,
                ..details.timeout
            },
            current_time: details.current_time.clone(),
            run_connector: details.run_connector.clone(),
            register_shutdown: details.register_shutdown.clone(),
        };
        self.tcp.connect(&bounded, chained)
    }
}
