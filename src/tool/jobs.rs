//! Bytes on their way into a layer, cut into jobs for all threads.
//!
//! What is in memory is copied into a job. What lies in files is only noted there, and fetched by
//! the thread that does the job, so that reading overlaps with compressing.

use std::mem;
use std::num::NonZero;
use std::thread::Scope;

use super::Error;
use super::in_order::InOrder;

/// Bytes of a job, a multiple of every block size; only the last one may have fewer.
const JOB_LEN: usize = 256 * 1024;

/// A piece of the layer, and what becomes of it.
#[derive(Default)]
pub struct Job {
    /// Room for its bytes, which is never made smaller: clearing it would take time. A job of which
    /// all is to be fetched gets it from the thread that does it.
    room: Vec<u8>,
    len: usize,
    fetches: Vec<Fetch>,
    /// The same bytes as they are stored, if that is another way.
    pub stored: Vec<u8>,
    /// Stored length of each block.
    pub lens: Vec<u32>,
}

/// Bytes of a job that a thread must fetch.
struct Fetch {
    at: usize,
    len: usize,
    from: u64,
}

impl Job {
    /// A job of these bytes.
    pub fn of(bytes: Vec<u8>) -> Self {
        Self {
            len: bytes.len(),
            room: bytes,
            ..Self::default()
        }
    }

    /// Its bytes.
    pub fn bytes(&self) -> &[u8] {
        &self.room[..self.len]
    }

    /// How many more bytes of those wanted it takes.
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

/// Jobs under way, their results taken in order.
pub struct Jobs {
    pending: Job,
    under_way: InOrder<Job, Result<Job, Error>>,
    /// Jobs done, whose buffers are used again.
    spare: Vec<Job>,
}

impl Jobs {
    /// Starts threads. Each has its own `fetch`, which fills bytes from a place that only its maker
    /// knows the meaning of, and its own `pack`, which does the job with its bytes.
    ///
    /// # Errors
    /// No thread can be started.
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
                // What only passes through stays in this processor's cache.
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

    /// Takes the next bytes. Gives `done` the jobs that are.
    ///
    /// # Errors
    /// A job failed, or `done` did.
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

    /// Takes the next `len` bytes, which `fetch` will find at `from`.
    ///
    /// # Errors
    /// As [`Jobs::write`].
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

    /// Takes what is left, and waits for all jobs.
    ///
    /// # Errors
    /// As [`Jobs::write`].
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
