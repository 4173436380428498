//! vhost-user messages byte by byte, for what the polite front-end refuses to send.

use std::fs::File;
use std::io::{ErrorKind, Read};
use std::os::fd::RawFd;
use std::os::unix::net::UnixStream;

use vhost::vhost_user::message::FrontendReq;
use vmm_sys_util::sock_ctrl_msg::ScmSocket;

use super::PATIENCE;

/// Header flags of a request: version 1.
pub const VERSION: u32 = 1;
/// Header flag: this is an answer.
pub const REPLY: u32 = 4;
/// Header flag: an answer is wanted.
pub const NEED_REPLY: u32 = 8;

/// A message that came.
#[derive(Debug)]
pub struct Message {
    /// Request code.
    pub request: u32,
    /// Header flags.
    pub flags: u32,
    /// Payload.
    pub body: Vec<u8>,
    /// First file descriptor that came with it.
    pub file: Option<File>,
}

impl Message {
    /// The payload as one number of 8 bytes.
    pub fn number(&self) -> u64 {
        u64::from_le_bytes(self.body[..].try_into().expect("payload of 8 bytes"))
    }
}

/// A connection without manners.
pub struct Raw(UnixStream);

/// A message's bytes: header and `body`, with `len` in the header.
pub fn message(request: u32, flags: u32, len: u32, body: &[u8]) -> Vec<u8> {
    let header = [request, flags, len].map(u32::to_le_bytes);
    [header.as_flattened(), body].concat()
}

impl Raw {
    /// Speaks over `stream`.
    pub fn new(stream: UnixStream) -> Self {
        stream.set_read_timeout(Some(PATIENCE)).expect("socket");
        stream.set_write_timeout(Some(PATIENCE)).expect("socket");
        Self(stream)
    }

    /// Sends bytes and descriptors as they are. Returns whether the other side still listens.
    pub fn send_bytes(&self, bytes: &[u8], fds: &[RawFd]) -> bool {
        match self.0.send_with_fds(&[bytes], fds) {
            Ok(sent) => {
                assert_eq!(sent, bytes.len(), "a message fits the socket's buffer");
                true
            }
            Err(_) => false,
        }
    }

    /// Sends one whole message. Returns whether the other side still listens.
    pub fn send(&self, request: FrontendReq, flags: u32, body: &[u8], fds: &[RawFd]) -> bool {
        let bytes = message(request.into(), VERSION | flags, body.len() as u32, body);
        self.send_bytes(&bytes, fds)
    }

    /// The next message, or `None` if the other side hung up.
    pub fn receive(&mut self) -> Option<Message> {
        let mut header = [0; 12];
        let (first, file) = match self.0.recv_with_fd(&mut header) {
            Ok((0, _)) => return None,
            Ok(got) => got,
            Err(error) if error.errno() == libc::ECONNRESET => return None,
            Err(error) => panic!("the back-end neither answered nor hung up: {error}"),
        };
        self.0
            .read_exact(&mut header[first..])
            .expect("rest of the header");
        let [request, flags, len] =
            [0, 4, 8].map(|at| u32::from_le_bytes([0, 1, 2, 3].map(|byte| header[at + byte])));
        let mut body = vec![0; len as usize];
        self.0.read_exact(&mut body).expect("payload");
        Some(Message {
            request,
            flags,
            body,
            file,
        })
    }

    /// Sends a request that has an answer, and returns the answer.
    pub fn ask(&mut self, request: FrontendReq, flags: u32, body: &[u8]) -> Option<Message> {
        if !self.send(request, flags, body, &[]) {
            return None;
        }
        let answer = self.receive()?;
        assert_eq!(
            answer.request,
            u32::from(request),
            "answer to what was asked"
        );
        assert_eq!(
            answer.flags & (REPLY | 3),
            REPLY | VERSION,
            "flags of an answer"
        );
        Some(answer)
    }

    /// Waits until the other side hangs up; what it still says is dropped.
    pub fn assert_closed(&mut self) {
        let mut buffer = [0; 4096];
        loop {
            match self.0.read(&mut buffer) {
                Ok(0) => return,
                Ok(_) => {}
                Err(error) if error.kind() == ErrorKind::ConnectionReset => return,
                Err(error) => panic!("the back-end did not hang up: {error}"),
            }
        }
    }
}
