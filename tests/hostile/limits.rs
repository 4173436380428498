//! Limits of the system. A daemon that would not have enough for all queues ends before it is ready, and
//! names the limit and the need. A daemon that has just enough serves two front-ends with all queues.

use std::fs;
use std::os::unix::net::UnixStream;
use std::process::{Child, Command, Stdio};
use std::thread;
use std::time::{Duration, Instant};

use common::PATIENCE;
use common::blk::Scratch;
use common::disk;
use common::guest::Guest;
use common::memory::Memory;
use common::queue::Queue;
use common::session::{Session, Wanted, feature};
use tempfile::TempDir;
use vhost::VhostBackend;

/// A daemon with a limit; killed when dropped.
struct Limited {
    child: Child,
    folder: TempDir,
}

impl Limited {
    /// Starts a daemon with `queues` queues under `limit`, as `ulimit` takes it.
    ///
    /// # Errors
    ///
    /// The daemon ends with exit code 1: what it says.
    fn start(limit: &str, queues: usize, writable: bool) -> Result<Self, String> {
        let folder = tempfile::tempdir().expect("temporary directory");
        let stderr = fs::File::create(folder.path().join("stderr")).expect("log file");
        let mut command = Command::new("sh");
        command
            .env_clear()
            // One heap: how much memory is in use does not depend on which threads met.
            .env("MALLOC_ARENA_MAX", "1")
            .args(["-c", &format!("ulimit {limit}; exec \"$0\" \"$@\"")])
            .arg(env!("CARGO_BIN_EXE_ovbd-vhost"))
            .args(["--io", "pread", "--num-queues", &queues.to_string()])
            .arg("--socket")
            .arg(folder.path().join("s"));
        for layer in disk::deep().0.layers {
            command.arg("--layers").arg(layer);
        }
        if writable {
            command.arg("--upper-auto").arg(folder.path().join("upper"));
        }
        let child = command.stdout(Stdio::null()).stderr(stderr).spawn();
        let mut daemon = Self {
            child: child.expect("start"),
            folder,
        };
        let start = Instant::now();
        while daemon.connect().is_none() {
            if let Some(status) = daemon.child.try_wait().expect("child") {
                assert_eq!(
                    status.code(),
                    Some(1),
                    "{limit}: {status}, {}",
                    daemon.log()
                );
                return Err(daemon.log());
            }
            assert!(start.elapsed() < PATIENCE, "{}", daemon.log());
            thread::sleep(Duration::from_millis(5));
        }
        Ok(daemon)
    }

    fn connect(&self) -> Option<UnixStream> {
        UnixStream::connect(self.folder.path().join("s")).ok()
    }

    fn log(&self) -> String {
        fs::read_to_string(self.folder.path().join("stderr")).expect("log")
    }

    /// Number of open descriptors.
    fn descriptors(&self) -> usize {
        let path = format!("/proc/{}/fd", self.child.id());
        fs::read_dir(path).expect("the daemon runs").count()
    }

    /// The same, once no connection is being closed any more: it does not change for a while.
    fn settled_descriptors(&self) -> usize {
        let mut last = self.descriptors();
        for _ in 0..20 {
            thread::sleep(Duration::from_millis(20));
            let now = self.descriptors();
            if now != last {
                return self.settled_descriptors();
            }
            last = now;
        }
        last
    }

    /// A front-end without queues.
    fn front_end(&self) -> vhost::Result<Guest> {
        let stream = self.connect().expect("the daemon listens");
        let session = Session::negotiate(stream, Wanted::all())?;
        let memory = Memory::typical();
        session.share(&memory)?;
        Ok(Guest {
            scratch: Scratch::new(&memory, 512 << 10),
            session,
            memory,
            queues: Vec::new(),
        })
    }
}

impl Drop for Limited {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// Sets up `count` queues, and does not enable them.
fn set_up(guest: &mut Guest, count: usize) -> vhost::Result<()> {
    let event_idx = guest.session.has(feature::EVENT_IDX);
    for index in 0..count {
        let queue = Queue::new(&guest.memory, 16, event_idx);
        guest.session.set_up_queue(index, &queue.ring.vring, 0)?;
        guest.queues.push(queue);
    }
    Ok(())
}

/// Enables all queues, which must start.
fn enable_all(guest: &mut Guest) {
    for index in 0..guest.queues.len() {
        let enabled = guest.session.enable(index, true);
        enabled.unwrap_or_else(|error| panic!("queue {index}: {error}"));
    }
}

/// Waits until the daemon has handled all messages sent before.
fn wait_for_answer(guest: &Guest) {
    guest.session.frontend.get_features().expect("features");
}

/// Reads through all queues.
fn assert_serves(guest: &mut Guest, content: &[u8]) {
    (0..guest.queues.len()).for_each(|index| guest.assert_reads(index, content));
}

/// The number before `what` in an error.
fn number(error: &str, what: &str) -> usize {
    let (before, _) = error.split_once(&format!(" {what}")).expect(error);
    let number = before.rsplit(' ').next().expect("a number");
    number.parse().expect(error)
}

/// Descriptors that a daemon says that it needs.
fn descriptors_needed(queues: usize, writable: bool) -> usize {
    let error = Limited::start("-n 128", queues, writable).err();
    number(&error.expect("the limit is too small"), "open files")
}

/// The lowest limit, in bytes, with which a daemon starts. It counts again when the layers are open.
fn lowest(letter: &str, what: &str, queues: usize, writable: bool) -> usize {
    /// Memory of the daemon differs a little from run to run.
    const SPARE: usize = 4 << 20;
    let mut bytes = 200 << 20;
    for _ in 0..8 {
        match Limited::start(&format!("-{letter} {}", bytes >> 10), queues, writable) {
            Ok(_) => return bytes,
            Err(error) => bytes = number(&error, what) + SPARE,
        }
    }
    panic!("{bytes} {what} are still too few");
}

#[test]
fn every_descriptor_of_a_queue_is_counted() {
    const QUEUES: usize = 16;
    for writable in [false, true] {
        let need = |queues| descriptors_needed(queues, writable);
        let counted = need(2 * QUEUES) - need(QUEUES);
        let daemon = Limited::start("-n 4096", QUEUES, writable).expect("it serves");
        let mut first = daemon.front_end().expect("session");
        let mut second = daemon.front_end().expect("session");
        wait_for_answer(&first);
        wait_for_answer(&second);
        let before = daemon.settled_descriptors();
        set_up(&mut first, QUEUES).expect("queues");
        enable_all(&mut first);
        set_up(&mut second, QUEUES).expect("queues");
        wait_for_answer(&first);
        wait_for_answer(&second);
        // The process of the front-end that got the disk is held as well.
        let made = daemon.descriptors() - before - 1;
        assert_eq!(counted, made, "writable: {writable}");
    }
}

#[test]
fn just_enough_descriptors_are_enough_for_two_front_ends() {
    const QUEUES: usize = 100;
    let content = disk::deep().1;
    for writable in [false, true] {
        let need = descriptors_needed(QUEUES, writable);
        assert!(Limited::start(&format!("-n {}", need - 1), QUEUES, writable).is_err());
        let daemon = Limited::start(&format!("-n {need}"), QUEUES, writable).expect("it serves");
        let mut first = daemon.front_end().expect("session");
        set_up(&mut first, QUEUES).expect("queues");
        enable_all(&mut first);
        assert_serves(&mut first, &content);
        // Others that never start a queue take nothing that these two need.
        let idle: Vec<_> = (0..20)
            .filter_map(|_| {
                let mut idle = daemon.front_end().ok()?;
                set_up(&mut idle, QUEUES).ok()?;
                Some(idle)
            })
            .collect();
        for index in 0..QUEUES {
            first.session.enable(index, false).expect("disable");
        }
        enable_all(&mut first);
        assert_serves(&mut first, &content);
        let mut second = next_front_end(&daemon, QUEUES);
        enable_all(&mut second);
        assert_serves(&mut second, &content);
        drop(idle);
    }
}

/// A front-end with all queues, which may have to wait for an idle one to end.
fn next_front_end(daemon: &Limited, queues: usize) -> Guest {
    let start = Instant::now();
    loop {
        if let Ok(mut guest) = daemon.front_end()
            && set_up(&mut guest, queues).is_ok()
        {
            return guest;
        }
        assert!(start.elapsed() < PATIENCE, "no front-end: {}", daemon.log());
        thread::sleep(Duration::from_millis(5));
    }
}

/// A soft limit is raised as far as the hard one allows.
#[test]
fn a_soft_limit_is_no_shortage() {
    let limit = "-S -n 64; ulimit -S -d 65536; ulimit -S -v 131072; ulimit -S -s 256";
    let daemon = Limited::start(limit, 16, true).expect("it serves");
    let mut guest = daemon.front_end().expect("session");
    set_up(&mut guest, 16).expect("queues");
    enable_all(&mut guest);
    assert_serves(&mut guest, &disk::deep().1);
}

#[test]
fn too_little_stack_is_named() {
    let error = Limited::start("-s 64", 1, false).err().expect("a shortage");
    assert!(error.contains("RLIMIT_STACK"), "{error}");
}

#[test]
fn too_little_memory_is_named_and_just_enough_serves_all_queues() {
    const QUEUES: usize = 16;
    let content = disk::deep().1;
    for (letter, what, name) in [
        ("d", "bytes of private memory", "RLIMIT_DATA"),
        ("v", "bytes of address space", "RLIMIT_AS"),
    ] {
        for writable in [false, true] {
            let start = |bytes| {
                let limit = format!("-{letter} {}", bytes >> 10);
                Limited::start(&limit, QUEUES, writable)
            };
            for mib in [64, 100, 150, 200] {
                let error = start(mib << 20).err().expect("a shortage");
                assert!(error.contains(name), "{error}");
            }
            let lowest = lowest(letter, what, QUEUES, writable);
            if letter == "v" {
                // The memory of a guest is refused where it would take what the queues need.
                let daemon = start(lowest).expect("it serves");
                assert!(daemon.front_end().is_err(), "64 MiB of guest memory");
                assert!(daemon.log().contains("RLIMIT_AS"), "{}", daemon.log());
            }
            let daemon = start(lowest + (72 << 20)).expect("it serves");
            let mut guest = daemon.front_end().expect("session");
            set_up(&mut guest, QUEUES).expect("queues");
            enable_all(&mut guest);
            assert_serves(&mut guest, &content);
        }
    }
}
