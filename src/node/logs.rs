//! Bounds the logs of disk processes.

use std::io;
use std::sync::Arc;
use std::time::Duration;

use super::disks::Disks;
use crate::ratelimited_log;

/// Pause between two looks at the logs.
const PERIOD: Duration = Duration::from_secs(2);

/// Bounds the logs for ever.
pub async fn bound(disks: Arc<Disks>) {
    loop {
        tokio::time::sleep(PERIOD).await;
        let node = disks.clone();
        // Files are read on a thread that may block.
        if let Err(error) = tokio::task::spawn_blocking(move || look(&node)).await {
            ratelimited_log::error(format_args!("cannot bound the logs of disks: {error}"));
            return;
        }
    }
}

fn look(disks: &Disks) {
    for disk in disks.all() {
        match disks.bound_log(&disk) {
            // A disk that is being removed or was never started has no log.
            Err(error) if error.kind() != io::ErrorKind::NotFound => {
                let id = disk.id();
                ratelimited_log::warn(format_args!("cannot bound the log of disk {id}: {error}"));
            }
            _ => {}
        }
    }
}
