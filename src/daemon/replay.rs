//! Replay of a prefetch trace: what the image read at its start elsewhere is fetched before the guest
//! asks for it.

use std::fs::File;
use std::io::{self, Read};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::thread;

use super::Error;
use crate::engine::Disk;
use crate::format::trace;
use crate::io::regular::open_regular;
use crate::reason::reason;

/// The file of a trace, open and not yet read.
#[derive(Debug)]
pub struct Trace {
    path: PathBuf,
    file: File,
}

impl Trace {
    /// Opens the trace of the command line, or the one that the image config names, if it is there.
    ///
    /// # Errors
    ///
    /// [`Error::Trace`] if the one of the command line cannot be opened. Others are only advice.
    pub fn open(named: Option<&Path>, configured: Option<&Path>) -> Result<Option<Self>, Error> {
        let open = |path: &Path| {
            let mut options = File::options();
            options.read(true);
            let path = path.to_owned();
            open_regular(&path, options).map(|file| Self { path, file })
        };
        match (named, configured) {
            (Some(path), _) => open(path).map(Some).map_err(|source| Error::Trace {
                path: path.to_owned(),
                source,
            }),
            (None, Some(path)) => Ok(open(path)
                .inspect_err(|error| log::info!("no trace {}: {error}", path.display()))
                .ok()),
            (None, None) => Ok(None),
        }
    }

    /// Reads the trace and suggests what it has to the fetcher, in a thread of its own.
    pub fn start(self, disk: Arc<Disk>) {
        let path = self.path.display().to_string();
        let run = move || match self.replay(&disk) {
            Ok(bytes) => log::info!("prefetching {bytes} bytes by the trace {path}"),
            Err(error) => log::warn!("the trace {path} is not replayed: {error}"),
        };
        let started = thread::Builder::new().name("replay".into()).spawn(run);
        if let Err(error) = started {
            log::warn!("no trace is replayed: {error}");
        }
    }

    fn replay(&self, disk: &Disk) -> Result<u64, String> {
        let mut bytes = Vec::new();
        let read = (&self.file)
            .take(trace::MAX_LEN + 1)
            .read_to_end(&mut bytes);
        read.map_err(|error: io::Error| error.to_string())?;
        let reads = trace::parse(&bytes).map_err(|error| reason(&error))?;
        Ok(disk.volume.image().replay(&reads))
    }
}
