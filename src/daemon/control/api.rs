//! The requests of the control API. `docs/control.md` describes them for users.

use std::path::Path;

use serde::Deserialize;
use serde::de::DeserializeOwned;
use serde_json::{Map, Value, json};

use super::http::{Body, Request, Response};
use crate::daemon::device::Device;
use crate::daemon::recorder::Purpose;
use crate::engine::stats::exposition::{Exposition, Format, Kind};
use crate::engine::stats::figures::Figures;
use crate::engine::stats::report::{self, DiskFigures};
use crate::format::trace::TracedRead;
use crate::ratelimited_log;
use crate::reason::reason;
use crate::version::VERSION;
use crate::vhost::handler::Offered;
use crate::writable::snapshots::MAX_NAME;
use crate::writable::{Error, Snapshot};

/// The body of a request for another size.
#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct SizeRequest {
    size_bytes: u64,
}

/// The body of a request for a snapshot.
#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct SnapshotRequest {
    name: String,
    /// Whether to answer only when the layer is sealed.
    #[serde(default)]
    wait: bool,
}

impl Device {
    /// Executes a request.
    pub fn answer(&self, request: &Request) -> Response {
        let method = match request.method.as_str() {
            // The body is not sent.
            "HEAD" => "GET",
            method => method,
        };
        match (method, request.path.as_str()) {
            ("GET", "/metrics") => self.metrics(Format::accepted(&request.accept)),
            (_, "/metrics") => Response::error(405, "expected GET"),
            ("GET", "/api/v1/device") => found(self.describe()),
            ("GET", "/api/v1/image") => found(self.image()),
            ("GET", "/api/v1/snapshots") => found(self.snapshots().iter().map(summary).collect()),
            ("POST", "/api/v1/snapshots") => self.snapshot(&request.body),
            ("PUT", "/api/v1/size") => self.resize(&request.body),
            ("GET", "/api/v1/limits") => found(json!(self.limits())),
            ("PUT", "/api/v1/limits") => self.limit(&request.body),
            ("PUT", "/api/v1/trace") => self.record(),
            ("DELETE", "/api/v1/trace") => self.end_record(),
            (_, "/api/v1/trace") => Response::error(405, "expected PUT or DELETE"),
            (_, "/api/v1/device" | "/api/v1/image") => Response::error(405, "expected GET"),
            (_, "/api/v1/snapshots") => Response::error(405, "expected GET or POST"),
            (_, "/api/v1/size") => Response::error(405, "expected PUT"),
            (_, "/api/v1/limits") => Response::error(405, "expected GET or PUT"),
            (_, super::LISTENER) => Response::error(405, "expected GET"),
            _ => Response::error(
                404,
                "expected /api/v1/device, /api/v1/image, /api/v1/snapshots, /api/v1/size, /api/v1/limits, \
                 /api/v1/trace or /metrics",
            ),
        }
    }

    /// Metrics of the disk, whose label is its serial number.
    fn metrics(&self, format: Format) -> Response {
        let disk = DiskFigures {
            id: self.serial(),
            figures: Figures::of(self.stats()),
        };
        let mut text = Exposition::new(format);
        text.family("ovbd_build", Kind::Info, "Version of ovbd-vhost.");
        text.sample(&[("version", VERSION)], 1);
        report::write(&mut text, &[disk], &Figures::default());
        Response {
            status: 200,
            body: Body::Text(format.content_type(), text.finish()),
        }
    }

    /// Describes the layers of the image, bottom first.
    fn image(&self) -> Value {
        let image = self.volume().image();
        let layers = image.layers().iter().map(|layer| {
            let blob = layer.container().blob();
            json!({
                "layer": layer.layer_ref(),
                "bytes": blob.len(),
                "local_bytes": blob.local_bytes(),
            })
        });
        json!({ "layers": layers.collect::<Value>(), "table_bytes": image.table_bytes() })
    }

    fn describe(&self) -> Value {
        let volume = self.volume();
        let uppers = volume.layers();
        let upper = uppers.first().map(|upper| {
            json!({
                "data": text(&upper.paths().data),
                "index": text(&upper.paths().index),
                "type": upper.kind().name(),
                "uuid": upper.header().uuid,
                "used_bytes": upper.used(),
                "extents": upper.extents(),
            })
        });
        let full_storage = self.full_storage();
        let waiting = full_storage.waiting();
        json!({
            "version": VERSION,
            "state": if waiting > 0 { "paused: storage full" } else { "serving" },
            "size_bytes": volume.size(),
            "serial": self.serial(),
            "layers": volume.image().layers().len(),
            "frozen_uppers": volume.layers_below_active(),
            "upper": upper,
            "offered": Offered::of(volume.is_writable()),
            "takeovers_refused": self.ownership().refused(),
            "limits": self.limits(),
            "storage_full": {
                "waiting_requests": waiting,
                "pauses": full_storage.pauses(),
            },
            "front_end": Figures::of(self.stats()).front_end(),
            "fetch": self.fetching(),
        })
    }

    fn resize(&self, body: &[u8]) -> Response {
        if !self.volume().is_writable() {
            let text = "the disk is read-only: only a disk with a writable layer can grow";
            return Response::error(409, text);
        }
        let size = match parse(body) {
            Ok(SizeRequest { size_bytes }) => size_bytes,
            Err(error) => {
                let text = format!("expected {{\"size_bytes\": N}}: {error}");
                return Response::error(400, &text);
            }
        };
        match self.grow(size) {
            Ok(()) => found(json!({ "size_bytes": size })),
            Err(error @ (Error::Shrinks { .. } | Error::ReadOnly)) => {
                Response::error(409, &error.to_string())
            }
            Err(error @ Error::Size(_)) => Response::error(400, &error.to_string()),
            Err(error) => {
                let text = reason(&error);
                ratelimited_log::error(format_args!("control: cannot grow the disk: {text}"));
                Response::error(500, &text)
            }
        }
    }

    fn limit(&self, body: &[u8]) -> Response {
        match parse(body) {
            Ok(limits) => {
                self.set_limits(limits);
                found(json!(limits))
            }
            Err(error) => {
                let text = format!(
                    "expected {{\"ops\": BUCKET or null, \"bandwidth\": BUCKET or null}}: {error}"
                );
                Response::error(400, &text)
            }
        }
    }

    fn record(&self) -> Response {
        match self.recorder().start(self.volume().image()) {
            true => found(json!({ "recording": true })),
            false => {
                let text =
                    "the daemon records a trace to a file (--record-trace or recordTracePath)";
                Response::error(409, text)
            }
        }
    }

    fn end_record(&self) -> Response {
        let image = self.volume().image();
        let Some(reads) = self.recorder().finish(image, Purpose::Client) else {
            let text = "no trace is being recorded: PUT /api/v1/trace starts a recording";
            return Response::error(409, text);
        };
        let read = |read: &TracedRead| json!([read.layer, read.offset, read.len]);
        found(json!({ "reads": reads.iter().map(read).collect::<Vec<_>>() }))
    }

    fn snapshot(&self, body: &[u8]) -> Response {
        if !self.volume().is_writable() {
            return Response::error(
                409,
                "the disk is read-only: only a disk with a writable layer has snapshots",
            );
        }
        let request: SnapshotRequest = match parse(body) {
            Ok(request) => request,
            Err(error) => {
                let text = format!(
                    "expected {{\"name\": \"...\"}}, and \"wait\": true to wait for the seal: {error}"
                );
                return Response::error(400, &text);
            }
        };
        let printable = !request.name.chars().any(char::is_control);
        if request.name.is_empty() || request.name.len() > MAX_NAME || !printable {
            let text = format!("expected a name of 1 to {MAX_NAME} printable bytes");
            return Response::error(400, &text);
        }
        let taken = self.take_snapshot(&request.name);
        let taken = taken.and_then(|snapshot| match request.wait {
            true => self.seal().map(|()| Snapshot {
                sealed: true,
                ..snapshot
            }),
            false => Ok(snapshot),
        });
        match taken {
            Ok(snapshot) => {
                ratelimited_log::info(format_args!("the snapshot {:?} is taken", snapshot.name));
                found(details(&snapshot))
            }
            Err(error @ Error::ReadOnly) => Response::error(409, &error.to_string()),
            Err(error) => {
                ratelimited_log::error(format_args!(
                    "control: cannot take a snapshot: {}",
                    reason(&error)
                ));
                Response::error(500, &reason(&error))
            }
        }
    }
}

/// Parses a body. A list is refused, although `serde` takes its values for the fields of a struct in order.
fn parse<T: DeserializeOwned>(body: &[u8]) -> Result<T, serde_json::Error> {
    let object: Map<String, Value> = serde_json::from_slice(body)?;
    serde_json::from_value(Value::Object(object))
}

/// Describes a snapshot in a list.
fn summary(snapshot: &Snapshot) -> Value {
    json!({
        "name": snapshot.name,
        "uuid": snapshot.uuid,
        "layer": snapshot.layers.last(),
        "sealed": snapshot.sealed,
        "taken": snapshot.taken,
    })
}

/// Describes a snapshot with all its layers.
fn details(snapshot: &Snapshot) -> Value {
    json!({
        "name": snapshot.name,
        "uuid": snapshot.uuid,
        "layers": snapshot.layers,
        "sealed": snapshot.sealed,
        "taken": snapshot.taken,
    })
}

/// Returns a path as JSON text; bytes that are not UTF-8 are replaced.
fn text(path: &Path) -> String {
    path.to_string_lossy().into_owned()
}

fn found(body: Value) -> Response {
    Response {
        status: 200,
        body: Body::Json(body),
    }
}
