//! Recording of a prefetch trace: the ranges of the layers that the guest reads from the start on.

use std::fs::File;
use std::io::{self, Write};
use std::path::{Path, PathBuf};
use std::sync::Arc;

use super::Error;
use crate::format::trace;
use crate::image::Image;
use crate::io::regular::open_regular;
use crate::source::recorder::Recorder;

/// A trace that is being recorded, and the open file to which it is written at the end.
#[derive(Debug)]
pub struct Recording {
    path: PathBuf,
    file: File,
    recorder: Arc<Recorder>,
}

impl Recording {
    /// Creates the file, or empties an existing one.
    ///
    /// # Errors
    ///
    /// [`Error::Record`] if the file cannot be opened for writing.
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

    /// Returns the recorder, which the layers report their reads to.
    pub fn recorder(&self) -> &Arc<Recorder> {
        &self.recorder
    }

    /// Writes the trace.
    ///
    /// # Errors
    ///
    /// [`Error::Record`] if the file cannot be written.
    pub fn finish(mut self, image: &Image) -> Result<(), Error> {
        let reads = image.traced(&self.recorder.units());
        let written: io::Result<()> = self.file.write_all(&trace::encode(&reads));
        let path = self.path;
        written.map_err(|source| Error::Record { path, source })
    }
}
