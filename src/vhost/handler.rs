//! State of one front-end connection, and the effect of each vhost-user message on it.
//!
//! A change under running queues (memory, descriptors, features, logs) always takes three steps: drain
//! and stop the workers concerned, change the state, start the workers. No worker thus writes to a
//! memory region once its removal is acknowledged.
//!
//! A front-end may omit messages that it sent on an earlier connection, and send messages in any order.
//! Omitted features count as acknowledged.
#![cfg_attr(
    not(test),
    warn(clippy::indexing_slicing, clippy::arithmetic_side_effects)
)]

mod config_space;

use std::fs::File;
use std::os::unix::net::UnixStream;
use std::sync::Arc;

use rustix::io::ioctl_fionread;
use serde::Serialize;
use vhost::vhost_user::message::{
    VhostUserInflight, VhostUserLog, VhostUserProtocolFeatures, VhostUserVirtioFeatures,
};

use super::config_change::{FrontEnds, SizeNotifier};
use super::refusal::Refusal;
use super::vring::{UserRings, Vring};
use crate::engine::BlockBackend;
use crate::engine::setup::{AfterStop, ConnectionContext};
use crate::io::interrupt::PeerCall;
use crate::virtio::config::{self, DeviceConfig};
use crate::virtio::dirty_log::DirtyLog;
use crate::virtio::inflight::{InflightArea, Queues};
use crate::virtio::memory::{Memory, RegionInfo};

/// Most memory regions of a front-end: the limit of QEMU's other back-ends.
pub const MEMORY_SLOTS: usize = 509;

/// Feature bits of the vhost-user transport.
const TRANSPORT: VhostUserVirtioFeatures =
    VhostUserVirtioFeatures::PROTOCOL_FEATURES.union(VhostUserVirtioFeatures::LOG_ALL);

/// Protocol features that the back-end offers.
const PROTOCOL: VhostUserProtocolFeatures = VhostUserProtocolFeatures::MQ
    .union(VhostUserProtocolFeatures::LOG_SHMFD)
    .union(VhostUserProtocolFeatures::REPLY_ACK)
    .union(VhostUserProtocolFeatures::CONFIG)
    .union(VhostUserProtocolFeatures::BACKEND_REQ)
    .union(VhostUserProtocolFeatures::INFLIGHT_SHMFD)
    .union(VhostUserProtocolFeatures::RESET_DEVICE)
    .union(VhostUserProtocolFeatures::CONFIGURE_MEM_SLOTS)
    .union(VhostUserProtocolFeatures::DEVICE_STATE);

/// Feature bits that a disk offers to front-ends.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
pub struct Offered {
    /// virtio and vhost feature bits.
    pub features: u64,
    /// Protocol features of vhost-user.
    pub protocol_features: u64,
}

impl Offered {
    /// Those of a disk that is writable or not.
    pub fn of(writable: bool) -> Self {
        Self {
            features: DeviceConfig::features_of(writable) | TRANSPORT.bits(),
            protocol_features: PROTOCOL.bits(),
        }
    }
}

/// Whether a front-end owns the disk.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Standing {
    /// It has started no queue yet.
    Waiting,
    /// It owns the disk, and its queues run.
    Serving,
    /// Another front-end has taken the disk over, or the connection ends.
    Retired,
}

/// State of one front-end connection.
#[derive(Debug)]
pub struct Handler {
    backend: Arc<BlockBackend>,
    size: Arc<SizeNotifier>,
    hangup: Arc<UnixStream>,
    standing: Standing,
    features: u64,
    /// Write cache mode that the driver requested before the front-end owned the disk.
    writeback: Option<bool>,
    memory: Memory,
    log: Option<Arc<DirtyLog>>,
    inflight: Option<Arc<InflightArea>>,
    vrings: Vec<Vring>,
    /// Stream of a device state that the front-end loads.
    loading: Option<File>,
}

impl Handler {
    /// State before the first message. `hangup` is the connection, which a worker ends if its guest
    /// memory is lost. `peer` interrupts blocked calls of the connection's thread. The front-end is added
    /// to `front_ends`, which are notified when the disk grows.
    pub fn new(
        backend: Arc<BlockBackend>,
        front_ends: &FrontEnds,
        hangup: Arc<UnixStream>,
        peer: &Arc<PeerCall>,
    ) -> Self {
        let size = SizeNotifier::new(backend.clone());
        front_ends.add(&size);
        let vring = |_| Vring::new(peer.clone());
        let vrings = (0..backend.config().queues).map(vring).collect();
        let features =
            backend.config().features() | VhostUserVirtioFeatures::PROTOCOL_FEATURES.bits();
        Self {
            backend,
            size,
            hangup,
            standing: Standing::Waiting,
            features,
            writeback: None,
            memory: Memory::default(),
            log: None,
            inflight: None,
            vrings,
            loading: None,
        }
    }

    /// Whether a complete queue waits until the front-end owns the disk.
    pub fn wants_disk(&self) -> bool {
        self.standing == Standing::Waiting && self.vrings.iter().any(Vring::is_complete)
    }

    /// Makes the front-end the owner of the disk, and starts its complete queues.
    ///
    /// # Errors
    ///
    /// [`Refusal::Start`] if a queue worker cannot start, [`Refusal::Flush`] if the write cache cannot be
    /// switched off.
    pub fn take_disk(&mut self) -> Result<(), Refusal> {
        if self.standing == Standing::Waiting {
            self.standing = Standing::Serving;
            self.size.start();
            if let Some(writeback) = self.writeback.take() {
                self.apply_writeback(writeback)?;
            }
        }
        self.start()
    }

    /// Drains and stops all queues for good.
    pub fn retire(&mut self) {
        self.stop(AfterStop::Stop);
        self.standing = Standing::Retired;
    }

    /// Descriptors that are left to close. `close(2)` may block.
    pub fn leftover(&mut self) -> impl Iterator<Item = File> + use<> {
        let left = [self.loading.take(), self.size.take_channel()];
        left.into_iter().flatten()
    }

    /// Whether another front-end has taken the disk over, or the connection ends.
    pub fn is_retired(&self) -> bool {
        self.standing == Standing::Retired
    }

    /// Whether the front-end owns the disk, has logged the guest's writes for a migration, and has stopped all
    /// queues.
    pub fn has_handed_over(&self) -> bool {
        let logged = self.features & VhostUserVirtioFeatures::LOG_ALL.bits() != 0;
        let stopped = !self.vrings.iter().any(Vring::is_complete);
        self.standing == Standing::Serving && self.log.is_some() && logged && stopped
    }

    /// Acknowledged feature bits.
    pub fn features(&self) -> u64 {
        self.features
    }

    fn stop(&mut self, after: AfterStop) {
        self.vrings.iter().for_each(|vring| vring.begin_stop(after));
        self.vrings.iter_mut().for_each(|vring| vring.stop(after));
    }

    /// Starts the complete queues if the front-end owns the disk; returns the first failure.
    fn start(&mut self) -> Result<(), Refusal> {
        if self.standing != Standing::Serving {
            return Ok(());
        }
        let logging = self.features & VhostUserVirtioFeatures::LOG_ALL.bits() != 0;
        let log = self.log.clone().filter(|_| logging);
        let context = ConnectionContext {
            backend: self.backend.clone(),
            memory: Arc::new(self.memory.with_log(log)),
            inflight: self.inflight.clone(),
            features: self.features,
            hangup: self.hangup.clone(),
        };
        let mut result = Ok(());
        for (index, vring) in (0u16..).zip(&mut self.vrings) {
            result = result.and(vring.start(index, &context));
        }
        result
    }

    /// Changes state that all queues share.
    fn change(
        &mut self,
        change: impl FnOnce(&mut Self) -> Result<(), Refusal>,
    ) -> Result<(), Refusal> {
        self.stop(AfterStop::Restart);
        let changed = change(self);
        changed.and(self.start())
    }

    /// Changes one queue, which may not continue where it stopped.
    pub fn change_vring(
        &mut self,
        index: u32,
        change: impl FnOnce(&mut Vring),
    ) -> Result<(), Refusal> {
        let vring = self.vring(index)?;
        vring.stop(AfterStop::Stop);
        change(vring);
        self.start()
    }

    /// Changes the eventfds of one queue.
    pub fn change_eventfds(
        &mut self,
        index: u32,
        change: impl FnOnce(&mut Vring),
    ) -> Result<(), Refusal> {
        let vring = self.vring(index)?;
        vring.stop(AfterStop::Restart);
        change(vring);
        self.start()
    }

    fn vring(&mut self, index: u32) -> Result<&mut Vring, Refusal> {
        let count = self.vrings.len();
        let vring = usize::try_from(index)
            .ok()
            .and_then(|index| self.vrings.get_mut(index));
        vring.ok_or(Refusal::Queue { index, count })
    }

    /// Stops the queues and resets them.
    pub fn reset_device(&mut self) {
        self.stop(AfterStop::Stop);
        self.vrings.iter_mut().for_each(Vring::reset);
    }

    /// Offered feature bits.
    pub fn offered(&self) -> u64 {
        Offered::of(self.backend.config().writable).features
    }

    /// Sets the feature bits that the driver and the front-end acknowledged.
    pub fn set_features(&mut self, features: u64) -> Result<(), Refusal> {
        let offered = self.offered();
        let unknown = features & !offered;
        if unknown != 0 {
            return Err(Refusal::Features { unknown, offered });
        }
        // Without protocol features there is no SET_VRING_ENABLE: queues are enabled from the start.
        let always = features & VhostUserVirtioFeatures::PROTOCOL_FEATURES.bits() == 0;
        self.change(|handler| {
            handler.features = features;
            if always {
                let vrings = handler.vrings.iter_mut();
                vrings.for_each(|vring| vring.set_enabled(true));
            }
            match config::starts_write_through(features) {
                true => handler.set_writeback(false),
                false => Ok(()),
            }
        })
    }

    /// Offered protocol features.
    pub fn protocol_features(&self) -> u64 {
        PROTOCOL.bits()
    }

    /// Checks the protocol features that the front-end acknowledged. The back-end does not depend on
    /// them: a front-end does not use what it does not know.
    pub fn set_protocol_features(&self, features: u64) -> Result<(), Refusal> {
        let offered = PROTOCOL.bits();
        let unknown = features & !offered;
        if unknown != 0 {
            return Err(Refusal::Features { unknown, offered });
        }
        Ok(())
    }

    /// Number of queues.
    pub fn queue_num(&self) -> usize {
        self.vrings.len()
    }

    /// Replaces the guest memory.
    pub fn set_memory(&mut self, regions: Vec<(RegionInfo, File)>) -> Result<(), Refusal> {
        let mut memory = Memory::default();
        for (info, file) in regions {
            memory = memory.with_region(info, file)?;
        }
        self.change(|handler| {
            handler.memory = memory;
            Ok(())
        })
    }

    /// Adds a region to the guest memory.
    pub fn add_memory(&mut self, info: RegionInfo, file: File) -> Result<(), Refusal> {
        if self.memory.region_count() >= MEMORY_SLOTS {
            return Err(Refusal::Slots { max: MEMORY_SLOTS });
        }
        let memory = self.memory.with_region(info, file)?;
        self.change(|handler| {
            handler.memory = memory;
            Ok(())
        })
    }

    /// Removes a region from the guest memory.
    pub fn remove_memory(&mut self, info: RegionInfo) -> Result<(), Refusal> {
        let memory = self
            .memory
            .without_region(info.guest, info.len, info.user)?;
        self.change(|handler| {
            handler.memory = memory;
            Ok(())
        })
    }

    /// Sets the number of descriptors of a queue.
    pub fn set_vring_size(&mut self, index: u32, size: u32) -> Result<(), Refusal> {
        let max = self.backend.config().queue_size;
        match u16::try_from(size) {
            Ok(size) if size.is_power_of_two() && size <= max => {
                self.change_vring(index, |vring| vring.set_size(size))
            }
            _ => Err(Refusal::QueueSize { size, max }),
        }
    }

    /// Sets the ring addresses of a queue.
    pub fn set_vring_rings(&mut self, index: u32, rings: UserRings) -> Result<(), Refusal> {
        self.change_vring(index, |vring| vring.set_rings(rings))
    }

    /// Sets the available index from which a queue starts.
    pub fn set_vring_base(&mut self, index: u32, base: u32) -> Result<(), Refusal> {
        let wrong = |_| Refusal::Base { index, base };
        let base = u16::try_from(base).map_err(wrong)?;
        self.change_vring(index, |vring| vring.set_base(base))
    }

    /// Stops a queue, and returns the available index to continue from.
    pub fn stop_vring(&mut self, index: u32) -> Result<u16, Refusal> {
        let count = self.vrings.len();
        let mut vrings = (0u16..).zip(&mut self.vrings);
        let found = vrings.find(|(number, _)| u32::from(*number) == index);
        let (number, vring) = found.ok_or(Refusal::Queue { index, count })?;
        Ok(vring.stop_at_base(number, &self.memory, self.inflight.as_deref()))
    }

    /// Queues of the device, in their largest size.
    fn largest_queues(&self) -> Queues {
        Queues {
            count: self.backend.config().queues,
            size: self.backend.config().queue_size,
        }
    }

    /// Creates an in-flight area.
    pub fn create_inflight(
        &self,
        asked: &VhostUserInflight,
    ) -> Result<(VhostUserInflight, File), Refusal> {
        let (queues, device) = (queues_of(asked), self.largest_queues());
        let counts = 1..=device.count;
        let sizes = 1..=device.size;
        if !counts.contains(&queues.count) || !sizes.contains(&queues.size) {
            return Err(Refusal::InflightSize { queues, device });
        }
        let (file, len) = InflightArea::create(queues, device)?;
        let made = VhostUserInflight::new(len, 0, queues.count, queues.size);
        Ok((made, file))
    }

    /// Sets the in-flight area, which the front-end kept.
    pub fn set_inflight(&mut self, given: &VhostUserInflight, file: &File) -> Result<(), Refusal> {
        let (asked, device) = (queues_of(given), self.largest_queues());
        let (offset, len) = (given.mmap_offset, given.mmap_size);
        let area = InflightArea::map(file, offset, len, asked, device)?;
        let through = area.writes_through();
        // A restart would leave open requests marked in the old area.
        self.stop(AfterStop::Stop);
        self.change(|handler| {
            handler.inflight = Some(Arc::new(area));
            // The driver switched the cache off in an earlier process, or before this area was set.
            match through || !handler.writeback() {
                true => handler.set_writeback(false),
                false => Ok(()),
            }
        })
    }

    /// Sets the dirty log.
    pub fn set_log(&mut self, given: &VhostUserLog, file: &File) -> Result<(), Refusal> {
        let log = DirtyLog::map(file, given.mmap_offset, given.mmap_size).map_err(Refusal::Log)?;
        self.change(|handler| {
            handler.log = Some(Arc::new(log));
            Ok(())
        })
    }

    /// Sets the channel on which the front-end is notified when the disk grows; returns the earlier one.
    pub fn set_backend_channel(&mut self, channel: File) -> Option<File> {
        self.size.set_channel(channel)
    }

    /// Sets the stream from which a device state is loaded, for [`Handler::check_state`]; returns the
    /// earlier one. The device state is empty, because guest memory and layers hold everything: to save
    /// it, its stream is closed.
    pub fn load_state(&mut self, stream: File) -> Option<File> {
        self.loading.replace(stream)
    }

    /// Checks that the device state to load is empty; returns its stream, for the caller to close.
    pub fn check_state(&mut self) -> Result<Option<File>, Refusal> {
        let Some(stream) = &self.loading else {
            return Ok(None);
        };
        // read(2) could block: the front-end shares the flags of the stream.
        let len = ioctl_fionread(stream).map_err(|errno| Refusal::Examine(errno.into()))?;
        match len {
            0 => Ok(self.loading.take()),
            len => Err(Refusal::DeviceState { len }),
        }
    }
}

impl Drop for Handler {
    fn drop(&mut self) {
        self.stop(AfterStop::Stop);
    }
}

fn queues_of(area: &VhostUserInflight) -> Queues {
    Queues {
        count: area.num_queues,
        size: area.queue_size,
    }
}
