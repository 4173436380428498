//! A thread confined as a daemon that serves.
//!
//! The thread, and each that it starts, is in the Landlock rules and the seccomp filters of the serving
//! stage. libFuzzer's own threads are not: they write artifacts and read the corpus. One thing differs
//! from the daemon: a call outside the tables stops its thread, and does not kill the process. The
//! fuzzing thread finds that out and panics, so that libFuzzer writes the input. A panic of a confined
//! thread ends the same way, because libFuzzer cannot write the input there.

use std::ffi::{c_int, c_void};
use std::path::PathBuf;
use std::sync::atomic::{AtomicI32, Ordering};
use std::sync::{LazyLock, mpsc};
use std::thread;
use std::time::Duration;

use ovbd_vhost::daemon::sandbox::seccomp::{self, Needs, Stage};
use ovbd_vhost::daemon::sandbox::{Reach, landlock};
use ovbd_vhost::io::confine::{self, Support};
use rustix::thread::CapabilitySet;
use seccompiler::{BpfProgram, SeccompAction};

/// Number of the last call that a filter stopped; -1: none was.
static STOPPED: AtomicI32 = AtomicI32::new(-1);

/// How often the fuzzing thread looks for a call that was stopped.
const MOMENT: Duration = Duration::from_millis(5);

/// Offset of `si_syscall` in `siginfo_t`, which has no field of that name in Rust.
const SI_SYSCALL: usize = 24;

/// The filters of a daemon with a writable layer, and of one without.
static WRITABLE: LazyLock<BpfProgram> = LazyLock::new(|| filter(&[PathBuf::from("/")]));
static READ_ONLY: LazyLock<BpfProgram> = LazyLock::new(|| filter(&[]));

/// The filter of a daemon on a kernel with Landlock.
fn filter(directories: &[PathBuf]) -> BpfProgram {
    // SAFETY: zeros are a valid `sigaction`: no flags, an empty mask, the default action.
    let mut action: libc::sigaction = unsafe { std::mem::zeroed() };
    action.sa_sigaction = stop as *const () as usize;
    action.sa_flags = libc::SA_SIGINFO | libc::SA_ONSTACK;
    // SAFETY: `stop` has the signature that SA_SIGINFO asks for, and makes calls that a handler may.
    let installed = unsafe { libc::sigaction(libc::SIGSYS, &action, std::ptr::null_mut()) };
    assert_eq!(installed, 0, "SIGSYS");
    let needs = Needs::of(&reach(directories), Support::Full);
    let filter = seccomp::filter(Stage::Serving, needs, SeccompAction::Trap);
    filter.expect("a known processor")
}

fn reach(directories: &[PathBuf]) -> Reach<'_> {
    Reach {
        directories,
        ..Reach::default()
    }
}

/// Notes the call, and stops the thread for ever.
extern "C" fn stop(_signal: c_int, info: *mut libc::siginfo_t, _context: *mut c_void) {
    // SAFETY: the kernel passes a siginfo of SIGSYS, which has the number of the call there.
    let call = unsafe { info.cast::<u8>().add(SI_SYSCALL).cast::<i32>().read() };
    STOPPED.store(call, Ordering::Release);
    loop {
        thread::sleep(Duration::from_secs(1));
    }
}

/// A confined thread that works.
pub struct Confined<T> {
    result: mpsc::Receiver<T>,
}

impl<T: Send + 'static> Confined<T> {
    /// Starts `work` on a thread that can open files in `directories` only.
    ///
    /// # Panics
    ///
    /// No thread can be started.
    pub fn start(directories: Vec<PathBuf>, work: impl FnOnce() -> T + Send + 'static) -> Self {
        let filter = match directories.is_empty() {
            true => &READ_ONLY,
            false => &WRITABLE,
        };
        // Compiled here: it would be slow in each thread.
        LazyLock::force(filter);
        let (done, result) = mpsc::channel();
        thread::spawn(move || {
            enter(&directories, filter);
            let _ = done.send(work());
        });
        Self { result }
    }

    /// Waits for the work to end.
    ///
    /// # Panics
    ///
    /// A confined thread made a call that the daemon may not make.
    pub fn join(self) -> T {
        loop {
            let result = self.result.recv_timeout(MOMENT);
            let call = STOPPED.load(Ordering::Acquire);
            assert!(call == -1, "system call {call} is outside the sandbox");
            match result {
                Ok(result) => return result,
                Err(mpsc::RecvTimeoutError::Timeout) => {}
                Err(error) => panic!("the confined thread panicked: {error}"),
            }
        }
    }
}

/// Confines the calling thread, in the order of the daemon.
fn enter(directories: &[PathBuf], filter: &BpfProgram) {
    landlock::close(&reach(directories)).expect("Landlock");
    confine::drop_all_but(CapabilitySet::empty()).expect("capabilities");
    seccompiler::apply_filter(filter).expect("seccomp");
}
