//! Replacing disk processes: one at a request, or all, one after the other.

use std::sync::Arc;
use std::time::{Duration, Instant};

use serde_json::Value;

use super::{Ask, Code, Disk, DiskId, Disks, Failure, State};

use crate::ratelimited_log;

/// How long a new process may take to serve before the next disk is replaced.
const START_LIMIT: Duration = Duration::from_secs(70);

/// Pause between two looks at a disk that starts.
const START_PERIOD: Duration = Duration::from_millis(5);

/// Fields of offered feature bits.
const BITS: [&str; 2] = ["features", "protocol_features"];

impl Disks {
    /// Replaces the process of the disk `id` by a new one.
    ///
    /// # Errors
    /// [`Code::NotFound`]; [`Code::Conflict`] if a front-end is connected and the program offers fewer feature bits than
    /// the present process.
    pub async fn restart(&self, id: &DiskId) -> Result<Arc<Disk>, Failure> {
        let disk = self.get(id)?;
        let operation = disk.operation().await;
        self.check_current(&disk)?;
        if disk.state() == State::Failed {
            let mut processes = self.services.launcher.processes();
            let left = processes.remove(id).unwrap_or_default();
            disk.recover(&left, &self.services).await;
            drop(operation);
            if disk.state() == State::Listening {
                tokio::spawn(disk.clone().watch(self.services.clone()));
            }
        } else {
            self.check_features(&disk).await?;
            disk.restart().await;
            drop(operation);
        }
        Ok(disk)
    }

    /// Begins to replace the processes of all disks that serve, one after the other; returns their number. A disk that
    /// cannot be replaced keeps its process, and the log has the reason.
    ///
    /// # Errors
    /// [`Code::Conflict`] while an earlier call is under way.
    pub fn reload(self: &Arc<Self>) -> Result<usize, Failure> {
        let Ok(reloading) = self.reloading.clone().try_lock_owned() else {
            let text = "disks are being replaced already; events tell when each has been";
            return Err(Failure::new(Code::Conflict, text));
        };
        let disks: Vec<_> = self
            .all()
            .into_iter()
            .filter(|disk| disk.state() == State::Listening)
            .collect();
        let count = disks.len();
        let node = self.clone();
        tokio::spawn(async move {
            for disk in disks {
                if let Err(failure) = node.replace(&disk).await {
                    ratelimited_log::error(format_args!(
                        "disk {} keeps its process: {}",
                        disk.id(),
                        failure.text
                    ));
                }
            }
            ratelimited_log::info(format_args!("replaced the processes of {count} disks"));
            drop(reloading);
        });
        Ok(count)
    }

    /// Replaces the process of a disk, and waits until the next one serves.
    async fn replace(&self, disk: &Arc<Disk>) -> Result<(), Failure> {
        let before = disk.restarts();
        self.restart(disk.id()).await?;
        let end = Instant::now() + START_LIMIT;
        while disk.restarts() == before && disk.state() != State::Failed && Instant::now() < end {
            tokio::time::sleep(START_PERIOD).await;
        }
        Ok(())
    }

    /// Checks that the program offers all feature bits of the disk's process, if a front-end is connected: a guest keeps
    /// the features that it negotiated when its front-end connects again.
    async fn check_features(&self, disk: &Disk) -> Result<(), Failure> {
        if self.in_use(disk).is_none() {
            return Ok(());
        }
        let device = self.ask(disk, Ask::Device).await?;
        let (Some(present), Some(upper)) = (device.get("offered"), device.get("upper")) else {
            // The process is older than this field.
            return Ok(());
        };
        let kind = if upper.is_null() {
            "read_only"
        } else {
            "writable"
        };
        let program = self.services.launcher.offered_features().await?;
        let next = program.get(kind).unwrap_or(&Value::Null);
        for field in BITS {
            let bits = |offered: &Value| offered.get(field).and_then(Value::as_u64).unwrap_or(0);
            let missing = bits(present) & !bits(next);
            if missing != 0 {
                let text = format!(
                    "the program does not offer the bits {missing:#x} of {field} that the process of disk {} offers to \
                     its guest; disconnect the front-end first, or install a program that offers them",
                    disk.id()
                );
                return Err(Failure::new(Code::Conflict, text));
            }
        }
        Ok(())
    }
}
