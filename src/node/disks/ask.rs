//! Operations that the process of a disk performs.

use std::path::PathBuf;

use serde_json::Value;

use super::{Code, Content, Disk, DiskId, Disks, Failure, Kind, Origin, State};
use crate::engine::stats::DiskCell;
use crate::tool::ctl::{self, Ask};

impl Disks {
    /// Makes the disk `id` `size` bytes large. A disk of that size stays as it is.
    ///
    /// # Errors
    /// [`Code::NotFound`]; [`Code::ReadOnly`]; [`Code::Conflict`] if the disk is larger; what the disk process reports.
    pub async fn resize(&self, id: &DiskId, size: u64) -> Result<std::sync::Arc<Disk>, Failure> {
        let disk = self.get(id)?;
        let old = disk.size();
        self.ask(&disk, Ask::Resize { size }).await?;
        disk.set_size(size);
        if old != Some(size) {
            self.services.events.add(id, Kind::Resized, None);
        }
        Ok(disk)
    }

    /// The snapshots of disk `id`, oldest first.
    ///
    /// # Errors
    /// [`Code::NotFound`]; what the disk process reports.
    pub async fn snapshots(&self, id: &DiskId) -> Result<Value, Failure> {
        self.ask(&*self.get(id)?, Ask::Snapshots).await
    }

    /// Returns the layers that the process of disk `id` has open.
    ///
    /// # Errors
    /// [`Code::NotFound`]; what the disk process reports.
    pub async fn image(&self, id: &DiskId) -> Result<Value, Failure> {
        self.ask(&*self.get(id)?, Ask::Image).await
    }

    /// Takes a snapshot of disk `id`; one of the same name is returned as it is.
    ///
    /// # Errors
    /// [`Code::NotFound`]; [`Code::ReadOnly`]; what the disk process reports.
    pub async fn snapshot(&self, id: &DiskId, name: String, wait: bool) -> Result<Value, Failure> {
        let disk = self.get(id)?;
        let made = self.ask(&disk, Ask::Snapshot { name, wait }).await?;
        self.services.events.add(disk.id(), Kind::Snapshot, None);
        Ok(made)
    }

    /// The layers of a snapshot of another disk.
    pub(super) async fn fork(&self, origin: &Origin) -> Result<Content, Failure> {
        let made = self
            .snapshot(&origin.disk, origin.snapshot.clone(), false)
            .await?;
        let layers = made
            .get("layers")
            .and_then(Value::as_array)
            .into_iter()
            .flatten();
        let layers: Vec<_> = layers
            .filter_map(Value::as_str)
            .map(PathBuf::from)
            .collect();
        match layers.is_empty() {
            true => Err(Failure::new(
                Code::Internal,
                format!("disk {} reported no layers for the snapshot", origin.disk),
            )),
            false => Ok(Content::Layers(layers)),
        }
    }

    /// Asks the process of a disk.
    ///
    /// # Errors
    /// [`Code::Starting`] while there is none, [`Code::Conflict`] for a failed disk; what the process answers.
    pub(super) async fn ask(&self, disk: &Disk, ask: Ask) -> Result<Value, Failure> {
        disk.check_served()?;
        let control = self.services.launcher.control(disk.id());
        let asked = tokio::task::spawn_blocking(move || ctl::ask(&control, &ask)).await;
        let answer = asked.map_err(|error| Failure::caused(Code::Internal, &error))?;
        answer.map_err(|error| self.unanswered(disk, &error))
    }

    fn unanswered(&self, disk: &Disk, error: &ctl::Error) -> Failure {
        let read_only = || self.figures(disk).disk(DiskCell::Writable) == 0;
        match error {
            ctl::Error::Refused { status: 409, .. } if read_only() => {
                Failure::caused(Code::ReadOnly, error)
            }
            ctl::Error::Refused { status: 409, .. } => Failure::caused(Code::Conflict, error),
            ctl::Error::Refused { status: 400, .. } => Failure::caused(Code::BadRequest, error),
            ctl::Error::Refused { text, .. } => Failure::reported(text.clone(), Code::Internal),
            ctl::Error::Late { .. } => Failure::caused(Code::Timeout, error),
            // The process has ended meanwhile, and is started again.
            ctl::Error::Connection { .. } if disk.state() != State::Failed => {
                Failure::caused(Code::Starting, error)
            }
            _ => Failure::caused(Code::Internal, error),
        }
    }
}
