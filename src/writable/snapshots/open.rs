//! Opens a disk with its snapshots.

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::AtomicBool;

use super::Snapshots;
use crate::image::config::Stack;
use crate::image::lineage::Placed;
use crate::image::segment::MAX_LAYERS;
use crate::image::{Image, OpenStack};
use crate::ratelimited_log;
use crate::source::{self, LayerRef};
use crate::writable::above::{Above, ActiveLayer};
use crate::writable::files::sync_name;
use crate::writable::frozen::FrozenLayer;
use crate::writable::locks::{Rank, RankedMutex, Sealing};
use crate::writable::manifest::{FrozenPair, Manifest, ManifestFile, manifest_path};
use crate::writable::seal::remove_index;
use crate::writable::{Error, Options, Paths, Volume, WritableLayer};

impl Snapshots {
    /// Loads the disk that was created with the pair `first`, with the pairs that snapshots have added since.
    /// `stack` names the layers below, which are open as `files`; it may be empty. A pair without a size gets that of the
    /// layers below.
    ///
    /// Opens files in the directories of `first` only, so that a process in its sandbox can call it; the paths
    /// must be absolute then.
    ///
    /// # Errors
    /// Those of [`Image::load`] and [`WritableLayer::open`]; [`Error::File`] if the manifest cannot be read.
    pub fn load(
        stack: &Stack,
        mut files: OpenStack,
        first: &Paths,
        options: Options,
    ) -> Result<(Arc<Volume>, Self), Error> {
        let first = Paths {
            data: absolute(&first.data)?,
            index: absolute(&first.index)?,
        };
        let stack = absolute_stack(stack)?;
        let path = manifest_path(&first);
        loop {
            let manifest = Manifest::load(&path)?;
            let spare = files.clone();
            let opened = Self::open_as(&first, &stack, files, options, &manifest);
            // The former process may have taken a snapshot while this one waited for its lock.
            if Manifest::load(&path)? == manifest {
                return opened.inspect(|(_, snapshots)| snapshots.remove_leftovers(manifest));
            }
            files = spare;
        }
    }

    /// Opens the pairs that `manifest` names.
    fn open_as(
        first: &Paths,
        stack: &Stack,
        files: OpenStack,
        options: Options,
        manifest: &Manifest,
    ) -> Result<(Arc<Volume>, Self), Error> {
        if *manifest != Manifest::default() {
            // Its name may not be durable yet, and the following steps cannot be undone.
            sync_name(&manifest_path(first))?;
        }
        let frozen = FrozenLayers::complete(manifest.frozen(), first)?;
        let data_file = |pair: &FrozenPair| LayerRef::from(pair.paths(first).data);
        let sealed: Vec<_> = frozen.sealed.iter().map(data_file).collect();
        let files = files.below(&sealed)?;
        let image = match files.is_empty() {
            true => Image::empty(stack.lineage()),
            false => Image::load(files)?,
        };
        let size = image.at_own_size().sectors().bytes();
        let active = ActiveLayer {
            number: manifest.active(),
            layer: WritableLayer::open(&manifest.active_paths(first), Some(size), &options)?.into(),
        };
        let unsealed = frozen.unsealed.iter().map(FrozenLayer::layer);
        let placed: Vec<_> = unsealed.chain([&active.layer]).map(placed).collect();
        image.check_above(&placed)?;
        let seal_first = !frozen.unsealed.is_empty();
        let above = Above::new(frozen.sealed, frozen.unsealed, active);
        let volume = Arc::new(Volume::with_layers(image, above));
        let snapshots = Self {
            volume: volume.clone(),
            first: first.clone(),
            options,
            lower: stack.layers().to_vec(),
            max_layers: source::make_room(MAX_LAYERS),
            manifest: RankedMutex::new(Rank::Manifest, ManifestFile::new(first, manifest)),
            sealing: Sealing::locked(),
            seal_first: AtomicBool::new(seal_first),
        };
        Ok((volume, snapshots))
    }

    /// Removes what interrupted operations left beside the disk, whose manifest is `manifest`. The disk is served also if
    /// that fails.
    fn remove_leftovers(&self, manifest: Manifest) {
        let mut file = self.manifest.lock();
        let removed = manifest.remove_leftovers(&self.first);
        if let Err(error) = removed.and_then(|()| file.forget_replaced(manifest)) {
            ratelimited_log::warn(format_args!(
                "cannot remove files that are not part of the disk: {error}"
            ));
        }
    }
}

/// Returns a writable layer as a member of a stack.
fn placed(layer: &Arc<WritableLayer>) -> Placed {
    Placed::new(LayerRef::from(&layer.paths().data), &layer.header())
}

/// The frozen layers of a disk, oldest first; all sealed ones lie below the others.
#[derive(Default)]
struct FrozenLayers {
    sealed: Vec<FrozenPair>,
    unsealed: Vec<FrozenLayer>,
}

impl FrozenLayers {
    /// Completes the seal of each pair. A layer without space for it stays unsealed, and so do all above it.
    fn complete(pairs: &[FrozenPair], first: &Paths) -> Result<Self, Error> {
        let mut layers = Self::default();
        let mut no_space = None;
        for pair in pairs {
            let paths = pair.paths(first);
            if no_space.is_none() {
                match complete_seal(&paths) {
                    Ok(()) => {
                        layers.sealed.push(pair.clone());
                        continue;
                    }
                    Err(error) if error.is_full() => no_space = Some(error),
                    Err(error) => return Err(error),
                }
            }
            let layer = match WritableLayer::open(&paths, None, &Options::default()) {
                Err(error @ Error::Sealed { .. }) => return Err(no_space.unwrap_or(error)),
                opened => opened?,
            };
            let frozen = FrozenLayer::reopened(pair.clone(), layer)?;
            layers.unsealed.push(frozen);
        }
        if let Some(error) = no_space {
            ratelimited_log::warn(format_args!(
                "cannot complete the layer of a snapshot: {error}"
            ));
        }
        Ok(layers)
    }
}

/// Completes the seal of a frozen layer that is not in use.
pub(in crate::writable) fn complete_seal(paths: &Paths) -> Result<(), Error> {
    if !paths.index.exists() {
        return Ok(());
    }
    match WritableLayer::open(paths, None, &Options::default()) {
        Err(Error::Sealed { .. }) => remove_index(paths),
        opened => opened?.seal(),
    }
}

/// Returns the stack with absolute paths.
fn absolute_stack(stack: &Stack) -> Result<Stack, Error> {
    let layers = stack.layers().iter().map(|layer| {
        let failed = |source| source::Error::Open {
            layer: layer.clone(),
            source,
        };
        layer.absolute().map_err(failed)
    });
    let layers: Vec<_> = layers.collect::<Result<_, _>>()?;
    Ok(Stack::new(layers).with_lineage(stack.lineage()))
}

fn absolute(path: &Path) -> Result<PathBuf, Error> {
    std::path::absolute(path).map_err(Error::file("find", path))
}
