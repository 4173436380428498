//! Answers one request: finds its route, performs its action, counts it, and logs changes.

use std::convert::Infallible;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

use hyper::body::{Bytes, Incoming};
use hyper::header::{ALLOW, HeaderName, HeaderValue};
use hyper::{Method, Request};

use super::actions::{self, Action};
use super::body;
use super::reply::{self, Reply};
use super::routes::{Found, route};
use crate::node::clock;
use crate::node::disks::Disks;
use crate::node::error::{Code, Failure};
use crate::ratelimited_log;

/// Header with the number of the request, by which a client finds it in the log.
const REQUEST_ID: HeaderName = HeaderName::from_static("x-request-id");

/// What the clients of a socket may do.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Access {
    /// Everything.
    Full,
    /// Read only: `GET` and `HEAD`.
    ReadOnly,
}

/// State that all requests share.
#[derive(Debug)]
pub struct Context {
    disks: Arc<Disks>,
    /// Time at which the node started, in seconds since 1970, and number of requests since then.
    start: u64,
    requests: AtomicU64,
}

impl Context {
    /// Returns the state of a node that has answered no request.
    pub fn new(disks: Arc<Disks>) -> Self {
        Self {
            disks,
            start: clock::now(),
            requests: AtomicU64::new(0),
        }
    }

    /// Returns a name for the next request, which no other request of this host has.
    fn request_id(&self) -> String {
        let number = self.requests.fetch_add(1, Ordering::Relaxed) + 1;
        format!("{:x}-{number}", self.start)
    }
}

/// The process that sent a request (`SO_PEERCRED`).
#[derive(Clone, Copy, Debug)]
pub struct Caller {
    /// User, if known.
    pub uid: Option<u32>,
    /// Process, if known.
    pub pid: Option<i32>,
    /// What it may do.
    pub access: Access,
}

/// Answers one request.
///
/// # Errors
/// None: a failure is an answer.
pub async fn answer(
    request: Request<Incoming>,
    context: Arc<Context>,
    caller: Caller,
) -> Result<Reply, Infallible> {
    let start = Instant::now();
    let id = context.request_id();
    let method = match request.method() {
        // The server omits the body.
        &Method::HEAD => Method::GET,
        method => method.clone(),
    };
    let path = request.uri().path().to_owned();
    let (head, body) = request.into_parts();
    let body = body::receive(body).await;
    let found = match caller.access {
        Access::ReadOnly if method != Method::GET => Err(read_only()),
        _ => route(&method, &path),
    };
    let (mut reply, pattern) = match found {
        Ok(found) => match body {
            Ok(body) => {
                let request = Request::from_parts(head, body);
                perform(found, &method, request, &context).await
            }
            Err(failure) => (reply::failure(&failure), found.pattern),
        },
        Err(refused) => (*refused, "unknown"),
    };
    if let Ok(value) = HeaderValue::from_str(&id) {
        reply.headers_mut().insert(REQUEST_ID, value);
    }
    let code = reply.status().as_u16();
    let took = start.elapsed();
    let counters = context.disks.counters();
    counters.count(method.as_str(), pattern, code, took);
    if method != Method::GET {
        let generation = reply::generation(&reply);
        audit(&method, &path, code, took, &id, generation, caller);
    }
    Ok(reply)
}

async fn perform(
    found: Found,
    method: &Method,
    request: Request<Bytes>,
    context: &Context,
) -> (Reply, &'static str) {
    let Found {
        action,
        pattern,
        id,
    } = found;
    let done = match *method == Method::GET {
        true => actions::run(action, id.as_deref(), request, &context.disks).await,
        false => run_to_end(action, id, request, context.disks.clone()).await,
    };
    let reply = done.unwrap_or_else(|failure| reply::failure(&failure));
    (reply, pattern)
}

/// Executes a request that changes something to its end, also if the client disconnects: the server drops the future of
/// such a request, and a disk would stay half made.
async fn run_to_end(
    action: Action,
    id: Option<String>,
    request: Request<Bytes>,
    disks: Arc<Disks>,
) -> Result<Reply, Failure> {
    let task =
        tokio::spawn(async move { actions::run(action, id.as_deref(), request, &disks).await });
    task.await
        .unwrap_or_else(|error| Err(Failure::caused(Code::Internal, &error)))
}

fn read_only() -> Box<Reply> {
    let text = "this socket serves GET only; send changes to the socket of --control";
    let mut refused = reply::failure(&Failure::new(Code::Method, text));
    refused
        .headers_mut()
        .insert(ALLOW, HeaderValue::from_static("GET"));
    Box::new(refused)
}

/// Logs a request that may have changed something.
fn audit(
    method: &Method,
    path: &str,
    code: u16,
    took: Duration,
    id: &str,
    generation: Option<&str>,
    caller: Caller,
) {
    let (uid, pid) = (caller.uid.map_or(-1, i64::from), caller.pid.unwrap_or(-1));
    let took = took.as_millis();
    let generation = generation.map_or_else(String::new, |tag| format!(", generation {tag}"));
    ratelimited_log::info(format_args!(
        "request {id}: {method} {path}: {code} in {took} ms{generation}, for uid {uid}, pid {pid}"
    ));
}
