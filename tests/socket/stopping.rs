//! The end of a daemon whose storage hangs.
//!
//! A worker that waits for ever is made by stopping its thread alone, as a debugger does.
#![allow(unsafe_code)] // ptrace has no safe form

use std::fs;
use std::io::Write;
use std::os::unix::net::UnixStream;
use std::process::ExitStatus;
use std::ptr::{null, null_mut};
use std::thread;
use std::time::{Duration, Instant};

use common::PATIENCE;
use common::disk::Disk;
use common::guest::{Guest, Options};
use libc::pid_t;
use rustix::process::{Signal, kill_process};

/// A thread of the daemon that is held still.
struct Held(pid_t);

impl Held {
    /// Holds the worker of the first queue.
    fn worker(disk: &Disk) -> Self {
        let threads = fs::read_dir(format!("/proc/{}/task", disk.daemon.pid())).unwrap();
        let mut names = threads.map(|thread| thread.unwrap().path());
        let worker = names.find(|path| fs::read(path.join("comm")).unwrap() == b"queue-0\n");
        let worker = worker.expect("a worker");
        let thread = worker.file_name().unwrap().to_str().unwrap();
        let thread: pid_t = thread.parse().unwrap();
        let mut status = 0;
        // SAFETY: the thread is one of a child's, and no memory but `status` is written.
        unsafe {
            assert_eq!(
                libc::ptrace(libc::PTRACE_SEIZE, thread, null_mut::<u8>(), 0),
                0
            );
            assert_eq!(
                libc::ptrace(libc::PTRACE_INTERRUPT, thread, null::<u8>(), 0),
                0
            );
            assert_eq!(libc::waitpid(thread, &mut status, libc::__WALL), thread);
        }
        assert!(libc::WIFSTOPPED(status));
        Self(thread)
    }

    /// Waits until the thread dies with its process.
    fn wait(self) {
        let start = Instant::now();
        let ended = |status| libc::WIFEXITED(status) || libc::WIFSIGNALED(status);
        let mut status = libc::W_STOPCODE(libc::SIGSTOP);
        while !ended(status) {
            assert!(start.elapsed() < PATIENCE, "the daemon does not end");
            thread::sleep(Duration::from_millis(2));
            // SAFETY: only `status` is written.
            unsafe { libc::waitpid(self.0, &mut status, libc::__WALL | libc::WNOHANG) };
        }
    }
}

/// A daemon that serves a guest, and the guest's connection.
fn serve() -> (Disk, Guest, UnixStream) {
    let disk = Disk::serve();
    let stream = disk.daemon.connect();
    let connection = stream.try_clone().unwrap();
    let mut guest = Guest::boot(stream, Options::default()).expect("guest");
    guest.assert_reads(0, &disk.content);
    (disk, guest, connection)
}

fn wait(disk: &mut Disk, held: Held) -> ExitStatus {
    held.wait();
    disk.daemon.wait()
}

#[test]
fn a_worker_that_never_drains_is_left_behind() {
    let (mut disk, _guest, _connection) = serve();
    let held = Held::worker(&disk);
    kill_process(disk.daemon.pid(), Signal::TERM).unwrap();
    assert_eq!(wait(&mut disk, held).code(), Some(1));
    let log = disk.daemon.log();
    let last = log.lines().last().unwrap();
    assert!(last.starts_with("ovbd-vhost: reads still wait"), "{log}");
    assert!(!disk.daemon.socket().exists(), "the socket is removed");
}

#[test]
fn a_second_signal_ends_it_at_once() {
    let (mut disk, _guest, mut connection) = serve();
    let held = Held::worker(&disk);
    kill_process(disk.daemon.pid(), Signal::TERM).unwrap();
    // The first is heard once the daemon reads no more of what we say.
    let start = Instant::now();
    while connection.write(&[0]).is_ok() {
        assert!(start.elapsed() < PATIENCE, "the first signal is not heard");
        thread::sleep(Duration::from_millis(2));
    }
    kill_process(disk.daemon.pid(), Signal::INT).unwrap();
    assert_eq!(wait(&mut disk, held).code(), Some(1));
    let log = disk.daemon.log();
    assert!(!log.contains("still wait"), "before the limit: {log}");
}

#[test]
fn a_signal_is_heard_while_a_front_end_is_being_replaced() {
    let (mut disk, _guest, _connection) = serve();
    let held = Held::worker(&disk);
    let stream = disk.daemon.connect();
    let newer = thread::spawn(move || Guest::boot(stream, Options::default()).map(drop));
    let start = Instant::now();
    while !disk.daemon.log().contains("takes over") {
        assert!(start.elapsed() < PATIENCE, "it does not take over");
        thread::sleep(Duration::from_millis(2));
    }
    kill_process(disk.daemon.pid(), Signal::TERM).unwrap();
    assert_eq!(wait(&mut disk, held).code(), Some(1));
    let newer = newer.join().expect("thread");
    assert!(newer.is_err(), "it was served beside the one before");
}
