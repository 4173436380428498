//! A small read-only back-end over a byte vector, on the `vhost-user-backend` crate.
//!
//! The front-end's checks run against it too: what fails there is the front-end's fault, not the
//! daemon's. It answers each batch backwards, so that a front-end that counts on order fails.

use std::io::{self, Read, Write};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::PathBuf;
use std::sync::{Arc, Mutex};

use tempfile::TempDir;
use vhost::vhost_user::Listener;
use vhost::vhost_user::message::VhostUserProtocolFeatures;
use vhost_user_backend::{VhostUserBackendMut, VhostUserDaemon, VringRwLock, VringT};
use virtio_queue::{DescriptorChain, QueueOwnedT, QueueT};
use vm_memory::{GuestAddressSpace, GuestMemoryAtomic, GuestMemoryLoadGuard, GuestMemoryMmap};
use vmm_sys_util::epoll::EventSet;
use vmm_sys_util::event::{
    EventConsumer, EventFlag, EventNotifier, new_event_consumer_and_notifier,
};

use super::blk::{self, SECTOR};
use super::session::feature;

/// Most queues it offers.
const QUEUES: usize = 4;
/// Bytes of its config space.
const CONFIG: usize = 60;

type Memory = GuestMemoryAtomic<GuestMemoryMmap>;
type Chain = DescriptorChain<GuestMemoryLoadGuard<GuestMemoryMmap>>;

struct Disk {
    content: Arc<Vec<u8>>,
    memory: Memory,
    event_idx: bool,
}

impl Disk {
    /// Serves one chain; the bytes written.
    fn serve(&self, chain: Chain) -> io::Result<u32> {
        let memory = self.memory.memory();
        let mut reader = chain.clone().reader(&memory).map_err(io::Error::other)?;
        let mut writer = chain.writer(&memory).map_err(io::Error::other)?;
        let room = writer.available_bytes();
        let end = room.checked_sub(1).ok_or(io::ErrorKind::InvalidInput)?;
        let mut status = writer.split_at(end).map_err(io::Error::other)?;

        let mut header = [0; blk::HEADER as usize];
        reader.read_exact(&mut header)?;
        let [kind, _, low, high] =
            [0, 4, 8, 12].map(|at| u32::from_le_bytes([0, 1, 2, 3].map(|byte| header[at + byte])));
        let sector = u64::from(low) | u64::from(high) << 32;
        let (code, written) = match kind {
            blk::IN => match self.range(sector, end) {
                Some(bytes) => {
                    writer.write_all(bytes)?;
                    (blk::OK, end)
                }
                None => (blk::IOERR, 0),
            },
            blk::GET_ID => {
                let mut id = [0; 20];
                id[..9].copy_from_slice(b"reference");
                let len = end.min(id.len());
                writer.write_all(&id[..len])?;
                (blk::OK, len)
            }
            blk::FLUSH => (blk::OK, 0),
            blk::OUT | blk::DISCARD | blk::WRITE_ZEROES => (blk::IOERR, 0),
            _ => (blk::UNSUPP, 0),
        };
        status.write_all(&[code])?;
        Ok(written as u32 + 1)
    }

    /// The bytes of a valid read.
    fn range(&self, sector: u64, len: usize) -> Option<&[u8]> {
        let start = usize::try_from(sector.checked_mul(SECTOR)?).ok()?;
        let whole = len > 0 && len.is_multiple_of(SECTOR as usize);
        self.content
            .get(start..start.checked_add(len)?)
            .filter(|_| whole)
    }

    /// Answers everything available in one ring.
    fn drain(&self, vring: &VringRwLock) -> io::Result<()> {
        let mut state = vring.get_mut();
        // The event may have come before the queue was stopped. An error here would end the thread
        // that waits for kicks, and no queue of the session would be served any more.
        if !state.get_queue().ready() {
            return Ok(());
        }
        loop {
            state.disable_notification().map_err(io::Error::other)?;
            let chains: Vec<Chain> = {
                let queue = state.get_queue_mut();
                queue
                    .iter(self.memory.memory())
                    .map_err(io::Error::other)?
                    .collect()
            };
            for chain in chains.into_iter().rev() {
                let head = chain.head_index();
                let len = self.serve(chain).unwrap_or(0);
                state.add_used(head, len).map_err(io::Error::other)?;
            }
            if state.needs_notification().map_err(io::Error::other)? {
                state.signal_used_queue()?;
            }
            if !state.enable_notification().map_err(io::Error::other)? {
                return Ok(());
            }
        }
    }
}

impl VhostUserBackendMut for Disk {
    type Bitmap = ();
    type Vring = VringRwLock;

    fn num_queues(&self) -> usize {
        QUEUES
    }

    fn max_queue_size(&self) -> usize {
        1024
    }

    fn features(&self) -> u64 {
        feature::VERSION_1
            | feature::PROTOCOL
            | feature::RO
            | feature::SEG_MAX
            | feature::BLK_SIZE
            | feature::MQ
            | feature::INDIRECT
            | feature::EVENT_IDX
    }

    fn protocol_features(&self) -> VhostUserProtocolFeatures {
        VhostUserProtocolFeatures::CONFIG
            | VhostUserProtocolFeatures::MQ
            | VhostUserProtocolFeatures::REPLY_ACK
            | VhostUserProtocolFeatures::CONFIGURE_MEM_SLOTS
    }

    fn set_event_idx(&mut self, enabled: bool) {
        self.event_idx = enabled;
    }

    fn get_config(&self, offset: u32, size: u32) -> Vec<u8> {
        let mut space = vec![0; CONFIG];
        space[..8].copy_from_slice(&(self.content.len() as u64 / SECTOR).to_le_bytes());
        space[12] = 126;
        space[20..24].copy_from_slice(&(SECTOR as u32).to_le_bytes());
        space.resize(CONFIG.max((offset + size) as usize), 0);
        space[offset as usize..(offset + size) as usize].to_vec()
    }

    fn update_memory(&mut self, memory: Memory) -> io::Result<()> {
        self.memory = memory;
        Ok(())
    }

    fn exit_event(&self, _thread: usize) -> Option<(EventConsumer, EventNotifier)> {
        new_event_consumer_and_notifier(EventFlag::NONBLOCK).ok()
    }

    fn handle_event(
        &mut self,
        event: u16,
        _set: EventSet,
        vrings: &[VringRwLock],
        _thread: usize,
    ) -> io::Result<()> {
        self.drain(&vrings[usize::from(event)])
    }
}

/// The running back-end; it ends with the test.
pub struct Reference {
    socket: PathBuf,
    _directory: TempDir,
}

impl Reference {
    /// Serves `content`, one front-end after the other.
    pub fn start(content: Arc<Vec<u8>>) -> Self {
        let directory = tempfile::tempdir().expect("temporary directory");
        let socket = directory.path().join("reference.sock");
        let listener = UnixListener::bind(&socket).expect("socket");
        std::thread::spawn(move || {
            let mut listener = Listener::from(listener);
            loop {
                let memory = Memory::new(GuestMemoryMmap::new());
                let disk = Disk {
                    content: Arc::clone(&content),
                    memory: memory.clone(),
                    event_idx: false,
                };
                let disk = Arc::new(Mutex::new(disk));
                let mut daemon = VhostUserDaemon::new("reference".into(), disk, memory)
                    .expect("reference back-end");
                daemon.start(&mut listener).expect("front-end");
                // How a front-end left is its own affair.
                let _ = daemon.wait();
            }
        });
        Self {
            socket,
            _directory: directory,
        }
    }

    /// A new connection.
    pub fn connect(&self) -> UnixStream {
        UnixStream::connect(&self.socket).expect("reference back-end listens")
    }
}
