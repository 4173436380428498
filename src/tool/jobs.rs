//! Cuts the bytes of a layer into jobs for all threads.
//!
//! Bytes in memory are copied into a job. Bytes in files are only noted there; the thread that runs
//! the job fetches them, so that reading overlaps with compression.

use std::mem;
use std::num::NonZero;
use std::thread::Scope;

use super::Error;
use super::in_order::InOrder;

/// Bytes of a job, a multiple of each block size; the last job may be shorter.
const JOB_LEN: usize = 256 * 1024;

/// A piece of the layer, before and after compression.
#[derive(Default)]
pub struct Job {
    /// Buffer of the bytes. It is never shortened, because clearing it would take time. If all
    /// bytes of a job are fetched, the thread that runs it allocates the buffer.
    room: Vec<u8>,
    len: usize,
    fetches: Vec<Fetch>,
    /// The bytes as stored, if compressed.
    pub stored: Vec<u8>,
    /// Stored length of each block.
    pub lens: Vec<u32>,
}

/// A range of a job that its thread fetches.
struct Fetch {
    at: usize,
    len: usize,
    from: u64,
}

impl Job {
    /// A job with these bytes.
    pub fn of(bytes: Vec<u8>) -> Self {
        Self {
            len: bytes.len(),
            room: bytes,
            ..Self::default()
        }
    }

    /// The bytes.
    pub fn bytes(&self) -> &[u8] {
        &self.room[..self.len]
    }

    /// Number of `wanted` bytes that fit.
    fn takes(&self, wanted: u64) -> usize {
        wanted.min((JOB_LEN - self.len) as u64) as usize
    }

    fn note(&mut self, len: usize, from: u64) {
        let at = self.len;
        self.len += len;
        match self.fetches.last_mut() {
            Some(last) if last.at + last.len == at && last.from + last.len as u64 == from => {
                last.len += len;
            }
            _ => self.fetches.push(Fetch { at, len, from }),
        }
    }

    fn clear(&mut self) {
        self.len = 0;
        self.fetches.clear();
        self.stored.clear();
        self.lens.clear();
    }
}

/// Jobs in progress; results are taken in order.
pub struct Jobs {
    pending: Job,
    under_way: InOrder<Job, Result<Job, Error>>,
    /// Finished jobs, whose buffers are reused.
    spare: Vec<Job>,
}

impl Jobs {
    /// Starts threads. Each has its own `fetch`, which fills bytes from a place in the source, and
    /// its own `pack`, which runs a job on its bytes.
    ///
    /// # Errors
    /// [`Error::Threads`].
    pub fn start<'scope, F, P>(
        scope: &'scope Scope<'scope, '_>,
        threads: NonZero<usize>,
        fetch: impl Fn() -> F,
        pack: impl Fn() -> P,
    ) -> Result<Self, Error>
    where
        F: FnMut(u64, &mut [u8]) -> Result<(), Error> + Send + 'scope,
        P: FnMut(&mut Job) -> Result<(), Error> + Send + 'scope,
    {
        let worker = || {
            let (mut fetch, mut pack) = (fetch(), pack());
            let mut own_room = Vec::new();
            move |mut job: Job| {
                // Bytes that are used once stay in this processor's cache.
                let lent = job.room.is_empty();
                if lent {
                    mem::swap(&mut job.room, &mut own_room);
                    job.room.resize(JOB_LEN, 0);
                }
                let Job { room, fetches, .. } = &mut job;
                for Fetch { at, len, from } in fetches {
                    fetch(*from, &mut room[*at..*at + *len])?;
                }
                pack(&mut job)?;
                if lent && !job.stored.is_empty() {
                    mem::swap(&mut job.room, &mut own_room);
                }
                Ok(job)
            }
        };
        Ok(Self {
            pending: Job::default(),
            under_way: InOrder::start(scope, threads, worker)?,
            spare: Vec::new(),
        })
    }

    /// Adds bytes. Passes finished jobs to `done`.
    ///
    /// # Errors
    /// A job or `done` failed.
    pub fn write(
        &mut self,
        mut bytes: &[u8],
        mut done: impl FnMut(&Job) -> Result<(), Error>,
    ) -> Result<(), Error> {
        while !bytes.is_empty() {
            let part = self.pending.takes(bytes.len() as u64);
            self.pending.room.resize(JOB_LEN, 0);
            let (now, later) = bytes.split_at(part);
            let at = self.pending.len;
            self.pending.room[at..at + part].copy_from_slice(now);
            self.pending.len += part;
            bytes = later;
            self.submit_full(&mut done)?;
        }
        Ok(())
    }

    /// Adds `len` bytes, which `fetch` reads at `from`.
    ///
    /// # Errors
    /// Those of [`Jobs::write`].
    pub fn fetch(
        &mut self,
        mut len: u64,
        mut from: u64,
        mut done: impl FnMut(&Job) -> Result<(), Error>,
    ) -> Result<(), Error> {
        while len > 0 {
            let part = self.pending.takes(len);
            self.pending.note(part, from);
            (len, from) = (len - part as u64, from + part as u64);
            self.submit_full(&mut done)?;
        }
        Ok(())
    }

    fn submit_full(&mut self, done: impl FnMut(&Job) -> Result<(), Error>) -> Result<(), Error> {
        match self.pending.len {
            JOB_LEN => self.submit(done),
            _ => Ok(()),
        }
    }

    fn submit(&mut self, mut done: impl FnMut(&Job) -> Result<(), Error>) -> Result<(), Error> {
        let next = self.spare.pop().unwrap_or_default();
        let job = mem::replace(&mut self.pending, next);
        if let Some(oldest) = self.under_way.push(job)? {
            let mut job = oldest?;
            done(&job)?;
            job.clear();
            self.spare.push(job);
        }
        Ok(())
    }

    /// Adds the last job, and waits for all jobs.
    ///
    /// # Errors
    /// Those of [`Jobs::write`].
    pub fn finish(&mut self, mut done: impl FnMut(&Job) -> Result<(), Error>) -> Result<(), Error> {
        if self.pending.len > 0 {
            self.submit(&mut done)?;
        }
        while let Some(job) = self.under_way.pop()? {
            done(&job?)?;
        }
        Ok(())
    }
}
