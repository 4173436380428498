//! Manifests in the cache, so that an image starts without its registry, with the same layers.

use std::fs;
use std::io::{self, Write};
use std::path::Path;
use std::sync::atomic::{AtomicU64, Ordering};

use super::{Cache, Error};
use crate::format::digest::Digest;
use crate::io::regular::{create_regular, read_regular};

/// Longest manifest that is kept: what a registry may send.
const MAX_KEPT_MANIFEST: u64 = 4 << 20;

/// Tells apart the temporary files of this process.
static NUMBER: AtomicU64 = AtomicU64::new(0);

impl Cache {
    /// Keeps a manifest, and that `reference` named it last.
    ///
    /// # Errors
    /// [`Error::File`] or [`Error::Full`] if the system fails.
    pub fn keep_manifest(&self, reference: &str, manifest: &[u8]) -> Result<Digest, Error> {
        let digest = Digest::of(manifest);
        self.replace(&self.layout.manifest(&digest), manifest)?;
        let named = format!("{digest}\n{reference}\n");
        self.replace(&self.layout.reference(reference), named.as_bytes())?;
        Ok(digest)
    }

    /// A manifest that was kept, verified; `None` if it was not, or is damaged.
    pub fn manifest(&self, digest: &Digest) -> Option<Vec<u8>> {
        let manifest = read_regular(&self.layout.manifest(digest), MAX_KEPT_MANIFEST).ok()?;
        (Digest::of(&manifest) == *digest).then_some(manifest)
    }

    /// The manifest that `reference` named last.
    pub fn last_named(&self, reference: &str) -> Option<Digest> {
        let named = read_regular(&self.layout.reference(reference), MAX_KEPT_MANIFEST).ok()?;
        let named = String::from_utf8(named).ok()?;
        let (digest, found) = named.strip_suffix('\n')?.split_once('\n')?;
        (found == reference).then(|| digest.parse().ok())?
    }

    /// Replaces a file; after a power loss it is the old or the new one.
    fn replace(&self, path: &Path, bytes: &[u8]) -> Result<(), Error> {
        let number = NUMBER.fetch_add(1, Ordering::Relaxed);
        let name = format!("new-{}-{number}", std::process::id());
        let new = self.layout.trash().join(name);
        let write = || -> io::Result<()> {
            let mut file = create_regular(&new)?;
            file.write_all(bytes)?;
            file.sync_all()?;
            fs::rename(&new, path)
        };
        write().map_err(Error::file("write", path))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_reference_names_the_last_manifest_that_was_kept() {
        let dir = tempfile::tempdir().unwrap();
        let cache = Cache::open(dir.path()).unwrap();
        let name = "r.example/a/b:../../x";
        assert_eq!(cache.last_named(name), None);
        let first = cache.keep_manifest(name, b"one").unwrap();
        let second = cache.keep_manifest(name, b"two").unwrap();
        assert_eq!(cache.last_named(name), Some(second));
        assert_eq!(cache.last_named("r.example/a/b:x"), None);
        assert_eq!(cache.manifest(&first).unwrap(), b"one");
        fs::write(cache.layout.manifest(&second), "bad").unwrap();
        assert_eq!(cache.manifest(&second), None);
    }
}
