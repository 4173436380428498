//! Limits of memory: RLIMIT_AS, RLIMIT_DATA and RLIMIT_STACK.
//!
//! A failed allocation ends the process, so the memory of all queues must be available before the
//! daemon is ready. The size of guest memory is known only when a front-end shares it: the rest of the
//! address space limits it ([`limit_address_space`]).

use std::fs::File;
use std::os::unix::fs::FileExt;

use rustix::process::{Resource, getrlimit};

use super::Shortage;
use crate::io::mapped_file::limit_address_space;
use crate::io::processors;
use crate::io::rlimit::raise;

/// Stack that the main thread needs, which parses command line, configs and layers.
const MAIN_STACK: u64 = 1 << 20;

/// Memory of a thread: the stack that the standard library gives it, and its signal stack.
const THREAD_BYTES: u64 = (2 << 20) + (64 << 10);

/// Heap of a queue whose ring is full of large reads: 64 buffers of the longest stored run of blocks, and
/// lists of pieces.
const QUEUE_HEAP: u64 = 12 << 20;

/// Heap beside that of queues: messages, control connections, snapshots, growth of the index of a writable layer.
const OTHER_HEAP: u64 = 64 << 20;

/// Address space that the C library reserves for the heap of a thread.
const ARENA: u64 = 64 << 20;

/// The memory of the process, readable from inside of the sandbox.
#[derive(Debug)]
pub struct Usage {
    /// `/proc/self/statm`. `None`: unknown.
    statm: Option<File>,
}

impl Usage {
    /// Opens the kernel's figures about the memory of the process.
    pub fn open() -> Self {
        Self {
            statm: File::open("/proc/self/statm").ok(),
        }
    }

    /// Returns the bytes of address space, and of private writable memory.
    fn bytes(&self) -> (u64, u64) {
        let read = || -> Option<(u64, u64)> {
            let mut text = [0; 128];
            let len = self.statm.as_ref()?.read_at(&mut text, 0).ok()?;
            let text = std::str::from_utf8(text.get(..len)?).ok()?;
            let mut pages = text.split_whitespace().map(|pages| pages.parse().ok());
            let page = rustix::param::page_size() as u64;
            let [total, data] = [pages.next()??, pages.nth(4)??].map(|pages: u64| pages * page);
            Some((total, data))
        };
        read().unwrap_or_default()
    }

    /// Compares the limits with the memory in use and the needs of `queues` queues and `threads` threads.
    /// Raises the soft limits as far as allowed, and limits the memory that front-ends may share.
    ///
    /// # Errors
    ///
    /// [`Shortage::Queues`] names the first limit that would be exceeded.
    pub fn check(&self, queues: u16, threads: u64) -> Result<(), Shortage> {
        let (total, data) = self.bytes();
        let more = u64::from(queues) * QUEUE_HEAP + threads * THREAD_BYTES + OTHER_HEAP;
        let need = data + more;
        let have = raise(Resource::Data, u64::MAX);
        if have < need {
            let what = "bytes of private memory";
            return Err(shortage(
                queues,
                what,
                "RLIMIT_DATA (ulimit -d)",
                need,
                have,
            ));
        }
        let need = total + more + arenas(threads) * ARENA;
        let have = raise(Resource::As, u64::MAX);
        if have < need {
            let what = "bytes of address space";
            return Err(shortage(queues, what, "RLIMIT_AS (ulimit -v)", need, have));
        }
        if have < u64::MAX {
            limit_address_space(have - need);
        }
        Ok(())
    }
}

fn shortage(queues: u16, what: &'static str, limit: &str, need: u64, have: u64) -> Shortage {
    Shortage::Queues {
        what,
        limit: limit.to_owned(),
        queues,
        need,
        have,
    }
}

/// Returns the number of heaps that the C library reserves address space for.
fn arenas(threads: u64) -> u64 {
    if !cfg!(target_env = "gnu") {
        return 0;
    }
    let chosen = std::env::var("MALLOC_ARENA_MAX").ok();
    let chosen = chosen.and_then(|number| number.parse().ok());
    let processors = processors::available() as u64;
    threads.min(chosen.unwrap_or(8 * processors))
}

/// Raises the limit of the main thread's stack if it is too small. Call it first: a stack overflow ends the process
/// without a message.
///
/// # Errors
///
/// [`Shortage::Stack`].
pub fn check_stack() -> Result<(), Shortage> {
    let have = getrlimit(Resource::Stack).current.unwrap_or(u64::MAX);
    if have >= MAIN_STACK {
        return Ok(());
    }
    let have = raise(Resource::Stack, u64::MAX);
    match have < MAIN_STACK {
        true => Err(Shortage::Stack {
            need: MAIN_STACK,
            have,
        }),
        false => Ok(()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_memory_of_the_process_is_found() {
        let (total, data) = Usage::open().bytes();
        assert!(data > 0 && total > data, "{total} {data}");
        assert_eq!(Usage { statm: None }.bytes(), (0, 0));
    }
}
