//! The listening socket of a disk, handed over between `ovbd-node` and a disk process.
//!
//! A disk process that the node starts has a stream to the node as its standard input (`--started-by-node`). The node
//! puts the listening socket into the stream before it starts the process (`SCM_RIGHTS`). When the process is ready it
//! answers with size and serial number of its disk. So the start needs no path in the file system, and no code between fork and exec.
//!
//! The next node asks a running process for the socket over the control API (`GET /api/v1/listener`).

use std::io::{self, IoSlice, IoSliceMut, Write};
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::net::{UnixListener, UnixStream};
use std::time::Duration;

use rustix::net::sockopt::{socket_acceptconn, socket_domain, socket_type};
use rustix::net::{
    AddressFamily, RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, SendAncillaryBuffer,
    SendAncillaryMessage, SendFlags, SocketType, recvmsg, sendmsg,
};
use serde::{Deserialize, Serialize};

/// Longest answer of a process that is ready, in bytes.
pub const MAX_READY: usize = 1024;

/// Version of the message with which the node starts a process.
const VERSION: u8 = 1;

/// Longest wait for the node's message, which is there when the process starts.
const PATIENCE: Duration = Duration::from_secs(10);

/// What a process reports of its disk once it serves: a line of JSON.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Ready {
    /// Size of the disk in bytes.
    pub size_bytes: u64,
    /// Serial number.
    pub serial: String,
}

/// What the node gave to this process.
#[derive(Debug)]
pub struct Handover {
    /// The listening socket.
    pub listener: UnixListener,
    /// The stream to the node.
    pub node: UnixStream,
}

impl Handover {
    /// Takes the stream that is the standard input, and the socket in it.
    ///
    /// # Errors
    /// Those of the system; `InvalidData` if the standard input holds no message of the node.
    pub fn take() -> io::Result<Self> {
        let node = UnixStream::from(io::stdin().as_fd().try_clone_to_owned()?);
        node.set_read_timeout(Some(PATIENCE))?;
        let mut version = [0];
        let (len, socket) = receive(&node, &mut version)?;
        let socket = socket.filter(|_| len == 1 && version == [VERSION]);
        let unexpected = || {
            let text = "expected the listening socket of ovbd-node on standard input";
            io::Error::new(io::ErrorKind::InvalidData, text)
        };
        let listener = socket.and_then(listening).ok_or_else(unexpected)?;
        Ok(Self { listener, node })
    }
}

/// Tells the node that the disk is served.
///
/// # Errors
/// `BrokenPipe` if the node has ended: it did not record the process, and the next node starts another.
pub fn report(mut node: UnixStream, ready: &Ready) -> io::Result<()> {
    let line = serde_json::to_string(ready)? + "\n";
    node.write_all(line.as_bytes())
}

/// Makes the stream between the node and a process, with `listener` in it. Returns the node's end, and the one that
/// becomes the standard input of the process.
///
/// # Errors
/// Those of the system.
pub fn prepare(listener: &UnixListener) -> io::Result<(UnixStream, OwnedFd)> {
    let (node, process) = UnixStream::pair()?;
    send(&node, &[VERSION], listener)?;
    Ok((node, process.into()))
}

/// Sends `bytes`, of which there are few, with `listener`.
///
/// # Errors
/// Those of `sendmsg(2)`.
pub fn send(mut stream: &UnixStream, bytes: &[u8], listener: &UnixListener) -> io::Result<()> {
    let sent = send_once(stream, bytes, listener)?;
    // The rest, if the buffer of the socket is almost full.
    stream.write_all(bytes.get(sent..).unwrap_or_default())
}

/// Sends bytes with `listener` by one call. Returns the number of bytes that were sent.
///
/// # Errors
/// Those of `sendmsg(2)`.
pub fn send_once(socket: impl AsFd, bytes: &[u8], listener: &UnixListener) -> io::Result<usize> {
    let sockets = [listener.as_fd()];
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
    let mut message = SendAncillaryBuffer::new(&mut space);
    message.push(SendAncillaryMessage::ScmRights(&sockets));
    let parts = [IoSlice::new(bytes)];
    Ok(sendmsg(socket, &parts, &mut message, SendFlags::NOSIGNAL)?)
}

/// Receives bytes and at most one descriptor.
///
/// # Errors
/// Those of `recvmsg(2)`.
pub fn receive(stream: impl AsFd, bytes: &mut [u8]) -> io::Result<(usize, Option<OwnedFd>)> {
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
    let mut message = RecvAncillaryBuffer::new(&mut space);
    let received = recvmsg(
        stream,
        &mut [IoSliceMut::new(bytes)],
        &mut message,
        RecvFlags::CMSG_CLOEXEC,
    )?;
    let descriptors = message.drain().filter_map(|part| match part {
        RecvAncillaryMessage::ScmRights(descriptors) => Some(descriptors),
        _ => None,
    });
    Ok((received.bytes, descriptors.flatten().next()))
}

/// Returns a descriptor as what it has to be: a listening Unix stream socket.
pub fn listening(socket: OwnedFd) -> Option<UnixListener> {
    let listens = socket_domain(&socket) == Ok(AddressFamily::UNIX)
        && socket_type(&socket) == Ok(SocketType::STREAM)
        && socket_acceptconn(&socket) == Ok(true);
    listens.then(|| socket.into())
}
