//! Recording of a prefetch trace to a file: the ranges of the layers that the guest reads from the start on.
//!
//! The command line names the file, or the image config does with `recordTracePath` and an empty file. For the image
//! config, upstream's files beside it are the interface: `PATH.lock` exists while reads are recorded, and ends the
//! recording when it is removed. `PATH.ok` appears once the trace is complete.

use std::fs::{self, File};
use std::io::{self, Write};
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::thread;
use std::time::Duration;

use super::Error;
use super::device::Device;
use super::recorder::Purpose;
use crate::format::trace;
use crate::io::regular::open_regular;
use crate::ratelimited_log;
use crate::reason::reason;

/// How often the lock file is looked at.
const TICK: Duration = Duration::from_secs(1);

/// A trace that is being recorded, and the open file to which it is written at the end.
#[derive(Debug)]
pub struct Recording {
    path: PathBuf,
    file: File,
    /// For a trace that the image config names.
    lock: Option<File>,
}

impl Recording {
    /// Creates the file, or empties an existing one.
    ///
    /// # Errors
    ///
    /// [`Error::Record`] if the file cannot be opened for writing.
    pub fn create(path: &Path) -> Result<Self, Error> {
        let file = create(path).map_err(failed(path))?;
        Ok(Self {
            path: path.to_owned(),
            file,
            lock: None,
        })
    }

    /// Records to the empty `file` that `recordTracePath` names, and creates the lock file.
    ///
    /// # Errors
    ///
    /// [`Error::Record`] if the lock file cannot be created.
    pub fn configured(path: &Path, file: File) -> Result<Self, Error> {
        let path = std::path::absolute(path).map_err(failed(path))?;
        let lock_path = beside(&path, ".lock");
        let lock = create(&lock_path).map_err(failed(&lock_path))?;
        Ok(Self {
            path,
            file,
            lock: Some(lock),
        })
    }

    /// The directory in which files are created and removed at the end.
    pub fn directory(&self) -> Option<PathBuf> {
        let parent = self.path.parent().map(Path::to_owned);
        parent.filter(|_| self.lock.is_some())
    }

    /// Starts a thread that ends the recording once the lock file is removed.
    pub fn watch(recording: &Arc<Self>, device: &Arc<Device>) {
        if recording.lock.is_none() {
            return;
        }
        let (own, device) = (Arc::clone(recording), Arc::clone(device));
        let run = move || {
            while !own.is_unlocked() {
                thread::sleep(TICK);
            }
            if let Err(error) = own.finish(&device) {
                ratelimited_log::error(format_args!("{}", reason(&error)));
            }
        };
        let started = thread::Builder::new().name("record".into()).spawn(run);
        if let Err(error) = started {
            ratelimited_log::warn(format_args!(
                "cannot watch the lock file of the trace; recording until the daemon ends: {error}"
            ));
        }
    }

    fn is_unlocked(&self) -> bool {
        // The sandbox allows no look at the path.
        let links = |lock: &File| lock.metadata().map(|metadata| metadata.nlink());
        self.lock
            .as_ref()
            .is_none_or(|lock| matches!(links(lock), Ok(0)))
    }

    /// Ends the recording and writes the trace, once.
    ///
    /// # Errors
    ///
    /// [`Error::Record`] if a file cannot be written.
    pub fn finish(&self, device: &Device) -> Result<(), Error> {
        let image = device.volume().image();
        let Some(reads) = device.recorder().finish(image, Purpose::File) else {
            return Ok(());
        };
        let written = (&self.file).write_all(&trace::encode(&reads));
        written.map_err(failed(&self.path))?;
        if self.lock.is_some() {
            let ok = beside(&self.path, ".ok");
            create(&ok).map_err(failed(&ok))?;
            let lock_path = beside(&self.path, ".lock");
            match fs::remove_file(&lock_path) {
                Err(error) if error.kind() != io::ErrorKind::NotFound => {
                    return Err(failed(&lock_path)(error));
                }
                _ => {}
            }
        }
        Ok(())
    }
}

/// Creates a file, or empties an existing one.
fn create(path: &Path) -> io::Result<File> {
    let mut options = File::options();
    options.write(true).create(true);
    let file = open_regular(path, options)?;
    file.set_len(0)?;
    Ok(file)
}

/// The path with another ending behind it.
fn beside(path: &Path, ending: &str) -> PathBuf {
    let mut name = path.as_os_str().to_owned();
    name.push(ending);
    name.into()
}

fn failed(path: &Path) -> impl Fn(io::Error) -> Error {
    let path = path.to_owned();
    move |source| Error::Record {
        path: path.clone(),
        source,
    }
}
