//! Requests to a node.

use std::path::{Path, PathBuf};
use std::time::Duration;

use serde_json::{Map, Value, json};

use super::error::Error;
use crate::tool::table::printable;
use crate::tool::unix_http::{Answer, Failure, exchange};

/// Control socket of a node that a service manager started.
pub const DEFAULT_CONTROL: &str = "/run/ovbd/node.sock";

/// Time limit of an answer. A disk may take a minute to start.
const LIMIT: Duration = Duration::from_secs(120);

/// Time limit of an answer that waits until a layer is sealed.
const SEAL_LIMIT: Duration = Duration::from_secs(3600);

/// Seconds that the node waits for the next event; at most 60.
const EVENT_WAIT: u64 = 30;

/// Content of a new disk.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Content {
    /// Absolute paths of layers, bottom first.
    Layers(Vec<String>),
    /// Absolute path of an image config.
    Config(String),
    /// An image in a registry.
    Image(String),
    /// A snapshot of another disk of the node, which is taken if missing.
    Snapshot {
        /// The other disk.
        disk: String,
        /// Name of the snapshot.
        name: String,
    },
}

/// Properties of a new disk beside its content.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Properties {
    /// Directory of the writable layer; without one the disk is read-only.
    pub upper: Option<String>,
    /// Most bytes of data in the writable layer.
    pub upper_limit: Option<u64>,
    /// Path of the vhost-user socket.
    pub socket: Option<String>,
    /// Serial number.
    pub serial: Option<String>,
    /// Number of virtqueues.
    pub num_queues: Option<u16>,
    /// Takeover policy: `always`, `peer` or `never`.
    pub takeover: Option<&'static str>,
    /// Labels.
    pub labels: Vec<(String, String)>,
}

/// A change of one rate limit.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum LimitChange {
    /// No limit.
    Remove,
    /// Tokens (operations, or bytes) for each second, and a burst once.
    Set {
        /// Tokens of a second.
        rate: u64,
        /// Tokens beside those, once.
        burst: Option<u64>,
    },
}

/// A node, by its control socket.
#[derive(Clone, Debug)]
pub struct Node {
    control: PathBuf,
}

impl Node {
    /// The node whose control socket is at `control`.
    pub fn at(control: &Path) -> Self {
        Self {
            control: control.to_owned(),
        }
    }

    /// Returns all disks, or those with the label `KEY=VALUE`, in order of their ids.
    ///
    /// # Errors
    /// [`Error`].
    pub fn disks(&self, label: Option<&str>) -> Result<Vec<Value>, Error> {
        let query = label.map_or_else(String::new, |label| format!("?label={}", encode(label)));
        let mut answer = self.get(&format!("/disks{query}"))?;
        match answer["disks"].take() {
            Value::Array(disks) => Ok(disks),
            _ => Err(self.unexpected("without the list of disks")),
        }
    }

    /// Makes a disk; returns it. The same disk may exist already.
    ///
    /// # Errors
    /// [`Error`].
    pub fn add(&self, id: &str, content: &Content, more: &Properties) -> Result<Value, Error> {
        let body = spec(content, more);
        self.ask("PUT", &disk(id, ""), Some(&body), LIMIT)
    }

    /// Removes a disk.
    ///
    /// # Errors
    /// [`Error`].
    pub fn remove(&self, id: &str, force: bool) -> Result<(), Error> {
        let query = if force { "?force=true" } else { "" };
        self.ask("DELETE", &disk(id, query), None, LIMIT).map(drop)
    }

    /// Replaces the process of a disk; returns the disk.
    ///
    /// # Errors
    /// [`Error`].
    pub fn restart(&self, id: &str) -> Result<Value, Error> {
        self.ask("POST", &disk(id, "/restart"), None, LIMIT)
    }

    /// Begins to replace the processes of all disks; returns their number.
    ///
    /// # Errors
    /// [`Error`].
    pub fn reload(&self) -> Result<Value, Error> {
        self.ask("POST", "/reload", None, LIMIT)
    }

    /// Returns the snapshots of a disk, oldest first.
    ///
    /// # Errors
    /// [`Error`].
    pub fn snapshots(&self, id: &str) -> Result<Vec<Value>, Error> {
        match self.get(&disk(id, "/snapshots"))? {
            Value::Array(snapshots) => Ok(snapshots),
            _ => Err(self.unexpected("without the list of snapshots")),
        }
    }

    /// Takes a snapshot of a disk, and waits for its layer to be sealed if `wait`; returns the snapshot.
    ///
    /// # Errors
    /// [`Error`].
    pub fn snapshot(&self, id: &str, name: &str, wait: bool) -> Result<Value, Error> {
        let body = json!({ "name": name, "wait": wait });
        let limit = if wait { SEAL_LIMIT } else { LIMIT };
        self.ask("POST", &disk(id, "/snapshots"), Some(&body), limit)
    }

    /// Changes the rate limits of a disk; `None` leaves one as it is. Returns the disk.
    ///
    /// # Errors
    /// [`Error`].
    pub fn limit(
        &self,
        id: &str,
        ops: Option<LimitChange>,
        bandwidth: Option<LimitChange>,
    ) -> Result<Value, Error> {
        let changes = [("ops", ops), ("bandwidth", bandwidth)];
        let limits: Map<_, _> = changes
            .into_iter()
            .filter_map(|(name, change)| Some((name.to_owned(), bucket(change?))))
            .collect();
        if limits.is_empty() {
            return self.get(&disk(id, ""));
        }
        let body = json!({ "limits": limits });
        self.ask("PATCH", &disk(id, ""), Some(&body), LIMIT)
    }

    /// Returns the events after number `after`. If there are none, waits for the next one if `wait`.
    ///
    /// # Errors
    /// [`Error`].
    pub fn events(&self, after: u64, wait: bool) -> Result<Value, Error> {
        let wait = if wait { EVENT_WAIT } else { 0 };
        self.get(&format!("/events?after={after}&wait={wait}"))
    }

    /// Returns the metrics as OpenMetrics text.
    ///
    /// # Errors
    /// [`Error`].
    pub fn metrics(&self) -> Result<String, Error> {
        let answer = self.exchange("GET", "/metrics", "", LIMIT)?;
        if answer.status != 200 {
            return Err(self.refusal(&answer));
        }
        String::from_utf8(answer.body).map_err(|_| self.unexpected("not UTF-8"))
    }

    fn get(&self, resource: &str) -> Result<Value, Error> {
        self.ask("GET", resource, None, LIMIT)
    }

    fn ask(
        &self,
        method: &str,
        resource: &str,
        body: Option<&Value>,
        limit: Duration,
    ) -> Result<Value, Error> {
        let body = body.map(Value::to_string).unwrap_or_default();
        let target = format!("/api/v1{resource}");
        let answer = self.exchange(method, &target, &body, limit)?;
        match answer.status {
            204 => Ok(Value::Null),
            200..300 => {
                serde_json::from_slice(&answer.body).map_err(|_| self.unexpected("not JSON"))
            }
            _ => Err(self.refusal(&answer)),
        }
    }

    fn exchange(
        &self,
        method: &str,
        target: &str,
        body: &str,
        limit: Duration,
    ) -> Result<Answer, Error> {
        let path = self.control.clone();
        exchange(&self.control, method, target, body, limit).map_err(|failure| match failure {
            Failure::Connection(source) => Error::Connection { path, source },
            Failure::Late => Error::Late {
                path,
                seconds: limit.as_secs(),
            },
            Failure::NotHttp => self.unexpected("not HTTP"),
        })
    }

    fn refusal(&self, answer: &Answer) -> Error {
        let body: Value = serde_json::from_slice(&answer.body).unwrap_or_default();
        let (Some(error), Some(code)) = (body["error"].as_str(), body["code"].as_str()) else {
            return self.unexpected("an error of another API");
        };
        let causes = body["causes"].as_array().into_iter().flatten();
        let texts = std::iter::once(error).chain(causes.filter_map(Value::as_str));
        Error::Refused {
            status: answer.status,
            code: printable(code),
            text: printable(&texts.collect::<Vec<_>>().join(": ")),
        }
    }

    fn unexpected(&self, found: &'static str) -> Error {
        Error::Answer {
            path: self.control.clone(),
            found,
        }
    }
}

/// The resource of a disk, and what follows it.
fn disk(id: &str, rest: &str) -> String {
    format!("/disks/{}{rest}", encode(id))
}

/// Encodes text for a URL.
fn encode(text: &str) -> String {
    let mut url = String::new();
    for byte in text.bytes() {
        match byte {
            b'A'..=b'Z' | b'a'..=b'z' | b'0'..=b'9' | b'-' | b'.' | b'_' | b'~' => {
                url.push(byte.into());
            }
            _ => url += &format!("%{byte:02X}"),
        }
    }
    url
}

/// The body of a request for a disk.
fn spec(content: &Content, more: &Properties) -> Value {
    let (name, value) = match content {
        Content::Layers(layers) => ("layers", json!(layers)),
        Content::Config(path) => ("config", json!(path)),
        Content::Image(reference) => ("image", json!(reference)),
        Content::Snapshot { disk, name } => ("from", json!({ "disk": disk, "snapshot": name })),
    };
    let labels: Map<_, _> = more
        .labels
        .iter()
        .map(|(key, value)| (key.clone(), json!(value)))
        .collect();
    let upper = more.upper.as_ref().map(|dir| json!({ "dir": dir }));
    let fields = [
        (name, Some(value)),
        ("upper", upper),
        ("upper_limit", more.upper_limit.map(Value::from)),
        ("socket", more.socket.clone().map(Value::from)),
        ("serial", more.serial.clone().map(Value::from)),
        ("num_queues", more.num_queues.map(Value::from)),
        ("takeover", more.takeover.map(Value::from)),
        (
            "labels",
            (!labels.is_empty()).then_some(Value::Object(labels)),
        ),
    ];
    let fields = fields
        .into_iter()
        .filter_map(|(name, value)| Some((name.to_owned(), value?)));
    Value::Object(fields.collect())
}

/// A token bucket in the words of Firecracker; `null` removes it.
fn bucket(change: LimitChange) -> Value {
    match change {
        LimitChange::Remove => Value::Null,
        LimitChange::Set { rate, burst: None } => json!({ "size": rate, "refill_time": 1000 }),
        LimitChange::Set {
            rate,
            burst: Some(burst),
        } => json!({ "size": rate, "one_time_burst": burst, "refill_time": 1000 }),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ids_cannot_leave_their_place_in_the_path() {
        assert_eq!(disk("vm-7.a_b", "/restart"), "/disks/vm-7.a_b/restart");
        assert_eq!(disk("a/b c\r\n?", ""), "/disks/a%2Fb%20c%0D%0A%3F");
    }

    #[test]
    fn absent_properties_are_left_out() {
        let content = Content::Config("/c".into());
        assert_eq!(
            spec(&content, &Properties::default()),
            json!({ "config": "/c" })
        );
        let more = Properties {
            upper: Some("/u".into()),
            labels: vec![("k".to_owned(), "v".to_owned())],
            ..Properties::default()
        };
        let content = Content::Layers(vec!["/a".into()]);
        let expected =
            json!({ "layers": ["/a"], "upper": { "dir": "/u" }, "labels": { "k": "v" } });
        assert_eq!(spec(&content, &more), expected);
    }
}
