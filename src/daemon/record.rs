//! Recording of a prefetch trace: what the guest reads of the layers, from the start on.

use std::fs::File;
use std::io::{self, Write};
use std::path::{Path, PathBuf};
use std::sync::Arc;

use super::Error;
use crate::engine::BlockBackend;
use crate::format::trace;
use crate::io::regular::open_regular;
use crate::source::recorder::Recorder;

/// A trace that is being recorded, and the open file that gets it at the end.
#[derive(Debug)]
pub struct Recording {
    path: PathBuf,
    file: File,
    recorder: Arc<Recorder>,
}

impl Recording {
    /// Creates the file, or empties it.
    ///
    /// # Errors
    ///
    /// [`Error::Record`] if the system refuses.
    pub fn create(path: &Path) -> Result<Self, Error> {
        let mut options = File::options();
        options.write(true).create(true);
        let opened = open_regular(path, options).and_then(|file| {
            file.set_len(0)?;
            Ok(file)
        });
        let path = path.to_owned();
        match opened {
            Ok(file) => Ok(Self {
                path,
                file,
                recorder: Arc::default(),
            }),
            Err(source) => Err(Error::Record { path, source }),
        }
    }

    /// Notes the reads.
    pub fn recorder(&self) -> &Arc<Recorder> {
        &self.recorder
    }

    /// Writes the trace.
    ///
    /// # Errors
    ///
    /// [`Error::Record`] if the file cannot be written.
    pub fn finish(mut self, backend: &BlockBackend) -> Result<(), Error> {
        let reads = backend.volume().image().traced(&self.recorder.units());
        let written: io::Result<()> = self.file.write_all(&trace::encode(&reads));
        let path = self.path;
        written.map_err(|source| Error::Record { path, source })
    }
}
