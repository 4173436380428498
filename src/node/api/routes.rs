//! The routes and their actions.

use std::convert::Infallible;
use std::sync::Arc;
use std::time::{Duration, Instant};

use http_body_util::{BodyExt, Limited};
use hyper::body::Incoming;
use hyper::header::{ACCEPT, ALLOW, HeaderValue};
use hyper::{Method, Request, StatusCode};
use serde::Deserialize;
use serde_json::{Map, Value, json};

use super::reply::{self, Reply};
use crate::engine::stats::exposition::Format;
use crate::node::disks::{Disks, Put};
use crate::node::error::{Code, Failure};
use crate::node::id::DiskId;
use crate::node::metrics;
use crate::node::spec::DiskSpec;
use crate::ratelimited_log;
use crate::version::VERSION;

/// Longest body in bytes: 4094 layer paths of some length.
const MAX_BODY: usize = 1 << 20;

/// How long a body may take to arrive.
const BODY_LIMIT: Duration = Duration::from_secs(10);

/// Longest wait for events, in seconds.
const MAX_WAIT: u64 = 60;

/// Text of `openapi.yaml`.
const OPENAPI: &str = include_str!("../../../docs/openapi.yaml");

/// Action of a route.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Action {
    ListDisks,
    PutDisk,
    GetDisk,
    PatchDisk,
    DeleteDisk,
    ResizeDisk,
    RestartDisk,
    Reload,
    ListSnapshots,
    MakeSnapshot,
    Events,
    Live,
    Ready,
    Version,
    OpenApi,
    Metrics,
}

/// Method, pattern and action of each route. A segment in braces stands for any one.
const ROUTES: [(&str, &str, Action); 16] = [
    ("GET", "/api/v1/disks", Action::ListDisks),
    ("PUT", "/api/v1/disks/{id}", Action::PutDisk),
    ("GET", "/api/v1/disks/{id}", Action::GetDisk),
    ("PATCH", "/api/v1/disks/{id}", Action::PatchDisk),
    ("DELETE", "/api/v1/disks/{id}", Action::DeleteDisk),
    ("PUT", "/api/v1/disks/{id}/size", Action::ResizeDisk),
    ("POST", "/api/v1/disks/{id}/restart", Action::RestartDisk),
    ("POST", "/api/v1/reload", Action::Reload),
    ("GET", "/api/v1/disks/{id}/snapshots", Action::ListSnapshots),
    ("POST", "/api/v1/disks/{id}/snapshots", Action::MakeSnapshot),
    ("GET", "/api/v1/events", Action::Events),
    ("GET", "/api/v1/health/live", Action::Live),
    ("GET", "/api/v1/health/ready", Action::Ready),
    ("GET", "/api/v1/version", Action::Version),
    ("GET", "/api/v1/openapi.yaml", Action::OpenApi),
    ("GET", "/metrics", Action::Metrics),
];

/// Methods and patterns of all routes, for the test against `openapi.yaml`.
pub fn table() -> impl Iterator<Item = (&'static str, &'static str)> {
    ROUTES
        .iter()
        .map(|(method, pattern, _)| (*method, *pattern))
}

/// State that all routes share.
#[derive(Debug)]
pub struct Context {
    /// The disks.
    pub disks: Arc<Disks>,
}

/// The process that sent a request (`SO_PEERCRED`).
#[derive(Clone, Copy, Debug, Default)]
pub struct Caller {
    /// User, if known.
    pub uid: Option<u32>,
    /// Process, if known.
    pub pid: Option<i32>,
}

/// Answers one request.
pub async fn answer(
    request: Request<Incoming>,
    context: Arc<Context>,
    caller: Caller,
) -> Result<Reply, Infallible> {
    let start = Instant::now();
    let method = match request.method() {
        // The server omits the body.
        &Method::HEAD => Method::GET,
        method => method.clone(),
    };
    let path = request.uri().path().to_owned();
    let found = route(&method, &path);
    let (reply, pattern) = match found {
        Ok((action, pattern, id)) => {
            let done = match method == Method::GET {
                true => run(action, id, request, &context).await,
                false => run_to_end(action, id, request, context.clone()).await,
            };
            (
                done.unwrap_or_else(|failure| reply::failure(&failure)),
                pattern,
            )
        }
        Err(refused) => (*refused, "unknown"),
    };
    let code = reply.status().as_u16();
    let took = start.elapsed();
    context
        .disks
        .counters()
        .count(method.as_str(), pattern, code, took);
    if method != Method::GET {
        let (uid, pid) = (caller.uid.map_or(-1, i64::from), caller.pid.unwrap_or(-1));
        let took = took.as_millis();
        ratelimited_log::info(format_args!(
            "{method} {path}: {code} in {took} ms, for uid {uid}, pid {pid}"
        ));
    }
    Ok(reply)
}

/// The action for a request, the pattern of its route, and the id in its path.
fn route(
    method: &Method,
    path: &str,
) -> Result<(Action, &'static str, Option<DiskId>), Box<Reply>> {
    let mut allowed = Vec::new();
    for (known, pattern, action) in ROUTES {
        let Some(id) = matches(pattern, path) else {
            continue;
        };
        if method.as_str() != known {
            allowed.push(known);
            continue;
        }
        let id = id.map(|id| decode(id).parse::<DiskId>()).transpose();
        let id = id.map_err(|error| {
            Box::new(reply::failure(&Failure::caused(Code::BadRequest, &error)))
        })?;
        return Ok((action, pattern, id));
    }
    if allowed.is_empty() {
        let failure = Failure::new(
            Code::NotFound,
            format!("no route {path}; see /api/v1/openapi.yaml"),
        );
        return Err(Box::new(reply::failure(&failure)));
    }
    let failure = Failure::new(
        Code::Method,
        format!("{path} takes {}, not {method}", allowed.join(", ")),
    );
    let mut refused = reply::failure(&failure);
    if let Ok(value) = HeaderValue::from_str(&allowed.join(", ")) {
        refused.headers_mut().insert(ALLOW, value);
    }
    Err(Box::new(refused))
}

/// Whether `path` fits `pattern`, and the segment that stands for the one in braces.
fn matches<'p>(pattern: &str, path: &'p str) -> Option<Option<&'p str>> {
    let (mut wanted, mut given) = (pattern.split('/'), path.split('/'));
    let mut id = None;
    loop {
        match (wanted.next(), given.next()) {
            (None, None) => return Some(id),
            (Some(want), Some(have)) if want.starts_with('{') => id = Some(have),
            (Some(want), Some(have)) if want == have => {}
            _ => return None,
        }
    }
}

/// `text` with each `%XX` replaced by its byte, once. What is not UTF-8 then is no valid id.
fn decode(text: &str) -> String {
    let mut bytes = Vec::with_capacity(text.len());
    let mut rest = text.as_bytes();
    while let Some((first, tail)) = rest.split_first() {
        let escaped = tail.get(..2).and_then(|hex| std::str::from_utf8(hex).ok());
        match escaped
            .and_then(|hex| u8::from_str_radix(hex, 16).ok())
            .filter(|_| *first == b'%')
        {
            Some(byte) => {
                bytes.push(byte);
                rest = &tail[2..];
            }
            None => {
                bytes.push(*first);
                rest = tail;
            }
        }
    }
    String::from_utf8_lossy(&bytes).into_owned()
}

/// Executes a request that changes something to its end, also if the client disconnects: the server drops the future of
/// such a request, and a disk would stay half made.
async fn run_to_end(
    action: Action,
    id: Option<DiskId>,
    request: Request<Incoming>,
    context: Arc<Context>,
) -> Result<Reply, Failure> {
    let task = tokio::spawn(async move { run(action, id, request, &context).await });
    task.await
        .unwrap_or_else(|error| Err(Failure::caused(Code::Internal, &error)))
}

async fn run(
    action: Action,
    id: Option<DiskId>,
    request: Request<Incoming>,
    context: &Context,
) -> Result<Reply, Failure> {
    let disks = &context.disks;
    let query = request.uri().query().unwrap_or_default().to_owned();
    let id = || {
        id.clone()
            .ok_or_else(|| Failure::new(Code::BadRequest, "the path names no disk"))
    };
    let ok = |body| Ok(reply::json(StatusCode::OK, &body));
    match action {
        Action::ListDisks => ok(list_disks(disks, &query)),
        Action::PutDisk => {
            let (put, disk) = disks.put(&id()?, body::<DiskSpec>(request).await?).await?;
            let status = match put {
                Put::Created => StatusCode::CREATED,
                Put::Unchanged => StatusCode::OK,
            };
            Ok(reply::json(status, &disks.view(&disk)))
        }
        Action::GetDisk => ok(disks.view(&*disks.get(&id()?)?)),
        Action::DeleteDisk => {
            let forced = value(&query, "force") == Some("true");
            let patience = Duration::from_secs(number(&query, "wait")?);
            disks.delete(&id()?, forced, patience).await?;
            Ok(reply::empty())
        }
        Action::PatchDisk => {
            let patch = body::<Map<String, Value>>(request).await?;
            ok(disks.view(&*disks.patch(&id()?, patch).await?))
        }
        Action::ResizeDisk => {
            let SizeRequest { bytes } = body(request).await?;
            ok(disks.view(&*disks.resize(&id()?, bytes).await?))
        }
        Action::RestartDisk => ok(disks.view(&*disks.restart(&id()?).await?)),
        Action::Reload => {
            let body = json!({ "disks": disks.reload()? });
            Ok(reply::json(StatusCode::ACCEPTED, &body))
        }
        Action::ListSnapshots => ok(disks.snapshots(&id()?).await?),
        Action::MakeSnapshot => {
            let wanted = body::<SnapshotRequest>(request).await?;
            ok(disks.snapshot(&id()?, wanted.name, wanted.wait).await?)
        }
        Action::Events => ok(events(disks, &query).await?),
        Action::Live => ok(json!({ "state": "live" })),
        // The control socket is bound once the state directory has been read.
        Action::Ready => ok(json!({ "state": "ready", "failed": disks.failed() })),
        Action::Version => ok(json!({ "version": VERSION })),
        Action::OpenApi => {
            let text = OPENAPI.to_owned();
            Ok(reply::text(StatusCode::OK, "application/yaml", text))
        }
        Action::Metrics => {
            let accept = request.headers().get(ACCEPT);
            let accept = accept.and_then(|accept| accept.to_str().ok());
            metrics(disks.clone(), Format::accepted(accept.unwrap_or_default())).await
        }
    }
}

/// The answer to a scrape. The statistics pages are read on a thread that may block.
pub async fn metrics(disks: Arc<Disks>, format: Format) -> Result<Reply, Failure> {
    let read = move || metrics::text(&disks, format);
    let text = tokio::task::spawn_blocking(read).await;
    let text = text.map_err(|error| Failure::caused(Code::Internal, &error))?;
    Ok(reply::text(StatusCode::OK, format.content_type(), text))
}

/// Returns the disks with the label `KEY=VALUE` of the query, or all.
fn list_disks(disks: &Disks, query: &str) -> Value {
    let label = value(query, "label").map(decode);
    let chosen = disks.all().into_iter().filter(|disk| {
        let Some(label) = &label else { return true };
        let labels = disk.entry().map(|entry| entry.spec.labels);
        let (key, wanted) = label.split_once('=').unwrap_or((label, ""));
        labels.is_some_and(|labels| labels.get(key).is_some_and(|found| found == wanted))
    });
    json!({ "disks": chosen.map(|disk| disks.view(&disk)).collect::<Vec<_>>() })
}

/// Returns the events after number `after` of the query; waits for the first one for `wait` seconds.
async fn events(disks: &Disks, query: &str) -> Result<Value, Failure> {
    let after = number(query, "after")?;
    let wait = number(query, "wait")?.min(MAX_WAIT);
    let batch = disks.events().after(after, Duration::from_secs(wait)).await;
    Ok(json!(batch))
}

/// Body of `PUT /disks/{id}/size`.
#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
struct SizeRequest {
    bytes: u64,
}

/// Body of `POST /disks/{id}/snapshots`.
#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
struct SnapshotRequest {
    name: String,
    #[serde(default)]
    wait: bool,
}

/// Reads a JSON body; its declared type is ignored.
async fn body<T: serde::de::DeserializeOwned>(request: Request<Incoming>) -> Result<T, Failure> {
    let limited = Limited::new(request.into_body(), MAX_BODY);
    let collected = tokio::time::timeout(BODY_LIMIT, limited.collect()).await;
    let collected =
        collected.map_err(|_| Failure::new(Code::BadRequest, "the body did not arrive in time"))?;
    let bytes = collected
        .map_err(|error| {
            let text = format!("body: {error}; expected at most {MAX_BODY} bytes");
            Failure::new(Code::TooLarge, text)
        })?
        .to_bytes();
    // A list is refused, although `serde` takes its values for the fields of a struct in order.
    serde_json::from_slice::<Map<String, Value>>(&bytes)
        .and_then(|object| serde_json::from_value(Value::Object(object)))
        .map_err(|error| Failure::new(Code::BadRequest, format!("body: {error}")))
}

/// The number that a key of the query has; 0 without the key.
fn number(query: &str, key: &str) -> Result<u64, Failure> {
    let number = value(query, key).map(str::parse).transpose();
    number.map(Option::unwrap_or_default).map_err(|_| {
        Failure::new(
            Code::BadRequest,
            format!("expected a whole number for {key}"),
        )
    })
}

/// The value of a key of the query.
fn value<'q>(query: &'q str, key: &str) -> Option<&'q str> {
    query
        .split('&')
        .filter_map(|pair| pair.split_once('='))
        .find(|(name, _)| *name == key)
        .map(|(_, value)| value)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn paths_find_their_routes() {
        let found = |method: Method, path: &str| {
            route(&method, path)
                .map(|(action, _, id)| (action, id))
                .ok()
        };
        let id = Some("a.b".parse().unwrap());
        assert_eq!(
            found(Method::GET, "/api/v1/disks"),
            Some((Action::ListDisks, None))
        );
        assert_eq!(
            found(Method::PUT, "/api/v1/disks/a.b"),
            Some((Action::PutDisk, id.clone()))
        );
        assert_eq!(
            found(Method::PUT, "/api/v1/disks/a%2eb"),
            Some((Action::PutDisk, id))
        );
        for path in [
            "/api/v1/disks/",
            "/api/v1/disks/..",
            "/api/v1/disks/%2e%2e",
            "/api/v1/disks/a/b",
            "/x",
        ] {
            assert_eq!(found(Method::GET, path), None, "{path}");
        }
        let refused = route(&Method::POST, "/api/v1/disks/a").unwrap_err();
        assert_eq!(refused.status(), StatusCode::METHOD_NOT_ALLOWED);
        assert_eq!(refused.headers()[ALLOW], "PUT, GET, PATCH, DELETE");
    }

    #[test]
    fn the_routes_are_those_of_openapi_yaml() {
        let mut described = Vec::new();
        let mut path = String::new();
        for line in OPENAPI.lines() {
            if let Some(name) = line
                .strip_prefix("  /")
                .and_then(|line| line.strip_suffix(':'))
            {
                path = format!("/{name}");
            }
            for method in ["get", "put", "post", "delete", "patch"] {
                if line == format!("    {method}:") {
                    described.push((method.to_uppercase(), path.clone()));
                }
            }
        }
        let mut known: Vec<_> = table()
            .map(|(method, path)| {
                (
                    method.to_owned(),
                    path.trim_start_matches("/api/v1").to_owned(),
                )
            })
            .collect();
        known.sort();
        described.sort();
        assert_eq!(described, known);
    }
}
