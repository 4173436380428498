//! Notifies front-ends that the disk has grown: VHOST_USER_BACKEND_CONFIG_CHANGE_MSG (vhost-user, "Back-end
//! message types") on the channel of SET_BACKEND_REQ_FD.
//!
//! The message carries no value: the front-end reads the configuration space again. It is sent to each
//! front-end that may rely on an old size, and asks for no reply, so that the sender never waits. A
//! front-end without the channel sees the new size when it reads the configuration space.

use std::fs::File;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, Weak};

use rustix::io::Errno;
use rustix::net::{SendFlags, send};
use vhost::vhost_user::message::BackendReq;

use super::channel::VERSION;
use crate::engine::BlockBackend;
use crate::units::Sector;

/// Notifies one front-end, which may have read an old size of the disk.
#[derive(Debug)]
pub struct SizeNotifier {
    backend: Arc<BlockBackend>,
    state: Mutex<State>,
}

#[derive(Debug, Default)]
struct State {
    /// Socket on which the front-end receives messages.
    channel: Option<File>,
    /// Capacity that the front-end read last on this connection.
    read: Option<Sector>,
    /// A queue was started. The front-end relies on a capacity then, and may have read it on an earlier
    /// connection.
    serving: bool,
}

impl SizeNotifier {
    /// For a front-end that has read no size on this connection.
    pub fn new(backend: Arc<BlockBackend>) -> Arc<Self> {
        Arc::new(Self {
            backend,
            state: Mutex::default(),
        })
    }

    /// Returns the capacity to the front-end, and remembers that the front-end knows it.
    pub fn read(&self) -> Sector {
        let mut state = self.lock();
        let capacity = self.backend.volume().sectors();
        state.read = Some(capacity);
        capacity
    }

    /// Sets the channel, a Unix socket; returns the earlier one, for the caller to close.
    pub fn set_channel(&self, channel: File) -> Option<File> {
        let earlier = self.lock().channel.replace(channel);
        self.notify();
        earlier
    }

    /// Removes the channel, for the caller to close.
    pub fn take_channel(&self) -> Option<File> {
        self.lock().channel.take()
    }

    /// Records that queues of the front-end start.
    pub fn start(&self) {
        self.lock().serving = true;
        self.notify();
    }

    /// Notifies the front-end if it may rely on an old size.
    fn notify(&self) {
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
            // The socket is full of unread messages: each makes the front-end read the new size.
            Ok(_) | Err(Errno::AGAIN) => {}
            Err(error) => log::debug!("cannot notify a front-end that the disk has grown: {error}"),
        }
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Connected front-ends, to notify them when the disk grows.
#[derive(Debug, Default)]
pub struct FrontEnds(Mutex<Vec<Weak<SizeNotifier>>>);

impl FrontEnds {
    /// Adds a front-end that has connected.
    pub fn add(&self, front_end: &Arc<SizeNotifier>) {
        let mut connected = self.lock();
        connected.retain(|front_end| front_end.strong_count() > 0);
        connected.push(Arc::downgrade(front_end));
    }

    /// Notifies all of them that the disk has grown, without waiting.
    pub fn tell_size(&self) {
        let connected = self.lock();
        connected
            .iter()
            .filter_map(Weak::upgrade)
            .for_each(|front_end| front_end.notify());
    }

    fn lock(&self) -> MutexGuard<'_, Vec<Weak<SizeNotifier>>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}
