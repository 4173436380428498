//! Logs of disk processes, bounded.
//!
//! A process appends to `ID.log`. It leaves the log of the process before it as `ID.log.1`. A log that grows beyond the
//! limit is copied there too, and emptied while the process has it open.

use std::fs::{self, File};
use std::io::{self, Read, Seek, SeekFrom};
use std::path::PathBuf;

use rustix::fs::{OFlags, fcntl_setfl};

use super::super::error::Error;
use super::super::id::DiskId;
use super::Launcher;
use crate::io::regular::{create_regular, open_regular};

/// Size beyond which a log is emptied.
const MAX_LOG: u64 = 1 << 20;

impl Launcher {
    pub(super) fn log(&self, id: &DiskId) -> PathBuf {
        self.run_dir.join(format!("{id}.log"))
    }

    pub(super) fn old_log(&self, id: &DiskId) -> PathBuf {
        self.run_dir.join(format!("{id}.log.1"))
    }

    /// Creates the log of a process that is about to start.
    pub(super) fn begin_log(&self, id: &DiskId) -> Result<File, Error> {
        let path = self.log(id);
        match fs::rename(&path, self.old_log(id)) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => {
                return Err(Error::file("rename", &path)(error));
            }
            _ => {}
        }
        let log = create_regular(&path).map_err(Error::file("create", &path))?;
        // Otherwise the process would write behind the end of an emptied log.
        fcntl_setfl(&log, OFlags::APPEND)
            .map_err(|errno| Error::file("open", &path)(errno.into()))?;
        Ok(log)
    }

    /// Empties the log of a disk if it has grown beyond the limit, and keeps its last part as the old log. A line that is
    /// written meanwhile may be lost.
    ///
    /// # Errors
    /// Those of the system.
    pub fn bound_log(&self, id: &DiskId) -> io::Result<()> {
        let mut options = File::options();
        options.read(true).write(true);
        let mut log = open_regular(&self.log(id), options)?;
        let len = log.metadata()?.len();
        if len <= MAX_LOG {
            return Ok(());
        }
        log.seek(SeekFrom::Start(len - MAX_LOG))?;
        let mut old = create_regular(&self.old_log(id))?;
        io::copy(&mut (&log).take(MAX_LOG), &mut old)?;
        log.set_len(0)
    }
}
