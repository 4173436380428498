//! One connection: messages in, answers out, until it ends.

use std::net::Shutdown;
use std::os::unix::net::UnixStream;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use vhost::vhost_user::{BackendReqHandler, Error};

use super::handler::Handler;
use crate::engine::Disk;

/// How long a front-end may leave our answers unread, once the socket holds no more of them.
const WRITE_TIMEOUT: Duration = Duration::from_secs(5);

/// Serves `stream` until the front-end leaves or breaks the protocol, then stops its queues.
///
/// # Errors
///
/// What the front-end did wrong, or the socket's failure; leaving is no error.
pub fn serve(stream: UnixStream, disk: Arc<Disk>) -> Result<(), Error> {
    stream
        .set_write_timeout(Some(WRITE_TIMEOUT))
        .map_err(Error::SocketError)?;
    let hangup = Arc::new(stream.try_clone().map_err(Error::SocketError)?);
    let handler = Arc::new(Mutex::new(Handler::new(disk, hangup.clone())));
    let mut requests = BackendReqHandler::from_stream(stream, handler.clone());
    let result = loop {
        match requests.handle_request() {
            Ok(()) | Err(Error::SocketRetry(_)) => {}
            Err(Error::Disconnected) => break Ok(()),
            Err(error) => break Err(error),
        }
    };
    // First the queues, then the hang-up: a front-end that sees it may take the used index for
    // final.
    handler
        .lock()
        .unwrap_or_else(PoisonError::into_inner)
        .stop();
    // Whoever else holds the socket, a front-end we no longer listen to shall see it.
    let _ = hangup.shutdown(Shutdown::Both);
    result
}
