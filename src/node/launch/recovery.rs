//! Processes that an earlier node started, and what they have to give to this one.

use std::io;
use std::os::unix::net::UnixListener;
use std::time::Duration;

use tokio::io::{AsyncWriteExt, Interest};
use tokio::net::UnixStream;

use super::super::id::DiskId;
use super::super::process::{Identity, Process};
use super::Launcher;
use crate::daemon::control::LISTENER;
use crate::daemon::handover::{self, MAX_READY, Ready};

/// How long a process may take to give its listening socket.
const ASK_LIMIT: Duration = Duration::from_secs(10);

impl Launcher {
    /// Finds a process that a former node started.
    pub fn find(&self, identity: &Identity) -> Option<Process> {
        Process::find(&self.watcher, identity)
    }

    /// Returns the process that serves the control socket of disk `id`, if there is one.
    pub async fn serving(&self, id: &DiskId) -> Option<Process> {
        let stream = UnixStream::connect(self.control(id)).await.ok()?;
        let pid = stream.peer_cred().ok()?.pid()?;
        let process = Process::of_pid(&self.watcher, pid).ok()?;
        (self.disk_of(pid).as_ref() == Some(id)).then_some(process)
    }

    /// Asks the process of disk `id` for its listening socket and for what it reported to the node that started it.
    ///
    /// # Errors
    /// Those of the system; `InvalidData` if the process does not give a listening socket; `TimedOut`.
    pub async fn take_back(&self, id: &DiskId) -> io::Result<(UnixListener, Ready)> {
        let asked = async {
            let mut stream = UnixStream::connect(self.control(id)).await?;
            let request = format!("GET {LISTENER} HTTP/1.1\r\nHost: localhost\r\n\r\n");
            stream.write_all(request.as_bytes()).await?;
            let mut answer = [0; MAX_READY];
            let received = stream.async_io(Interest::READABLE, || {
                handover::receive(&stream, &mut answer)
            });
            let (len, socket) = received.await?;
            let listener = socket.and_then(handover::listening);
            let ready = ready_of(&answer[..len]);
            listener
                .zip(ready)
                .ok_or_else(|| io::ErrorKind::InvalidData.into())
        };
        let answered = tokio::time::timeout(ASK_LIMIT, asked).await;
        answered.unwrap_or_else(|_| Err(io::ErrorKind::TimedOut.into()))
    }
}

/// The report in an answer, which a process sends in one piece.
fn ready_of(answer: &[u8]) -> Option<Ready> {
    let text = std::str::from_utf8(answer).ok()?;
    let (head, body) = text.split_once("\r\n\r\n")?;
    head.starts_with("HTTP/1.1 200 ").then_some(())?;
    serde_json::from_str(body).ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_a_whole_answer_is_a_report() {
        let answer = b"HTTP/1.1 200 OK\r\nA: b\r\n\r\n{\"size_bytes\":5,\"serial\":\"x\"}\n";
        let ready = ready_of(answer).unwrap();
        assert_eq!((ready.size_bytes, ready.serial.as_str()), (5, "x"));
        assert_eq!(ready_of(&answer[..answer.len() - 3]), None);
        assert_eq!(ready_of(b"HTTP/1.1 404 Not Found\r\n\r\n{}"), None);
        assert_eq!(ready_of(&[0xff; 8]), None);
    }
}
