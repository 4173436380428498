//! `ovbd upper create`: the files of an empty writable layer.

use uuid::Uuid;

use super::Error;
use crate::format::lsmt::writable::Kind;
use crate::image::Image;
use crate::image::config::Stack;
use crate::writable::{self, Paths};

/// What to make.
#[derive(Clone, Debug)]
pub struct CreateUpper {
    /// The files, which must not be there yet.
    pub paths: Paths,
    /// How data is placed.
    pub kind: Kind,
    /// The layers it is to lie upon; possibly none.
    pub stack: Stack,
    /// Size of the disk in bytes; `None`: that of the layers.
    pub size: Option<u64>,
    /// Name of the layer; `None`: a random one.
    pub uuid: Option<Uuid>,
}

/// Makes an empty writable layer, whose parent is the topmost of the layers.
///
/// # Errors
/// The layers cannot be opened, a file exists or cannot be written, or the size is impossible.
pub fn create(task: &CreateUpper) -> Result<(), Error> {
    let image = match task.stack.layers().is_empty() && task.size.is_some() {
        true => Image::empty(),
        false => Image::open(&task.stack)?,
    };
    let size = task.size.unwrap_or(image.size());
    let header = image.header_above(size, task.uuid.unwrap_or_else(Uuid::new_v4));
    Ok(writable::create(&task.paths, task.kind, &header)?)
}
