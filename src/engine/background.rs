//! What a queue's worker must not wait for: one thread per queue of a writable device that flushes,
//! discards and zeroes.
//!
//! Jobs go in through a channel; answers come out through another, and an eventfd tells the worker.
//! All jobs that wait are taken together: those that discard are done in turn, and one flush serves
//! all that asked for one, for everything they cover was written before.

use std::io;
use std::mem;
use std::panic::{self, AssertUnwindSafe};
use std::sync::Arc;
use std::sync::mpsc::{Receiver, Sender, channel};
use std::thread::{self, JoinHandle};

use vmm_sys_util::eventfd::{EFD_CLOEXEC, EFD_NONBLOCK, EventFd};

use super::Disk;
use super::limit::{self, reason};
use crate::upper::{Error, Volume};
use crate::virtio::ranges::Range;
use crate::virtio::request::Status;

/// What is to be done for a request.
#[derive(Debug, Default)]
pub struct Job {
    /// Ranges to change first, and how.
    pub change: Option<(Change, Vec<Range>)>,
    /// Whether what was written before, and the change, must be durable.
    pub flush: bool,
}

/// What becomes of ranges.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Change {
    /// They hold nothing any more.
    Discard,
    /// They hold zeros.
    Zero,
}

impl Job {
    /// Does the first half.
    fn change(&mut self, volume: &Volume) -> Result<(), Error> {
        let Some((change, ranges)) = self.change.take() else {
            return Ok(());
        };
        for range in ranges {
            match change {
                Change::Discard => volume.discard(range.start, range.sectors)?,
                Change::Zero => volume.write_zeroes(range.start, range.sectors, range.unmap)?,
            }
        }
        Ok(())
    }
}

/// Does jobs, and says what comes of them.
struct Performer {
    disk: Arc<Disk>,
    queue: u16,
}

impl Performer {
    /// Does something that may fail, or panic: a request's end, not the thread's.
    fn attempt(&mut self, what: &str, attempt: impl FnOnce(&Volume) -> Result<(), Error>) -> bool {
        let attempt = AssertUnwindSafe(|| attempt(&self.disk.volume));
        let reason = match panic::catch_unwind(attempt) {
            Ok(Ok(())) => return true,
            Ok(Err(error)) => reason(&error),
            Err(_) => "a panic".to_owned(),
        };
        let queue = self.queue;
        limit::warn(format_args!("queue {queue}: {what} fails: {reason}"));
        false
    }

    /// Does all jobs of `batch`, and calls `done` with each one's number and answer.
    fn perform(&mut self, batch: Vec<(u16, Job)>, mut done: impl FnMut(u16, Status)) {
        let mut flushing = Vec::new();
        for (slot, mut job) in batch {
            if !self.attempt("a discard", |volume| job.change(volume)) {
                done(slot, Status::IoError);
            } else if job.flush {
                flushing.push(slot);
            } else {
                done(slot, Status::Ok);
            }
        }
        if flushing.is_empty() {
            return;
        }
        let status = match self.attempt("a flush", Volume::flush) {
            true => Status::Ok,
            false => Status::IoError,
        };
        for slot in flushing {
            done(slot, status);
        }
    }
}

/// A queue's thread.
#[derive(Debug)]
pub struct Background {
    /// None once it shall end.
    jobs: Option<Sender<(u16, Job)>>,
    answers: Receiver<(u16, Status)>,
    /// Written at each answer.
    event: Arc<EventFd>,
    under_way: usize,
    thread: Option<JoinHandle<()>>,
}

impl Background {
    /// Starts the thread of queue `queue`.
    ///
    /// # Errors
    ///
    /// No thread or descriptor is to be had.
    pub fn start(queue: u16, disk: Arc<Disk>) -> io::Result<Self> {
        let event = Arc::new(EventFd::new(EFD_NONBLOCK | EFD_CLOEXEC)?);
        let (jobs, waiting) = channel::<(u16, Job)>();
        let (answer, answers) = channel();
        let theirs = event.clone();
        let mut performer = Performer { disk, queue };
        let thread = thread::Builder::new()
            .name(format!("flush-{queue}"))
            .spawn(move || {
                while let Ok(first) = waiting.recv() {
                    let batch = [first].into_iter().chain(waiting.try_iter()).collect();
                    performer.perform(batch, |slot, status| {
                        // The worker waits for every answer before it ends.
                        let _ = answer.send((slot, status));
                        // A counter at its limit wakes as well.
                        let _ = theirs.write(1);
                    });
                }
            })?;
        Ok(Self {
            jobs: Some(jobs),
            answers,
            event,
            under_way: 0,
            thread: Some(thread),
        })
    }

    /// Written to at each answer.
    pub fn event(&self) -> &EventFd {
        &self.event
    }

    /// Jobs without an answer yet.
    pub fn under_way(&self) -> usize {
        self.under_way
    }

    /// Begins a job for the task in `slot`.
    pub fn begin(&mut self, slot: u16, job: Job) {
        let sent = self.jobs.as_ref().map(|jobs| jobs.send((slot, job)));
        debug_assert!(matches!(sent, Some(Ok(()))), "the thread outlives its jobs");
        self.under_way += 1;
    }

    /// The next answer, if there is one.
    pub fn answer(&mut self) -> Option<(u16, Status)> {
        if self.under_way == 0 {
            return None;
        }
        let answer = self.answers.try_recv().ok()?;
        self.under_way -= 1;
        Some(answer)
    }

    /// Waits for the next answer; there is none when no job is under way.
    pub fn wait(&mut self) -> Option<(u16, Status)> {
        if self.under_way == 0 {
            return None;
        }
        let answer = self.answers.recv().ok()?;
        self.under_way -= 1;
        Some(answer)
    }
}

impl Drop for Background {
    fn drop(&mut self) {
        drop(mem::take(&mut self.jobs));
        if let Some(thread) = self.thread.take() {
            // It catches panics.
            let _ = thread.join();
        }
    }
}
