//! Seals the layers that snapshots froze, while the disk is in use: by a thread that exists as long as there is
//! something to seal.

use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread;
use std::time::Duration;

use crate::daemon::device::Device;
use crate::ratelimited_log;
use crate::reason::reason;

/// Pause before a failed seal is tried again; the file system may have space by then.
const AGAIN: Duration = Duration::from_secs(30);

/// What the thread is to do.
#[derive(Debug, Default)]
struct Work {
    /// Whether the thread exists.
    running: bool,
    /// Whether layers may have been frozen since the last seal began.
    asked: bool,
}

/// Sealer of the frozen layers of a disk.
#[derive(Debug)]
pub struct Sealer {
    device: Arc<Device>,
    work: Mutex<Work>,
    /// Signalled when `asked` is set.
    changed: Condvar,
}

impl Sealer {
    /// Sealer of `device`, without a thread.
    pub fn new(device: Arc<Device>) -> Self {
        Self {
            device,
            work: Mutex::default(),
            changed: Condvar::new(),
        }
    }

    /// Seals all layers that are frozen by now, in the background.
    pub fn wake(self: &Arc<Self>) {
        let mut work = self.lock();
        work.asked = true;
        self.changed.notify_one();
        if work.running || !self.device.has_unsealed() {
            return;
        }
        work.running = true;
        let own = Arc::clone(self);
        let thread = thread::Builder::new().name("seal".into());
        if let Err(error) = thread.spawn(move || own.run()) {
            // The next request of a client tries again.
            work.running = false;
            ratelimited_log::warn(format_args!(
                "control: cannot start the thread that completes layers: {error}"
            ));
        }
    }

    /// Seals until there is nothing left to seal.
    fn run(&self) {
        let mut work = self.lock();
        while work.asked {
            work.asked = false;
            drop(work);
            let sealed = self.device.seal();
            work = self.lock();
            if let Err(error) = sealed {
                ratelimited_log::warn(format_args!(
                    "control: cannot complete the layer of a snapshot: {}",
                    reason(&error)
                ));
                work = self.pause(work);
            }
        }
        work.running = false;
    }

    /// Waits until the next seal is asked for, or a failed one is to be tried again.
    fn pause<'w>(&self, work: MutexGuard<'w, Work>) -> MutexGuard<'w, Work> {
        let unasked = |work: &mut Work| !work.asked;
        let waited = self.changed.wait_timeout_while(work, AGAIN, unasked);
        let (mut work, _) = waited.unwrap_or_else(PoisonError::into_inner);
        work.asked = true;
        work
    }

    fn lock(&self) -> MutexGuard<'_, Work> {
        self.work.lock().unwrap_or_else(PoisonError::into_inner)
    }
}
