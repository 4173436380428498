//! Closes descriptors that a front-end sent.
//!
//! `close(2)` may block. A lingering socket blocks it until a signal; a file system may block it until its
//! server answers, and no signal ends that. Files of such file systems are closed by threads of their own.

use std::fs::File;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::thread;

use super::message::MAX_HELD;
use crate::io::file_system::may_wait;
use crate::io::interrupt::PeerCall;

/// Most threads that close files at a time. With as many, the thread of the connection closes the file
/// itself, and may block; the number of connections is limited as well.
pub const MAX_CLOSERS: usize = 8;

/// Most descriptors that these threads hold: those of one message each.
pub const MAX_CLOSING: usize = MAX_CLOSERS * MAX_HELD;

static CLOSERS: AtomicUsize = AtomicUsize::new(0);

/// Closes `files`. `peer` interrupts blocked calls of the connection's thread.
pub fn close(files: impl IntoIterator<Item = File>, peer: &PeerCall) {
    let waits = |file: &File| may_wait(file).unwrap_or(true);
    let (slow, quick): (Vec<_>, Vec<_>) = files.into_iter().partition(waits);
    peer.run(|| drop(quick));
    if slow.is_empty() {
        return;
    }
    let one_more = |count| (count < MAX_CLOSERS).then_some(count + 1);
    if CLOSERS
        .fetch_update(Ordering::Relaxed, Ordering::Relaxed, one_more)
        .is_err()
    {
        return;
    }
    let started = thread::Builder::new().name("close".to_owned()).spawn(|| {
        drop(slow);
        CLOSERS.fetch_sub(1, Ordering::Relaxed);
    });
    if started.is_err() {
        // Dropping the closure has closed the files.
        CLOSERS.fetch_sub(1, Ordering::Relaxed);
    }
}
