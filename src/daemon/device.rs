//! One disk: its layers, what is written above them, and what the guest sees of it.
//!
//! A disk is opened in four steps, between which the daemon changes its user and enters its sandbox:
//! [`Sources::open`] opens the local layers, [`Sources::connect`] starts a fetcher for the others,
//! [`WritableFiles::find`] finds the writable layer, and [`Device::load`] reads what both hold.

use std::os::unix::net::UnixStream;
use std::sync::Arc;

use super::handover::Ready;
use super::limits::SystemLimits;
use super::recorder::DiskRecorder;
use super::sources::Sources;
use super::writable_files::WritableFiles;
use super::{Config, Error};
use crate::engine::full_storage::FullStorage;
use crate::engine::rate_limit::LimitsSpec;
use crate::engine::ring::Rings;
use crate::engine::stats::{DiskCell, StatsPage};
use crate::engine::{BackendOptions, BlockBackend};
use crate::image::Image;
use crate::ratelimited_log;
use crate::source::Blob;
use crate::source::client::Client;
use crate::vhost::config_change::FrontEnds;
use crate::vhost::ownership::Ownership;
use crate::vhost::session::Session;
use crate::virtio::request::SERIAL_LEN;
use crate::writable::{self, Options, Snapshot, Snapshots, Volume};

/// What is opened before the sandbox is entered, for [`Device::load`].
pub(super) struct DeviceParts {
    pub(super) sources: Sources,
    pub(super) writable: Option<WritableFiles>,
    /// Rings of the queue workers.
    pub(super) rings: Rings,
    /// Whether a trace is recorded from the start on.
    pub(super) record: bool,
    /// Counters and gauges.
    pub(super) stats: Arc<StatsPage>,
}

/// A disk: its layers and its writable layer, the virtio-blk device that its queue workers serve, the front-ends
/// that use it, and their limit. The acceptor of front-ends, the control API and the sealer share it.
#[derive(Debug)]
pub struct Device {
    backend: Arc<BlockBackend>,
    /// Of a disk with a writable layer.
    snapshots: Option<Snapshots>,
    /// Of a disk with layers in registries.
    client: Option<Arc<Client>>,
    /// The layer in a registry that holds the image's trace.
    trace: Option<Blob>,
    recorder: DiskRecorder,
    /// The connected front-ends.
    front_ends: FrontEnds,
    /// Which of them has the disk.
    ownership: Ownership,
    max_front_ends: usize,
}

impl Device {
    /// Reads the layers and the writable layer. Opens files in the directories of the writable layer
    /// only. Waits for registries, a minute at most.
    ///
    /// # Errors
    ///
    /// [`Error::Layers`], [`Error::Image`] and [`Error::Writable`] if one of them cannot be read or breaks a rule of its
    /// format; [`Error::Limits`] if `limits` are too small for the queues.
    pub(super) fn load(
        config: &Config,
        parts: DeviceParts,
        limits: &SystemLimits,
    ) -> Result<Self, Error> {
        let sources = parts.sources.open_remotes(config)?;
        let recorder = DiskRecorder::default();
        if parts.record {
            recorder.start_loading(&sources.files);
        }
        let (volume, snapshots) = match parts.writable {
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
                let opened = Snapshots::load(&sources.stack, sources.files, files.paths(), options);
                let (volume, snapshots) = opened.map_err(Error::Writable)?;
                (volume, Some(snapshots))
            }
        };
        // Layers that snapshots added are not part of the serial.
        let serial = volume.image().serial(sources.stack.layers().len());
        let options = BackendOptions {
            queues: config.queues(),
            queue_size: config.queue_size,
            serial: config.serial.unwrap_or_else(|| padded(&serial)),
            block_cache: config.block_cache,
            on_full: config.on_full,
            tuning: config.tuning.clone(),
            limits: config.limits,
            stats: parts.stats,
        };
        // All files are open now.
        let max_front_ends = limits.check(config.queues(), volume.is_writable())?;
        let stats = &options.stats;
        stats.set(DiskCell::Size, volume.size());
        stats.set(DiskCell::Writable, volume.is_writable().into());
        let limit = config.upper_limit.unwrap_or(u64::MAX);
        stats.set(DiskCell::UpperLimit, limit);
        stats.set(DiskCell::BlockCacheLimit, config.block_cache);
        stats.set(DiskCell::TableBytes, volume.image().table_bytes());
        stats.set(DiskCell::Layers, volume.image().layers().len() as u64);
        let backend = Arc::new(BlockBackend::new(volume, options, parts.rings));
        backend.record_used();
        Ok(Self {
            backend,
            snapshots,
            client: sources.client,
            trace: sources.trace,
            recorder,
            front_ends: FrontEnds::default(),
            ownership: Ownership::new(config.takeover),
            max_front_ends,
        })
    }

    /// Takes the layer in a registry that holds the image's trace.
    pub(super) fn take_trace(&mut self) -> Option<Blob> {
        self.trace.take()
    }

    /// Returns the recorder of the reads.
    pub fn recorder(&self) -> &DiskRecorder {
        &self.recorder
    }

    /// Returns the client of the fetcher, for a disk with layers in registries.
    pub(super) fn client(&self) -> Option<&Client> {
        self.client.as_deref()
    }

    /// Ends the start: from now on, reads wait for registries as long as the command line says.
    pub fn start_serving(&self) {
        if let Some(client) = &self.client {
            client.start_serving();
        }
    }

    /// Returns the layers and the writable layer.
    pub fn volume(&self) -> &Volume {
        self.backend.volume()
    }

    /// Returns the writes that wait for space in the storage.
    pub fn full_storage(&self) -> &FullStorage {
        self.backend.full_storage()
    }

    /// Makes a session for a front-end that connected. `stream` blocks.
    pub(super) fn connect(&self, stream: UnixStream) -> Arc<Session> {
        Session::new(stream, self.backend.clone(), &self.front_ends)
    }

    /// Returns how many front-ends may be connected.
    pub(super) fn max_front_ends(&self) -> usize {
        self.max_front_ends
    }

    /// Returns which front-end has the disk.
    pub(super) fn ownership(&self) -> &Ownership {
        &self.ownership
    }

    /// Makes the disk `size` bytes large, durably, and tells the front-ends. A disk of this size stays as it is.
    ///
    /// # Errors
    ///
    /// [`writable::Error::ReadOnly`] without a writable layer, and those of [`Snapshots::grow_disk`].
    pub fn grow(&self, size: u64) -> Result<(), writable::Error> {
        let snapshots = self.snapshots.as_ref().ok_or(writable::Error::ReadOnly)?;
        let volume = self.volume();
        let old = volume.size();
        snapshots.grow_disk(size)?;
        self.stats().set(DiskCell::Size, volume.size());
        if size != old {
            ratelimited_log::info(format_args!(
                "the disk has grown from {old} to {size} bytes"
            ));
        }
        self.front_ends.tell_size();
        Ok(())
    }

    /// Returns what the node wants to know of a disk that is served.
    pub fn ready(&self) -> Ready {
        Ready {
            size_bytes: self.volume().size(),
            serial: self.serial(),
        }
    }

    /// Returns the rate limits.
    pub fn limits(&self) -> LimitsSpec {
        self.backend.rate_limiter().spec()
    }

    /// Replaces the rate limits. Requests that wait for tokens follow the new ones within 50 ms.
    pub fn set_limits(&self, limits: LimitsSpec) {
        self.backend.rate_limiter().replace(limits);
    }

    /// Returns the snapshots, oldest first.
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
        let taken = snapshots.take(name);
        self.stats().count(match taken {
            Ok(_) => DiskCell::SnapshotsTaken,
            Err(_) => DiskCell::SnapshotsFailed,
        });
        self.count_unsealed();
        taken
    }

    /// Returns whether a snapshot froze a layer that is not sealed.
    pub fn has_unsealed(&self) -> bool {
        self.snapshots().iter().any(|snapshot| !snapshot.sealed)
    }

    /// Seals the layers that snapshots froze.
    ///
    /// # Errors
    ///
    /// Those of [`Snapshots::seal`].
    pub fn seal(&self) -> Result<(), writable::Error> {
        let snapshots = self.snapshots.as_ref();
        let sealed = snapshots.map_or(Ok(()), |snapshots| snapshots.seal());
        self.count_unsealed();
        sealed
    }

    /// Returns the counters and gauges.
    pub fn stats(&self) -> &StatsPage {
        self.backend.stats()
    }

    /// Returns the serial number as text.
    pub fn serial(&self) -> String {
        let serial = String::from_utf8_lossy(self.backend.serial());
        serial.trim_end_matches('\0').to_owned()
    }

    fn count_unsealed(&self) {
        let unsealed = self
            .snapshots()
            .iter()
            .filter(|snapshot| !snapshot.sealed)
            .count();
        self.stats()
            .set(DiskCell::SnapshotsUnsealed, unsealed as u64);
    }
}

/// Pads a serial with zeros.
fn padded(text: &str) -> [u8; SERIAL_LEN] {
    let mut bytes = [0; SERIAL_LEN];
    bytes
        .iter_mut()
        .zip(text.bytes())
        .for_each(|(byte, text)| *byte = text);
    bytes
}

/// Creates io_uring rings for the queue workers. A worker without a ring reads with `pread`.
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
