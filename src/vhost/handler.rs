//! What each vhost-user message does.
//!
//! A change under running queues (memory, descriptors, features, logs) is always made in one way:
//! stop and drain the workers it touches, change it, start them again. A region that was removed is
//! thus no longer written to when its removal is answered.
//!
//! A front-end may leave out what it said on an earlier connection, and send messages in any order.
//! What it left out is taken to be as offered.

mod config_space;

use std::fs::File;
use std::os::unix::net::UnixStream;
use std::sync::Arc;

use rustix::io::ioctl_fionread;
use vhost::vhost_user::message::{
    VhostUserInflight, VhostUserLog, VhostUserProtocolFeatures, VhostUserVirtioFeatures,
};

use super::config_change::{FrontEnds, SizeKnowledge};
use super::error::Refusal;
use super::vring::{UserRings, Vring};
use crate::engine::BlockBackend;
use crate::engine::setup::{ConnectionContext, Next};
use crate::io::interrupt::PeerCall;
use crate::virtio::config;
use crate::virtio::dirty_log::DirtyLog;
use crate::virtio::inflight::{InflightArea, Queues};
use crate::virtio::memory::{Memory, RegionInfo};

/// Memory regions a front-end may share; the limit QEMU's other back-ends have.
pub const MEMORY_SLOTS: usize = 509;

/// Bits the transport itself takes in the feature mask.
const TRANSPORT: VhostUserVirtioFeatures =
    VhostUserVirtioFeatures::PROTOCOL_FEATURES.union(VhostUserVirtioFeatures::LOG_ALL);

/// Protocol features of a block device.
const PROTOCOL: VhostUserProtocolFeatures = VhostUserProtocolFeatures::MQ
    .union(VhostUserProtocolFeatures::LOG_SHMFD)
    .union(VhostUserProtocolFeatures::REPLY_ACK)
    .union(VhostUserProtocolFeatures::CONFIG)
    .union(VhostUserProtocolFeatures::BACKEND_REQ)
    .union(VhostUserProtocolFeatures::INFLIGHT_SHMFD)
    .union(VhostUserProtocolFeatures::RESET_DEVICE)
    .union(VhostUserProtocolFeatures::CONFIGURE_MEM_SLOTS)
    .union(VhostUserProtocolFeatures::DEVICE_STATE);

/// Whether a front-end has the disk.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Standing {
    /// It has not started a queue yet.
    Waiting,
    /// Its queues run.
    Serving,
    /// Another front-end took over.
    Retired,
}

/// One front-end's view of the device.
#[derive(Debug)]
pub struct Handler {
    backend: Arc<BlockBackend>,
    size: Arc<SizeKnowledge>,
    hangup: Arc<UnixStream>,
    standing: Standing,
    features: u64,
    /// The write cache as this front-end's driver wants it, until the front-end has the disk.
    writeback: Option<bool>,
    memory: Memory,
    log: Option<Arc<DirtyLog>>,
    inflight: Option<Arc<InflightArea>>,
    vrings: Vec<Vring>,
    /// A device state that the front-end loads.
    loading: Option<File>,
}

impl Handler {
    /// The device before the first message. `hangup` is the connection, for a worker to end it when
    /// the memory it serves is gone; `peer` interrupts calls of the connection's thread; `front_ends` are told
    /// when the disk grows.
    pub fn new(
        backend: Arc<BlockBackend>,
        front_ends: &FrontEnds,
        hangup: Arc<UnixStream>,
        peer: &Arc<PeerCall>,
    ) -> Self {
        let size = SizeKnowledge::new(backend.clone());
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

    /// Whether a queue is to start that may not before the front-end has the disk.
    pub fn wants_disk(&self) -> bool {
        self.standing == Standing::Waiting && self.vrings.iter().any(Vring::is_complete)
    }

    /// Takes the disk, and starts the queues that are complete.
    ///
    /// # Errors
    ///
    /// [`Refusal::Start`] and [`Refusal::Flush`].
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

    /// Stops and drains all queues for good.
    pub fn retire(&mut self) {
        self.stop(Next::Stop);
        self.standing = Standing::Retired;
    }

    /// The descriptors left to close, which may take long.
    pub fn leftover(&mut self) -> impl Iterator<Item = File> + use<> {
        let left = [self.loading.take(), self.size.take_channel()];
        left.into_iter().flatten()
    }

    /// Whether another front-end took over.
    pub fn is_retired(&self) -> bool {
        self.standing == Standing::Retired
    }

    /// Feature bits that the front-end acknowledged.
    pub fn features(&self) -> u64 {
        self.features
    }

    fn stop(&mut self, next: Next) {
        self.vrings.iter().for_each(|vring| vring.begin_stop(next));
        self.vrings.iter_mut().for_each(|vring| vring.stop(next));
    }

    /// Starts the queues that are complete, if this front-end has the disk; returns the first
    /// failure of those that should start.
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

    /// Changes what all queues share.
    fn change(
        &mut self,
        change: impl FnOnce(&mut Self) -> Result<(), Refusal>,
    ) -> Result<(), Refusal> {
        self.stop(Next::Restart);
        let changed = change(self);
        changed.and(self.start())
    }

    /// Changes one queue, which may not go on where it was.
    pub fn change_vring(
        &mut self,
        index: u32,
        change: impl FnOnce(&mut Vring),
    ) -> Result<(), Refusal> {
        let vring = self.vring(index)?;
        vring.stop(Next::Stop);
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
        vring.stop(Next::Restart);
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

    /// Stops the queues and forgets that they were started.
    pub fn reset_device(&mut self) {
        self.stop(Next::Stop);
        self.vrings.iter_mut().for_each(Vring::reset);
    }

    /// The feature bits offered.
    pub fn offered(&self) -> u64 {
        self.backend.config().features() | TRANSPORT.bits()
    }

    /// Takes the feature bits that the driver and the front-end acknowledged.
    pub fn set_features(&mut self, features: u64) -> Result<(), Refusal> {
        let offered = self.offered();
        let unknown = features & !offered;
        if unknown != 0 {
            return Err(Refusal::Features { unknown, offered });
        }
        // Without SET_VRING_ENABLE in the protocol a queue is enabled from the start.
        let always = features & VhostUserVirtioFeatures::PROTOCOL_FEATURES.bits() == 0;
        self.change(|handler| {
            handler.features = features;
            for vring in &mut handler.vrings {
                vring.enabled |= always;
            }
            match config::starts_write_through(features) {
                true => handler.set_writeback(false),
                false => Ok(()),
            }
        })
    }

    /// The protocol features offered.
    pub fn protocol_features(&self) -> u64 {
        PROTOCOL.bits()
    }

    /// Checks the protocol features that the front-end acknowledged. Nothing depends on them: what a
    /// front-end does not know, it does not use.
    pub fn set_protocol_features(&self, features: u64) -> Result<(), Refusal> {
        let offered = PROTOCOL.bits();
        let unknown = features & !offered;
        if unknown != 0 {
            return Err(Refusal::Features { unknown, offered });
        }
        Ok(())
    }

    /// The number of queues.
    pub fn queue_num(&self) -> usize {
        self.vrings.len()
    }

    /// Replaces the guest's memory.
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

    /// Adds to the guest's memory.
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

    /// Takes a region away from the guest's memory.
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
                self.change_vring(index, |vring| vring.size = size)
            }
            _ => Err(Refusal::QueueSize { size, max }),
        }
    }

    /// Sets where the parts of a queue lie.
    pub fn set_vring_rings(&mut self, index: u32, rings: UserRings) -> Result<(), Refusal> {
        self.change_vring(index, |vring| vring.rings = Some(rings))
    }

    /// Sets where a queue starts.
    pub fn set_vring_base(&mut self, index: u32, base: u32) -> Result<(), Refusal> {
        let wrong = |_| Refusal::Base { index, base };
        let base = u16::try_from(base).map_err(wrong)?;
        self.change_vring(index, |vring| vring.base = Some(base))
    }

    /// Stops a queue, and returns the available index to go on from.
    pub fn stop_vring(&mut self, index: u32) -> Result<u16, Refusal> {
        let vring = self.vring(index)?;
        vring.stop(Next::Stop);
        vring.started = false;
        vring.eventfds.kick = None;
        let (vring, area) = (&self.vrings[index as usize], self.inflight.as_deref());
        Ok(vring.next_available(index as u16, &self.memory, area))
    }

    /// The queues of the device, in their largest size.
    fn largest_queues(&self) -> Queues {
        Queues {
            count: self.backend.config().queues,
            size: self.backend.config().queue_size,
        }
    }

    /// Makes an in-flight area.
    pub fn make_inflight(
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

    /// Takes the in-flight area that the front-end kept.
    pub fn set_inflight(&mut self, given: &VhostUserInflight, file: &File) -> Result<(), Refusal> {
        let (asked, device) = (queues_of(given), self.largest_queues());
        let (offset, len) = (given.mmap_offset, given.mmap_size);
        let area = InflightArea::map(file, offset, len, asked, device)?;
        let through = area.writes_through();
        // What stays open would be marked in the old area.
        self.stop(Next::Stop);
        self.change(|handler| {
            handler.inflight = Some(Arc::new(area));
            // The driver told an earlier process, or this one before it knew the area.
            match through || !handler.writeback() {
                true => handler.set_writeback(false),
                false => Ok(()),
            }
        })
    }

    /// Takes the dirty log.
    pub fn set_log(&mut self, given: &VhostUserLog, file: &File) -> Result<(), Refusal> {
        let log = DirtyLog::map(file, given.mmap_offset, given.mmap_size).map_err(Refusal::Log)?;
        self.change(|handler| {
            handler.log = Some(Arc::new(log));
            Ok(())
        })
    }

    /// Takes the channel on which the front-end is told when the disk grows; returns an earlier one.
    pub fn set_backend_channel(&mut self, channel: File) -> Option<File> {
        self.size.set_channel(channel)
    }

    /// Loads a device state from `stream`, which [`Handler::check_state`] examines; returns the
    /// stream of an earlier one. To save the state is to close its stream: it is empty, for
    /// everything is in the guest's memory and the layers.
    pub fn load_state(&mut self, stream: File) -> Option<File> {
        self.loading.replace(stream)
    }

    /// Returns the stream of the device state that was loaded, if it is empty, as it must be. The
    /// caller closes it.
    pub fn check_state(&mut self) -> Result<Option<File>, Refusal> {
        let Some(stream) = &self.loading else {
            return Ok(None);
        };
        // To read could wait: the front-end shares the stream's flags.
        let len = ioctl_fionread(stream).map_err(|errno| Refusal::Examine(errno.into()))?;
        match len {
            0 => Ok(self.loading.take()),
            len => Err(Refusal::DeviceState { len }),
        }
    }
}

impl Drop for Handler {
    fn drop(&mut self) {
        self.stop(Next::Stop);
    }
}

fn queues_of(area: &VhostUserInflight) -> Queues {
    Queues {
        count: area.num_queues,
        size: area.queue_size,
    }
}
