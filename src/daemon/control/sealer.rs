//! The thread that seals what snapshots froze, while the guest goes on and more snapshots are taken.

use std::io;
use std::sync::Arc;
use std::sync::mpsc::{Receiver, RecvTimeoutError, SyncSender, sync_channel};
use std::thread;
use std::time::Duration;

use crate::daemon::device::Device;
use crate::reason::reason;

/// Pause before a failed seal is tried again: the file system may have space by then.
const AGAIN: Duration = Duration::from_secs(30);

/// Wakes the thread.
#[derive(Debug)]
pub struct Sealer {
    wake: SyncSender<()>,
}

impl Sealer {
    /// Starts the thread, which ends with this value.
    ///
    /// # Errors
    /// There is no thread to be had.
    pub fn start(device: Arc<Device>) -> io::Result<Self> {
        let (wake, asked) = sync_channel(1);
        let run = move || serve(&device, &asked);
        thread::Builder::new().name("seal".into()).spawn(run)?;
        let sealer = Self { wake };
        // There may be what there was no room for at the start.
        sealer.wake();
        Ok(sealer)
    }

    /// Lets all be sealed that is frozen by now.
    pub fn wake(&self) {
        // If it was asked already and has not begun, that will do.
        let _ = self.wake.try_send(());
    }
}

fn serve(device: &Device, asked: &Receiver<()>) {
    let mut wait = Duration::MAX;
    while asked.recv_timeout(wait) != Err(RecvTimeoutError::Disconnected) {
        wait = match device.seal() {
            Ok(()) => Duration::MAX,
            Err(error) => {
                log::warn!(
                    "control: cannot complete the layer of a snapshot: {}",
                    reason(&error)
                );
                AGAIN
            }
        };
    }
}
