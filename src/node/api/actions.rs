//! The actions of the routes.

use std::sync::Arc;
use std::time::Duration;

use hyper::body::Bytes;
use hyper::header::{ACCEPT, HeaderValue, LOCATION};
use hyper::{Request, StatusCode};
use serde::Deserialize;
use serde_json::{Map, Value, json};

use super::body;
use super::query::Query;
use super::reply::{self, Reply};
use crate::engine::stats::exposition::Format;
use crate::node::condition::Condition;
use crate::node::disk::Disk;
use crate::node::disks::{Disks, Put};
use crate::node::error::{Code, Failure};
use crate::node::id::DiskId;
use crate::node::spec::DiskSpec;
use crate::node::{inventory, metrics};
use crate::version::VERSION;

/// Longest wait for events, in seconds.
const MAX_WAIT: u64 = 60;

/// Text of `openapi.yaml`.
pub const OPENAPI: &str = include_str!("../../../docs/openapi.yaml");

/// Action of a route.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Action {
    /// List the disks.
    ListDisks,
    /// Make a disk.
    PutDisk,
    /// Describe a disk.
    GetDisk,
    /// Change limits, labels or the trace of a disk.
    PatchDisk,
    /// Remove a disk.
    DeleteDisk,
    /// Grow a disk.
    ResizeDisk,
    /// Replace the process of a disk.
    RestartDisk,
    /// Return the counters of a disk.
    DiskStats,
    /// Replace all processes.
    Reload,
    /// List the snapshots of a disk.
    ListSnapshots,
    /// Take a snapshot.
    MakeSnapshot,
    /// List the images that disks have open.
    ListImages,
    /// Describe one of them.
    GetImage,
    /// Return the specifications of all disks.
    Config,
    /// Return events.
    Events,
    /// Tell that the node runs.
    Live,
    /// Tell that the node has read its state.
    Ready,
    /// Return the version.
    Version,
    /// Return the description of the API.
    OpenApi,
    /// Return the metrics.
    Metrics,
}

impl Action {
    /// Returns the parameters that its query may have.
    fn parameters(self) -> &'static [&'static str] {
        match self {
            Self::ListDisks => &["label", "limit", "after"],
            Self::PutDisk => &["validate"],
            Self::DeleteDisk => &["force", "wait"],
            Self::Events => &["after", "wait"],
            _ => &[],
        }
    }
}

/// Performs an action. `segment` is the variable part of the path.
///
/// # Errors
/// The failure that the client is told.
pub async fn run(
    action: Action,
    segment: Option<&str>,
    request: Request<Bytes>,
    disks: &Arc<Disks>,
) -> Result<Reply, Failure> {
    let query = Query::parse(
        request.uri().query().unwrap_or_default(),
        action.parameters(),
    )?;
    let segment = segment.unwrap_or_default();
    match action {
        Action::PutDisk
        | Action::GetDisk
        | Action::PatchDisk
        | Action::DeleteDisk
        | Action::ResizeDisk
        | Action::RestartDisk
        | Action::DiskStats
        | Action::ListSnapshots
        | Action::MakeSnapshot => {
            let id = segment.parse::<DiskId>();
            let id = id.map_err(|error| Failure::caused(Code::BadRequest, &error))?;
            with_disk(action, &id, &query, request, disks).await
        }
        Action::ListDisks => Ok(reply::ok(&inventory::page(
            disks,
            &labels(&query)?,
            query.text("after")?,
            limit(&query)?,
        ))),
        Action::Reload => {
            let body = json!({ "disks": disks.reload()? });
            Ok(reply::json(StatusCode::ACCEPTED, &body))
        }
        Action::ListImages => Ok(reply::ok(&inventory::images(disks))),
        Action::GetImage => Ok(reply::ok(&inventory::image(disks, segment).await?)),
        Action::Config => Ok(reply::ok(&inventory::config(disks))),
        Action::Events => Ok(reply::ok(&events(disks, &query).await?)),
        Action::Live => Ok(reply::ok(&json!({ "state": "live" }))),
        // The control socket is bound once the state directory has been read.
        Action::Ready => Ok(reply::ok(
            &json!({ "state": "ready", "failed": disks.failed() }),
        )),
        Action::Version => Ok(reply::ok(&json!({ "version": VERSION }))),
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

/// Performs an action on one disk.
async fn with_disk(
    action: Action,
    id: &DiskId,
    query: &Query,
    request: Request<Bytes>,
    disks: &Arc<Disks>,
) -> Result<Reply, Failure> {
    let condition = match action {
        // A `GET` is always answered in full: state and figures change without the generation.
        Action::GetDisk | Action::DiskStats | Action::ListSnapshots => Condition::default(),
        _ => Condition::of(request.headers())?,
    };
    match action {
        Action::PutDisk if query.flag("validate")? => {
            disks.validate(id, &body::parse::<DiskSpec>(request.body())?, &condition)?;
            Ok(reply::empty())
        }
        Action::PutDisk => {
            let spec = body::parse::<DiskSpec>(request.body())?;
            let (put, disk) = disks.put(id, spec, &condition).await?;
            let view = disks.view(&disk);
            Ok(match put {
                Put::Created => created(id, &view),
                Put::Unchanged => reply::disk(StatusCode::OK, &view),
            })
        }
        Action::PatchDisk => {
            let patch = body::parse::<Map<String, Value>>(request.body())?;
            let disk = disks.patch(id, patch, &condition).await?;
            Ok(reply::disk(StatusCode::OK, &disks.view(&disk)))
        }
        Action::DeleteDisk => {
            let patience = Duration::from_secs(query.number("wait")?.unwrap_or(0));
            let force = query.flag("force")?;
            disks.delete(id, force, patience, &condition).await?;
            Ok(reply::empty())
        }
        _ => {
            disks.check(id, &condition)?;
            unconditional(action, id, request, disks).await
        }
    }
}

/// Performs an action that leaves the generation of the disk as it is.
async fn unconditional(
    action: Action,
    id: &DiskId,
    request: Request<Bytes>,
    disks: &Arc<Disks>,
) -> Result<Reply, Failure> {
    let found = |disk: Arc<Disk>| Ok(reply::disk(StatusCode::OK, &disks.view(&disk)));
    match action {
        Action::ResizeDisk => {
            let SizeRequest { bytes } = body::parse(request.body())?;
            found(disks.resize(id, bytes).await?)
        }
        Action::RestartDisk => found(disks.restart(id).await?),
        Action::ListSnapshots => Ok(reply::ok(&disks.snapshots(id).await?)),
        Action::MakeSnapshot => {
            let wanted = body::parse::<SnapshotRequest>(request.body())?;
            let made = disks.snapshot(id, wanted.name, wanted.wait).await?;
            Ok(reply::ok(&made))
        }
        Action::DiskStats => {
            let disk = disks.get(id)?;
            Ok(reply::ok(&disks.figures(&disk).describe()))
        }
        _ => found(disks.get(id)?),
    }
}

/// The answer for a new disk.
fn created(id: &DiskId, view: &Value) -> Reply {
    let mut reply = reply::disk(StatusCode::CREATED, view);
    // An id has no character that a header cannot have.
    if let Ok(place) = HeaderValue::from_str(&format!("/api/v1/disks/{id}")) {
        reply.headers_mut().insert(LOCATION, place);
    }
    reply
}

/// The answer to a scrape. The statistics pages are read on a thread that may block.
///
/// # Errors
/// [`Code::Internal`] if that thread panics.
pub async fn metrics(disks: Arc<Disks>, format: Format) -> Result<Reply, Failure> {
    let read = move || metrics::text(&disks, format);
    let text = tokio::task::spawn_blocking(read).await;
    let text = text.map_err(|error| Failure::caused(Code::Internal, &error))?;
    Ok(reply::text(StatusCode::OK, format.content_type(), text))
}

/// The labels `KEY=VALUE` that listed disks must have.
fn labels(query: &Query) -> Result<Vec<(String, String)>, Failure> {
    let label = |text: &str| {
        let (key, value) = text.split_once('=').ok_or_else(|| {
            let text = format!("parameter label: expected KEY=VALUE, found {text:?}");
            Failure::new(Code::BadRequest, text)
        })?;
        Ok((key.to_owned(), value.to_owned()))
    };
    query.all("label").map(label).collect()
}

/// The largest number of disks to list.
fn limit(query: &Query) -> Result<usize, Failure> {
    match query.number("limit")? {
        None => Ok(usize::MAX),
        Some(0) => Err(Failure::new(
            Code::BadRequest,
            "parameter limit: expected at least 1",
        )),
        Some(limit) => Ok(usize::try_from(limit).unwrap_or(usize::MAX)),
    }
}

/// Returns the events after number `after` of the query; waits for the first one for `wait` seconds.
async fn events(disks: &Disks, query: &Query) -> Result<Value, Failure> {
    let after = query.number("after")?.unwrap_or(0);
    let wait = query.number("wait")?.unwrap_or(0).min(MAX_WAIT);
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
