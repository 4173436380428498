//! A name server of a test: it answers, or is silent as one behind a dead link.

use std::collections::VecDeque;
use std::net::{Ipv4Addr, SocketAddr, UdpSocket};
use std::sync::{Arc, Mutex};
use std::thread;

/// Knows one name, whose address is 127.0.0.1.
pub struct NameServer {
    address: Ipv4Addr,
    socket: UdpSocket,
    state: Arc<Mutex<State>>,
}

struct State {
    /// The name, as questions hold it.
    known: Vec<u8>,
    silent: bool,
    asked: usize,
    /// Questions that were not answered, and from where they came. A few: others are repeated.
    open: VecDeque<(Vec<u8>, SocketAddr)>,
}

impl NameServer {
    /// Starts a server for `name`, at an address of its own on this machine.
    pub fn start(name: &str) -> NameServer {
        let (address, socket) = own_address();
        let state = State {
            known: encoded(name),
            silent: false,
            asked: 0,
            open: VecDeque::new(),
        };
        let state = Arc::new(Mutex::new(state));
        let server = NameServer {
            address,
            socket: socket.try_clone().expect("a descriptor"),
            state: Arc::clone(&state),
        };
        thread::spawn(move || {
            let mut buffer = [0; 1500];
            while let Ok((len, client)) = socket.recv_from(&mut buffer) {
                let question = buffer[..len].to_vec();
                let mut state = state.lock().expect("the state");
                state.asked += 1;
                if state.silent {
                    state.open.push_back((question, client));
                    state.open.truncate(64);
                } else {
                    answer(&socket, &question, client, &state.known);
                }
            }
        });
        server
    }

    /// The content of a `resolv.conf` that names this server alone. The C library waits for it for
    /// minutes: an answer of its own never comes within the patience of a test.
    pub fn resolv_conf(&self) -> String {
        format!(
            "nameserver {}\noptions timeout:30 attempts:5\n",
            self.address
        )
    }

    /// From now on, questions get no answer.
    pub fn fall_silent(&self) {
        self.state.lock().expect("the state").silent = true;
    }

    /// From now on, questions are answered, first those that are open.
    pub fn speak(&self) {
        let mut state = self.state.lock().expect("the state");
        state.silent = false;
        let State { known, open, .. } = &mut *state;
        for (question, client) in open.drain(..) {
            answer(&self.socket, &question, client, known);
        }
    }

    /// Number of questions so far.
    pub fn asked(&self) -> usize {
        self.state.lock().expect("the state").asked
    }
}

/// Port 53 of an address of this machine that nothing uses.
fn own_address() -> (Ipv4Addr, UdpSocket) {
    let process = std::process::id().to_le_bytes();
    let mut refused = None;
    for number in 1..=254 {
        let address = Ipv4Addr::new(127, 128 | process[1], process[0], number);
        match UdpSocket::bind((address, 53)) {
            Ok(socket) => return (address, socket),
            Err(error) => refused = Some(error),
        }
    }
    panic!(
        "a test cannot bind UDP port 53 (run it as root, or lower \
         net.ipv4.ip_unprivileged_port_start): {refused:?}"
    );
}

/// A name as a question holds it, with the type A and the class IN.
fn encoded(name: &str) -> Vec<u8> {
    let mut bytes = Vec::new();
    for label in name.split('.') {
        bytes.push(u8::try_from(label.len()).expect("a short label"));
        bytes.extend(label.bytes());
    }
    bytes.extend([0, 0, 1, 0, 1]);
    bytes
}

/// Answers 127.0.0.1 to a question for `known`, else that the name is unknown (RFC 1035, 4.1).
fn answer(socket: &UdpSocket, question: &[u8], client: SocketAddr, known: &[u8]) {
    const HEADER: usize = 12;
    let Some(asked) = question.get(HEADER..) else {
        return;
    };
    let end = asked.iter().position(|byte| *byte == 0).unwrap_or(0) + 5;
    let asked = &asked[..end.min(asked.len())];
    // The type and the class follow the name.
    let name = |asked: &[u8]| asked.len().checked_sub(4).map(|end| asked[..end].to_vec());
    let (is_name, is_address) = (name(asked) == name(known), asked == known);
    let mut reply = question[..2].to_vec();
    // A recursive answer; code 3 for a name that does not exist. One question.
    reply.extend([0x81, if is_name { 0x80 } else { 0x83 }, 0, 1]);
    reply.extend([0, u8::from(is_address), 0, 0, 0, 0]);
    reply.extend(asked);
    if is_address {
        // The name of the question; type A, class IN, a second to live, four bytes.
        reply.extend([
            0xc0,
            HEADER as u8,
            0,
            1,
            0,
            1,
            0,
            0,
            0,
            1,
            0,
            4,
            127,
            0,
            0,
            1,
        ]);
    }
    let _ = socket.send_to(&reply, client);
}
