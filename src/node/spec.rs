//! Specification of a disk in a request, and its checked form.

mod values;

use std::collections::{BTreeMap, BTreeSet};
use std::path::PathBuf;

use serde::{Deserialize, Serialize};
use serde_json::{Map, Value};

use super::allow::{AllowedDirs, Expected};
use super::error::{Code, Failure};
use super::id::DiskId;
use super::socket::{SocketMode, SocketOwner};
use crate::daemon::config::{DEFAULT_QUEUE_SIZE, MAX_QUEUES};
use crate::engine::rate_limit::LimitsSpec;
use crate::format::digest::Digest;
use crate::registry::reference::Reference;
use crate::vhost::takeover::Takeover;
use crate::writable::OnFull;

/// Most labels of a disk, and most bytes of a key or a value.
const MAX_LABELS: usize = 64;
const MAX_LABEL_LEN: usize = 256;

/// Digits of [`Content::key`].
const KEY_LEN: usize = 16;

/// Fields that can be changed after the disk was made.
const MUTABLE: [&str; 3] = ["labels", "limits", "prefetch"];

/// Body of `PUT /disks/{id}`. Exactly one of `image`, `config`, `layers` and `from` names the content of the disk.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct DiskSpec {
    /// Reference of an OverlayBD image in a registry.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub image: Option<String>,
    /// Path of an image config (`config.v1.json`).
    #[serde(skip_serializing_if = "Option::is_none")]
    pub config: Option<PathBuf>,
    /// Paths of layers, bottom first.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub layers: Option<Vec<PathBuf>>,
    /// A snapshot of another disk.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub from: Option<Origin>,
    /// Writable layer above the content; without one the disk is read-only.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub upper: Option<Upper>,
    /// Most bytes of data in the writable layer.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub upper_limit: Option<u64>,
    /// Path of the vhost-user socket; default: below the run directory.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub socket: Option<PathBuf>,
    /// Permissions of the socket.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub socket_mode: Option<SocketMode>,
    /// Owner of the socket; default: the user and group of the node.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub socket_owner: Option<SocketOwner>,
    /// Free key-value pairs.
    #[serde(skip_serializing_if = "BTreeMap::is_empty")]
    pub labels: BTreeMap<String, String>,
    /// Serial number of the disk, up to 20 bytes.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub serial: Option<String>,
    /// Rate limits.
    #[serde(skip_serializing_if = "LimitsSpec::is_unlimited")]
    pub limits: LimitsSpec,
    /// Trace of reads that is replayed at the start.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub prefetch: Option<PathBuf>,
    /// Queues that a front-end may use.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub num_queues: Option<u16>,
    /// Largest size of a queue, in descriptors.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub queue_size: Option<u16>,
    /// Busy-polling of queues before they sleep, in microseconds.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub poll_us: Option<u32>,
    /// Bytes of the cache of decompressed blocks; 0 for none.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub block_cache: Option<u64>,
    /// What becomes of writes while the storage of the writable layer is full.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub on_full: Option<OnFull>,
    /// When a front-end takes the disk over from another.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub takeover: Option<Takeover>,
}

/// A snapshot of a disk of this node. It is taken if the disk has none of that name.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Origin {
    /// The disk.
    pub disk: DiskId,
    /// Name of the snapshot.
    pub snapshot: String,
}

/// A writable layer.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Upper {
    /// Directory of its files; created if missing.
    pub dir: PathBuf,
}

/// Content of a disk, as its process opens it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Content {
    /// An image in a registry.
    Image(String),
    /// An image config.
    Config(PathBuf),
    /// Layers, bottom first.
    Layers(Vec<PathBuf>),
}

impl Content {
    /// Returns the name in metrics: the reference, the image config, or the topmost layer.
    pub fn name(&self) -> String {
        let path = match self {
            Self::Image(reference) => return reference.clone(),
            Self::Config(path) => Some(path),
            Self::Layers(layers) => layers.last(),
        };
        path.map_or_else(String::new, |path| path.to_string_lossy().into_owned())
    }

    /// Returns a name that disks of the same content share: the start of the digest of the content's description.
    pub fn key(&self) -> String {
        let text = serde_json::to_vec(self).unwrap_or_default();
        let mut digits = Digest::of(&text).hex();
        digits.truncate(KEY_LEN);
        digits
    }

    /// Returns whether the start may wait for a registry.
    pub fn may_be_remote(&self) -> bool {
        matches!(self, Self::Image(_) | Self::Config(_))
    }
}

/// Content of a disk as a request names it, before forks are resolved.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Requested {
    /// Files of the host.
    Files(Content),
    /// A snapshot of another disk.
    Snapshot(Origin),
}

/// A request whose values are valid and whose paths are below the allowed directories.
#[derive(Clone, Debug)]
pub struct Checked {
    /// Content of the disk.
    pub requested: Requested,
    /// Directory of the writable layer.
    pub upper: Option<PathBuf>,
    /// Path of the socket, if the request names one.
    pub socket: Option<PathBuf>,
}

impl DiskSpec {
    /// Checks the values and resolves the paths.
    ///
    /// # Errors
    /// [`Code::BadRequest`] names the wrong field; [`Code::NoLayer`] names the missing file.
    pub fn check(&self, allowed: &AllowedDirs) -> Result<Checked, Failure> {
        let bad = |text: &str| Failure::new(Code::BadRequest, text);
        let named = [
            self.image.is_some(),
            self.config.is_some(),
            self.layers.is_some(),
            self.from.is_some(),
        ];
        if named.into_iter().filter(|named| *named).count() != 1 {
            return Err(bad(
                "expected exactly one of image, config, layers and from",
            ));
        }
        self.check_values()?;
        let requested = match (&self.image, &self.config, &self.layers, &self.from) {
            (Some(image), _, _, _) => {
                let checked = image.parse::<Reference>();
                checked.map_err(|error| Failure::caused(Code::BadRequest, &error))?;
                Requested::Files(Content::Image(image.clone()))
            }
            (_, Some(config), _, _) => {
                Requested::Files(Content::Config(allowed.resolve(config, Expected::File)?))
            }
            (_, _, Some(layers), _) => {
                let resolve = |layer: &PathBuf| allowed.resolve(layer, Expected::File);
                Requested::Files(Content::Layers(
                    layers.iter().map(resolve).collect::<Result<_, _>>()?,
                ))
            }
            (_, _, _, Some(origin)) => Requested::Snapshot(origin.clone()),
            _ => {
                return Err(bad(
                    "expected exactly one of image, config, layers and from",
                ));
            }
        };
        if let Some(trace) = &self.prefetch {
            allowed.resolve(trace, Expected::File)?;
        }
        if let Some(owner) = &self.socket_owner {
            owner
                .numbers()
                .map_err(|error| Failure::caused(Code::BadRequest, &error))?;
        }
        let upper = self
            .upper
            .as_ref()
            .map(|upper| allowed.resolve(&upper.dir, Expected::Directory));
        Ok(Checked {
            requested,
            upper: upper.transpose()?,
            socket: self.socket.clone(),
        })
    }

    /// Returns the specification after a merge patch (RFC 7386) of the fields that can change.
    ///
    /// # Errors
    /// [`Code::Immutable`] for another field; [`Code::BadRequest`] if a value is invalid.
    pub fn patched(&self, patch: Map<String, Value>) -> Result<Self, Failure> {
        for key in patch.keys() {
            if !MUTABLE.contains(&key.as_str()) {
                let text = format!("{key} cannot be changed; expected {}", MUTABLE.join(", "));
                return Err(Failure::new(Code::Immutable, text));
            }
        }
        let invalid = |error: serde_json::Error| Failure::caused(Code::BadRequest, &error);
        let mut value = serde_json::to_value(self).map_err(invalid)?;
        merge(&mut value, Value::Object(patch));
        serde_json::from_value(value).map_err(invalid)
    }

    /// Returns the specification with the value of each field that has a default, and with paths in their plain form.
    pub fn with_defaults(&self) -> Self {
        let plain = |path: &PathBuf| path.components().collect::<PathBuf>();
        let layers = self.layers.as_ref();
        let upper = self.upper.as_ref();
        Self {
            config: self.config.as_ref().map(plain),
            layers: layers.map(|layers| layers.iter().map(plain).collect()),
            upper: upper.map(|Upper { dir }| Upper { dir: plain(dir) }),
            socket: self.socket.as_ref().map(plain),
            prefetch: self.prefetch.as_ref().map(plain),
            socket_mode: Some(self.socket_mode.unwrap_or_default()),
            num_queues: self.num_queues.or(Some(MAX_QUEUES)),
            queue_size: self.queue_size.or(Some(DEFAULT_QUEUE_SIZE)),
            poll_us: self.poll_us.or(Some(0)),
            block_cache: self.block_cache.or(Some(0)),
            on_full: Some(self.on_full.unwrap_or_default()),
            takeover: Some(self.takeover.unwrap_or_default()),
            ..self.clone()
        }
    }

    /// Returns the specification with its content as files of the host, or as an image in a registry.
    pub fn with_content(&self, content: &Content) -> Self {
        let (mut image, mut config, mut layers) = (None, None, None);
        match content.clone() {
            Content::Image(reference) => image = Some(reference),
            Content::Config(path) => config = Some(path),
            Content::Layers(paths) => layers = Some(paths),
        }
        Self {
            image,
            config,
            layers,
            from: None,
            ..self.clone()
        }
    }

    /// Returns the fields with other values in `other`, after defaults are filled in.
    pub fn differences(&self, other: &Self) -> Vec<String> {
        let fields = |spec: &Self| match serde_json::to_value(spec.with_defaults()) {
            Ok(Value::Object(fields)) => fields,
            // Cannot be: a specification is an object.
            _ => Map::new(),
        };
        let (ours, theirs) = (fields(self), fields(other));
        let names: BTreeSet<_> = ours.keys().chain(theirs.keys()).collect();
        let differ = |name: &&&String| ours.get(**name) != theirs.get(**name);
        names
            .iter()
            .filter(differ)
            .map(ToString::to_string)
            .collect()
    }
}

/// Merges `patch` into `target` as RFC 7386 says. `patch` comes from `serde_json`, which limits its depth.
fn merge(target: &mut Value, patch: Value) {
    let Value::Object(patch) = patch else {
        *target = patch;
        return;
    };
    if !target.is_object() {
        *target = Value::Object(Map::new());
    }
    let Some(fields) = target.as_object_mut() else {
        return;
    };
    for (key, value) in patch {
        match value.is_null() {
            true => drop(fields.remove(&key)),
            false => merge(fields.entry(key).or_insert(Value::Null), value),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parse(text: &str) -> Result<DiskSpec, serde_json::Error> {
        serde_json::from_str(text)
    }

    #[test]
    fn unknown_fields_are_refused() {
        assert!(parse(r#"{"layers":["/a"],"limit":1}"#).is_err());
        assert!(parse(r#"{"layers":["/a"],"upper":{"dir":"/u","x":1}}"#).is_err());
        assert!(parse(r#"{"from":{"disk":"../x","snapshot":"s"}}"#).is_err());
    }

    #[test]
    fn specifications_differ_by_what_they_mean() {
        let differences =
            |one: &str, other: &str| parse(one).unwrap().differences(&parse(other).unwrap());
        let plain = r#"{"layers":["/a/b"]}"#;
        let spelled = r#"{"layers":["/a//b"],"takeover":"peer","on_full":"error","num_queues":256,
            "queue_size":1024,"poll_us":0,"block_cache":0,"socket_mode":"600","labels":{},"limits":{}}"#;
        assert_eq!(differences(plain, spelled), [""; 0]);
        let other = r#"{"layers":["/a"],"takeover":"never","serial":"x"}"#;
        assert_eq!(differences(plain, other), ["layers", "serial", "takeover"]);
    }

    #[test]
    fn a_patch_changes_limits_labels_and_prefetch_only() {
        let spec = parse(
            r#"{"layers":["/a"],"labels":{"a":"1","b":"2"},
                "limits":{"ops":{"size":5,"refill_time":100}}}"#,
        );
        let spec = spec.unwrap();
        let patched = |patch: &str| spec.patched(serde_json::from_str(patch).unwrap());
        let changed = patched(
            r#"{"labels":{"a":null,"c":"3"},"limits":{"ops":{"size":7},
                "bandwidth":{"size":1,"refill_time":1}},"prefetch":"/t"}"#,
        );
        let expected = parse(
            r#"{"layers":["/a"],"labels":{"b":"2","c":"3"},"prefetch":"/t",
                "limits":{"ops":{"size":7,"refill_time":100},
                "bandwidth":{"size":1,"refill_time":1}}}"#,
        );
        assert_eq!(changed.unwrap(), expected.unwrap());
        let unlimited = patched(r#"{"limits":null}"#).unwrap();
        assert_eq!(unlimited.limits, LimitsSpec::default());
        assert_eq!(patched("{}").unwrap(), spec);
        for (patch, code) in [
            (r#"{"layers":["/b"]}"#, Code::Immutable),
            (r#"{"upper":null}"#, Code::Immutable),
            (r#"{"limit":{}}"#, Code::Immutable),
            (r#"{"limits":{"ops":{"size":0}}}"#, Code::BadRequest),
            (r#"{"limits":{"bandwidth":{"size":1}}}"#, Code::BadRequest),
            (r#"{"limits":5}"#, Code::BadRequest),
            (r#"{"labels":{"a":5}}"#, Code::BadRequest),
        ] {
            assert_eq!(patched(patch).unwrap_err().code, code, "{patch}");
        }
    }

    #[test]
    fn one_source_is_named_and_values_are_bounded() {
        let allowed = AllowedDirs::open(&[]).unwrap();
        for text in [
            "{}",
            r#"{"layers":["/a"],"config":"/c"}"#,
            r#"{"layers":[]}"#,
            r#"{"from":{"disk":"a","snapshot":"s"},"upper_limit":5}"#,
            r#"{"from":{"disk":"a","snapshot":"s"},"serial":"123456789012345678901"}"#,
            r#"{"layers":["/etc/passwd"]}"#,
            r#"{"from":{"disk":"a","snapshot":"s"},"serial":""}"#,
            r#"{"from":{"disk":"a","snapshot":"s"},"serial":"a\u0000"}"#,
            r#"{"from":{"disk":"a","snapshot":"s"},"num_queues":0}"#,
            r#"{"from":{"disk":"a","snapshot":"s"},"num_queues":257}"#,
            r#"{"from":{"disk":"a","snapshot":"s"},"queue_size":1000}"#,
            r#"{"from":{"disk":"a","snapshot":"s"},"queue_size":1}"#,
            r#"{"from":{"disk":"a","snapshot":"s"},"poll_us":1000001}"#,
            r#"{"from":{"disk":"a","snapshot":"s"},"block_cache":70368744177665}"#,
            r#"{"from":{"disk":"a","snapshot":"s"},"upper":{"dir":"/a"},"upper_limit":70368744177665}"#,
            r#"{"from":{"disk":"a","snapshot":"s"},"socket":"a.sock"}"#,
            r#"{"from":{"disk":"a","snapshot":"s"},"socket":"/a\u0000b"}"#,
            r#"{"from":{"disk":"a","snapshot":"s"},"socket":"/"}"#,
            r#"{"from":{"disk":"a","snapshot":"s"},"socket_owner":"no-such-user"}"#,
            r#"{"from":{"disk":"a","snapshot":"s"},"labels":{"":"x"}}"#,
        ] {
            let failure = parse(text).unwrap().check(&allowed).unwrap_err();
            assert_eq!(failure.code, Code::BadRequest, "{text}: {failure:?}");
        }
        let fork = parse(r#"{"from":{"disk":"a","snapshot":"s"}}"#).unwrap();
        assert!(matches!(
            fork.check(&allowed).unwrap().requested,
            Requested::Snapshot(_)
        ));
    }
}
