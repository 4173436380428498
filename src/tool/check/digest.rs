//! The digest of a layer in a registry, which covers the bytes that no other checksum does.

use super::super::Error;
use super::findings::Findings;
use crate::format::digest::{Digest, Hasher};
use crate::source::{self, Blob};

/// Bytes that are hashed at a time.
const CHUNK: usize = 256 << 10;

/// The bytes of a blob have another digest than its name.
#[derive(Debug, thiserror::Error)]
#[error("the blob has digest {found}; expected {expected}")]
struct Mismatch {
    expected: Digest,
    found: Digest,
}

/// Reads a whole blob, and reports if its digest is not `expected`.
pub(super) fn check(
    blob: &Blob,
    expected: &Digest,
    findings: &mut Findings<'_>,
) -> Result<(), Error> {
    match hash(blob) {
        Ok(found) if found == *expected => Ok(()),
        Ok(found) => {
            let expected = *expected;
            findings.broken(None, &Mismatch { expected, found })
        }
        Err(error) => findings.broken(None, &error),
    }
}

fn hash(blob: &Blob) -> Result<Digest, source::Error> {
    let mut hasher = Hasher::new();
    let mut buffer = vec![0; CHUNK];
    let mut at = 0;
    while at < blob.len() {
        let part = (blob.len() - at).min(CHUNK as u64) as usize;
        blob.read_exact_at(&mut buffer[..part], at)?;
        hasher.update(&buffer[..part]);
        at += part as u64;
    }
    Ok(hasher.finish())
}
