//! One connection: messages in, answers out, until it ends.

use std::net::Shutdown;
use std::os::unix::net::UnixStream;
use std::sync::{Arc, Mutex};

use vhost::vhost_user::{BackendReqHandler, Error};

use super::handler::Handler;
use crate::engine::Disk;

/// Serves `stream` until the front-end leaves or breaks the protocol, then stops its queues.
///
/// # Errors
///
/// What the front-end did wrong, or the socket's failure; leaving is no error.
pub fn serve(stream: UnixStream, disk: Arc<Disk>) -> Result<(), Error> {
    let hangup = Arc::new(stream.try_clone().map_err(Error::SocketError)?);
    let handler = Arc::new(Mutex::new(Handler::new(disk, hangup.clone())));
    let mut requests = BackendReqHandler::from_stream(stream, handler);
    let result = loop {
        match requests.handle_request() {
            Ok(()) | Err(Error::SocketRetry(_)) => {}
            Err(Error::Disconnected) => break Ok(()),
            Err(error) => break Err(error),
        }
    };
    // Whoever else holds the socket, a front-end we no longer listen to shall see it.
    let _ = hangup.shutdown(Shutdown::Both);
    result
}
