//! `ovbd upper create`: creates an empty writable layer.

use uuid::Uuid;

use super::Error;
use super::open_files::OpenFiles;
use crate::format::lsmt::writable::Kind;
use crate::image::Image;
use crate::writable::{self, Paths};

/// The writable layer to create.
#[derive(Clone, Debug)]
pub struct CreateUpper {
    /// Its files, which must not exist.
    pub paths: Paths,
    /// Placement of data.
    pub kind: Kind,
    /// Size of the disk in bytes. `None`: that of the layers below.
    pub size: Option<u64>,
    /// Uuid of the layer. `None`: random.
    pub uuid: Option<Uuid>,
}

/// Creates an empty writable layer. Its parent is the topmost of the layers `below`.
///
/// # Errors
/// The layers cannot be opened, a file exists or cannot be written, or the size is invalid.
pub fn create(task: &CreateUpper, below: OpenFiles) -> Result<(), Error> {
    let image = match below.layers().is_empty() && task.size.is_some() {
        true => Image::empty(below.lineage()),
        false => below.load()?,
    };
    let size = task.size.unwrap_or(image.size());
    let header = image.header_above(size, task.uuid.unwrap_or_else(Uuid::new_v4))?;
    Ok(writable::create(&task.paths, task.kind, &header)?)
}
