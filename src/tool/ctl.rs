//! `ovbd ctl`: sends requests to the control socket of a running daemon (`docs/control.md`).

use std::fmt;
use std::io;
use std::path::{Path, PathBuf};
use std::time::Duration;

use serde_json::{Value, json};
use thiserror::Error;

use super::snapshots;
use super::table::{Align, Table, printable, size};
use super::unix_http::{Failure, exchange};

/// Time limit of an answer: a snapshot or a resize makes earlier writes durable.
const LIMIT: Duration = Duration::from_secs(120);

/// Time limit of an answer that waits until a layer is sealed.
const SEAL_LIMIT: Duration = Duration::from_secs(3600);

/// A request.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Ask {
    /// Describe the disk.
    Device,
    /// Describe the layers.
    Image,
    /// List the snapshots.
    Snapshots,
    /// Take a snapshot.
    Snapshot {
        /// Name of the snapshot.
        name: String,
        /// Whether to wait until the layer is sealed.
        wait: bool,
    },
    /// Set the size of the disk.
    Resize {
        /// Size in bytes.
        size: u64,
    },
    /// Start to record the guest's reads.
    StartTrace,
    /// End the recording, and return the reads.
    EndTrace,
    /// Replace the rate limits of the disk.
    SetLimits {
        /// The limits, as `PUT /api/v1/limits` takes them.
        limits: Value,
    },
}

/// The request failed, or there is no answer.
#[derive(Debug, Error)]
pub enum Error {
    /// The daemon cannot be reached.
    #[error("cannot reach a daemon at {}", path.display())]
    Connection {
        /// The control socket.
        path: PathBuf,
        /// Error of the system.
        source: io::Error,
    },
    /// The daemon did not answer in time.
    #[error(
        "no answer from {0} within {seconds} s; the request may still complete; check with \
         `ovbd ctl {0} device` and `snapshots`",
        path.display()
    )]
    Late {
        /// The control socket.
        path: PathBuf,
        /// Time limit.
        seconds: u64,
    },
    /// The socket is not that of a daemon.
    #[error("{}: reply is not HTTP; expected the control socket of ovbd-vhost", path.display())]
    NoAnswer {
        /// The socket.
        path: PathBuf,
    },
    /// The daemon refused the request.
    #[error("the daemon refused the request ({status}): {text}")]
    Refused {
        /// HTTP status, such as 409.
        status: u16,
        /// Reason of the daemon.
        text: String,
    },
}

/// Sends a request to the daemon whose control socket is at `path`; returns its answer.
///
/// # Errors
/// [`Error::Late`] after two minutes, or an hour to seal a layer; otherwise another [`Error`].
pub fn ask(path: &Path, ask: &Ask) -> Result<Value, Error> {
    let (method, resource, body) = match ask {
        Ask::Device => ("GET", "device", String::new()),
        Ask::Image => ("GET", "image", String::new()),
        Ask::Snapshots => ("GET", "snapshots", String::new()),
        Ask::Snapshot { name, wait } => {
            let body = json!({ "name": name, "wait": wait });
            ("POST", "snapshots", body.to_string())
        }
        Ask::Resize { size } => ("PUT", "size", json!({ "size_bytes": size }).to_string()),
        Ask::StartTrace => ("PUT", "trace", String::new()),
        Ask::EndTrace => ("DELETE", "trace", String::new()),
        Ask::SetLimits { limits } => ("PUT", "limits", limits.to_string()),
    };
    let limit = match ask {
        Ask::Snapshot { wait: true, .. } => SEAL_LIMIT,
        _ => LIMIT,
    };
    let path = path.to_owned();
    let target = format!("/api/v1/{resource}");
    let answer = match exchange(&path, method, &target, &body, limit) {
        Ok(answer) => answer,
        Err(Failure::Connection(source)) => return Err(Error::Connection { path, source }),
        Err(Failure::Late) => {
            let seconds = limit.as_secs();
            return Err(Error::Late { path, seconds });
        }
        Err(Failure::NotHttp) => return Err(Error::NoAnswer { path }),
    };
    let Ok(body) = serde_json::from_slice::<Value>(&answer.body) else {
        return Err(Error::NoAnswer { path });
    };
    match answer.status {
        200 => Ok(body),
        status => Err(Error::Refused {
            status,
            text: body["error"].as_str().unwrap_or_default().to_owned(),
        }),
    }
}

/// Returns an answer as text.
pub fn text(ask: &Ask, answer: &Value) -> String {
    match ask {
        Ask::Snapshots => snapshots::Listing::from_answer(answer).to_string(),
        Ask::Snapshot { .. } => {
            let name = printable(answer["name"].as_str().unwrap_or_default());
            let layers = answer["layers"].as_array().map_or(0, Vec::len);
            let sealed = match answer["sealed"].as_bool() {
                Some(true) => "sealed",
                _ => "not sealed yet",
            };
            format!("snapshot {name} of {layers} layers, {sealed}\n")
        }
        _ => {
            let mut table = Table::new([("FIELD", Align::Left), ("VALUE", Align::Left)]);
            fields("", answer, &mut table);
            table.to_string()
        }
    }
}

/// Adds the fields of `value`, which is called `name`, and of all it consists of.
fn fields(name: &str, value: &Value, table: &mut Table<2>) {
    let inner = |part: &dyn fmt::Display| match name {
        "" => part.to_string(),
        _ => format!("{name}.{part}"),
    };
    match value {
        Value::Object(object) => {
            for (key, value) in object {
                fields(&inner(key), value, table);
            }
        }
        Value::Array(array) => {
            for (number, value) in array.iter().enumerate() {
                fields(&inner(&number), value, table);
            }
        }
        Value::String(text) => table.add([name.to_owned(), text.clone()]),
        Value::Null => table.add([name.to_owned(), "-".to_owned()]),
        _ => {
            let is_size = name.ends_with("bytes");
            let bytes = value.as_u64().filter(|_| is_size).map(size);
            table.add([name.to_owned(), bytes.unwrap_or_else(|| value.to_string())]);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn fields_have_the_names_of_what_they_are_part_of() {
        let device = json!({
            "size_bytes": 1536,
            "upper": null,
            "fetch": { "layers": [{ "layer": "a\u{1b}" }] },
        });
        let expected = "FIELD                 VALUE\n\
                        fetch.layers.0.layer  a\\u{1b}\n\
                        size_bytes            1.50 KiB\n\
                        upper                 -\n";
        assert_eq!(text(&Ask::Device, &device), expected);
    }
}
