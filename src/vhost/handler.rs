//! What each vhost-user message does.
//!
//! Whatever changes under running queues (memory, descriptors, features, logs) is changed in one
//! way: stop and drain the workers it touches, change it, start them again. A region that was
//! removed is thus no longer written to when its removal is answered.

use std::fs::File;
use std::io::{self, Read};
use std::os::unix::net::UnixStream;
use std::sync::Arc;
use std::sync::atomic::Ordering;

use vhost::vhost_user::message::{
    VhostTransferStateDirection, VhostTransferStatePhase, VhostUserConfigFlags, VhostUserInflight,
    VhostUserLog, VhostUserMemoryRegion, VhostUserProtocolFeatures, VhostUserShMemConfig,
    VhostUserSharedMsg, VhostUserSingleMemoryRegion, VhostUserVirtioFeatures,
    VhostUserVringAddrFlags, VhostUserVringState,
};
use vhost::vhost_user::{Error, GpuBackend, Result, VhostUserBackendReqHandlerMut};

use super::vring::{UserRings, Vring};
use crate::engine::Disk;
use crate::engine::setup::ConnectionContext;
use crate::virtio::config;
use crate::virtio::dirty_log::DirtyLog;
use crate::virtio::inflight::InflightArea;
use crate::virtio::memory::{Memory, RegionInfo};

/// Memory regions a front-end may share; the limit QEMU's other backends have.
const MEMORY_SLOTS: usize = 509;

/// Some front-ends ask for the configuration space at the offset it has in virtio-mmio.
const MMIO_CONFIG_OFFSET: u32 = 0x100;

/// Bytes of configuration space a front-end may ask for.
const CONFIG_SPACE: usize = 256;

/// Bits the transport itself takes in the feature mask.
const TRANSPORT: VhostUserVirtioFeatures =
    VhostUserVirtioFeatures::PROTOCOL_FEATURES.union(VhostUserVirtioFeatures::LOG_ALL);

/// One front-end's device.
#[derive(Debug)]
pub struct Handler {
    disk: Arc<Disk>,
    hangup: Arc<UnixStream>,
    features: u64,
    memory: Memory,
    log: Option<Arc<DirtyLog>>,
    inflight: Option<Arc<InflightArea>>,
    vrings: Vec<Vring>,
    /// A device state a front-end is about to load.
    loading: Option<File>,
}

fn refuse(what: impl Into<Box<dyn std::error::Error + Send + Sync>>) -> Error {
    Error::ReqHandlerError(io::Error::other(what))
}

impl Handler {
    /// A device nobody has set up yet. `hangup` is the connection, for a worker to end it when
    /// the memory it serves is gone.
    pub fn new(disk: Arc<Disk>, hangup: Arc<UnixStream>) -> Self {
        let vrings = (0..disk.config.queues).map(|_| Vring::default()).collect();
        Self {
            disk,
            hangup,
            features: 0,
            memory: Memory::default(),
            log: None,
            inflight: None,
            vrings,
            loading: None,
        }
    }

    /// Stops and drains all queues.
    pub fn stop(&mut self) {
        self.vrings.iter().for_each(Vring::begin_stop);
        self.vrings.iter_mut().for_each(Vring::stop);
    }

    /// What the driver wants: writes that are durable once flushed, or once answered.
    fn set_writeback(&self, writeback: bool) -> Result<()> {
        let before = self.disk.writeback.swap(writeback, Ordering::Relaxed);
        log::debug!("the driver wants writeback {writeback}, it was {before}");
        if let Some(area) = &self.inflight {
            area.note_writes_through(!writeback);
        }
        if before && !writeback {
            // Its driver flushes no more, and may count on what was written until now.
            self.disk.volume.flush().map_err(refuse)?;
        }
        Ok(())
    }

    fn offered(&self) -> u64 {
        self.disk.config.features() | TRANSPORT.bits()
    }

    fn start(&mut self) {
        let logging = self.features & VhostUserVirtioFeatures::LOG_ALL.bits() != 0;
        let log = self.log.clone().filter(|_| logging);
        let context = ConnectionContext {
            disk: self.disk.clone(),
            memory: Arc::new(self.memory.with_log(log)),
            inflight: self.inflight.clone(),
            features: self.features,
            hangup: self.hangup.clone(),
        };
        for (index, vring) in (0u16..).zip(&mut self.vrings) {
            vring.start(index, &context);
        }
    }

    /// Changes what all queues stand on.
    fn change<T>(&mut self, change: impl FnOnce(&mut Self) -> Result<T>) -> Result<T> {
        self.stop();
        let result = change(self);
        self.start();
        result
    }

    /// Changes one queue.
    fn change_vring(&mut self, index: u32, change: impl FnOnce(&mut Vring)) -> Result<()> {
        let vring = self.vring(index)?;
        vring.stop();
        change(vring);
        self.start();
        Ok(())
    }

    fn vring(&mut self, index: u32) -> Result<&mut Vring> {
        let count = self.vrings.len();
        usize::try_from(index)
            .ok()
            .and_then(|index| self.vrings.get_mut(index))
            .ok_or_else(|| refuse(format!("queue {index} named, the device has {count}")))
    }
}

impl Drop for Handler {
    fn drop(&mut self) {
        self.stop();
    }
}

/// The offset in `struct virtio_blk_config` that a front-end means.
fn config_offset(offset: u32) -> u32 {
    offset.checked_sub(MMIO_CONFIG_OFFSET).unwrap_or(offset)
}

fn region(region: &VhostUserMemoryRegion) -> RegionInfo {
    RegionInfo {
        guest: region.guest_phys_addr,
        len: region.memory_size,
        user: region.user_addr,
        file_offset: region.mmap_offset,
    }
}

impl VhostUserBackendReqHandlerMut for Handler {
    fn set_owner(&mut self) -> Result<()> {
        Ok(())
    }

    fn reset_owner(&mut self) -> Result<()> {
        self.reset_device()
    }

    fn reset_device(&mut self) -> Result<()> {
        self.stop();
        for vring in &mut self.vrings {
            (vring.started, vring.enabled, vring.base) = (false, false, None);
        }
        Ok(())
    }

    fn get_features(&mut self) -> Result<u64> {
        Ok(self.offered())
    }

    fn set_features(&mut self, features: u64) -> Result<()> {
        let unknown = features & !self.offered();
        if unknown != 0 {
            return Err(refuse(format!(
                "feature bits {unknown:#x} were not offered"
            )));
        }
        // Without SET_VRING_ENABLE in the protocol a queue is enabled from the start.
        let always = features & VhostUserVirtioFeatures::PROTOCOL_FEATURES.bits() == 0;
        self.change(|handler| {
            handler.features = features;
            if config::starts_write_through(features) {
                handler.set_writeback(false)?;
            }
            for vring in &mut handler.vrings {
                vring.enabled |= always;
            }
            Ok(())
        })
    }

    fn get_protocol_features(&mut self) -> Result<VhostUserProtocolFeatures> {
        Ok(VhostUserProtocolFeatures::MQ
            | VhostUserProtocolFeatures::LOG_SHMFD
            | VhostUserProtocolFeatures::REPLY_ACK
            | VhostUserProtocolFeatures::CONFIG
            | VhostUserProtocolFeatures::INFLIGHT_SHMFD
            | VhostUserProtocolFeatures::RESET_DEVICE
            | VhostUserProtocolFeatures::CONFIGURE_MEM_SLOTS
            | VhostUserProtocolFeatures::DEVICE_STATE)
    }

    fn set_protocol_features(&mut self, features: u64) -> Result<()> {
        let unknown = features & !self.get_protocol_features()?.bits();
        if unknown != 0 {
            return Err(refuse(format!(
                "protocol feature bits {unknown:#x} were not offered"
            )));
        }
        Ok(())
    }

    fn get_queue_num(&mut self) -> Result<u64> {
        Ok(self.vrings.len() as u64)
    }

    fn set_mem_table(
        &mut self,
        regions: &[VhostUserMemoryRegion],
        files: Vec<File>,
        _postcopy: Option<bool>,
    ) -> Result<Option<Vec<u64>>> {
        let mut memory = Memory::default();
        for (info, file) in regions.iter().map(region).zip(files) {
            memory = memory.with_region(info, file).map_err(refuse)?;
        }
        self.change(|handler| {
            handler.memory = memory;
            Ok(None)
        })
    }

    fn get_max_mem_slots(&mut self) -> Result<u64> {
        Ok(MEMORY_SLOTS as u64)
    }

    fn add_mem_region(
        &mut self,
        added: &VhostUserSingleMemoryRegion,
        file: File,
        _postcopy: Option<bool>,
    ) -> Result<Option<u64>> {
        if self.memory.region_count() >= MEMORY_SLOTS {
            return Err(refuse(format!("more than {MEMORY_SLOTS} memory regions")));
        }
        let memory = self
            .memory
            .with_region(region(added), file)
            .map_err(refuse)?;
        self.change(|handler| {
            handler.memory = memory;
            Ok(None)
        })
    }

    fn remove_mem_region(&mut self, removed: &VhostUserSingleMemoryRegion) -> Result<()> {
        let info = region(removed);
        let memory = self
            .memory
            .without_region(info.guest, info.len, info.user)
            .map_err(refuse)?;
        self.change(|handler| {
            handler.memory = memory;
            Ok(())
        })
    }

    fn set_vring_num(&mut self, index: u32, num: u32) -> Result<()> {
        let max = self.disk.config.queue_size;
        match u16::try_from(num) {
            Ok(size) if size.is_power_of_two() && size <= max => {
                self.change_vring(index, |vring| vring.size = size)
            }
            _ => Err(refuse(format!(
                "queue size {num} is no power of two up to {max}"
            ))),
        }
    }

    fn set_vring_addr(
        &mut self,
        index: u32,
        flags: VhostUserVringAddrFlags,
        descriptors: u64,
        used: u64,
        available: u64,
        log: u64,
    ) -> Result<()> {
        let used_log = flags
            .contains(VhostUserVringAddrFlags::VHOST_VRING_F_LOG)
            .then_some(log);
        let rings = UserRings {
            descriptors,
            available,
            used,
            used_log,
        };
        self.change_vring(index, |vring| vring.rings = Some(rings))
    }

    fn set_vring_base(&mut self, index: u32, base: u32) -> Result<()> {
        let base = u16::try_from(base)
            .map_err(|_| refuse(format!("base {base} of queue {index} is no ring index")))?;
        self.change_vring(index, |vring| vring.base = Some(base))
    }

    fn get_vring_base(&mut self, index: u32) -> Result<VhostUserVringState> {
        let vring = self.vring(index)?;
        vring.stop();
        vring.started = false;
        vring.eventfds.kick = None;
        Ok(VhostUserVringState::new(
            index,
            u32::from(vring.base.unwrap_or(0)),
        ))
    }

    fn set_vring_kick(&mut self, index: u8, fd: Option<File>) -> Result<()> {
        self.change_vring(index.into(), |vring| {
            vring.eventfds.kick = Vring::eventfd(fd);
            vring.started = true;
        })
    }

    fn set_vring_call(&mut self, index: u8, fd: Option<File>) -> Result<()> {
        self.change_vring(index.into(), |vring| {
            vring.eventfds.call = Vring::eventfd(fd)
        })
    }

    fn set_vring_err(&mut self, index: u8, fd: Option<File>) -> Result<()> {
        self.change_vring(index.into(), |vring| {
            vring.eventfds.error = Vring::eventfd(fd)
        })
    }

    fn set_vring_enable(&mut self, index: u32, enable: bool) -> Result<()> {
        self.change_vring(index, |vring| vring.enabled = enable)
    }

    fn get_config(&mut self, offset: u32, size: u32, _: VhostUserConfigFlags) -> Result<Vec<u8>> {
        let absurd = || {
            refuse(format!(
                "{size} bytes of configuration space at offset {offset}"
            ))
        };
        let (start, size) = (config_offset(offset) as usize, size as usize);
        let writeback = self.disk.writeback.load(Ordering::Relaxed);
        let mut space = self.disk.config.space(writeback).to_vec();
        space.resize(CONFIG_SPACE, 0);
        let end = start.checked_add(size).ok_or_else(absurd)?;
        space.get(start..end).map(<[u8]>::to_vec).ok_or_else(absurd)
    }

    fn set_config(&mut self, offset: u32, bytes: &[u8], _: VhostUserConfigFlags) -> Result<()> {
        // The one field a driver may write; a front-end passes on what its guest does, and writes to
        // other fields are ignored.
        let writable = self.disk.config.writable;
        match config::WRITEBACK_AT.checked_sub(config_offset(offset)) {
            Some(at) if writable && (at as usize) < bytes.len() => {
                self.set_writeback(bytes[at as usize] != 0)
            }
            _ => {
                let len = bytes.len();
                log::debug!("{len} bytes written to configuration offset {offset}");
                Ok(())
            }
        }
    }

    fn get_inflight_fd(&mut self, asked: &VhostUserInflight) -> Result<(VhostUserInflight, File)> {
        let (queues, size) = (asked.num_queues, asked.queue_size);
        let max = self.disk.config.queue_size;
        if usize::from(queues) > self.vrings.len() || size > max {
            return Err(refuse(format!(
                "in-flight area for {queues} queues of {size} entries"
            )));
        }
        let (file, len) = InflightArea::create(queues, size).map_err(refuse)?;
        let mut answer = *asked;
        (answer.mmap_size, answer.mmap_offset) = (len, 0);
        Ok((answer, file))
    }

    fn set_inflight_fd(&mut self, given: &VhostUserInflight, file: File) -> Result<()> {
        let (queues, size) = (given.num_queues, given.queue_size);
        let area = InflightArea::map(file, given.mmap_offset, given.mmap_size, queues, size)
            .map_err(refuse)?;
        self.change(|handler| {
            let through = area.writes_through();
            let writeback = handler.disk.writeback.load(Ordering::Relaxed);
            handler.inflight = Some(Arc::new(area));
            // An earlier process was told, or this one was before it knew the area.
            handler.set_writeback(writeback && !through)
        })
    }

    fn set_log_base(&mut self, log: &VhostUserLog, file: File) -> Result<()> {
        let log = DirtyLog::map(&file, log.mmap_offset, log.mmap_size).map_err(refuse)?;
        self.change(|handler| {
            handler.log = Some(Arc::new(log));
            Ok(())
        })
    }

    fn set_device_state_fd(
        &mut self,
        direction: VhostTransferStateDirection,
        _phase: VhostTransferStatePhase,
        file: File,
    ) -> Result<Option<File>> {
        // Everything is in the guest's memory and the layers: to save is to close the pipe at
        // once, and to load is to find it empty.
        self.loading = (direction == VhostTransferStateDirection::LOAD).then_some(file);
        Ok(None)
    }

    fn check_device_state(&mut self) -> Result<()> {
        let Some(mut file) = self.loading.take() else {
            return Ok(());
        };
        rustix::io::ioctl_fionbio(&file, true).map_err(|errno| refuse(io::Error::from(errno)))?;
        match file.read(&mut [0u8]) {
            Ok(0) => Ok(()),
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => Ok(()),
            Ok(_) => Err(refuse("a device state that is not empty is not ours")),
            Err(error) => Err(refuse(error)),
        }
    }

    fn set_gpu_socket(&mut self, _backend: GpuBackend) -> Result<()> {
        Err(refuse("a block device takes no GPU socket"))
    }

    fn get_shared_object(&mut self, _uuid: VhostUserSharedMsg) -> Result<File> {
        Err(refuse("a block device shares no objects"))
    }

    fn get_shmem_config(&mut self) -> Result<VhostUserShMemConfig> {
        Err(refuse("a block device has no shared memory regions"))
    }
}
