//! One vhost-user connection: negotiation, memory, starting and stopping queues.

use std::os::unix::net::UnixStream;

use vhost::VringConfigData;
use vhost::vhost_user::message::{VhostUserConfigFlags, VhostUserHeaderFlag};
use vhost::vhost_user::{Frontend, VhostUserFrontend, VhostUserProtocolFeatures};
use vhost::{Result, VhostBackend};

use super::PATIENCE;
use super::memory::Memory;
use super::ring::Vring;

/// Feature bit numbers (virtio 1.x 5.2.3 and 6; vhost-user).
pub mod feature {
    use virtio_bindings::{virtio_blk as blk, virtio_config as config, virtio_ring as ring};

    /// Largest segment is in the config space.
    pub const SIZE_MAX: u64 = 1 << blk::VIRTIO_BLK_F_SIZE_MAX;
    /// Most segments are in the config space.
    pub const SEG_MAX: u64 = 1 << blk::VIRTIO_BLK_F_SEG_MAX;
    /// Read-only.
    pub const RO: u64 = 1 << blk::VIRTIO_BLK_F_RO;
    /// Block size is in the config space.
    pub const BLK_SIZE: u64 = 1 << blk::VIRTIO_BLK_F_BLK_SIZE;
    /// Flush.
    pub const FLUSH: u64 = 1 << blk::VIRTIO_BLK_F_FLUSH;
    /// Topology is in the config space.
    pub const TOPOLOGY: u64 = 1 << blk::VIRTIO_BLK_F_TOPOLOGY;
    /// Write cache can be switched.
    pub const CONFIG_WCE: u64 = 1 << blk::VIRTIO_BLK_F_CONFIG_WCE;
    /// Several queues.
    pub const MQ: u64 = 1 << blk::VIRTIO_BLK_F_MQ;
    /// Discard.
    pub const DISCARD: u64 = 1 << blk::VIRTIO_BLK_F_DISCARD;
    /// Write zeroes.
    pub const WRITE_ZEROES: u64 = 1 << blk::VIRTIO_BLK_F_WRITE_ZEROES;
    /// Indirect descriptors.
    pub const INDIRECT: u64 = 1 << ring::VIRTIO_RING_F_INDIRECT_DESC;
    /// Notification by index.
    pub const EVENT_IDX: u64 = 1 << ring::VIRTIO_RING_F_EVENT_IDX;
    /// virtio 1.
    pub const VERSION_1: u64 = 1 << config::VIRTIO_F_VERSION_1;
    /// vhost: log of dirty pages.
    pub const LOG_ALL: u64 = 1 << 26;
    /// vhost-user: protocol features.
    pub const PROTOCOL: u64 = 1 << 30;
}

/// What a front-end would like; it gets what the back-end offers of it.
#[derive(Clone, Copy, Debug)]
pub struct Wanted {
    /// virtio and vhost feature bits.
    pub features: u64,
    /// vhost-user protocol features.
    pub protocol: VhostUserProtocolFeatures,
}

impl Wanted {
    /// What a full-featured VMM asks for.
    pub fn all() -> Self {
        Self {
            features: !feature::LOG_ALL,
            protocol: VhostUserProtocolFeatures::CONFIG
                | VhostUserProtocolFeatures::MQ
                | VhostUserProtocolFeatures::REPLY_ACK
                | VhostUserProtocolFeatures::CONFIGURE_MEM_SLOTS,
        }
    }
}

/// One vhost-user connection.
pub struct Session {
    /// The messages, for what has no method here.
    pub frontend: Frontend,
    /// virtio features acknowledged.
    pub features: u64,
    /// Protocol features acknowledged.
    pub protocol: VhostUserProtocolFeatures,
}

/// A front-end over `stream` that gives up on a silent back-end.
pub fn frontend(stream: UnixStream) -> Frontend {
    stream.set_read_timeout(Some(PATIENCE)).expect("socket");
    stream.set_write_timeout(Some(PATIENCE)).expect("socket");
    Frontend::from_stream(stream, 0x100)
}

/// From now on every message asks for an answer, so that a refusal shows where it happens.
pub fn ask_for_replies(frontend: &Frontend) {
    frontend.set_hdr_flags(VhostUserHeaderFlag::NEED_REPLY);
}

/// The arguments of SET_VRING_ADDR for `vring`.
pub fn addresses(vring: &Vring) -> VringConfigData {
    VringConfigData {
        queue_max_size: vring.size,
        queue_size: vring.size,
        flags: 0,
        desc_table_addr: vring.at.descriptors,
        used_ring_addr: vring.at.used,
        avail_ring_addr: vring.at.available,
        log_addr: None,
    }
}

impl Session {
    /// Takes ownership and agrees on features, in the order QEMU does it.
    pub fn negotiate(stream: UnixStream, wanted: Wanted) -> Result<Self> {
        let mut frontend = frontend(stream);
        let offered = frontend.get_features()?;
        let mut protocol = VhostUserProtocolFeatures::empty();
        if offered & feature::PROTOCOL != 0 {
            protocol = frontend.get_protocol_features()? & wanted.protocol;
            frontend.set_protocol_features(protocol)?;
        }
        if protocol.contains(VhostUserProtocolFeatures::REPLY_ACK) {
            ask_for_replies(&frontend);
        }
        frontend.set_owner()?;
        let features = offered & wanted.features;
        frontend.set_features(features)?;
        Ok(Self {
            frontend,
            features,
            protocol,
        })
    }

    /// Whether `bit` of [`feature`] was acknowledged.
    pub fn has(&self, bit: u64) -> bool {
        self.features & bit == bit
    }

    /// Shares all regions of `memory`.
    pub fn share(&self, memory: &Memory) -> Result<()> {
        let regions: Vec<_> = memory.regions.iter().map(|region| region.info()).collect();
        self.frontend.set_mem_table(&regions).map(|_| ())
    }

    /// Sets queue `index` up, not yet enabled; the device takes available heads from `base` on.
    pub fn set_up_queue(&self, index: usize, vring: &Vring, base: u16) -> Result<()> {
        self.frontend.set_vring_num(index, vring.size)?;
        self.frontend.set_vring_base(index, base)?;
        self.frontend.set_vring_addr(index, &addresses(vring))?;
        self.frontend.set_vring_err(index, &vring.err)?;
        self.frontend.set_vring_call(index, &vring.call)?;
        self.frontend.set_vring_kick(index, &vring.kick)
    }

    /// Sets queue `index` up and enables it.
    pub fn start_queue(&mut self, index: usize, vring: &Vring, base: u16) -> Result<()> {
        self.set_up_queue(index, vring, base)?;
        self.enable(index, true)
    }

    /// Lets queue `index` run, or pauses it.
    pub fn enable(&mut self, index: usize, enabled: bool) -> Result<()> {
        self.frontend.set_vring_enable(index, enabled)
    }

    /// Stops queue `index` and returns where it stood in the available ring.
    pub fn stop_queue(&self, index: usize) -> Result<u16> {
        let base = self.frontend.get_vring_base(index)?;
        Ok(u16::try_from(base).expect("base of a split queue has 16 bits"))
    }

    /// `len` bytes of the config space at `offset`.
    pub fn config(&mut self, offset: u32, len: u32) -> Result<Vec<u8>> {
        let buffer = vec![0; len as usize];
        let flags = VhostUserConfigFlags::WRITABLE;
        let answer = self.frontend.get_config(offset, len, flags, &buffer);
        answer.map(|(_, bytes)| bytes)
    }

    /// The capacity in sectors that the config space shows.
    pub fn capacity(&mut self) -> Result<u64> {
        let bytes = self.config(0, 8)?;
        Ok(u64::from_le_bytes(bytes.try_into().expect("eight bytes")))
    }
}
