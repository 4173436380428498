//! `ovbd upper create`: the files of an empty writable layer.

use uuid::Uuid;

use super::Error;
use crate::format::lsmt::Header;
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
        true => None,
        false => Some(Image::open(&task.stack)?),
    };
    let image = image.as_ref();
    let size = image.map_or(0, Image::size);
    let top = image.and_then(|image| image.layers().last());
    let header = Header::empty(
        task.size.unwrap_or(size),
        task.uuid.unwrap_or_else(Uuid::new_v4),
        top.map_or(Uuid::nil(), |top| top.uuid()),
    );
    Ok(writable::create(&task.paths, task.kind, &header)?)
}
