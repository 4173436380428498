//! Manifests and indexes of OverlayBD images: JSON to structs, checked.

use serde::Deserialize;
use thiserror::Error;

use super::json::is_object;
use crate::format::digest::Digest;
use std::collections::HashMap;

/// Largest manifest or index that is read, in bytes.
pub const MAX_MANIFEST: u64 = 4 << 20;

/// Most layers of an image, as upstream's.
const MAX_IMAGE_LAYERS: usize = 256;

/// Largest acceleration layer, in bytes: it is fetched whole.
const MAX_ACCELERATION: u64 = 16 << 20;

/// Media types to ask a registry for.
pub const ACCEPT: &str = "application/vnd.oci.image.index.v1+json, \
    application/vnd.oci.image.manifest.v1+json, \
    application/vnd.docker.distribution.manifest.list.v2+json, \
    application/vnd.docker.distribution.manifest.v2+json";

/// Media types of manifests that list layers.
const MANIFESTS: [&str; 2] = [
    "application/vnd.oci.image.manifest.v1+json",
    "application/vnd.docker.distribution.manifest.v2+json",
];

/// Media types of layers as the convertors write them: uncompressed tars.
const LAYERS: [&str; 3] = [
    "application/vnd.oci.image.layer.v1.tar",
    "application/vnd.docker.image.rootfs.diff.tar",
    "application/vnd.docker.image.rootfs.foreign.diff.tar",
];

/// Prefix of OverlayBD's annotations.
const ANNOTATION: &str = "containerd.io/snapshot/overlaybd/";

/// Annotations of TurboOCI layers, of today and of its first versions.
const TURBO: [&str; 2] = ["turbo-oci/target-digest", "fastoci/target-digest"];

/// Longest text of the manifest that an error quotes.
const MAX_QUOTE: usize = 200;

/// Error of a manifest that is not that of an OverlayBD image.
#[derive(Clone, Debug, Error, PartialEq, Eq)]
pub enum Error {
    /// Not JSON, or values of wrong types.
    #[error("malformed manifest: {0}")]
    Syntax(String),
    /// Neither an index nor a manifest.
    #[error("media type {0:?} is neither an image index nor an image manifest")]
    MediaType(String),
    /// An index without an image for this machine.
    #[error("the index has no image for linux/{wanted}; it has: {found}")]
    Platform {
        /// Architecture of this machine.
        wanted: &'static str,
        /// Platforms of the index.
        found: String,
    },
    /// An index inside an index.
    #[error("nested image index; expected an image manifest")]
    Nested,
    /// No layer has OverlayBD's annotations.
    #[error("not an OverlayBD image; convert it first (accelerated-container-image's convertor)")]
    NotOverlayBd,
    /// Some layers have OverlayBD's annotations and some have not.
    #[error(
        "layer {0} of the image is not an OverlayBD layer, but other layers are: convert the whole image"
    )]
    Mixed(usize),
    /// A TurboOCI layer refers to another image's compressed layer.
    #[error(
        "layer {0} is a TurboOCI layer, which is not supported; convert the image without --turboOCI"
    )]
    Turbo(usize),
    /// A layer of another media type.
    #[error("layer {number} has media type {found:?}; expected an uncompressed OverlayBD layer")]
    LayerType {
        /// Position of the layer, bottom first, from 0.
        number: usize,
        /// Its media type.
        found: String,
    },
    /// The annotations contradict the layer's descriptor.
    #[error("layer {number}: annotation {key} is {found:?}, its descriptor says {expected}")]
    Contradiction {
        /// Position of the layer.
        number: usize,
        /// The annotation, without its prefix.
        key: &'static str,
        /// Its value.
        found: String,
        /// Value in the descriptor.
        expected: String,
    },
    /// A digest or a size is malformed.
    #[error("layer {number}: {what}")]
    Layer {
        /// Position of the layer.
        number: usize,
        /// Description of the error.
        what: String,
    },
    /// More layers than an image may have, or none.
    #[error("the image has {0} layers; expected 1 to {MAX_IMAGE_LAYERS}")]
    Count(usize),
    /// The layer that is on top of an acceleration layer.
    #[error("layer {0} is an acceleration layer but not the topmost one")]
    Acceleration(usize),
}

/// One layer's blob.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Layer {
    digest: Digest,
    size: u64,
}

/// An OverlayBD image's manifest.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Manifest {
    layers: Vec<Layer>,
    acceleration: Option<Layer>,
}

/// Document that a registry serves for a tag or digest.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Document {
    /// An index; holds the digest of the manifest for this machine.
    Index(Digest),
    /// An image's manifest.
    Image(Manifest),
}

impl Layer {
    /// Digest of the blob as stored.
    pub fn digest(&self) -> &Digest {
        &self.digest
    }

    /// Bytes of the blob as stored.
    pub fn size(&self) -> u64 {
        self.size
    }
}

impl Manifest {
    /// Reads an image's manifest.
    ///
    /// # Errors
    /// [`Error::Nested`]: it is an index. Else see [`Document::parse`].
    pub fn parse(bytes: &[u8]) -> Result<Manifest, Error> {
        match Document::parse(bytes)? {
            Document::Image(manifest) => Ok(manifest),
            Document::Index(_) => Err(Error::Nested),
        }
    }

    /// The layers of the disk, bottom first.
    pub fn layers(&self) -> &[Layer] {
        &self.layers
    }

    /// The layer that holds a trace of what the image reads first.
    pub fn acceleration(&self) -> Option<&Layer> {
        self.acceleration.as_ref()
    }
}

impl Document {
    /// Reads a manifest or index as served by a registry.
    ///
    /// # Errors
    /// Each variant of [`Error`] names what is wrong with the document.
    pub fn parse(bytes: &[u8]) -> Result<Document, Error> {
        if !is_object(bytes) {
            return Err(Error::Syntax("expected a JSON object".to_owned()));
        }
        let raw: RawDocument = serde_json::from_slice(bytes)
            .map_err(|error| Error::Syntax(quote(&error.to_string())))?;
        // An index has no layers and a manifest has no manifests, whatever the media type says:
        // two readers of one digest must not see two things in it.
        match (raw.manifests, raw.layers) {
            (Some(entries), None) => choose(&entries).map(Document::Index),
            (None, Some(layers)) => image(&layers).map(Document::Image),
            _ => Err(Error::MediaType(quote(&raw.media_type.unwrap_or_default()))),
        }
    }
}

#[derive(Deserialize)]
#[serde(rename_all = "camelCase")]
struct RawDocument {
    media_type: Option<String>,
    manifests: Option<Vec<RawEntry>>,
    layers: Option<Vec<RawLayer>>,
}

#[derive(Deserialize)]
#[serde(rename_all = "camelCase")]
struct RawEntry {
    #[serde(default)]
    media_type: String,
    digest: String,
    platform: Option<RawPlatform>,
    annotations: Option<HashMap<String, String>>,
}

#[derive(Deserialize)]
struct RawPlatform {
    #[serde(default)]
    os: String,
    #[serde(default)]
    architecture: String,
}

#[derive(Deserialize)]
#[serde(rename_all = "camelCase")]
struct RawLayer {
    #[serde(default)]
    media_type: String,
    digest: String,
    size: u64,
    annotations: Option<HashMap<String, String>>,
}

impl RawLayer {
    fn annotation(&self, key: &str) -> Option<&str> {
        let annotations = self.annotations.as_ref()?;
        annotations
            .get(&format!("{ANNOTATION}{key}"))
            .map(String::as_str)
    }
}

/// This machine's architecture in the words of image indexes.
const fn architecture() -> &'static str {
    if cfg!(target_arch = "aarch64") {
        "arm64"
    } else {
        "amd64"
    }
}

/// The digest of the first entry for this machine. Attestations are for no machine.
fn choose(entries: &[RawEntry]) -> Result<Digest, Error> {
    let wanted = architecture();
    let is_image = |entry: &&RawEntry| {
        let kind = entry.annotations.as_ref();
        kind.is_none_or(|annotations| !annotations.contains_key("vnd.docker.reference.type"))
    };
    let fits = |entry: &&RawEntry| {
        let platform = entry.platform.as_ref();
        platform.is_some_and(|platform| platform.os == "linux" && platform.architecture == wanted)
    };
    let entry = entries.iter().filter(is_image).find(fits).ok_or_else(|| {
        let platforms = entries
            .iter()
            .take(20)
            .filter_map(|entry| entry.platform.as_ref());
        let names = platforms.map(|platform| format!("{}/{}", platform.os, platform.architecture));
        let found = quote(&names.collect::<Vec<_>>().join(", "));
        Error::Platform { wanted, found }
    })?;
    if !entry.media_type.is_empty() && !MANIFESTS.contains(&entry.media_type.as_str()) {
        return Err(Error::MediaType(quote(&entry.media_type)));
    }
    entry
        .digest
        .parse()
        .map_err(|error| Error::Syntax(format!("{error}")))
}

fn image(raw: &[RawLayer]) -> Result<Manifest, Error> {
    if raw.is_empty() || raw.len() > MAX_IMAGE_LAYERS {
        return Err(Error::Count(raw.len()));
    }
    if let Some(number) = raw.iter().position(is_turbo) {
        return Err(Error::Turbo(number));
    }
    let is_overlaybd = |layer: &RawLayer| layer.annotation("blob-digest").is_some();
    if !raw.iter().any(is_overlaybd) {
        return Err(Error::NotOverlayBd);
    }
    if let Some(number) = raw.iter().position(|layer| !is_overlaybd(layer)) {
        return Err(Error::Mixed(number));
    }
    let mut layers = Vec::with_capacity(raw.len());
    let mut acceleration = None;
    for (number, layer) in raw.iter().enumerate() {
        let checked = checked(number, layer)?;
        if layer.annotation("acceleration-layer") != Some("yes") {
            layers.push(checked);
        } else if number + 1 != raw.len() {
            return Err(Error::Acceleration(number));
        } else if checked.size > MAX_ACCELERATION {
            let what = format!(
                "an acceleration layer has at most {MAX_ACCELERATION} bytes; found {}",
                checked.size
            );
            return Err(Error::Layer { number, what });
        } else {
            acceleration = Some(checked);
        }
    }
    if layers.is_empty() {
        return Err(Error::Count(0));
    }
    Ok(Manifest {
        layers,
        acceleration,
    })
}

fn is_turbo(layer: &RawLayer) -> bool {
    let version = layer.annotation("version").unwrap_or_default();
    TURBO.iter().any(|key| layer.annotation(key).is_some())
        || version.contains("-turbo")
        || version.contains("-fastoci")
}

fn checked(number: usize, layer: &RawLayer) -> Result<Layer, Error> {
    if !LAYERS.contains(&layer.media_type.as_str()) {
        let found = quote(&layer.media_type);
        return Err(Error::LayerType { number, found });
    }
    let digest: Digest = layer.digest.parse().map_err(|error| Error::Layer {
        number,
        what: format!("{error}"),
    })?;
    if layer.size == 0 || layer.size > i64::MAX as u64 {
        let what = format!("size {} is not that of a layer", layer.size);
        return Err(Error::Layer { number, what });
    }
    for (key, expected) in [
        ("blob-digest", digest.to_string()),
        ("blob-size", layer.size.to_string()),
    ] {
        let found = layer.annotation(key).unwrap_or(&expected);
        if found != expected {
            let found = quote(found);
            return Err(Error::Contradiction {
                number,
                key,
                found,
                expected,
            });
        }
    }
    Ok(Layer {
        digest,
        size: layer.size,
    })
}

fn quote(text: &str) -> String {
    text.chars().take(MAX_QUOTE).collect()
}

#[cfg(test)]
mod tests;
