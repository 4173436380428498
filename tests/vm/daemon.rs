//! `ovbd-vhost` under test: started, killed and started again on the same socket.

use std::fs::File;
use std::path::{Path, PathBuf};
use std::thread::sleep;
use std::time::{Duration, Instant};
use std::{fs, process};

use crate::process::{Process, command, text_of};

/// How long a start may take before the test gives up on it.
const START_LIMIT: Duration = Duration::from_secs(30);

/// A running daemon.
pub struct Daemon {
    process: Process,
    layers: Vec<PathBuf>,
    socket: PathBuf,
    log: PathBuf,
}

impl Daemon {
    /// Serves `layers`, bottom first, on a socket in `dir`; returns when it listens.
    pub fn start(dir: &Path, layers: &[PathBuf]) -> Self {
        let socket = dir.join("ovbd.sock");
        let log = dir.join("ovbd-vhost.log");
        let process = spawn(&socket, layers, &log);
        let mut daemon = Self {
            process,
            layers: layers.to_vec(),
            socket,
            log,
        };
        daemon.wait_until_listening();
        daemon
    }

    /// The socket it listens on.
    pub fn socket(&self) -> &Path {
        &self.socket
    }

    /// Kills it without warning and starts another in its place.
    pub fn kill_and_restart(&mut self) {
        self.process.kill();
        self.process = spawn(&self.socket, &self.layers, &self.log);
        self.wait_until_listening();
    }

    /// Seen from outside and without connecting: a connection would be a front-end.
    fn wait_until_listening(&mut self) {
        const ACCEPTS_CONNECTIONS: &str = "00010000";
        let path = self.socket.to_str().expect("socket path");
        let give_up = Instant::now() + START_LIMIT;
        loop {
            let sockets = fs::read_to_string("/proc/net/unix").expect("list of sockets");
            let listens = sockets.lines().any(|line| {
                line.ends_with(path) && line.split_whitespace().nth(3) == Some(ACCEPTS_CONNECTIONS)
            });
            if listens {
                return;
            }
            let ended = self.process.0.try_wait().expect("state of the daemon");
            assert!(
                ended.is_none() && Instant::now() < give_up,
                "the daemon does not listen: {ended:?}\n{}",
                text_of(&self.log)
            );
            sleep(Duration::from_millis(5));
        }
    }
}

fn spawn(socket: &Path, layers: &[PathBuf], log: &Path) -> Process {
    let log = File::options()
        .create(true)
        .append(true)
        .open(log)
        .expect("log file");
    let mut daemon = command(env!("CARGO_BIN_EXE_ovbd-vhost"));
    daemon.arg("--socket").arg(socket);
    daemon.args(["--serial", crate::SERIAL]);
    for layer in layers {
        daemon.arg("--layers").arg(layer);
    }
    daemon
        .stdin(process::Stdio::null())
        .stdout(log.try_clone().expect("log file"))
        .stderr(log);
    Process(daemon.spawn().expect("daemon starts"))
}
