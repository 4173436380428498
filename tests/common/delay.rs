//! A slow link to a server on this machine: a proxy that holds bytes back and meters them.
//!
//! Half a round trip each way; towards the client, all connections share the link's rate. A proxy of
//! TCP connections opens them at once, so that a link with [`Link::handshake`] delays the first bytes of
//! a connection by one round trip more.

use std::io::{Read, Write};
use std::net::{Shutdown, SocketAddr, TcpListener, TcpStream};
use std::sync::mpsc::{Receiver, SyncSender, sync_channel};
use std::sync::{Arc, Mutex};
use std::thread;
use std::time::{Duration, Instant};

/// Bytes that are moved at a time.
const CHUNK: usize = 16 << 10;

/// Chunks of one connection that may be on their way.
const MOST_CHUNKS: usize = 4096;

/// What a link is like.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Link {
    /// Time from a question to its answer.
    pub round_trip: Duration,
    /// Whether a connection takes a round trip to open.
    pub handshake: bool,
    /// Bytes per second towards the client, of all connections together; `None`: no limit.
    pub rate: Option<u64>,
}

/// A proxy for one server. Serves until the process ends.
pub struct Delay {
    address: SocketAddr,
}

/// Time at which the link is free again.
type Free = Arc<Mutex<Instant>>;

impl Delay {
    /// Starts a proxy for the server at `host`.
    pub fn start(host: &str, link: Link) -> Delay {
        let server: SocketAddr = host.parse().expect("an address");
        let listener = TcpListener::bind("127.0.0.1:0").expect("a port");
        let address = listener.local_addr().expect("its address");
        let free = Arc::new(Mutex::new(Instant::now()));
        thread::spawn(move || {
            for client in listener.incoming().flatten() {
                // A server that is gone refuses, and so does the proxy then.
                if let Ok(server) = TcpStream::connect(server) {
                    connect(client, server, link, &free);
                }
            }
        });
        Delay { address }
    }

    /// `HOST:PORT` of the proxy.
    pub fn host(&self) -> String {
        self.address.to_string()
    }
}

fn connect(client: TcpStream, server: TcpStream, link: Link, free: &Free) {
    let clone = |stream: &TcpStream| {
        stream.set_nodelay(true).expect("an option");
        stream.try_clone().expect("a descriptor")
    };
    let half = link.round_trip / 2;
    let first = match link.handshake {
        true => link.round_trip,
        false => Duration::ZERO,
    };
    pump(clone(&client), clone(&server), first + half, half, None);
    let metered = link.rate.map(|rate| (rate, Arc::clone(free)));
    pump(server, client, half, half, metered);
}

/// Moves bytes in one direction, the first ones after `first`, the others after `later`.
fn pump(
    mut from: TcpStream,
    to: TcpStream,
    first: Duration,
    later: Duration,
    metered: Option<(u64, Free)>,
) {
    let (send, receive) = sync_channel(MOST_CHUNKS);
    thread::spawn(move || write(to, &receive));
    thread::spawn(move || {
        let begin = Instant::now();
        let mut buffer = vec![0; CHUNK];
        while let Ok(len @ 1..) = from.read(&mut buffer) {
            let mut at = Instant::now();
            if let Some((rate, free)) = &metered {
                let took = Duration::from_secs_f64(len as f64 / *rate as f64);
                let mut free = free.lock().expect("the link");
                at = at.max(*free) + took;
                *free = at;
            }
            let due = (at + later).max(begin + first);
            if SyncSender::send(&send, (due, buffer[..len].to_vec())).is_err() {
                break;
            }
        }
        let _ = from.shutdown(Shutdown::Read);
    });
}

fn write(mut to: TcpStream, chunks: &Receiver<(Instant, Vec<u8>)>) {
    for (due, bytes) in chunks {
        thread::sleep(due.saturating_duration_since(Instant::now()));
        if to.write_all(&bytes).is_err() {
            break;
        }
    }
    let _ = to.shutdown(Shutdown::Both);
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn answers_come_after_a_round_trip_and_no_faster_than_the_link() {
        let server = TcpListener::bind("127.0.0.1:0").unwrap();
        let host = server.local_addr().unwrap().to_string();
        thread::spawn(move || {
            let (mut stream, _) = server.accept().unwrap();
            let mut question = [0; 4];
            while stream.read_exact(&mut question).is_ok() {
                stream.write_all(&[7; 100_000]).unwrap();
            }
        });
        let link = Link {
            round_trip: Duration::from_millis(40),
            handshake: true,
            rate: Some(1_000_000),
        };
        let delay = Delay::start(&host, link);
        let mut stream = TcpStream::connect(delay.host()).unwrap();
        for least in [180, 140] {
            let start = Instant::now();
            stream.write_all(b"more").unwrap();
            let mut answer = vec![0; 100_000];
            stream.read_exact(&mut answer).unwrap();
            assert!(answer.iter().all(|byte| *byte == 7));
            assert!(start.elapsed() >= Duration::from_millis(least));
        }
    }
}
