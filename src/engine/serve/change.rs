//! Requests that change the disk, and those that make changes last.
//!
//! A write goes from the guest's memory into the page cache at once. Everything else is left to the
//! thread beside the worker, whose answers are taken as reads are. The compiler is told to keep all
//! this out of the loop that reads go through.

use std::sync::atomic::Ordering;

use super::QueueWorker;
use crate::engine::background::{Background, Change, Job};
use crate::units::{SECTOR_SIZE, Sector};
use crate::virtio::config::writes_through;
use crate::virtio::discard::Range;
use crate::virtio::request::HEADER;
use crate::virtio::status::Status;
use crate::writable::Error;

/// Flushes that one write waits for at most, to use what was discarded before it.
const MAX_FLUSHES: u32 = 3;

impl QueueWorker<'_> {
    /// Whether what is written must be durable before it is answered.
    fn writes_through(&self) -> bool {
        writes_through(self.features, self.disk.writeback.load(Ordering::Relaxed))
    }

    /// Writes the data of the task in `slot`.
    #[inline(never)]
    pub(super) fn write(&mut self, slot: u16, start: Sector) {
        if self.context.is_lost() {
            // Zeros that stand in for memory that is gone are not the guest's data; and nobody is
            // shown this answer.
            return self.answer(slot, Status::IoError, 0);
        }
        // Asked before: a driver that switches meanwhile has no claim to either.
        let through = self.writes_through();
        let data = &self.tasks[usize::from(slot)].chain.readable();
        let sectors = (data.len() - HEADER) as u64 / SECTOR_SIZE;
        let data = data.cursor(HEADER);
        match self.disk.volume.write_now(start, sectors, data) {
            Ok(()) if through => self.flush(slot),
            Ok(()) => self.answer(slot, Status::Ok, 0),
            Err(Error::FlushFirst) if self.tasks[usize::from(slot)].flushes < MAX_FLUSHES => {
                let task = &mut self.tasks[usize::from(slot)];
                (task.write_again, task.flushes) = (Some(start), task.flushes + 1);
                self.flush(slot);
            }
            Err(error) => {
                self.complain("a write", &error);
                self.answer(slot, Status::IoError, 0);
            }
        }
    }

    /// Answers the task in `slot` once what was written so far is durable.
    #[inline(never)]
    pub(super) fn flush(&mut self, slot: u16) {
        self.leave(
            slot,
            Job {
                change: None,
                flush: true,
            },
        );
    }

    /// Answers the task in `slot` once `ranges` are changed.
    #[inline(never)]
    pub(super) fn change(&mut self, slot: u16, change: Change, ranges: Vec<Range>) {
        if self.context.is_lost() {
            return self.answer(slot, Status::IoError, 0);
        }
        let flush = self.writes_through();
        self.leave(
            slot,
            Job {
                change: Some((change, ranges)),
                flush,
            },
        );
    }

    /// Leaves the rest of a task to the thread beside this one. A device without one has nothing to
    /// make durable.
    fn leave(&mut self, slot: u16, job: Job) {
        match &mut self.background {
            Some(background) => background.begin(slot, job),
            None => self.answer(slot, Status::Ok, 0),
        }
    }

    /// Whether anything is left to that thread.
    pub(super) fn awaits_background(&self) -> bool {
        self.background
            .as_ref()
            .is_some_and(|background| background.under_way() > 0)
    }

    /// Takes what that thread has done; returns whether there was anything.
    pub(super) fn take_background(&mut self) -> bool {
        let mut any = false;
        while let Some((slot, status)) = self.background.as_mut().and_then(Background::answer) {
            any = true;
            self.go_on(slot, status);
        }
        any
    }

    /// Answers the task in `slot`, or writes what had to wait for a flush.
    fn go_on(&mut self, slot: u16, outcome: Option<Status>) {
        let write_again = self.tasks[usize::from(slot)].write_again.take();
        match (outcome, write_again) {
            (Some(Status::Ok), Some(start)) => self.write(slot, start),
            (Some(status), _) => self.answer(slot, status, 0),
            (None, _) => self.leave_open(slot),
        }
    }

    /// Leaves the task in `slot` to the next process that serves the queue, where it is marked as
    /// taken.
    fn leave_open(&mut self, slot: u16) {
        let head = self.tasks[usize::from(slot)].head.take();
        match head.map(|head| self.queue.leave(head)) {
            Some(Err(head)) => {
                self.tasks[usize::from(slot)].head = Some(head);
                self.answer(slot, Status::IoError, 0);
            }
            _ => self.let_go(slot),
        }
    }

    /// Waits for all that is left to that thread.
    pub(super) fn wait_background(&mut self) {
        while let Some((slot, status)) = self.background.as_mut().and_then(Background::wait) {
            self.go_on(slot, status);
        }
    }
}
