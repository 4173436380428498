//! The thread that seals the layers that snapshots froze, while the disk is in use.

use std::io;
use std::sync::Arc;
use std::sync::mpsc::{Receiver, RecvTimeoutError, SyncSender, sync_channel};
use std::thread;
use std::time::Duration;

use crate::daemon::device::Device;
use crate::ratelimited_log;
use crate::reason::reason;

/// Pause before a failed seal is tried again; the file system may have space by then.
const AGAIN: Duration = Duration::from_secs(30);

/// Handle of the thread. The thread ends when it is dropped.
#[derive(Debug)]
pub struct Sealer {
    wake: SyncSender<()>,
}

impl Sealer {
    /// Starts the thread.
    ///
    /// # Errors
    /// Those of the system: no thread can be started.
    pub fn start(device: Arc<Device>) -> io::Result<Self> {
        let (wake, asked) = sync_channel(1);
        let run = move || serve(&device, &asked);
        thread::Builder::new().name("seal".into()).spawn(run)?;
        let sealer = Self { wake };
        // At the start there may have been no space to seal a layer.
        sealer.wake();
        Ok(sealer)
    }

    /// Seals all layers that are frozen by now, in the background.
    pub fn wake(&self) {
        // A full channel holds a request that has not begun; it covers this one.
        let _ = self.wake.try_send(());
    }
}

fn serve(device: &Device, asked: &Receiver<()>) {
    let mut wait = Duration::MAX;
    while asked.recv_timeout(wait) != Err(RecvTimeoutError::Disconnected) {
        wait = match device.seal() {
            Ok(()) => Duration::MAX,
            Err(error) => {
                ratelimited_log::warn(format_args!(
                    "control: cannot complete the layer of a snapshot: {}",
                    reason(&error)
                ));
                AGAIN
            }
        };
    }
}
