//! A front-end that comes back: it keeps memory, queues and in-flight region across connections.

use std::fs::File;
use std::os::fd::AsRawFd;
use std::os::unix::net::UnixStream;

use vhost::vhost_user::message::VhostUserInflight;
use vhost::vhost_user::{VhostUserFrontend, VhostUserProtocolFeatures as Protocol};

use super::daemon::Daemon;
use super::memory::Memory;
use super::ring::Vring;
use super::session::{Session, Wanted};

/// What stays when a connection or the daemon goes.
pub struct Returning {
    /// The guest's memory.
    pub memory: Memory,
    /// Its queues, all of one size.
    pub vrings: Vec<Vring>,
    inflight: Option<(VhostUserInflight, File)>,
}

impl Returning {
    /// What it asks for.
    pub fn wanted() -> Wanted {
        let mut wanted = Wanted::all();
        wanted.protocol |= Protocol::INFLIGHT_SHMFD;
        wanted
    }

    /// One that was never connected.
    pub fn new(memory: Memory, vrings: Vec<Vring>) -> Self {
        Self {
            memory,
            vrings,
            inflight: None,
        }
    }

    /// The in-flight region, which `daemon` makes if there is none yet.
    pub fn region(&mut self, daemon: &Daemon) -> &File {
        let (_, file) = self.inflight.get_or_insert_with(|| {
            let session = Session::negotiate(daemon.connect(), Self::wanted());
            let size = self.vrings[0].size;
            let queues = self.vrings.len() as u16;
            ask_for_region(&mut session.expect("session"), queues, size).expect("region")
        });
        file
    }

    /// Hands over memory and region, and starts the queues. The base is the used index, as QEMU
    /// sends it; the region overrules it.
    pub fn connect(&mut self, stream: UnixStream) -> Session {
        self.try_connect(stream).expect("connection")
    }

    /// The same with a back-end that may end at any moment.
    pub fn try_connect(&mut self, stream: UnixStream) -> vhost::Result<Session> {
        let mut session = Session::negotiate(stream, Self::wanted())?;
        session.share(&self.memory)?;
        if self.inflight.is_none() {
            let size = self.vrings[0].size;
            let region = ask_for_region(&mut session, self.vrings.len() as u16, size)?;
            self.inflight = Some(region);
        }
        if let Some((info, file)) = &self.inflight {
            session.frontend.set_inflight_fd(info, file.as_raw_fd())?;
        }
        for (index, vring) in self.vrings.iter().enumerate() {
            session.start_queue(index, vring, vring.used_index())?;
            vring.kick.write(1).expect("kick");
        }
        Ok(session)
    }
}

fn ask_for_region(
    session: &mut Session,
    queues: u16,
    size: u16,
) -> vhost::Result<(VhostUserInflight, File)> {
    let wanted = VhostUserInflight::new(0, 0, queues, size);
    let region = session.frontend.get_inflight_fd(&wanted)?;
    Ok(region)
}
