//! A registry, token server or mirror that does as a test says: one reply a request, down to the
//! bytes on the wire, and a record of what was asked.

use std::collections::{HashMap, VecDeque};
use std::io::{self, BufRead, BufReader, Read, Write};
use std::net::{Shutdown, SocketAddr, TcpListener, TcpStream};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Condvar, Mutex};
use std::thread;
use std::time::Duration;

use rustls::{ServerConfig, ServerConnection, StreamOwned};

use crate::PATIENCE;

/// One request as it was received.
#[derive(Clone, Debug)]
pub struct Received {
    /// `GET` or another method.
    pub method: String,
    /// Path and query.
    pub target: String,
    /// Fields of the header; names in lower case.
    pub headers: Vec<(String, String)>,
    /// The body.
    pub body: String,
    /// Number of the connection, from 0.
    pub connection: usize,
}

impl Received {
    /// A field of the header.
    pub fn header(&self, name: &str) -> Option<&str> {
        let field = self.headers.iter().find(|(field, _)| field == name)?;
        Some(&field.1)
    }

    /// First and last byte of the `Range` field.
    pub fn range(&self) -> Option<(usize, usize)> {
        let (first, last) = self
            .header("range")?
            .strip_prefix("bytes=")?
            .split_once('-')?;
        Some((first.parse().ok()?, last.parse().ok()?))
    }
}

/// What the server does about a request.
#[derive(Clone, Debug)]
pub enum Reply {
    /// Sends bytes and reads the next request.
    Send(Vec<u8>),
    /// Sends bytes and closes the connection.
    Close(Vec<u8>),
    /// Sends bytes and resets the connection.
    Reset(Vec<u8>),
    /// Sends bytes and then nothing, until the client goes.
    Stall(Vec<u8>),
    /// Sends bytes one at a time with pauses.
    Drip(Vec<u8>, Duration),
    /// Waits, then does something else.
    Later(Duration, Box<Reply>),
}

/// An answer with a body, delimited by `Content-Length`.
pub fn answer(status: u16, headers: &[(&str, &str)], body: &[u8]) -> Reply {
    let length = body.len().to_string();
    let mut all = vec![("Content-Length", length.as_str())];
    all.extend_from_slice(headers);
    Reply::Send(raw(status, &all, body))
}

/// The bytes of an answer, with no header added.
pub fn raw(status: u16, headers: &[(&str, &str)], body: &[u8]) -> Vec<u8> {
    let mut bytes = format!("HTTP/1.1 {status} X\r\n").into_bytes();
    for (name, value) in headers {
        bytes.extend_from_slice(format!("{name}: {value}\r\n").as_bytes());
    }
    bytes.extend_from_slice(b"\r\n");
    bytes.extend_from_slice(body);
    bytes
}

/// What a good registry answers to a request for a blob: the range asked for, or the whole.
pub fn serve(request: &Received, blob: &[u8]) -> Reply {
    let Some((first, last)) = request.range() else {
        return answer(200, &[], blob);
    };
    if first >= blob.len() {
        let range = format!("bytes */{}", blob.len());
        return answer(416, &[("Content-Range", &range)], b"");
    }
    let last = last.min(blob.len() - 1);
    let range = format!("bytes {first}-{last}/{}", blob.len());
    answer(206, &[("Content-Range", &range)], &blob[first..=last])
}

type Handler = dyn Fn(&Received) -> Reply + Send + Sync;

struct Shared {
    handler: Box<Handler>,
    received: Mutex<Vec<Received>>,
    streams: Mutex<HashMap<usize, TcpStream>>,
    stopped: AtomicBool,
    stop: (Mutex<bool>, Condvar),
}

/// A server on a port of its own, until it is dropped.
pub struct Server {
    address: SocketAddr,
    shared: Arc<Shared>,
}

impl Server {
    /// Starts a server that replies as `handler` says.
    pub fn start(handler: impl Fn(&Received) -> Reply + Send + Sync + 'static) -> Server {
        Server::launch(None, Box::new(handler))
    }

    /// The same over TLS.
    pub fn start_tls(
        tls: Arc<ServerConfig>,
        handler: impl Fn(&Received) -> Reply + Send + Sync + 'static,
    ) -> Server {
        Server::launch(Some(tls), Box::new(handler))
    }

    fn launch(tls: Option<Arc<ServerConfig>>, handler: Box<Handler>) -> Server {
        let listener = TcpListener::bind("127.0.0.1:0").expect("a port");
        let address = listener.local_addr().expect("its address");
        let shared = Arc::new(Shared {
            handler,
            received: Mutex::default(),
            streams: Mutex::default(),
            stopped: AtomicBool::new(false),
            stop: (Mutex::new(false), Condvar::new()),
        });
        let accepting = Arc::clone(&shared);
        thread::spawn(move || {
            for (number, stream) in listener.incoming().enumerate() {
                let Ok(stream) = stream else { continue };
                if accepting.stopped.load(Ordering::SeqCst) {
                    return;
                }
                let (shared, tls) = (Arc::clone(&accepting), tls.clone());
                let kept = stream.try_clone().expect("a descriptor");
                shared.streams.lock().expect("streams").insert(number, kept);
                thread::spawn(move || {
                    let _ = shared.serve(stream, tls, number);
                });
            }
        });
        Server { address, shared }
    }

    /// Starts a server that gives these replies, one a request, and status 599 after them.
    pub fn script(replies: impl IntoIterator<Item = Reply>) -> Server {
        let replies: Mutex<VecDeque<_>> = Mutex::new(replies.into_iter().collect());
        Server::start(move |_| {
            let next = replies.lock().expect("replies").pop_front();
            next.unwrap_or_else(|| answer(599, &[], b"the script is at its end"))
        })
    }

    /// `HOST:PORT`.
    pub fn host(&self) -> String {
        self.address.to_string()
    }

    /// URL of a path.
    pub fn url(&self, path: &str) -> String {
        format!("http://{}{path}", self.address)
    }

    /// All requests so far.
    pub fn received(&self) -> Vec<Received> {
        self.shared.received.lock().expect("requests").clone()
    }

    /// Number of requests so far.
    pub fn count(&self) -> usize {
        self.received().len()
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        self.shared.stopped.store(true, Ordering::SeqCst);
        *self.shared.stop.0.lock().expect("stop") = true;
        self.shared.stop.1.notify_all();
        for stream in self.shared.streams.lock().expect("streams").values() {
            let _ = stream.shutdown(Shutdown::Both);
        }
        // Wakes the thread that accepts.
        let _ = TcpStream::connect(self.address);
    }
}

impl Shared {
    fn serve(
        &self,
        stream: TcpStream,
        tls: Option<Arc<ServerConfig>>,
        connection: usize,
    ) -> io::Result<()> {
        stream.set_nodelay(true)?;
        let socket = stream.try_clone()?;
        match tls {
            None => self.converse(stream, socket, connection),
            Some(tls) => {
                let session = ServerConnection::new(tls).map_err(io::Error::other)?;
                self.converse(StreamOwned::new(session, stream), socket, connection)
            }
        }
    }

    fn converse(
        &self,
        stream: impl Read + Write,
        socket: TcpStream,
        connection: usize,
    ) -> io::Result<()> {
        let mut reader = BufReader::new(stream);
        while let Some(request) = read_request(&mut reader, connection)? {
            self.received
                .lock()
                .expect("requests")
                .push(request.clone());
            let mut reply = (self.handler)(&request);
            while let Reply::Later(wait, then) = reply {
                self.wait(wait);
                reply = *then;
            }
            match reply {
                Reply::Send(bytes) => reader.get_mut().write_all(&bytes)?,
                Reply::Close(bytes) => {
                    reader.get_mut().write_all(&bytes)?;
                    return socket.shutdown(Shutdown::Both);
                }
                Reply::Reset(bytes) => {
                    reader.get_mut().write_all(&bytes)?;
                    // Time for the client to read what was sent, which a reset would take away.
                    self.wait(Duration::from_millis(50));
                    rustix::net::sockopt::set_socket_linger(&socket, Some(Duration::ZERO))?;
                    self.streams.lock().expect("streams").remove(&connection);
                    return Ok(());
                }
                Reply::Stall(bytes) => {
                    reader.get_mut().write_all(&bytes)?;
                    let _ = reader.read(&mut [0]);
                    return Ok(());
                }
                Reply::Drip(bytes, pause) => {
                    for byte in bytes {
                        reader.get_mut().write_all(&[byte])?;
                        self.wait(pause);
                    }
                }
                Reply::Later(..) => {}
            }
        }
        Ok(())
    }

    /// Waits, unless the server stops.
    fn wait(&self, duration: Duration) {
        let stopped = self.stop.0.lock().expect("stop");
        let waited = self
            .stop
            .1
            .wait_timeout_while(stopped, duration, |stopped| !*stopped);
        drop(waited);
    }
}

fn read_request(reader: &mut impl BufRead, connection: usize) -> io::Result<Option<Received>> {
    let mut line = String::new();
    if reader.read_line(&mut line)? == 0 {
        return Ok(None);
    }
    let mut words = line.split_whitespace().map(str::to_owned);
    let (method, target) = (
        words.next().unwrap_or_default(),
        words.next().unwrap_or_default(),
    );
    let mut headers = Vec::new();
    loop {
        let mut line = String::new();
        reader.read_line(&mut line)?;
        let Some((name, value)) = line.trim_end().split_once(':') else {
            break;
        };
        headers.push((name.to_ascii_lowercase(), value.trim().to_owned()));
    }
    let length = headers.iter().find(|(name, _)| name == "content-length");
    let length = length
        .and_then(|(_, value)| value.parse().ok())
        .unwrap_or(0);
    let mut body = vec![0; length];
    reader.read_exact(&mut body)?;
    let body = String::from_utf8_lossy(&body).into_owned();
    Ok(Some(Received {
        method,
        target,
        headers,
        body,
        connection,
    }))
}

/// Waits until `done`, and fails if that takes too long.
pub fn until(what: &str, mut done: impl FnMut() -> bool) {
    let end = std::time::Instant::now() + PATIENCE;
    while !done() {
        assert!(std::time::Instant::now() < end, "not in time: {what}");
        thread::sleep(Duration::from_millis(5));
    }
}
