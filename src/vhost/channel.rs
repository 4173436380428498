//! Socket of one front-end connection: receives whole messages with their descriptors, sends replies.
//!
//! The request handler of the `vhost` crate is not used, for three reasons. It does not notice that the
//! kernel dropped descriptors of a message, and then waits for the rest of a lost message. It examines
//! sockets with system calls that the sandbox forbids. It refuses what was not negotiated on the same
//! connection, and front-ends do not negotiate again after a restart of the daemon. The crate's types
//! describe the messages ([`message`](super::message)).

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
use super::message::{MAX_DESCRIPTORS, Message, Reply};
use crate::io::interrupt::PeerCall;

/// Length of a message header: request, flags and length of the body, 32 bits each.
const HEADER: usize = 12;

/// Protocol version in the flags of a header.
pub(super) const VERSION: u32 = 1;

/// Time limit for the rest of a message to arrive, and for the front-end to read a reply.
const DEADLINE: Duration = Duration::from_secs(5);

/// Error that ends the exchange of messages with a front-end.
#[derive(Debug, thiserror::Error)]
pub enum ChannelError {
    /// A system call on the socket fails.
    #[error("{doing} a message failed")]
    Socket {
        /// Operation that failed.
        doing: &'static str,
        /// Error of the system call.
        source: io::Error,
    },
    /// The connection ends within a message.
    #[error("the connection ended within a message: expected {expected} bytes, found {found}")]
    Partial {
        /// Length of the header or body.
        expected: usize,
        /// Bytes received.
        found: usize,
    },
    /// The front-end does not send the rest of a message, or does not read a reply, in time.
    #[error("{doing} a message took longer than {} s", DEADLINE.as_secs())]
    Late {
        /// Operation that failed.
        doing: &'static str,
    },
    /// The kernel dropped descriptors of a message.
    #[error(
        "descriptors of a message were lost: the message had more than {MAX_DESCRIPTORS}, or \
         the daemon reached its limit of open files (RLIMIT_NOFILE)"
    )]
    Descriptors,
    /// The header is not that of a request.
    #[error(
        "request {request} has flags {flags:#x} and {len} bytes: expected version {VERSION}, no reply, and at most {MAX_MSG_SIZE} bytes"
    )]
    Header {
        /// Number of the request.
        request: u32,
        /// Flags of the header.
        flags: u32,
        /// Length of the body.
        len: u32,
    },
}

/// Socket of one front-end connection.
#[derive(Debug)]
pub struct Channel {
    stream: Arc<UnixStream>,
    /// Wraps calls that close descriptors. Closing can block: a socket may linger.
    peer: Arc<PeerCall>,
}

impl Channel {
    /// Channel over `stream`, which is in blocking mode.
    ///
    /// # Errors
    ///
    /// `setsockopt(2)` of the send timeout fails.
    pub fn new(stream: Arc<UnixStream>, peer: Arc<PeerCall>) -> io::Result<Self> {
        stream.set_write_timeout(Some(DEADLINE))?;
        Ok(Self { stream, peer })
    }

    /// Receives the next message; `None` once the front-end has disconnected.
    ///
    /// # Errors
    ///
    /// Any [`ChannelError`]. The position of the next message in the stream is unknown afterwards.
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
        let [r0, r1, r2, r3, f0, f1, f2, f3, n0, n1, n2, n3] = header;
        let request = u32::from_le_bytes([r0, r1, r2, r3]);
        let flags = u32::from_le_bytes([f0, f1, f2, f3]);
        let len = u32::from_le_bytes([n0, n1, n2, n3]);
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

    /// Fills the rest of `buffer`, whose first `found` bytes are read already.
    fn read_rest(
        &self,
        buffer: &mut [u8],
        mut found: usize,
        files: &mut Vec<OwnedFd>,
    ) -> Result<(), ChannelError> {
        let deadline = Instant::now() + DEADLINE;
        let expected = buffer.len();
        while let Some(rest) = buffer.get_mut(found..).filter(|rest| !rest.is_empty()) {
            match self.read(rest, files, Some(deadline))? {
                0 => return Err(ChannelError::Partial { expected, found }),
                more => found += more,
            }
        }
        Ok(())
    }

    /// Reads the bytes that have arrived; waits for the first one until the deadline.
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
        // The call closes the descriptors that the kernel drops.
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
        // A message may arrive in several parts, each with descriptors.
        if received.flags.contains(ReturnFlags::CTRUNC) || files.len() > MAX_DESCRIPTORS {
            return Err(ChannelError::Descriptors);
        }
        Ok(received.bytes)
    }

    /// Waits until the socket is readable; returns false if it is not by the deadline.
    fn wait(&self, deadline: Instant) -> Result<bool, Errno> {
        let left = deadline.saturating_duration_since(Instant::now());
        let left = Timespec::try_from(left).map_err(|_| Errno::INVAL)?;
        let mut watched = [PollFd::new(&*self.stream, PollFlags::IN)];
        match poll(&mut watched, Some(&left)) {
            Ok(ready) => Ok(ready > 0),
            // The caller reads, and blocks there if nothing has arrived.
            Err(Errno::INTR) => Ok(true),
            Err(errno) => Err(errno),
        }
    }

    /// Sends the reply to `request`.
    ///
    /// # Errors
    ///
    /// [`ChannelError::Socket`] if the front-end has disconnected, [`ChannelError::Late`] if it does not
    /// read.
    pub fn send(&self, request: u32, reply: &Reply) -> Result<(), ChannelError> {
        const DOING: &str = "sending";
        let flags = VERSION | VhostUserHeaderFlag::REPLY.bits();
        let header = [request, flags, reply.body.len() as u32].map(u32::to_le_bytes);
        let bytes = [header.as_flattened(), &reply.body].concat();
        let deadline = Instant::now() + DEADLINE;
        let mut sent = 0;
        while let Some(rest) = bytes.get(sent..).filter(|rest| !rest.is_empty()) {
            let file = reply.file.as_ref().filter(|_| sent == 0);
            match send_some(&self.stream, rest, file) {
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
        // The space is for one descriptor.
        control.push(SendAncillaryMessage::ScmRights(&descriptors));
    }
    let parts = [IoSlice::new(bytes)];
    sendmsg(stream, &parts, &mut control, SendFlags::NOSIGNAL)
}
