//! State notifications to the service manager (`sd_notify(3)`).

use std::env;
use std::ffi::OsStr;
use std::io;
use std::os::linux::net::SocketAddrExt;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::net::{SocketAddr, UnixDatagram, UnixListener};

use sd_notify::NotifyState;

use super::handover;

/// The connection to the service manager, if there is one. Made early: the sandbox allows no new socket.
#[derive(Debug)]
pub struct Manager {
    socket: Option<UnixDatagram>,
}

impl Manager {
    /// Connects to the socket that `NOTIFY_SOCKET` names; a failure is logged.
    pub fn connect() -> Self {
        let socket = env::var_os("NOTIFY_SOCKET").and_then(|name| {
            connect(&name)
                .inspect_err(|error| {
                    log::warn!("cannot connect to the service manager at {name:?}: {error}")
                })
                .ok()
        });
        Self { socket }
    }

    /// Sends a state; a failure is logged.
    pub fn tell(&self, state: &NotifyState<'_>) {
        if let Some(socket) = &self.socket
            && let Err(error) = socket.send(state.to_string().as_bytes())
        {
            log::warn!("cannot send {state} to the service manager: {error}");
        }
    }
}

impl Manager {
    /// Asks the service manager to keep a socket while the service is restarted, in place of an earlier one of this
    /// name; a failure is logged. Without `FileDescriptorStoreMax=`, the service manager closes it.
    pub fn keep(&self, name: &str, listener: &UnixListener) {
        self.forget(name);
        let message = format!("FDSTORE=1\nFDNAME={name}\nFDPOLL=0");
        if let Some(socket) = &self.socket
            && let Err(error) = handover::send_once(socket, message.as_bytes(), listener)
        {
            log::warn!("cannot leave the socket {name} to the service manager: {error}");
        }
    }

    /// Asks the service manager to close the socket that it keeps by this name.
    pub fn forget(&self, name: &str) {
        self.tell(&NotifyState::Custom(&format!(
            "FDSTOREREMOVE=1\nFDNAME={name}"
        )));
    }
}

fn connect(name: &OsStr) -> io::Result<UnixDatagram> {
    let address = match name.as_bytes() {
        [b'@', name @ ..] => SocketAddr::from_abstract_name(name)?,
        _ => SocketAddr::from_pathname(name)?,
    };
    let socket = UnixDatagram::unbound()?;
    socket.connect_addr(&address)?;
    Ok(socket)
}
