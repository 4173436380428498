//! What all JSON documents of registries and services have in common.

/// Whether JSON text is an object. The derived deserializers of structs also take an array of the fields'
/// values, which no registry means.
pub(super) fn is_object(json: &[u8]) -> bool {
    json.trim_ascii_start().starts_with(b"{")
}
