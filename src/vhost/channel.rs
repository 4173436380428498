//! The socket of one front-end: whole messages with their descriptors in, replies out.
//!
//! The `vhost` crate's own request handler is not used for this. It reads a header and its
//! descriptors without noticing that the kernel dropped some of them, and then waits for the rest of
//! a message it has lost; it examines sockets with calls that the sandbox forbids; and it refuses
//! whatever was not negotiated on this connection, which a front-end does not do again after a
//! restart. Its types describe the messages here ([`Body`](super::message)).

use std::fs::File;
use std::io::{self, IoSlice, IoSliceMut};
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::sync::Arc;
use std::time::{Duration, Instant};

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::io::{Errno, retry_on_intr};
use rustix::net::{
    RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, ReturnFlags, SendAncillaryBuffer,
    SendAncillaryMessage, SendFlags, recvmsg, sendmsg,
};
use vhost::vhost_user::message::{MAX_MSG_SIZE, VhostUserHeaderFlag};

use super::closing;
use super::message::{Message, Reply};
use crate::io::interrupt::PeerCall;

/// Bytes of a message's header: request, flags and length of the body, 32 bits each.
const HEADER: usize = 12;

/// Descriptors that may come with a message; the longest memory table has as many regions.
pub const MAX_DESCRIPTORS: usize = 32;

/// Most descriptors that are held for one message: a part of it may bring as many as the message may have before the
/// message is refused.
pub const MAX_HELD: usize = 2 * MAX_DESCRIPTORS;

/// Protocol version in a header's flags.
pub(super) const VERSION: u32 = 1;

/// How long the rest of a message may take, and the front-end to read a reply.
const DEADLINE: Duration = Duration::from_secs(5);

/// Why no more messages can be exchanged with a front-end.
#[derive(Debug, thiserror::Error)]
pub enum ChannelError {
    /// The socket fails.
    #[error("{doing} a message failed")]
    Socket {
        /// What was being done.
        doing: &'static str,
        /// What the system said.
        source: io::Error,
    },
    /// The connection ended within a message.
    #[error("the connection ended within a message: expected {expected} bytes, found {found}")]
    Partial {
        /// Bytes of the header or body.
        expected: usize,
        /// Bytes that came.
        found: usize,
    },
    /// The rest of a message, or room for a reply, did not come.
    #[error("{doing} a message took longer than {} s", DEADLINE.as_secs())]
    Late {
        /// What was being done.
        doing: &'static str,
    },
    /// The kernel dropped descriptors of a message.
    #[error(
        "descriptors of a message were lost: the message had more than {MAX_DESCRIPTORS}, or \
         the daemon reached its limit of open files (RLIMIT_NOFILE)"
    )]
    Descriptors,
    /// The header is not one of a request.
    #[error(
        "request {request} has flags {flags:#x} and {len} bytes: expected version {VERSION}, no reply, and at most {MAX_MSG_SIZE} bytes"
    )]
    Header {
        /// The request's number.
        request: u32,
        /// Its flags.
        flags: u32,
        /// Length of its body.
        len: u32,
    },
}

/// The socket of one front-end.
#[derive(Debug)]
pub struct Channel {
    stream: Arc<UnixStream>,
    /// Calls that end with descriptors being closed, which can block: a socket may linger.
    peer: Arc<PeerCall>,
}

impl Channel {
    /// A channel over `stream`, which blocks.
    ///
    /// # Errors
    ///
    /// The stream's timeout for sending cannot be set.
    pub fn new(stream: Arc<UnixStream>, peer: Arc<PeerCall>) -> io::Result<Self> {
        stream.set_write_timeout(Some(DEADLINE))?;
        Ok(Self { stream, peer })
    }

    /// The next message; `None` once the front-end has left.
    ///
    /// # Errors
    ///
    /// As [`ChannelError`]: what comes next in the stream is not the start of a message.
    pub fn receive(&self) -> Result<Option<Message>, ChannelError> {
        let mut files = Vec::new();
        let received = self.receive_parts(&mut files);
        match received {
            Ok(Some((request, flags, body))) => Ok(Some(Message {
                request,
                wants_reply: flags & VhostUserHeaderFlag::NEED_REPLY.bits() != 0,
                body,
                files: files.into_iter().map(File::from).collect(),
            })),
            Ok(None) => Ok(None),
            Err(error) => {
                closing::close(files.into_iter().map(File::from), &self.peer);
                Err(error)
            }
        }
    }

    fn receive_parts(
        &self,
        files: &mut Vec<OwnedFd>,
    ) -> Result<Option<(u32, u32, Vec<u8>)>, ChannelError> {
        let mut header = [0; HEADER];
        match self.read(&mut header, files, None)? {
            0 => return Ok(None),
            found => self.read_rest(&mut header, found, files)?,
        }
        let [request, flags, len] =
            [0, 4, 8].map(|at| u32::from_le_bytes([0, 1, 2, 3].map(|byte| header[at + byte])));
        let allowed = VERSION | VhostUserHeaderFlag::NEED_REPLY.bits();
        let sensible = flags & VhostUserHeaderFlag::VERSION.bits() == VERSION
            && flags & !allowed == 0
            && len as usize <= MAX_MSG_SIZE;
        if !sensible {
            return Err(ChannelError::Header {
                request,
                flags,
                len,
            });
        }
        let mut body = vec![0; len as usize];
        self.read_rest(&mut body, 0, files)?;
        Ok(Some((request, flags, body)))
    }

    /// Fills `buffer`, of which the first `found` bytes are there.
    fn read_rest(
        &self,
        buffer: &mut [u8],
        mut found: usize,
        files: &mut Vec<OwnedFd>,
    ) -> Result<(), ChannelError> {
        let deadline = Instant::now() + DEADLINE;
        while found < buffer.len() {
            match self.read(&mut buffer[found..], files, Some(deadline))? {
                0 => {
                    let expected = buffer.len();
                    return Err(ChannelError::Partial { expected, found });
                }
                more => found += more,
            }
        }
        Ok(())
    }

    /// Reads what is there, and waits for something until the deadline.
    fn read(
        &self,
        buffer: &mut [u8],
        files: &mut Vec<OwnedFd>,
        deadline: Option<Instant>,
    ) -> Result<usize, ChannelError> {
        const DOING: &str = "receiving";
        let failed = |errno: Errno| ChannelError::Socket {
            doing: DOING,
            source: errno.into(),
        };
        if let Some(deadline) = deadline
            && !self.wait(deadline).map_err(failed)?
        {
            return Err(ChannelError::Late { doing: DOING });
        }
        let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(MAX_DESCRIPTORS))];
        let mut control = RecvAncillaryBuffer::new(&mut space);
        let mut parts = [IoSliceMut::new(buffer)];
        // Descriptors the kernel drops are closed in the call.
        let receive = || {
            recvmsg(
                &self.stream,
                &mut parts,
                &mut control,
                RecvFlags::CMSG_CLOEXEC,
            )
        };
        let received = match self.peer.run(|| retry_on_intr(receive)) {
            Ok(received) => received,
            Err(Errno::CONNRESET) => return Ok(0),
            Err(errno) => return Err(failed(errno)),
        };
        for message in control.drain() {
            if let RecvAncillaryMessage::ScmRights(descriptors) = message {
                files.extend(descriptors);
            }
        }
        // A message may come in many parts, each with descriptors.
        if received.flags.contains(ReturnFlags::CTRUNC) || files.len() > MAX_DESCRIPTORS {
            return Err(ChannelError::Descriptors);
        }
        Ok(received.bytes)
    }

    /// Waits until there is something to read; returns whether there is by the deadline.
    fn wait(&self, deadline: Instant) -> Result<bool, Errno> {
        let left = deadline.saturating_duration_since(Instant::now());
        let left = Timespec::try_from(left).map_err(|_| Errno::INVAL)?;
        let mut watched = [PollFd::new(&*self.stream, PollFlags::IN)];
        match poll(&mut watched, Some(&left)) {
            Ok(ready) => Ok(ready > 0),
            // The caller reads, and waits if that finds nothing.
            Err(Errno::INTR) => Ok(true),
            Err(errno) => Err(errno),
        }
    }

    /// Answers `request`.
    ///
    /// # Errors
    ///
    /// The front-end has left, or does not read.
    pub fn send(&self, request: u32, reply: &Reply) -> Result<(), ChannelError> {
        const DOING: &str = "sending";
        let flags = VERSION | VhostUserHeaderFlag::REPLY.bits();
        let header = [request, flags, reply.body.len() as u32].map(u32::to_le_bytes);
        let bytes = [header.as_flattened(), &reply.body].concat();
        let deadline = Instant::now() + DEADLINE;
        let mut sent = 0;
        while sent < bytes.len() {
            let file = reply.file.as_ref().filter(|_| sent == 0);
            match send_some(&self.stream, &bytes[sent..], file) {
                Ok(count) => sent += count,
                Err(Errno::INTR) => {}
                Err(Errno::AGAIN) => return Err(ChannelError::Late { doing: DOING }),
                Err(errno) => {
                    let source = errno.into();
                    return Err(ChannelError::Socket {
                        doing: DOING,
                        source,
                    });
                }
            }
            if Instant::now() > deadline {
                return Err(ChannelError::Late { doing: DOING });
            }
        }
        Ok(())
    }
}

fn send_some(stream: &UnixStream, bytes: &[u8], file: Option<&File>) -> Result<usize, Errno> {
    let descriptors = [file.map_or(stream.as_fd(), AsFd::as_fd)];
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
    let mut control = SendAncillaryBuffer::new(&mut space);
    if file.is_some() {
        // There is room for one.
        control.push(SendAncillaryMessage::ScmRights(&descriptors));
    }
    let parts = [IoSlice::new(bytes)];
    sendmsg(stream, &parts, &mut control, SendFlags::NOSIGNAL)
}
