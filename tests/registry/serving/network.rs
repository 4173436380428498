//! Names that do not resolve, addresses that do not answer, a registry that is away.

use std::fs;
use std::net::TcpStream;
use std::time::{Duration, Instant};

use common::daemon;
use common::name_server::NameServer;
use common::registries::{DockerRegistry, Storage, free_address};
use common::registry_server::{Reply, Server, answer, until};
use common::remote::{Layers, Place, REPOSITORY};
use rustix::net::{AddressFamily, SocketType, bind, listen, socket};
use serde_json::json;

use super::{Reader, fetching};

const NAME: &str = "registry.test";

/// A configuration of name servers: one that is away. Nothing listens there.
pub(super) const NO_SERVER: &str = "nameserver 127.0.0.1\noptions timeout:1 attempts:1\n";

/// A place in which the names of hosts come from files of the test alone: the addresses in `names`,
/// and what the name servers in `servers` say.
pub(super) fn with_names(names: &str, servers: &str) -> (Place, String) {
    let place = Place::default();
    fs::write(place.path("hosts"), names).expect("names");
    fs::write(place.path("resolv.conf"), servers).expect("a configuration");
    let mounts = ["hosts", "resolv.conf"].map(|name| {
        let path = place.path(name);
        format!("mount --bind {} /etc/{name}", path.display())
    });
    (place, mounts.join("; "))
}

/// Whether a daemon may fetch from `port` of [`NAME`].
fn serve_by_name(place: &Place, setup: &str, layers: &Layers, server: &Server) -> Reader {
    let port = server.host().replace("127.0.0.1", NAME);
    place.config("http", &port, &layers.lowers(), json!({}));
    let daemon = place.serve_in_namespace(setup, &[]);
    let mut reader = Reader::connect(&daemon);
    reader.check_all(&layers.content);
    reader
}

#[test]
fn a_name_that_resolves_again_ends_the_wait() {
    let (place, setup) = with_names(&format!("127.0.0.1 {NAME}\n"), NO_SERVER);
    let layers = Layers::new(4);
    let server = layers.registry_with_outages(Reply::Close(Vec::new()));
    let host = server.host().replace("127.0.0.1", NAME);
    place.config("http", &host, &layers.lowers(), json!({}));
    let daemon = place.serve_in_namespace(&setup, &["--insecure-registry", &host]);
    let mut reader = Reader::connect(&daemon);
    reader.ask([0]);
    reader.check(&layers.content);

    // In place: the file is mounted.
    fs::write(place.path("hosts"), "").expect("names");
    server.take_away();
    let before = server.count();
    reader.ask([3 << 20, 1 << 20]);
    until("a request fails", || server.count() > before);
    std::thread::sleep(Duration::from_secs(1));
    let failed = server.count();
    server.bring_back();
    std::thread::sleep(Duration::from_secs(1));
    assert!(reader.load.take().is_none(), "no name, no bytes");
    assert_eq!(server.count(), failed, "no connection without a name");
    fs::write(place.path("hosts"), format!("127.0.0.1 {NAME}\n")).expect("names");
    reader.check(&layers.content);
    reader.check_all(&layers.content);
}

/// A name with an IPv6 address that swallows connections, and an IPv4 address that answers.
#[test]
fn an_address_that_swallows_connections_is_passed_by() {
    let names = format!("::1 {NAME}\n127.0.0.1 {NAME}\n");
    let (place, setup) = with_names(&names, NO_SERVER);
    let layers = Layers::new(1);
    let server = layers.registry();
    let address = server.host().replace("127.0.0.1", "[::1]");
    let address: std::net::SocketAddrV6 = address.parse().expect("an address");
    let hole = socket(AddressFamily::INET6, SocketType::STREAM, None).expect("a socket");
    bind(&hole, &address).expect("an address");
    listen(&hole, 0).expect("a queue");
    // The queue holds one connection; the next one is not answered.
    let _first = TcpStream::connect(address).expect("a connection");
    let short = Duration::from_millis(300);
    assert!(TcpStream::connect_timeout(&address.into(), short).is_err());
    serve_by_name(&place, &setup, &layers, &server);
    assert!(server.count() > 2);
}

/// The registry is away for a moment and for half a minute, while the guest goes on.
#[test]
fn a_guest_goes_on_when_the_registry_comes_back() {
    let layers = Layers::new(8);
    let place = Place::default();
    let storage = Storage::default();
    for blob in &layers.blobs {
        storage.blob(REPOSITORY, blob);
    }
    let mut registry = DockerRegistry::open(storage);
    place.config("http", registry.host(), &layers.lowers(), json!({}));
    let daemon = place.serve(&[]);
    let mut reader = Reader::connect(&daemon);
    for (outage, seconds) in [(0, 1), (1, 30)] {
        registry.stop();
        let start = outage * (4 << 20);
        reader.ask((0..32).map(|read| start + read * (128 << 10)));
        std::thread::sleep(Duration::from_secs(seconds));
        registry.restart();
        reader.check(&layers.content);
    }
    reader.check_all(&layers.content);
    let log = daemon.log();
    let count = |words: &str| log.matches(words).count();
    assert_eq!(count("stopped answering"), count("answers again"), "{log}");
    assert!((1..=2).contains(&count("stopped answering")), "{log}");
}

/// What keeps a start from a registry that does not serve: upstream's words for each.
#[test]
fn a_start_without_an_answer_ends_with_the_reason() {
    let layers = Layers::new(1);
    let silent = Server::start(|_| Reply::Stall(Vec::new()));
    let busy = Server::start(|_| answer(503, &[("Retry-After", "1")], b""));
    let closed = Server::start(|_| answer(503, &[("Retry-After", "31536000")], b""));
    let garbage = Server::start(|_| Reply::Close(b"garbage\r\n\r\n".to_vec()));
    let empty = Server::start(|_| answer(204, &[], b""));
    let cases = [
        (free_address(), "Connection failed"),
        (silent.host(), "Get meta timedout"),
        (busy.host(), "Too many requests"),
        (closed.host(), "Too many requests"),
        (garbage.host(), "Unexpected response"),
        (empty.host(), "Unexpected response"),
    ];
    std::thread::scope(|scope| {
        for (host, words) in &cases {
            let layers = &layers;
            scope.spawn(move || {
                let place = Place::default();
                place.config("http", host, &layers.lowers(), json!({}));
                let output = place.run(&[]);
                assert_eq!(output.status.code(), Some(1), "{host}: {output:?}");
                let (result, expected) = (place.result(), format!("failed:{words}"));
                assert!(result.starts_with(&expected), "{host}: {result}");
            });
        }
    });
}

/// Starts the daemon where the names of hosts come from `setup`, and gives what it says at its end.
fn refused(setup: &str, options: &[&str]) -> String {
    let output = daemon::run_in_namespace(setup, options);
    assert_eq!(output.status.code(), Some(1), "{output:?}");
    String::from_utf8(output.stderr).expect("text")
}

/// A name server that is away, one that does not know the name, and one that never answers, for which
/// the C library would wait for minutes.
#[test]
fn a_start_ends_if_no_name_server_knows_the_registry() {
    let layers = Layers::new(1);
    let (speaking, silent) = (NameServer::start("other.test"), NameServer::start(NAME));
    silent.fall_silent();
    let cases = [
        (NO_SERVER.to_owned(), "Temporary failure"),
        (speaking.resolv_conf(), "Name or service not known"),
        (silent.resolv_conf(), "did not answer within 5.0s"),
    ];
    std::thread::scope(|scope| {
        for (servers, reason) in &cases {
            let layers = &layers;
            scope.spawn(move || {
                let (place, setup) = with_names("", servers);
                place.config("http", NAME, &layers.lowers(), json!({}));
                let socket = place.path("s").display().to_string();
                let cache = place.path("cache").display().to_string();
                let config = place.path("config.v1.json").display().to_string();
                let reference = format!("{NAME}/{REPOSITORY}:1");
                for image in [["--config", &config], ["--image", &reference]] {
                    let more = ["--socket", &socket, "--cache", &cache];
                    let start = Instant::now();
                    let text = refused(&setup, &[&image, &more[..]].concat());
                    // Three times the longest look-up.
                    assert!(start.elapsed() < Duration::from_secs(15), "{text}");
                    assert!(text.contains(reason), "{image:?}: {text}");
                    assert!(text.contains("cannot resolve the host name"), "{text}");
                }
                let result = place.result();
                assert!(result.starts_with("failed:Connection failed"), "{result}");
            });
        }
    });
    assert!(speaking.asked() > 0 && silent.asked() > 0);
}

/// A look-up that hangs is waited out by a guest, and the next one finds the registry.
#[test]
fn a_guest_waits_out_a_silent_name_server() {
    let names = NameServer::start(NAME);
    let (place, setup) = with_names("", &names.resolv_conf());
    let layers = Layers::new(4);
    let server = layers.registry_with_outages(Reply::Reset(Vec::new()));
    let host = server.host().replace("127.0.0.1", NAME);
    place.config("http", &host, &layers.lowers(), json!({}));
    let control = place.path("control").display().to_string();
    let daemon = place.serve_in_namespace(&setup, &["--control", &control]);
    let mut reader = Reader::connect(&daemon);
    names.fall_silent();
    server.take_away();
    let asked = names.asked();
    reader.ask([3 << 20, 1 << 20]);
    until("the name is looked up again", || names.asked() > asked);
    server.bring_back();
    // A reset, which makes the client forget the address, and then a look-up that is late.
    let failed = || fetching(&place)["fetcher"]["retries"].as_u64().unwrap_or(0);
    until("the look-up is late", || failed() > 2);
    assert!(reader.load.take().is_none(), "no name, no bytes");
    names.speak();
    reader.check(&layers.content);
    reader.check_all(&layers.content);
}

/// A registry by a name with a local address may not name that address itself: the error says which
/// address, and what would be allowed.
#[test]
fn a_redirect_to_a_name_with_a_local_address_is_explained() {
    let (place, setup) = with_names(&format!("127.0.0.1 {NAME}\n"), NO_SERVER);
    let layers = Layers::new(1);
    let server = Server::start(|_| answer(307, &[("Location", "/again")], b""));
    let host = server.host().replace("127.0.0.1", NAME);
    place.config("http", &host, &layers.lowers(), json!({}));
    let path = |name| place.path(name).display().to_string();
    let (config, cache, socket) = (path("config.v1.json"), path("cache"), path("s"));
    let options = ["--config", &config, "--cache", &cache, "--socket", &socket];
    let text = refused(&setup, &options);
    let expected = format!(
        "{host} redirects to http://{host}/again, which is refused: {host} has the address 127.0.0.1: only a server that the user named by an address"
    );
    assert!(text.contains(&expected), "{text}");
    assert!(place.result().starts_with("failed:Unexpected response: "));
}
