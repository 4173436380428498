//! `ovbd merge`: one sealed layer from a stack of them and a writable one above.

use std::num::NonZero;
use std::path::PathBuf;

use indicatif::ProgressBar;
use uuid::Uuid;

use super::Error;
use super::commit::write;
use super::disk::{Disk, Files};
use super::layer_writer::{LayerFormat, Written};
use super::name::hashed;
use crate::format::zfile::BlockFormat;

/// What to make a layer of, and how.
#[derive(Clone, Debug)]
pub struct Merge {
    /// The layers. No process may have the writable layer open.
    pub files: Files,
    /// File to be written; one that exists is replaced.
    pub to: PathBuf,
    /// How blocks are compressed; `None`: the layer is not compressed.
    pub blocks: Option<BlockFormat>,
    /// Whether to wrap it in a tar member.
    pub tar: bool,
    /// Name of the layer; `None`: that of the topmost layer, or one made from the message if that has
    /// none.
    pub uuid: Option<Uuid>,
    /// Commit message, of at most 256 bytes.
    pub message: String,
    /// Threads that read, unpack and compress.
    pub threads: NonZero<usize>,
}

/// Makes one layer that can take the place of all of them: its disk is that of the topmost, its
/// parent that of the bottom one. Sectors that a layer makes zero stay so, for the layers that may
/// lie below. The output does not depend on the number of threads.
///
/// # Errors
/// Something cannot be read or written; there is no output then.
pub fn merge(task: &Merge, progress: &ProgressBar) -> Result<Written, Error> {
    let disk = Disk::open(&task.files)?;
    let layers = disk.image().map_or(&[][..], |image| image.layers()).iter();
    let names = layers.map(|layer| (layer.uuid(), layer.parent_uuid()));
    let upper = disk.upper().map(|upper| &upper.header);
    let names = names.chain(upper.map(|header| (header.uuid, header.parent_uuid)));
    let (names, parents): (Vec<_>, Vec<_>) = names.unzip();
    // Layers above the topmost one name that as their parent, and shall find it.
    let top = names.last().filter(|top| !top.is_nil());
    let uuid = task.uuid.or(top.copied()).unwrap_or_else(|| {
        let parts = names.iter().map(|name: &Uuid| &name.as_bytes()[..]);
        let parts: Vec<_> = parts.chain([task.message.as_bytes()]).collect();
        hashed(&parts)
    });
    let format = LayerFormat {
        blocks: task.blocks,
        tar: task.tar,
        uuid,
        parent_uuid: parents.first().copied().unwrap_or_default(),
        message: task.message.clone().into_bytes(),
    };
    write(&disk, &task.to, format, task.threads, progress)
}
