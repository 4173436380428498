//! `ovbd merge`: makes one sealed layer of several layers and an optional writable layer.

use std::num::NonZero;

use indicatif::ProgressBar;
use uuid::Uuid;

use super::Error;
use super::commit::write;
use super::layer_writer::{LayerFormat, Written, message};
use super::loaded_stack::LoadedStack;
use super::name::hashed;
use super::output::NewFile;
use crate::format::zfile::BlockFormat;

/// The layer to make.
#[derive(Clone, Debug)]
pub struct Merge {
    /// Format of compressed blocks. `None`: no compression.
    pub blocks: Option<BlockFormat>,
    /// Whether the layer is wrapped in tar.
    pub tar: bool,
    /// Uuid of the layer. `None`: that of the topmost layer, or, if that has none, derived from the
    /// message.
    pub uuid: Option<Uuid>,
    /// Text of the commit message.
    pub message: String,
    /// Number of threads that read, decode and compress.
    pub threads: NonZero<usize>,
}

/// Makes one layer that can replace all of them: with the size of the topmost layer, and the parent
/// of the bottom layer. Zeroed ranges are kept, because layers below may hold data there. The
/// output does not depend on the number of threads.
///
/// # Errors
/// [`Error::OutputIsInput`] and [`Error::TooManyMappings`]; others if something cannot be read or written.
/// There is no output then.
pub fn merge(
    stack: &LoadedStack,
    task: &Merge,
    file: NewFile,
    progress: &ProgressBar,
) -> Result<Written, Error> {
    let layers = stack.image().map_or(&[][..], |image| image.layers()).iter();
    let names = layers.map(|layer| (layer.uuid(), layer.parent_uuid()));
    let upper = stack.upper().map(|upper| upper.layer().header());
    let names = names.chain(upper.map(|header| (header.uuid, header.parent_uuid)));
    let (names, parents): (Vec<_>, Vec<_>) = names.unzip();
    // Layers above the topmost one name it as their parent, and must find it.
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
        message: message(&task.message, stack.made_upon())?,
    };
    write(stack, file, format, task.threads, progress)
}
