//! Telling front-ends that the disk has grown: VHOST_USER_BACKEND_CONFIG_CHANGE_MSG (vhost-user, "Back-end
//! message types") on the channel of SET_BACKEND_REQ_FD.
//!
//! The message names no value: the front-end reads the configuration space again. It is sent wherever the
//! front-end may rely on another size than the present one, and asks for no reply, so that nothing is ever
//! waited for. A front-end without the channel sees the new size when it reads the configuration space.

use std::fs::File;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, Weak};

use rustix::io::Errno;
use rustix::net::{SendFlags, send};
use vhost::vhost_user::message::BackendReq;

use super::channel::VERSION;
use crate::engine::BlockBackend;
use crate::units::Sector;

/// What one front-end knows of the disk's size.
#[derive(Debug)]
pub struct SizeKnowledge {
    backend: Arc<BlockBackend>,
    state: Mutex<State>,
}

#[derive(Debug, Default)]
struct State {
    /// Where the front-end takes messages.
    channel: Option<File>,
    /// The capacity that it read last on this connection.
    read: Option<Sector>,
    /// Its queues were started, so it relies on a capacity, which it may have read on an earlier connection.
    serving: bool,
}

impl SizeKnowledge {
    /// That of a front-end that has said nothing yet.
    pub fn new(backend: Arc<BlockBackend>) -> Arc<Self> {
        Arc::new(Self {
            backend,
            state: Mutex::default(),
        })
    }

    /// The capacity, which the front-end reads.
    pub fn read(&self) -> Sector {
        let mut state = self.lock();
        let capacity = self.backend.volume().sectors();
        state.read = Some(capacity);
        capacity
    }

    /// Takes the channel, a Unix socket; returns an earlier one, for the caller to close.
    pub fn set_channel(&self, channel: File) -> Option<File> {
        let earlier = self.lock().channel.replace(channel);
        self.tell();
        earlier
    }

    /// Gives the channel back, for the caller to close.
    pub fn take_channel(&self) -> Option<File> {
        self.lock().channel.take()
    }

    /// Notes that queues of the front-end start.
    pub fn start(&self) {
        self.lock().serving = true;
        self.tell();
    }

    /// Tells the front-end if it may rely on another size than the present one.
    fn tell(&self) {
        let state = self.lock();
        let is_stale = match state.read {
            Some(read) => read != self.backend.volume().sectors(),
            None => state.serving,
        };
        let Some(channel) = state.channel.as_ref().filter(|_| is_stale) else {
            return;
        };
        let header = [u32::from(BackendReq::CONFIG_CHANGE_MSG), VERSION, 0].map(u32::to_le_bytes);
        let flags = SendFlags::DONTWAIT | SendFlags::NOSIGNAL;
        match send(channel, header.as_flattened(), flags) {
            // Messages that it has not read yet fill the socket: each makes it read the new size.
            Ok(_) | Err(Errno::AGAIN) => {}
            Err(error) => log::debug!("cannot tell a front-end that the disk has grown: {error}"),
        }
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// The front-ends that are connected.
#[derive(Debug, Default)]
pub struct FrontEnds(Mutex<Vec<Weak<SizeKnowledge>>>);

impl FrontEnds {
    /// Adds one that has connected.
    pub fn add(&self, front_end: &Arc<SizeKnowledge>) {
        let mut connected = self.lock();
        connected.retain(|front_end| front_end.strong_count() > 0);
        connected.push(Arc::downgrade(front_end));
    }

    /// Tells all of them that the disk has grown. Waits for none.
    pub fn tell_size(&self) {
        let connected = self.lock();
        connected
            .iter()
            .filter_map(Weak::upgrade)
            .for_each(|front_end| front_end.tell());
    }

    fn lock(&self) -> MutexGuard<'_, Vec<Weak<SizeKnowledge>>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}
