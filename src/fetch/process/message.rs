//! What the owner of a fetcher sends through the keeper: texts in files in memory, with sockets.
//!
//! The first message is the configuration, with the socket at which further owners connect if the fetcher is
//! shared. Each further one is an [`Order`] with a socket for the answers.
//! The keeper passes messages on and parses none of them.

use std::fs::File;
use std::io::{self, Read, Seek, Write};
use std::os::fd::OwnedFd;
use std::time::Duration;

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::fs::{MemfdFlags, memfd_create};
use serde::{Deserialize, Serialize};

use super::ProcessError;
use crate::fetch::download::Download;
use crate::source::link::{self, Message};
use crate::source::protocol::MESSAGE_LEN;

/// Longest text of a message.
pub(in crate::fetch) const MAX_TEXT: u64 = 4 << 20;

/// How long the peer may take to read a message.
const PATIENCE: Duration = Duration::from_secs(2);

/// What the owner asks for.
#[derive(Debug, Serialize, Deserialize)]
pub(super) enum Order {
    /// To serve a disk process on the socket.
    Attach {
        /// Blobs that it may ask for, by their places in the list.
        blobs: Vec<Listed>,
        /// Download of the blobs while the disk is served.
        download: Option<Download>,
    },
    /// To write the layers of an image, as [`Resolved`](crate::fetch::image_lookup::Resolved), to the socket.
    Resolve {
        reference: String,
        /// Longest wait for a registry that does not answer.
        patience: Duration,
    },
}

/// A blob that a disk process may ask for.
#[derive(Debug, Serialize, Deserialize)]
pub(super) struct Listed {
    pub(super) digest: String,
    pub(super) size: Option<u64>,
    pub(super) blobs_url: String,
}

/// A message as it is received.
#[derive(Debug)]
pub(super) struct OwnerMessage {
    pub(super) text: OwnedFd,
    pub(super) socket: Option<OwnedFd>,
}

impl OwnerMessage {
    /// The message in a packet; `None` if the packet has no text.
    pub(super) fn new(packet: Message) -> Option<Self> {
        let mut files = packet.files.into_iter();
        let text = files.next()?;
        let socket = files.next();
        Some(Self { text, socket })
    }

    /// Whether the process at the other end of the socket closed it.
    pub(super) fn is_over(&self) -> bool {
        let Some(socket) = &self.socket else {
            return false;
        };
        let mut polled = [PollFd::new(socket, PollFlags::HUP)];
        let now = Timespec::default();
        poll(&mut polled, Some(&now)).is_ok() && polled[0].revents().contains(PollFlags::HUP)
    }

    /// Reads the text.
    pub(super) fn read<T: for<'de> Deserialize<'de>>(&self) -> Result<T, ProcessError> {
        let mut file = File::from(self.text.try_clone()?);
        file.rewind()?;
        let mut text = String::new();
        file.take(MAX_TEXT).read_to_string(&mut text)?;
        Ok(serde_json::from_str(&text)?)
    }

    /// The descriptors of the packet.
    pub(super) fn into_files(self) -> Vec<OwnedFd> {
        std::iter::once(self.text).chain(self.socket).collect()
    }

    /// The same message, with descriptors of its own.
    pub(super) fn try_clone(&self) -> io::Result<Self> {
        Ok(Self {
            text: self.text.try_clone()?,
            socket: self.socket.as_ref().map(OwnedFd::try_clone).transpose()?,
        })
    }
}

/// Sends a value as a message, with a socket.
pub(super) fn send<T: Serialize>(
    control: &OwnedFd,
    value: &T,
    socket: Option<OwnedFd>,
) -> Result<(), ProcessError> {
    let memory = memfd_create("fetch", MemfdFlags::CLOEXEC).map_err(io::Error::from)?;
    let mut file = File::from(memory);
    file.write_all(&serde_json::to_vec(value)?)?;
    let text = file.into();
    let files = OwnerMessage { text, socket }.into_files();
    Ok(link::send_once(
        control,
        &[0; MESSAGE_LEN],
        &files,
        PATIENCE,
    )?)
}
