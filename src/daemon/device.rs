//! One disk: its layers, what is written above them, and what the guest sees of it.
//!
//! A disk is opened in four steps, between which the daemon changes its user and enters its sandbox:
//! [`Sources::open`] opens the local layers, [`Sources::connect`] starts a fetcher for the others,
//! [`WritableFiles::find`] finds the writable layer, and [`Device::load`] reads what both hold.

use std::fs::{self, File, TryLockError};
use std::io;
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use uuid::Uuid;

use super::config::WritableSource;
use super::sources::{OpenSources, Sources};
use super::{Config, Error};
use crate::engine::ring::Rings;
use crate::engine::{BackendOptions, BlockBackend};
use crate::format::lsmt::HEADER_LEN;
use crate::format::lsmt::writable::Kind;
use crate::image::Image;
use crate::io::file_lock::{LockKind, lock_within};
use crate::io::regular::open_directory;
use crate::source::Blob;
use crate::source::client::Client;
use crate::source::recorder::Recorder;
use crate::vhost::config_change::FrontEnds;
use crate::virtio::request::SERIAL_LEN;
use crate::writable::{self, Options, Paths, Snapshot, Snapshots, Volume};

/// How long another process may keep the directory of a writable layer locked: it opens a layer there.
const LOCK_LIMIT: Duration = Duration::from_secs(10);

/// The files of a writable layer, which need not be there yet, in a directory that is.
#[derive(Debug)]
pub struct WritableFiles {
    paths: Paths,
    /// The locked directory of `--upper-auto`, in which the layer is created if missing. It is kept
    /// until the layer is open, and with that locked itself.
    automatic: Option<File>,
}

impl WritableFiles {
    /// Creates the directory of `--upper-auto` if it is missing.
    ///
    /// # Errors
    ///
    /// [`Error::Writable`] if it cannot be created.
    pub fn create_folder(source: &WritableSource) -> Result<(), Error> {
        match source {
            WritableSource::Files(_) => Ok(()),
            WritableSource::Folder(folder) => {
                fs::create_dir_all(folder).map_err(|source| failed("create", folder, source))
            }
        }
    }

    /// Finds out where the files are, and locks the directory of `--upper-auto`, which is there.
    ///
    /// # Errors
    ///
    /// [`Error::Writable`] if a directory is missing, or stays locked.
    pub fn find(source: &WritableSource) -> Result<Self, Error> {
        let (paths, automatic) = match source {
            WritableSource::Files(paths) => (paths.clone(), None),
            WritableSource::Folder(folder) => {
                let paths = Paths {
                    data: folder.join("upper.data"),
                    index: folder.join("upper.index"),
                };
                (paths, Some(lock(folder)?))
            }
        };
        let absolute =
            |path: &Path| std::path::absolute(path).map_err(|source| failed("find", path, source));
        let paths = Paths {
            data: absolute(&paths.data)?,
            index: absolute(&paths.index)?,
        };
        for directory in paths.directories() {
            let found = fs::metadata(&directory);
            found.map_err(|source| failed("open", &directory, source))?;
        }
        Ok(Self { paths, automatic })
    }

    /// The paths of the files.
    pub fn paths(&self) -> &Paths {
        &self.paths
    }

    /// Creates the layer above `sources` if it is missing and its place is ours to choose.
    fn create_if_missing(&self, sources: &OpenSources) -> Result<(), Error> {
        let Self { paths, automatic } = self;
        // The index is created last, and goes when a snapshot seals the data. A header alone was left
        // behind by a process that died in between: nothing was ever written behind it.
        let len = paths.data.metadata().map(|data| data.len());
        let is_there =
            paths.index.exists() || len.as_ref().is_ok_and(|len| *len > HEADER_LEN as u64);
        if automatic.is_none() || is_there {
            return Ok(());
        }
        if len.is_ok() {
            fs::remove_file(&paths.data).map_err(|source| failed("remove", &paths.data, source))?;
        }
        let image = sources.image().map_err(Error::Image)?;
        let size = image.at_own_size().sectors().bytes();
        let header = image
            .header_above(size, Uuid::new_v4())
            .map_err(Error::Image)?;
        writable::create(paths, Kind::Hybrid, &header).map_err(Error::Writable)?;
        log::info!("created the writable layer {}", paths.data.display());
        Ok(())
    }
}

fn failed(what: &'static str, path: &Path, source: io::Error) -> Error {
    let path = path.to_owned();
    Error::Writable(writable::Error::File { what, path, source })
}

/// Locks a directory: a second daemon started by mistake must not create or open the layer in it at the
/// same time.
fn lock(folder: &Path) -> Result<File, Error> {
    let opened = open_directory(folder).map_err(|source| failed("open", folder, source))?;
    match lock_within(&opened, LockKind::Exclusive, LOCK_LIMIT) {
        Ok(()) => Ok(opened),
        Err(TryLockError::WouldBlock) => {
            let path = folder.to_owned();
            Err(Error::Writable(writable::Error::Busy { path }))
        }
        Err(TryLockError::Error(source)) => Err(failed("lock", folder, source)),
    }
}

/// A disk, and how snapshots of it are taken.
#[derive(Debug)]
pub struct Device {
    backend: Arc<BlockBackend>,
    front_ends: Arc<FrontEnds>,
    /// For a disk with a writable layer.
    snapshots: Option<Snapshots>,
    /// For a disk with layers in registries.
    client: Option<Arc<Client>>,
    /// The layer in a registry that holds the image's trace.
    trace: Option<Blob>,
}

impl Device {
    /// Reads the layers and the writable layer. Opens files in the directories of the writable layer
    /// only. Waits for registries, a minute at most. `recorder` notes what is read of the layers.
    ///
    /// # Errors
    ///
    /// [`Error::Layers`], [`Error::Image`] and [`Error::Writable`] if one of them cannot be read or breaks a rule of its
    /// format.
    pub fn load(
        config: &Config,
        sources: Sources,
        writable: Option<WritableFiles>,
        rings: Rings,
        recorder: Option<&Arc<Recorder>>,
    ) -> Result<Self, Error> {
        let mut sources = sources.open_remotes(config)?;
        if let Some(recorder) = recorder {
            sources.files = sources.files.recorded(recorder);
        }
        let (volume, snapshots) = match writable {
            None => {
                let image = Image::load(sources.files).map_err(Error::Image)?;
                (Arc::new(Volume::read_only(image)), None)
            }
            Some(files) => {
                files.create_if_missing(&sources)?;
                let options = Options {
                    limit: config.upper_limit.unwrap_or(u64::MAX),
                    ..Options::default()
                };
                let opened = Snapshots::load(&sources.stack, sources.files, &files.paths, options);
                let (volume, snapshots) = opened.map_err(Error::Writable)?;
                (volume, Some(snapshots))
            }
        };
        // What snapshots have put above the layers since is no part of the serial.
        let serial = volume.image().serial(sources.stack.layers().len());
        let options = BackendOptions {
            queues: config.queues(),
            queue_size: config.queue_size,
            serial: config.serial.unwrap_or_else(|| padded(&serial)),
            block_cache: config.block_cache,
            tuning: config.tuning.clone(),
        };
        Ok(Self {
            backend: Arc::new(BlockBackend::new(volume, options, rings)),
            front_ends: Arc::default(),
            snapshots,
            client: sources.client,
            trace: sources.trace,
        })
    }

    /// The layer in a registry that holds the image's trace.
    pub(super) fn take_trace(&mut self) -> Option<Blob> {
        self.trace.take()
    }

    /// What brings the bytes of layers in registries.
    pub(super) fn client(&self) -> Option<&Client> {
        self.client.as_deref()
    }

    /// From now on reads wait for registries as long as the command line says.
    pub fn start_serving(&self) {
        if let Some(client) = &self.client {
            client.start_serving();
        }
    }

    /// What the queues serve.
    pub fn backend(&self) -> &Arc<BlockBackend> {
        &self.backend
    }

    /// Those that are told when the disk grows.
    pub fn front_ends(&self) -> &Arc<FrontEnds> {
        &self.front_ends
    }

    /// Makes the disk `size` bytes large, durably, and tells the front-ends. That it has this size already is no
    /// error.
    ///
    /// # Errors
    ///
    /// [`writable::Error::ReadOnly`] without a writable layer, and those of [`Snapshots::grow_disk`].
    pub fn grow(&self, size: u64) -> Result<(), writable::Error> {
        let snapshots = self.snapshots.as_ref().ok_or(writable::Error::ReadOnly)?;
        let volume = self.backend.volume();
        let old = volume.size();
        snapshots.grow_disk(size)?;
        if size != old {
            log::info!("the disk has grown from {old} to {size} bytes");
        }
        self.front_ends.tell_size();
        Ok(())
    }

    /// Whether snapshots can be taken.
    pub fn is_writable(&self) -> bool {
        self.snapshots.is_some()
    }

    /// The snapshots, the oldest first.
    pub fn snapshots(&self) -> Vec<Snapshot> {
        let snapshots = self.snapshots.as_ref();
        snapshots.map_or_else(Vec::new, |snapshots| snapshots.list())
    }

    /// Takes a snapshot of this name, which [`Device::seal`] then seals.
    ///
    /// # Errors
    ///
    /// [`writable::Error::ReadOnly`] without a writable layer, and those of [`Snapshots::take`].
    pub fn take_snapshot(&self, name: &str) -> Result<Snapshot, writable::Error> {
        let snapshots = self.snapshots.as_ref().ok_or(writable::Error::ReadOnly)?;
        snapshots.take(name)
    }

    /// Seals what snapshots froze.
    ///
    /// # Errors
    ///
    /// Those of [`Snapshots::seal`].
    pub fn seal(&self) -> Result<(), writable::Error> {
        let snapshots = self.snapshots.as_ref();
        snapshots.map_or(Ok(()), |snapshots| snapshots.seal())
    }
}

/// A serial with zeros behind it.
fn padded(text: &str) -> [u8; SERIAL_LEN] {
    let mut bytes = [0; SERIAL_LEN];
    bytes
        .iter_mut()
        .zip(text.bytes())
        .for_each(|(byte, text)| *byte = text);
    bytes
}

/// Makes io_uring rings for the queue workers, which read with `pread` where there are none.
pub fn make_rings(count: usize) -> Rings {
    let (rings, error) = Rings::make(count);
    if let Some(error) = error {
        let made = rings.made();
        log::warn!(
            "created {made} of {count} io_uring rings; other queues read with pread: {error}"
        );
    }
    rings
}

#[cfg(test)]
mod tests {
    use std::sync::Barrier;
    use std::thread;

    use super::*;
    use crate::format::lsmt::{Header, HeaderKind};
    use crate::image::config::Stack;
    use crate::writable::WritableLayer;

    /// An image of 5 sectors and a half that holds nothing.
    fn stack(dir: &Path) -> Stack {
        let header = Header {
            index_offset: HEADER_LEN as u64,
            index_entries: 0,
            virtual_size: 5 * 512 + 100,
            uuid: Uuid::from_u128(7),
            parent_uuid: Uuid::nil(),
            message: Vec::new(),
        };
        let mut bytes = header.encode(HeaderKind::Header).to_vec();
        bytes.extend(header.encode(HeaderKind::Trailer));
        let path = dir.join("layer");
        fs::write(&path, bytes).unwrap();
        Stack::new([path])
    }

    fn open_upper(paths: &Paths) -> Result<WritableLayer, writable::Error> {
        let options = Options::default();
        WritableLayer::open(paths, &options)
    }

    fn sources(stack: &Stack) -> OpenSources {
        OpenSources {
            stack: stack.clone(),
            files: stack.open_files().unwrap(),
            client: None,
            trace: None,
        }
    }

    fn find_or_create(folder: &Path, stack: &Stack) -> Paths {
        let source = WritableSource::Folder(folder.to_owned());
        WritableFiles::create_folder(&source).unwrap();
        let files = WritableFiles::find(&source).unwrap();
        files.create_if_missing(&sources(stack)).unwrap();
        files.paths
    }

    #[test]
    fn a_folder_gets_one_layer_and_keeps_it() {
        let dir = tempfile::tempdir().unwrap();
        let (stack, folder) = (stack(dir.path()), dir.path().join("a/b"));
        let paths = find_or_create(&folder, &stack);
        let upper = open_upper(&paths).unwrap();
        assert_eq!(upper.header().virtual_size, 6 * 512);
        assert_eq!(upper.header().parent_uuid, Uuid::from_u128(7));
        let uuid = upper.header().uuid;
        drop(upper);
        assert_eq!(find_or_create(&folder, &stack), paths);
        assert_eq!(open_upper(&paths).unwrap().header().uuid, uuid);
    }

    #[test]
    fn of_two_who_start_at_once_one_has_the_layer() {
        for _ in 0..8 {
            let dir = tempfile::tempdir().unwrap();
            let stack = stack(dir.path());
            let folder = dir.path().join("upper");
            let barrier = Barrier::new(2);
            let start = || {
                barrier.wait();
                let source = WritableSource::Folder(folder.clone());
                WritableFiles::create_folder(&source).unwrap();
                let files = WritableFiles::find(&source).unwrap();
                files.create_if_missing(&sources(&stack)).unwrap();
                (open_upper(&files.paths), files.paths)
            };
            let (one, other) = thread::scope(|scope| {
                let other = scope.spawn(start);
                (start(), other.join().unwrap())
            });
            let (opened, failed) = match one.0.is_ok() {
                true => (one, other.0),
                false => (other, one.0),
            };
            assert!(
                matches!(failed, Err(writable::Error::Busy { .. })),
                "{failed:?}"
            );
            let uuid = opened.0.unwrap().header().uuid;
            assert_eq!(open_upper(&opened.1).unwrap().header().uuid, uuid);
        }
    }

    #[test]
    fn what_is_left_of_making_one_is_made_anew_but_data_is_kept() {
        let dir = tempfile::tempdir().unwrap();
        let stack = stack(dir.path());
        let data = dir.path().join("upper.data");
        for len in [0, HEADER_LEN] {
            fs::write(&data, vec![0; len]).unwrap();
            find_or_create(dir.path(), &stack);
            fs::remove_file(dir.path().join("upper.index")).unwrap();
        }
        fs::write(&data, vec![1; HEADER_LEN + 1]).unwrap();
        let paths = find_or_create(dir.path(), &stack);
        assert!(open_upper(&paths).is_err());
        assert_eq!(fs::read(&data).unwrap(), vec![1; HEADER_LEN + 1]);
    }
}
