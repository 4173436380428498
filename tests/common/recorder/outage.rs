//! Steps that fail, whatever they do: a step is a call that changes something or makes it durable.

use fuser::{Errno, INodeNo};

/// How a step fails.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Failure {
    /// It does nothing.
    Error(Errno),
    /// A write does half, and what follows of it finds no room; other steps find none at once.
    Short,
}

/// Steps that fail.
#[derive(Debug, Default)]
pub(super) struct Outage {
    /// Steps so far.
    count: usize,
    /// Steps that still succeed, steps that then fail, and how.
    planned: Option<(usize, usize, Failure)>,
    failures: usize,
    /// A file that had a short write: the rest of it finds no room.
    short: Option<INodeNo>,
}

impl Outage {
    pub(super) fn steps(&self) -> usize {
        self.count
    }

    pub(super) fn failures(&self) -> usize {
        self.failures
    }

    /// Lets steps fail.
    pub(super) fn begin(&mut self, after: usize, steps: usize, failure: Failure) {
        self.failures = 0;
        self.planned = Some((after, steps, failure));
    }

    /// Lets all steps succeed.
    pub(super) fn end(&mut self) {
        (self.planned, self.short) = (None, None);
    }

    /// Counts a step; tells how it fails, if it does.
    fn step(&mut self) -> Option<Failure> {
        self.count += 1;
        let (after, steps, failure) = self.planned.as_mut()?;
        if let Some(left) = after.checked_sub(1) {
            *after = left;
            return None;
        }
        *steps = steps.checked_sub(1)?;
        self.failures += 1;
        Some(*failure)
    }

    /// Counts a step that does all or nothing.
    pub(super) fn whole_step(&mut self) -> Result<(), Errno> {
        match self.step() {
            None => Ok(()),
            Some(Failure::Error(errno)) => Err(errno),
            Some(Failure::Short) => Err(Errno::ENOSPC),
        }
    }

    /// Counts a write; returns how many of so many bytes it takes.
    pub(super) fn write(&mut self, ino: INodeNo, len: usize) -> Result<usize, Errno> {
        let failure = self.step();
        if self.short.take_if(|short| *short == ino).is_some() {
            return Err(Errno::ENOSPC);
        }
        match failure {
            None => Ok(len),
            Some(Failure::Short) => {
                let half = match len {
                    0..512 => len / 2,
                    // Sectors are written as a whole.
                    _ => len / 1024 * 512,
                };
                if half == 0 {
                    return Err(Errno::ENOSPC);
                }
                self.short = Some(ino);
                Ok(half)
            }
            Some(Failure::Error(errno)) => Err(errno),
        }
    }
}
