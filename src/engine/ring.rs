//! Asynchronous reads by io_uring, with one ring per queue worker.
//!
//! Rings are made before the daemon enters its sandbox ([`Rings`]). The parameters of `io_uring_setup(2)` lie in
//! memory, where a seccomp filter cannot check them, so that an attacker in the daemon could otherwise make a
//! ring without restrictions. A worker takes a ring when it starts and returns it when it ends.
//!
//! A [`Ring`] owns every buffer that the kernel may write to, from submission until the completion is taken. No
//! buffer can be freed or read while its read is under way. Dropping a [`Ring`] waits for its reads.
#![allow(unsafe_code)]

use std::io;
use std::mem::ManuallyDrop;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use io_uring::register::Restriction;
use io_uring::{IoUring, opcode, squeue, types};

/// Most reads under way in a ring.
pub const MAX_READS: usize = 64;

/// Most buffers kept for reuse.
const SPARE: usize = 8;

/// A finished read.
#[derive(Debug)]
pub struct Completion {
    /// The tag given to [`Ring::read`].
    pub tag: u32,
    /// Number of bytes read, which may be fewer than requested, or the error.
    pub result: io::Result<usize>,
    /// Buffer of the read, in its whole length.
    pub buffer: Vec<u8>,
}

/// Rings that no worker uses. Clones share them.
#[derive(Clone, Default)]
pub struct Rings {
    made: usize,
    free: Arc<Mutex<Vec<IoUring>>>,
}

impl std::fmt::Debug for Rings {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Rings")
            .field("made", &self.made)
            .finish_non_exhaustive()
    }
}

impl Rings {
    /// Makes `count` rings, each restricted to reads. If the kernel refuses one, returns those made before and
    /// the error. Kernels before 5.10 and containers that forbid io_uring refuse the first one.
    pub fn make(count: usize) -> (Rings, Option<io::Error>) {
        let mut free = Vec::new();
        let error = (0..count).find_map(|_| match read_only_ring() {
            Ok(ring) => {
                free.push(ring);
                None
            }
            Err(error) => Some(error),
        });
        let rings = Rings {
            made: free.len(),
            free: Arc::new(Mutex::new(free)),
        };
        (rings, error)
    }

    /// Number of rings that were made.
    pub fn made(&self) -> usize {
        self.made
    }

    /// Takes a free ring, if there is one. Dropping the [`Ring`] returns it.
    pub fn take(&self) -> Option<Ring> {
        let ring = self.free().pop()?;
        Some(Ring {
            ring: ManuallyDrop::new(ring),
            home: Some(self.clone()),
            reads: (0..MAX_READS).map(|_| None).collect(),
            under_way: 0,
            spare: Vec::new(),
        })
    }

    fn free(&self) -> MutexGuard<'_, Vec<IoUring>> {
        self.free.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Makes a ring that accepts only reads, and no registration.
fn read_only_ring() -> io::Result<IoUring> {
    let ring = IoUring::builder()
        .setup_r_disabled()
        .build(MAX_READS as u32)?;
    let submitter = ring.submitter();
    submitter.register_restrictions(&mut [Restriction::sqe_op(opcode::Read::CODE)])?;
    submitter.register_enable_rings()?;
    Ok(ring)
}

/// A read under way.
struct Read {
    tag: u32,
    buffer: Vec<u8>,
}

/// Ring of a worker, and the buffers that it writes to.
pub struct Ring {
    ring: ManuallyDrop<IoUring>,
    /// Where the ring is returned when it is dropped; `None` once it is abandoned.
    home: Option<Rings>,
    /// Reads under way, by the `user_data` of their entries.
    reads: Vec<Option<Read>>,
    under_way: usize,
    spare: Vec<Vec<u8>>,
}

impl std::fmt::Debug for Ring {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Ring")
            .field("under_way", &self.under_way)
            .finish_non_exhaustive()
    }
}

impl Ring {
    /// Number of reads under way.
    pub fn under_way(&self) -> usize {
        self.under_way
    }

    /// Whether one more read can be begun: fewer than [`MAX_READS`] are under way.
    pub fn has_room(&self) -> bool {
        self.under_way < MAX_READS
    }

    /// Takes a buffer of `len` bytes, with any content.
    pub fn buffer(&mut self, len: usize) -> Vec<u8> {
        let mut buffer = self.spare.pop().unwrap_or_default();
        buffer.resize(len, 0);
        buffer
    }

    /// Keeps a buffer for reuse.
    pub fn recycle(&mut self, buffer: Vec<u8>) {
        if self.spare.len() < SPARE {
            self.spare.push(buffer);
        }
    }

    /// Prepares a read of `fd` at `offset` that fills `buffer` from byte `filled` on. The read starts at
    /// the next [`Ring::submit`], and its completion has this `tag`.
    ///
    /// # Errors
    ///
    /// There is no room, or the submission queue is full until the next [`Ring::submit`].
    pub fn read(
        &mut self,
        tag: u32,
        fd: BorrowedFd<'_>,
        offset: u64,
        buffer: Vec<u8>,
        filled: usize,
    ) -> io::Result<()> {
        let busy = || io::Error::from(io::ErrorKind::ResourceBusy);
        let mut slots = (0u64..).zip(&mut self.reads);
        let vacant = slots.find(|(_, slot)| slot.is_none());
        let (number, slot) = vacant.ok_or_else(busy)?;
        let read = slot.insert(Read { tag, buffer });
        let rest = &mut read.buffer[filled..];
        let len = u32::try_from(rest.len()).unwrap_or(u32::MAX);
        let entry: squeue::Entry =
            opcode::Read::new(types::Fd(fd.as_raw_fd()), rest.as_mut_ptr(), len)
                .offset(offset)
                .build()
                .user_data(number);
        // SAFETY: the buffer lives in the table, unmoved and untouched, until its completion is
        // taken, and the file stays open as long as the image, which outlives the worker. The
        // heap bytes a `Vec` points to do not move with it.
        let pushed = unsafe { self.ring.submission().push(&entry) };
        if pushed.is_err() {
            *slot = None;
            return Err(busy());
        }
        self.under_way += 1;
        Ok(())
    }

    /// Whether the kernel has not taken all prepared reads yet.
    pub fn is_backlogged(&mut self) -> bool {
        !self.ring.submission().is_empty()
    }

    /// Drops the ring without waiting for its reads. The kernel may still write to their buffers, which are
    /// never freed.
    pub fn abandon(mut self) {
        self.leak_buffers();
    }

    fn leak_buffers(&mut self) {
        self.reads.drain(..).for_each(std::mem::forget);
        self.under_way = 0;
        self.home = None;
    }

    /// Submits the prepared reads. Those for which the kernel has no room stay prepared
    /// ([`Ring::is_backlogged`]).
    ///
    /// # Errors
    ///
    /// `io_uring_enter(2)` fails for another reason.
    pub fn submit(&mut self) -> io::Result<()> {
        if self.ring.submission().is_empty() {
            return Ok(());
        }
        match self.ring.submit() {
            Ok(_) => Ok(()),
            Err(error) if is_passing(&error) || is_full(&error) => Ok(()),
            Err(error) => Err(error),
        }
    }

    /// Takes the completion of one read, if there is one.
    pub fn completed(&mut self) -> Option<Completion> {
        loop {
            let entry = self.ring.completion().next()?;
            let Ok(slot) = usize::try_from(entry.user_data()) else {
                continue;
            };
            let Some(Read { tag, buffer }) = self.reads.get_mut(slot).and_then(Option::take) else {
                continue;
            };
            self.under_way -= 1;
            let result = match entry.result() {
                read @ 0.. => Ok(read as usize),
                errno => Err(io::Error::from_raw_os_error(-errno)),
            };
            return Some(Completion {
                tag,
                result,
                buffer,
            });
        }
    }

    /// Waits for at least one read to finish.
    ///
    /// # Errors
    ///
    /// `io_uring_enter(2)` fails.
    pub fn wait(&mut self) -> io::Result<()> {
        match self.ring.submit_and_wait(1) {
            Ok(_) => Ok(()),
            Err(error) if is_passing(&error) || is_full(&error) => Ok(()),
            Err(error) => Err(error),
        }
    }
}

/// Whether the same call may succeed when it is repeated.
pub(super) fn is_passing(error: &io::Error) -> bool {
    matches!(
        error.kind(),
        io::ErrorKind::Interrupted | io::ErrorKind::WouldBlock
    )
}

/// Whether completions must be taken from the ring before it accepts more reads.
fn is_full(error: &io::Error) -> bool {
    error.raw_os_error() == Some(libc::EBUSY)
}

impl AsFd for Ring {
    /// Readable when a read has finished.
    fn as_fd(&self) -> BorrowedFd<'_> {
        // SAFETY: the ring owns the descriptor and is borrowed as long as the result.
        unsafe { BorrowedFd::borrow_raw(self.ring.as_raw_fd()) }
    }
}

impl Drop for Ring {
    fn drop(&mut self) {
        while self.under_way > 0 {
            if self.completed().is_none() && self.wait().is_err() {
                // The kernel may still write to the buffers.
                self.leak_buffers();
            }
        }
        // SAFETY: `self` is being dropped, so that nothing uses the field after this.
        let ring = unsafe { ManuallyDrop::take(&mut self.ring) };
        if let Some(home) = self.home.take() {
            home.free().push(ring);
        }
    }
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::FileExt;

    use super::*;

    fn read(ring: &mut Ring) -> Completion {
        let file = tempfile::tempfile().unwrap();
        file.write_all_at(b"123456789", 0).unwrap();
        let buffer = ring.buffer(9);
        ring.read(7, file.as_fd(), 0, buffer, 0).unwrap();
        loop {
            // A signal may end the wait early.
            ring.wait().unwrap();
            if let Some(completion) = ring.completed() {
                return completion;
            }
        }
    }

    #[test]
    fn a_ring_reads_and_does_nothing_else() {
        let (rings, error) = Rings::make(1);
        assert!(error.is_none(), "{error:?}");
        let mut ring = rings.take().unwrap();
        let completion = read(&mut ring);
        assert_eq!(completion.tag, 7);
        assert_eq!(completion.result.unwrap(), 9);
        assert_eq!(completion.buffer, b"123456789");
        // SAFETY: the operation has no memory and no descriptor.
        unsafe { ring.ring.submission().push(&opcode::Nop::new().build()) }.unwrap();
        ring.wait().unwrap();
        let result = ring.ring.completion().next().unwrap().result();
        assert_eq!(result, -libc::EACCES);
    }

    #[test]
    fn rings_come_back_with_nothing_under_way_unless_they_are_given_up() {
        let (rings, _) = Rings::make(2);
        let (mut first, second) = (rings.take().unwrap(), rings.take().unwrap());
        assert!(rings.take().is_none());
        let file = tempfile::tempfile().unwrap();
        file.write_all_at(b"123456789", 0).unwrap();
        let buffer = first.buffer(9);
        first.read(7, file.as_fd(), 0, buffer, 0).unwrap();
        drop(first);
        assert_eq!(read(&mut rings.take().unwrap()).result.unwrap(), 9);
        second.abandon();
        assert_eq!(rings.free().len(), 1);
    }
}
