//! Reads that wait for storage while the worker goes on: one io_uring per worker.
//!
//! The ring's table owns every buffer the kernel may write to, from submission until the
//! completion is taken; a buffer can thus not be freed or seen while a read is under way. Dropping
//! the ring waits for what is left.
#![allow(unsafe_code)]

use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd};

use io_uring::register::Restriction;
use io_uring::{IoUring, opcode, squeue, types};

/// Reads under way at a time, per worker.
pub const MAX_READS: usize = 64;

/// Buffers kept for reuse.
const SPARE: usize = 8;

/// A finished read.
#[derive(Debug)]
pub struct Completion {
    /// The number given at submission.
    pub id: usize,
    /// Bytes read, which may be fewer than asked for, or the error.
    pub result: io::Result<usize>,
    /// The buffer, as long as the read asked for.
    pub buffer: Vec<u8>,
}

/// The ring and the buffers it writes to.
pub struct Uring {
    ring: IoUring,
    /// Buffers under way, by id.
    buffers: Vec<Option<Vec<u8>>>,
    under_way: usize,
    spare: Vec<Vec<u8>>,
}

impl std::fmt::Debug for Uring {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Uring")
            .field("under_way", &self.under_way)
            .finish_non_exhaustive()
    }
}

impl Uring {
    /// Sets a ring up, which can read and do nothing else.
    ///
    /// # Errors
    ///
    /// Kernels before 5.10, and containers that forbid io_uring, refuse here.
    pub fn new() -> io::Result<Uring> {
        let ring = IoUring::builder()
            .setup_r_disabled()
            .build(MAX_READS as u32)?;
        let submitter = ring.submitter();
        submitter.register_restrictions(&mut [Restriction::sqe_op(opcode::Read::CODE)])?;
        submitter.register_enable_rings()?;
        let buffers = (0..MAX_READS).map(|_| None).collect();
        Ok(Uring {
            ring,
            buffers,
            under_way: 0,
            spare: Vec::new(),
        })
    }

    /// Reads under way.
    pub fn under_way(&self) -> usize {
        self.under_way
    }

    /// A free id, unless [`MAX_READS`] are under way.
    pub fn free_id(&self) -> Option<usize> {
        self.buffers.iter().position(Option::is_none)
    }

    /// A buffer of `len` bytes, of any content.
    pub fn buffer(&mut self, len: usize) -> Vec<u8> {
        let mut buffer = self.spare.pop().unwrap_or_default();
        buffer.resize(len, 0);
        buffer
    }

    /// Gives a buffer back for reuse.
    pub fn recycle(&mut self, buffer: Vec<u8>) {
        if self.spare.len() < SPARE {
            self.spare.push(buffer);
        }
    }

    /// Prepares a read of `fd` at `offset` that fills `buffer` from byte `filled` on. `id` must be
    /// free ([`Uring::free_id`]). It starts at the next [`Uring::submit`].
    ///
    /// # Errors
    ///
    /// When the id is taken or the submission queue is full, which submitting mends.
    pub fn read(
        &mut self,
        id: usize,
        fd: BorrowedFd<'_>,
        offset: u64,
        buffer: Vec<u8>,
        filled: usize,
    ) -> io::Result<()> {
        let busy = || io::Error::from(io::ErrorKind::ResourceBusy);
        let slot = self
            .buffers
            .get_mut(id)
            .filter(|slot| slot.is_none())
            .ok_or_else(busy)?;
        let buffer = slot.insert(buffer);
        let rest = &mut buffer[filled..];
        let len = u32::try_from(rest.len()).unwrap_or(u32::MAX);
        let entry: squeue::Entry =
            opcode::Read::new(types::Fd(fd.as_raw_fd()), rest.as_mut_ptr(), len)
                .offset(offset)
                .build()
                .user_data(id as u64);
        // SAFETY: the buffer lives in the table, unmoved and untouched, until its completion is
        // taken, and the file stays open as long as the image, which outlives the worker. The
        // heap bytes a `Vec` points to do not move with it.
        let pushed = unsafe { self.ring.submission().push(&entry) };
        if pushed.is_err() {
            self.buffers[id] = None;
            return Err(busy());
        }
        self.under_way += 1;
        Ok(())
    }

    /// Whether reads were prepared that the kernel has not taken yet.
    pub fn is_backlogged(&mut self) -> bool {
        !self.ring.submission().is_empty()
    }

    /// Gives the ring up without waiting for it. The kernel may still write to its buffers, so they
    /// are never freed.
    pub fn abandon(mut self) {
        self.buffers.drain(..).for_each(std::mem::forget);
        self.under_way = 0;
    }

    /// Starts what was prepared. What the kernel has no room for at the moment stays prepared
    /// ([`Uring::is_backlogged`]).
    pub fn submit(&mut self) -> io::Result<()> {
        if self.ring.submission().is_empty() {
            return Ok(());
        }
        match self.ring.submit() {
            Ok(_) => Ok(()),
            Err(error) if is_passing(&error) => Ok(()),
            Err(error) => Err(error),
        }
    }

    /// Takes one finished read, if there is one.
    pub fn completed(&mut self) -> Option<Completion> {
        loop {
            let entry = self.ring.completion().next()?;
            let Ok(id) = usize::try_from(entry.user_data()) else {
                continue;
            };
            let Some(buffer) = self.buffers.get_mut(id).and_then(Option::take) else {
                continue;
            };
            self.under_way -= 1;
            let result = match entry.result() {
                read @ 0.. => Ok(read as usize),
                errno => Err(io::Error::from_raw_os_error(-errno)),
            };
            return Some(Completion { id, result, buffer });
        }
    }

    /// Waits for at least one read to finish.
    pub fn wait(&mut self) -> io::Result<()> {
        match self.ring.submit_and_wait(1) {
            Ok(_) => Ok(()),
            Err(error) if is_passing(&error) => Ok(()),
            Err(error) => Err(error),
        }
    }
}

fn is_passing(error: &io::Error) -> bool {
    matches!(
        error.raw_os_error(),
        Some(libc::EINTR | libc::EAGAIN | libc::EBUSY)
    )
}

impl AsFd for Uring {
    /// Readable when a read has finished.
    fn as_fd(&self) -> BorrowedFd<'_> {
        // SAFETY: the ring owns the descriptor and is borrowed as long as the result.
        unsafe { BorrowedFd::borrow_raw(self.ring.as_raw_fd()) }
    }
}

impl Drop for Uring {
    fn drop(&mut self) {
        while self.under_way > 0 {
            if self.completed().is_none() && self.wait().is_err() {
                // The kernel may still write to them: leak rather than free.
                self.buffers.drain(..).for_each(std::mem::forget);
                return;
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_ring_reads_and_does_nothing_else() {
        let mut uring = Uring::new().unwrap();
        let file = std::fs::File::open("Cargo.toml").unwrap();
        let buffer = uring.buffer(9);
        uring.read(0, file.as_fd(), 0, buffer, 0).unwrap();
        uring.wait().unwrap();
        let completion = uring.completed().unwrap();
        assert_eq!(completion.result.unwrap(), 9);
        assert_eq!(completion.buffer, b"[package]");
        // SAFETY: the operation has no memory and no descriptor.
        unsafe { uring.ring.submission().push(&opcode::Nop::new().build()) }.unwrap();
        uring.wait().unwrap();
        let result = uring.ring.completion().next().unwrap().result();
        assert_eq!(result, -libc::EACCES);
    }
}
