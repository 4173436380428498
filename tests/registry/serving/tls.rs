//! TLS under a served disk: which certificates are taken, and what a start says about others.

use std::io;
use std::net::{Shutdown, TcpListener, TcpStream};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::thread;
use std::time::Duration;

use common::certificates::{Authority, Certificate, Demands};
use common::registry_server::{Reply, Server, serve, until};
use common::remote::{Layers, Place};
use rustix::net::sockopt::set_socket_linger;
use serde_json::json;

use super::{Reader, asked_units};

const OWN: &str = "IP:127.0.0.1";

/// Options that name an authority and a certificate of the client, if any.
fn trusting(place: &Place, ca: Option<&Authority>, own: Option<&Certificate>) -> Vec<String> {
    let mut options = Vec::new();
    if let Some(ca) = ca {
        options.extend(["--registry-ca".to_owned(), ca.file().display().to_string()]);
    }
    if let Some(own) = own {
        let path = place.path("overlaybd.json");
        let text = json!({"certConfig": {"certFile": own.certificate, "keyFile": own.key}});
        std::fs::write(&path, text.to_string()).expect("a service configuration");
        options.extend(["--service-config".to_owned(), path.display().to_string()]);
    }
    options
}

fn texts(options: &[String]) -> Vec<&str> {
    options.iter().map(String::as_str).collect()
}

/// An own authority, an old server, and one that wants a certificate.
#[test]
fn a_disk_is_served_over_tls() {
    let authority = Authority::new();
    let own = authority.sign("DNS:client.example");
    for (client, old) in [(false, false), (false, true), (true, false), (true, true)] {
        let (layers, place) = (Layers::new(2), Place::default());
        let demands = Demands {
            client: client.then_some(&authority),
            old,
        };
        let server = layers.registry_tls(authority.sign(OWN).server(demands));
        place.config("https", &server.host(), &layers.lowers(), json!({}));
        let options = trusting(&place, Some(&authority), client.then_some(&own));
        let daemon = place.serve(&texts(&options));
        assert_eq!(server.count(), 2 * layers.blobs.len());
        Reader::connect(&daemon).check_all(&layers.content);
        for blob in &layers.blobs {
            let counts = asked_units(&server, blob);
            assert!(counts.iter().all(|count| *count == 1), "{counts:?}");
        }
    }
}

/// A server that cannot be trusted, or that does not trust this client, gets no request.
#[test]
fn a_handshake_that_fails_ends_the_start() {
    let (authority, other) = (Authority::new(), Authority::new());
    let layers = Layers::new(1);
    let good = authority.sign(OWN);
    let wants = |old| Demands {
        client: Some(&authority),
        old,
    };
    let plain = Demands::default();
    let stranger = other.sign("DNS:client.example");
    let expired = authority.sign_until(OWN, "20200102000000Z");
    let cases = [
        ("unknown authority", good.server(plain), None, None),
        ("another authority", good.server(plain), Some(&other), None),
        (
            "wrong name",
            authority.sign("DNS:r.example").server(plain),
            Some(&authority),
            None,
        ),
        ("expired", expired.server(plain), Some(&authority), None),
        (
            "no certificate",
            good.server(wants(false)),
            Some(&authority),
            None,
        ),
        (
            "no certificate, TLS 1.2",
            good.server(wants(true)),
            Some(&authority),
            None,
        ),
        (
            "a stranger's certificate",
            good.server(wants(false)),
            Some(&authority),
            Some(&stranger),
        ),
    ];
    for (what, tls, ca, own) in cases {
        let place = Place::default();
        let server = layers.registry_tls(tls);
        place.config("https", &server.host(), &layers.lowers(), json!({}));
        let options = trusting(&place, ca, own);
        let output = place.run(&texts(&options));
        let said = String::from_utf8_lossy(&output.stderr);
        assert_eq!(output.status.code(), Some(1), "{what}: {said}");
        assert!(
            said.contains("TLS handshake with 127.0.0.1:"),
            "{what}: {said}"
        );
        let result = place.result();
        assert!(
            result.starts_with("failed:Connection failed"),
            "{what}: {result}"
        );
        assert_eq!(server.count(), 0, "{what}");
    }
}

/// A proxy of connections that resets them while it is told to.
struct Front {
    host: String,
    resets: Arc<AtomicBool>,
    count: Arc<AtomicUsize>,
}

impl Front {
    fn start(server: &str) -> Front {
        let listener = TcpListener::bind("127.0.0.1:0").expect("a port");
        let host = listener.local_addr().expect("its address").to_string();
        let (resets, count) = (Arc::new(AtomicBool::new(true)), Arc::default());
        let front = Front {
            host,
            resets: Arc::clone(&resets),
            count: Arc::clone(&count),
        };
        let server = server.to_owned();
        thread::spawn(move || {
            for client in listener.incoming().flatten() {
                if resets.load(Ordering::SeqCst) {
                    count.fetch_add(1, Ordering::SeqCst);
                    let _ = set_socket_linger(&client, Some(Duration::ZERO));
                } else if let Ok(server) = TcpStream::connect(&server) {
                    join(&client, &server);
                    join(&server, &client);
                }
            }
        });
        front
    }
}

/// Moves bytes from one connection to another until they end.
fn join(from: &TcpStream, to: &TcpStream) {
    let clone = |stream: &TcpStream| stream.try_clone().expect("a descriptor");
    let (mut from, mut to) = (clone(from), clone(to));
    thread::spawn(move || {
        let _ = io::copy(&mut from, &mut to);
        let _ = to.shutdown(Shutdown::Both);
    });
}

/// At the start and under a guest: connections that are reset in the handshake are made again.
#[test]
fn a_handshake_that_is_reset_is_repeated() {
    let (layers, place) = (Layers::new(2), Place::default());
    let authority = Authority::new();
    // A connection for each request, so that the guest's reads need handshakes.
    let closing = layers.handler(|request, blob| match serve(request, blob) {
        Reply::Send(bytes) => Reply::Close(bytes),
        other => other,
    });
    let server = Server::start_tls(authority.sign(OWN).server(Demands::default()), closing);
    let front = Front::start(&server.host());
    place.config("https", &front.host, &layers.lowers(), json!({}));
    let options = trusting(&place, Some(&authority), None);
    let daemon = thread::scope(|scope| {
        let starting = scope.spawn(|| place.serve(&texts(&options)));
        until("handshakes are reset", || {
            front.count.load(Ordering::SeqCst) > 2
        });
        front.resets.store(false, Ordering::SeqCst);
        starting.join().expect("a daemon")
    });
    let mut reader = Reader::connect(&daemon);
    front.resets.store(true, Ordering::SeqCst);
    let before = front.count.load(Ordering::SeqCst);
    reader.ask([1 << 20, 3 << 19]);
    until("handshakes are reset again", || {
        front.count.load(Ordering::SeqCst) > before + 2
    });
    assert!(reader.load.take().is_none());
    front.resets.store(false, Ordering::SeqCst);
    reader.check(&layers.content);
    reader.check_all(&layers.content);
}
