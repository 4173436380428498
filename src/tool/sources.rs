//! The files of a disk before the sandbox: local layers are open, and a fetcher knows of the others.

use std::path::PathBuf;
use std::sync::Arc;

use super::Error;
use super::open_files::OpenFiles;
use crate::fetch::open::{AttachedBlobs, Needs, OpenBlobs};
use crate::source::client::Patience;

/// The files of a disk, of which those in registries are not open yet.
#[derive(Debug)]
pub struct Sources {
    files: OpenFiles,
    remote: Option<(AttachedBlobs, Patience)>,
}

impl Sources {
    /// Files that are all local.
    pub fn local(files: OpenFiles) -> Self {
        let remote = None;
        Self { files, remote }
    }

    /// Files whose layers in registries, in their order, are `attached`.
    pub(super) fn remote(files: OpenFiles, attached: AttachedBlobs, patience: Patience) -> Self {
        let remote = Some((attached, patience));
        Self { files, remote }
    }

    /// Directories and files in which the writable layer is opened for reading.
    pub fn readable(&self) -> Vec<PathBuf> {
        self.files.readable()
    }

    /// Opens the layers in registries: waits for the fetcher, and asks for the bytes that loading them
    /// needs. The thread that receives bytes from then on calls `prepare` first. Call it inside the
    /// sandbox.
    ///
    /// # Errors
    /// [`Error::Layers`] names a layer that cannot be opened, with the reason of the fetcher.
    pub fn open(self, prepare: impl FnOnce() + Send + 'static) -> Result<OpenFiles, Error> {
        let Some((attached, patience)) = self.remote else {
            return Ok(self.files);
        };
        let mut files = self.files;
        let OpenBlobs { blobs, client } = attached.open(patience, Needs::Structures, prepare)?;
        let remote = files.layers_mut().filter(|layer| layer.is_remote());
        for (layer, opened) in remote.zip(blobs) {
            let opened = opened?;
            layer.local_bytes = opened.local_bytes;
            layer.blob = Ok(Arc::new(opened.blob));
        }
        files.read_through(client);
        Ok(files)
    }
}
