//! The keys of a service configuration that have no effect here.

use serde_json::{Map, Value};

/// Most keys that are named.
const MAX_NAMED: usize = 32;

/// Most characters of a key that are repeated.
const MAX_NAME: usize = 60;

/// Keys that are taken. Those of an object are listed with it.
const TAKEN: [(&str, &[&str]); 11] = [
    (
        "credentialConfig",
        &[
            "mode",
            "path",
            "timeout",
            "client_cert_path",
            "client_key_path",
            "server_ca_path",
        ],
    ),
    ("credentialFilePath", &[]),
    (
        "cacheConfig",
        &["cacheType", "cacheDir", "cacheSizeGB", "refillSize"],
    ),
    ("registryCacheDir", &[]),
    ("registryCacheSizeGB", &[]),
    ("cacheType", &[]),
    (
        "download",
        &[
            "enable",
            "delay",
            "delayExtra",
            "maxMBps",
            "tryCnt",
            "blockSize",
        ],
    ),
    ("p2pConfig", &["enable", "address"]),
    ("prefetchConfig", &["concurrency"]),
    ("certConfig", &["certFile", "keyFile"]),
    ("userAgent", &[]),
];

/// The names of the other keys of a configuration, in the order of their names. An object that is
/// disabled has no effect in upstream's daemon either, and is left out.
pub(super) fn keys(text: &[u8]) -> Vec<String> {
    let Ok(Value::Object(object)) = serde_json::from_slice(text) else {
        return Vec::new();
    };
    let mut found = Vec::new();
    for (key, value) in &object {
        match TAKEN.iter().find(|(taken, _)| taken == key) {
            None if is_disabled(value) => {}
            None => found.push(shown(key)),
            Some((_, inner)) => {
                let inside = value.as_object().into_iter().flat_map(Map::keys);
                let ignored = inside.filter(|name| !inner.contains(&name.as_str()));
                found.extend(ignored.map(|name| format!("{key}.{}", shown(name))));
            }
        }
    }
    found.sort();
    let more = found.len().saturating_sub(MAX_NAMED);
    if more > 0 {
        found.truncate(MAX_NAMED);
        found.push(format!("{more} more"));
    }
    found
}

fn is_disabled(value: &Value) -> bool {
    value.get("enable") == Some(&Value::Bool(false))
}

fn shown(name: &str) -> String {
    let text: String = name.chars().take(MAX_NAME).collect();
    let rest = if text.len() < name.len() { "..." } else { "" };
    format!("{}{rest}", text.escape_debug())
}
