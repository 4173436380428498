//! Source of a prefetch trace, and its replay: a trace lists what a guest read of the image during an earlier start,
//! which is fetched before this guest reads it.

use std::fs::File;
use std::io::{self, Read};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::thread;

use super::Error;
use super::device::Device;
use super::replay::{self, Outcome};
use crate::format::{tar, trace};
use crate::image::config::TracePath;
use crate::image::{Image, TracedRun};
use crate::io::regular::open_regular;
use crate::reason::reason;
use crate::source::Blob;

/// What is done about the trace of a disk.
#[derive(Debug)]
pub enum Trace {
    /// It is replayed.
    Replay(TraceSource),
    /// It is recorded to this empty file, which `recordTracePath` names.
    Record(PathBuf, File),
}

/// Where a trace is stored. It is open and not read yet.
#[derive(Debug)]
pub enum TraceSource {
    /// In a file.
    File(PathBuf, File),
    /// In a layer of its own, a tar file with one member.
    Layer(Blob),
}

impl Trace {
    /// Opens the trace that the command line names, else the one that the image config names. A configured trace that
    /// cannot be opened is logged and ignored.
    ///
    /// # Errors
    ///
    /// [`Error::Trace`] if the trace of the command line cannot be opened.
    pub fn open(
        named: Option<&Path>,
        configured: Option<&TracePath>,
    ) -> Result<Option<Self>, Error> {
        let replay = |path: &Path| {
            let mut options = File::options();
            options.read(true);
            let file = open_regular(path, options)?;
            Ok(Self::Replay(TraceSource::File(path.to_owned(), file)))
        };
        if let Some(path) = named {
            let path = path.to_owned();
            return match replay(&path) {
                Ok(trace) => Ok(Some(trace)),
                Err(source) => Err(Error::Trace { path, source }),
            };
        }
        let (path, opened) = match configured {
            None => return Ok(None),
            Some(TracePath::Layer(path)) => (path, replay(path)),
            Some(TracePath::Named(path)) => match record(path) {
                Ok(Some(file)) => (path, Ok(Self::Record(path.clone(), file))),
                Ok(None) => (path, replay(path)),
                Err(error) => (path, Err(error)),
            },
        };
        let logged = opened.inspect_err(|error| {
            log::info!(
                "cannot read the trace {}; starting without it: {error}",
                path.display()
            )
        });
        Ok(logged.ok())
    }
}

/// Opens an empty file to record to. Returns `None` for one that has content.
fn record(path: &Path) -> io::Result<Option<File>> {
    if path.metadata()?.len() > 0 {
        return Ok(None);
    }
    let mut options = File::options();
    options.write(true);
    open_regular(path, options).map(Some)
}

impl TraceSource {
    /// Starts a thread that reads the trace and asks the fetcher for the ranges in it, until they are
    /// local.
    pub fn start(self, device: Arc<Device>) {
        let run = move || {
            let name = self.name();
            match self.runs(device.volume().image()) {
                Ok(runs) => replay_runs(&name, device, runs),
                Err(error) => log::warn!("cannot replay the trace {name}: {error}"),
            }
        };
        let started = thread::Builder::new().name("replay".into()).spawn(run);
        if let Err(error) = started {
            log::warn!("cannot start the replay thread: {error}");
        }
    }

    fn name(&self) -> String {
        match self {
            Self::File(path, _) => path.display().to_string(),
            Self::Layer(blob) => blob.layer().to_string(),
        }
    }

    fn runs(&self, image: &Image) -> Result<Vec<TracedRun>, String> {
        let reads = match self {
            Self::File(_, file) => trace::parse(&read(file)?),
            Self::Layer(blob) => trace::parse(member(&fetch(blob)?)?),
        };
        let reads = reads.map_err(|error| reason(&error))?;
        Ok(image.traced_runs(&reads))
    }
}

fn replay_runs(name: &str, device: Arc<Device>, runs: Vec<TracedRun>) {
    let image = device.volume().image();
    let bytes: u64 = runs.iter().map(|run| image.absent_bytes(run)).sum();
    log::info!("prefetching {bytes} bytes recorded in the trace {name}");
    match replay::run(device, runs) {
        Outcome::Local => log::info!("prefetched the bytes recorded in the trace {name}"),
        Outcome::GivenUp(runs) => log::warn!(
            "stopped prefetching the trace {name}: {runs} of its ranges are not local, and none became \
             local for 10 minutes; they are fetched when the guest reads them"
        ),
        Outcome::Stopped => {}
    }
}

fn read(file: &File) -> Result<Vec<u8>, String> {
    let mut bytes = Vec::new();
    let read = file.take(trace::MAX_TRACE_LEN + 1).read_to_end(&mut bytes);
    read.map_err(|error| error.to_string())?;
    Ok(bytes)
}

/// Reads all bytes of a blob; waits until they are fetched.
fn fetch(blob: &Blob) -> Result<Vec<u8>, String> {
    if blob.len() > trace::MAX_TRACE_LEN {
        let (len, most) = (blob.len(), trace::MAX_TRACE_LEN);
        return Err(format!("{len} bytes; the limit is {most}"));
    }
    let mut bytes = vec![0; blob.len() as usize];
    let read = blob.read_exact_at(&mut bytes, 0);
    read.map_err(|error| reason(&error))?;
    Ok(bytes)
}

/// Returns the member of a tar file.
fn member(bytes: &[u8]) -> Result<&[u8], String> {
    let payload = tar::payload(bytes).map_err(|error| reason(&error))?;
    let payload = payload.ok_or("expected a tar file")?;
    let end = payload.offset.checked_add(payload.len);
    let range = end.map(|end| payload.offset as usize..end as usize);
    let member = range.and_then(|range| bytes.get(range));
    member.ok_or_else(|| "the tar file is truncated".to_owned())
}
