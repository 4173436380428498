//! Keeping the cache within its limits: the least recently used files go first, those in use never.

use std::path::PathBuf;
use std::time::SystemTime;

use std::os::unix::fs::MetadataExt;

use rustix::fs::statvfs;

use super::layout::{partial_named, sync_dir};
use super::list::entries;
use super::{Cache, Error, Removal};

/// How large the cache may grow.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Limits {
    /// Bytes of storage that blobs and tables may take.
    pub bytes: u64,
    /// Percentage of the file system that must stay free.
    pub free_percent: u8,
    /// Bytes that are enough to stay free, for any percentage.
    pub free_bytes: u64,
}

impl Default for Limits {
    /// No limit of its own, and 5 % of the file system or 1 GiB, whichever is less.
    fn default() -> Self {
        Self {
            bytes: u64::MAX,
            free_percent: 5,
            free_bytes: 1 << 30,
        }
    }
}

/// What an eviction did.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Evicted {
    /// Files removed.
    pub files: u64,
    /// Bytes of storage they took.
    pub bytes: u64,
    /// Bytes that should have gone as well, but are in use.
    pub missing: u64,
}

struct Candidate {
    path: PathBuf,
    stored: u64,
    used: SystemTime,
}

impl Cache {
    /// Bytes of storage that blobs and tables take.
    ///
    /// # Errors
    /// [`Error::File`] if a directory cannot be read.
    pub fn usage(&self) -> Result<u64, Error> {
        let stored = |candidates: Vec<Candidate>| candidates.iter().map(|found| found.stored).sum();
        self.candidates().map(stored)
    }

    /// Removes files that are not in use, the least recently used first, if the cache is over a
    /// limit: until it is 10 % below.
    ///
    /// # Errors
    /// [`Error::File`] and [`Error::Locked`] if the system fails.
    pub fn evict(&self, limits: Limits) -> Result<Evicted, Error> {
        let excess = self.excess(limits)?;
        self.free(excess)
    }

    /// Whether the cache is over a limit.
    ///
    /// # Errors
    /// [`Error::File`] if a directory cannot be read.
    pub fn is_over(&self, limits: Limits) -> Result<bool, Error> {
        self.excess(limits).map(|excess| excess > 0)
    }

    /// Removes files that are not in use until `wanted` bytes of storage are free again.
    ///
    /// # Errors
    /// As [`Cache::evict`].
    pub fn free(&self, wanted: u64) -> Result<Evicted, Error> {
        let mut done = Evicted::default();
        if wanted == 0 {
            return Ok(done);
        }
        let lock = self.lock()?;
        let mut candidates = self.candidates()?;
        candidates.sort_by_key(|candidate| candidate.used);
        for candidate in candidates {
            if done.bytes >= wanted {
                break;
            }
            if self.discard_unused(&candidate.path)? == Removal::Removed {
                done.files += 1;
                done.bytes += candidate.stored;
            }
        }
        sync_dir(&self.layout.partials())?;
        drop(lock);
        self.empty_trash()?;
        done.missing = wanted.saturating_sub(done.bytes);
        Ok(done)
    }

    /// Bytes over the limits, and 10 % of the limit more.
    fn excess(&self, limits: Limits) -> Result<u64, Error> {
        let usage = self.usage()?;
        let low = limits.bytes - limits.bytes / 10;
        let over = match usage > limits.bytes {
            true => usage - low,
            false => 0,
        };
        let system = statvfs(self.root())
            .map_err(|errno| Error::file("examine", self.root())(errno.into()))?;
        let block = u128::from(system.f_frsize);
        let total = u128::from(system.f_blocks) * block;
        let free = u128::from(system.f_bavail) * block;
        let least = total * u128::from(limits.free_percent.min(100)) / 100;
        let least = least.min(limits.free_bytes.into());
        let lack = match free < least {
            true => least + least / 10 - free,
            false => 0,
        };
        Ok(over.max(u64::try_from(lack).unwrap_or(u64::MAX)))
    }

    /// The files that may go: complete blobs, partial ones, tables.
    fn candidates(&self) -> Result<Vec<Candidate>, Error> {
        let mut found = Vec::new();
        let layout = &self.layout;
        for directory in [layout.blobs(), layout.partials(), layout.tables()] {
            for (entry, metadata) in entries(&directory)? {
                let name = entry.file_name();
                let is_map = directory == layout.partials()
                    && partial_named(&name.to_string_lossy()).is_none();
                if !is_map {
                    found.push(Candidate {
                        path: entry.path(),
                        stored: metadata.blocks() * 512,
                        used: metadata.modified().unwrap_or(SystemTime::UNIX_EPOCH),
                    });
                }
            }
        }
        Ok(found)
    }
}
