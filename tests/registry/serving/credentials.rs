//! Credential services and token servers under a served disk: right, refusing, slow, absent, and with
//! other credentials than before.

use std::fs;
use std::io::{BufRead, BufReader, Write};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::Path;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex};
use std::thread;
use std::time::Duration;

use common::certificates::{Authority, Demands};
use common::daemon::Daemon;
use common::registry_server::{Reply, Server, answer, raw, serve, until};
use common::remote::{Layers, Place, REPOSITORY};
use rustix::net::{AddressFamily, SocketAddrUnix, SocketType};
use serde_json::{Value, json};

use super::Reader;

/// `user:pass` and `user:new`, as HTTP has them.
const OLD: &str = "Basic dXNlcjpwYXNz";
const NEW: &str = "Basic dXNlcjpuZXc=";

/// A registry that takes one `Authorization`, which may change.
struct Guarded {
    server: Server,
    wants_new: Arc<AtomicBool>,
}

impl Guarded {
    fn start(layers: &Layers) -> Guarded {
        let wants_new = Arc::<AtomicBool>::default();
        let new = Arc::clone(&wants_new);
        let server = layers.registry_that(move |request, blob| {
            let good = if new.load(Ordering::SeqCst) { NEW } else { OLD };
            match request.header("authorization") {
                Some(given) if given == good => serve(request, blob),
                _ => answer(401, &[("WWW-Authenticate", "Basic realm=\"r\"")], b""),
            }
        });
        Guarded { server, wants_new }
    }

    /// What a service replies with a password for this registry.
    fn reply(&self, password: &str) -> Reply {
        let auths = json!({ self.server.host(): {"username": "user", "password": password} });
        let body = json!({"traceId": "x", "success": true, "data": {"auths": auths}});
        answer(200, &[], body.to_string().as_bytes())
    }
}

/// How a program reaches a credential service.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Mode {
    Http,
    /// With an authority of its own, and with a client certificate.
    Https,
    Uds,
}

/// A credential service that a test tells what to reply.
struct Service {
    reply: Arc<Mutex<Reply>>,
    asked: Arc<Mutex<Vec<String>>>,
    /// `credentialConfig` of the service configuration.
    config: Value,
    _server: Option<Server>,
    /// Has the files of the certificates.
    _authority: Option<Authority>,
}

impl Service {
    fn start(mode: Mode, place: &Place, reply: Reply) -> Service {
        let (reply, asked) = (
            Arc::new(Mutex::new(reply)),
            Arc::<Mutex<Vec<String>>>::default(),
        );
        let (shared, record) = (Arc::clone(&reply), Arc::clone(&asked));
        let next = move |target: &str| {
            record.lock().expect("requests").push(target.to_owned());
            shared.lock().expect("a reply").clone()
        };
        let authority = (mode == Mode::Https).then(Authority::new);
        let mut config = json!({});
        let server = match (mode, &authority) {
            (Mode::Uds, _) => {
                let path = place.path("credentials.sock");
                listen(&path, next);
                config["path"] = json!(path);
                None
            }
            (_, None) => Some(Server::start(move |request| next(&request.target))),
            (_, Some(authority)) => {
                let own = authority.sign("DNS:client");
                config["server_ca_path"] = json!(authority.file());
                config["client_cert_path"] = json!(own.certificate);
                config["client_key_path"] = json!(own.key);
                let client = Some(authority);
                let demands = Demands { client, old: false };
                let tls = authority.sign("IP:127.0.0.1").server(demands);
                Some(Server::start_tls(tls, move |request| next(&request.target)))
            }
        };
        if let Some(server) = &server {
            config["path"] = json!(format!("{}/auth", server.host()));
        }
        config["mode"] = json!(match mode {
            Mode::Http => "http",
            Mode::Https => "https",
            Mode::Uds => "uds",
        });
        Service {
            reply,
            asked,
            config,
            _server: server,
            _authority: authority,
        }
    }

    fn count(&self) -> usize {
        self.asked.lock().expect("requests").len()
    }

    fn set(&self, reply: Reply) {
        *self.reply.lock().expect("a reply") = reply;
    }

    /// Options for a daemon that asks it, and waits for it for a second.
    fn options(&self, place: &Place) -> [String; 2] {
        options(place, &self.config)
    }
}

fn options(place: &Place, config: &Value) -> [String; 2] {
    let file = place.path("overlaybd.json");
    let mut config = config.clone();
    config["timeout"] = json!(1);
    let text = json!({ "credentialConfig": config });
    fs::write(&file, text.to_string()).expect("a service configuration");
    ["--service-config".to_owned(), file.display().to_string()]
}

/// Serves requests at a unix socket until the test ends.
fn listen(path: &Path, reply: impl Fn(&str) -> Reply + Send + Sync + 'static) {
    let listener = UnixListener::bind(path).expect("a socket");
    let reply = Arc::new(reply);
    thread::spawn(move || {
        for stream in listener.incoming().flatten() {
            let reply = Arc::clone(&reply);
            thread::spawn(move || converse(stream, &*reply));
        }
    });
}

fn converse(mut stream: UnixStream, reply: &dyn Fn(&str) -> Reply) {
    let mut reader = BufReader::new(stream.try_clone().expect("a descriptor"));
    let mut line = String::new();
    let _ = reader.read_line(&mut line);
    let target = line.split_whitespace().nth(1).unwrap_or_default();
    match reply(target) {
        Reply::Send(bytes) => drop(stream.write_all(&bytes)),
        Reply::Stall(bytes) => {
            let _ = stream.write_all(&bytes);
            // Until the client goes.
            while reader.read_line(&mut line).is_ok_and(|len| len > 0) {}
        }
        other => panic!("no reply of a credential service: {other:?}"),
    }
}

const MODES: [Mode; 3] = [Mode::Http, Mode::Https, Mode::Uds];

fn serve_with(place: &Place, options: &[String; 2]) -> Daemon {
    place.serve(&[&options[0], &options[1]])
}

/// A right reply is asked for once, and again when its credentials are no longer taken.
#[test]
fn a_service_is_asked_when_a_login_is_needed() {
    for mode in MODES {
        let (layers, place) = (Layers::new(2), Place::default());
        let registry = Guarded::start(&layers);
        let service = Service::start(mode, &place, registry.reply("pass"));
        place.config("http", &registry.server.host(), &layers.lowers(), json!({}));
        let daemon = serve_with(&place, &service.options(&place));
        let mut reader = Reader::connect(&daemon);
        reader.ask([1 << 20]);
        reader.check(&layers.content);
        assert_eq!(service.count(), 1, "{mode:?}");
        let asked = service.asked.lock().expect("requests")[0].clone();
        let host = registry.server.host();
        let expected = format!("/auth?remote_url=http://{host}/v2/{REPOSITORY}/blobs");
        assert_eq!(asked, expected, "{mode:?}");

        registry.wants_new.store(true, Ordering::SeqCst);
        service.set(registry.reply("new"));
        reader.check_all(&layers.content);
        assert_eq!(service.count(), 2, "{mode:?}");
        assert!(!daemon.log().contains("WARN"), "{}", daemon.log());
    }
}

/// A service that says no ends a start, and is outwaited by a guest.
#[test]
fn a_service_that_refuses_ends_a_start_and_no_guest() {
    let refusal = || answer(200, &[], br#"{"success":false}"#);
    let check = |mode| {
        let (layers, place) = (Layers::new(2), Place::default());
        let registry = Guarded::start(&layers);
        let service = Service::start(mode, &place, refusal());
        place.config("http", &registry.server.host(), &layers.lowers(), json!({}));
        let options = service.options(&place);
        let output = place.run(&[&options[0], &options[1]]);
        let said = String::from_utf8_lossy(&output.stderr);
        assert_eq!(output.status.code(), Some(1), "{said}");
        assert!(said.contains("\"success\" is false"), "{said}");
        let result = place.result();
        assert!(
            result.starts_with("failed:Authentication failed"),
            "{result}"
        );

        service.set(registry.reply("pass"));
        let daemon = serve_with(&place, &options);
        let mut reader = Reader::connect(&daemon);
        registry.wants_new.store(true, Ordering::SeqCst);
        service.set(refusal());
        let asked = service.count();
        reader.ask([1 << 20, 3 << 19]);
        until("the service refuses", || service.count() > asked);
        until("the log says so", || {
            daemon.log().contains("\"success\" is false")
        });
        assert!(reader.load.take().is_none());
        service.set(registry.reply("new"));
        reader.check(&layers.content);
        reader.check_all(&layers.content);
    };
    thread::scope(|scope| {
        for mode in MODES {
            scope.spawn(move || check(mode));
        }
    });
}

/// A service that does not answer, answers 500, or is not there, is asked again: at the start and under
/// a guest.
#[test]
fn a_service_that_is_away_is_waited_for() {
    let (slow, failing) = (Reply::Stall(Vec::new()), Reply::Send(raw(500, &[], b"")));
    let ways = [
        (Mode::Http, &slow),
        (Mode::Uds, &slow),
        (Mode::Http, &failing),
    ];
    for (mode, away) in ways {
        let (layers, place) = (Layers::new(2), Place::default());
        let registry = Guarded::start(&layers);
        let service = Service::start(mode, &place, away.clone());
        place.config("http", &registry.server.host(), &layers.lowers(), json!({}));
        let options = service.options(&place);
        let daemon = thread::scope(|scope| {
            let starting = scope.spawn(|| serve_with(&place, &options));
            until("the service is asked again", || service.count() > 1);
            service.set(registry.reply("pass"));
            starting.join().expect("a daemon")
        });
        let mut reader = Reader::connect(&daemon);
        registry.wants_new.store(true, Ordering::SeqCst);
        service.set(away.clone());
        let asked = service.count();
        reader.ask([1 << 20, 3 << 19]);
        until("the service is asked again", || service.count() > asked + 1);
        assert!(reader.load.take().is_none());
        service.set(registry.reply("new"));
        reader.check(&layers.content);
        reader.check_all(&layers.content);
    }
}

/// An https service whose certificate nothing trusts.
#[test]
fn a_service_without_a_trusted_certificate_ends_a_start() {
    let (layers, place) = (Layers::new(1), Place::default());
    let registry = Guarded::start(&layers);
    let mut service = Service::start(Mode::Https, &place, registry.reply("pass"));
    let other = Authority::new();
    service.config["server_ca_path"] = json!(other.file());
    place.config("http", &registry.server.host(), &layers.lowers(), json!({}));
    let options = service.options(&place);
    let output = place.run(&[&options[0], &options[1]]);
    let said = String::from_utf8_lossy(&output.stderr);
    assert_eq!(output.status.code(), Some(1), "{said}");
    assert!(
        said.contains("credential service") && said.contains("TLS"),
        "{said}"
    );
    assert_eq!(service.count(), 0);
}

/// A service that accepts nothing, with a backlog that is full: it is given up after its second.
#[test]
fn a_service_with_a_full_backlog_is_given_up() {
    let (layers, place) = (Layers::new(1), Place::default());
    let registry = Guarded::start(&layers);
    let path = place.path("credentials.sock");
    let socket = rustix::net::socket(AddressFamily::UNIX, SocketType::STREAM, None);
    let socket = socket.expect("a socket");
    let address = SocketAddrUnix::new(&path).expect("an address");
    rustix::net::bind(&socket, &address).expect("a socket");
    rustix::net::listen(&socket, 0).expect("a backlog");
    let _first = UnixStream::connect(&path).expect("a connection");
    place.config("http", &registry.server.host(), &layers.lowers(), json!({}));
    let options = options(&place, &json!({"mode": "uds", "path": path}));
    thread::scope(|scope| {
        let starting = scope.spawn(|| serve_with(&place, &options));
        until("the registry is asked", || registry.server.count() > 0);
        // Time to begin to wait for the socket, which stays as it is.
        thread::sleep(Duration::from_millis(500));
        fs::remove_file(&path).expect("a socket");
        let reply = registry.reply("pass");
        listen(&path, move |_| reply.clone());
        starting.join().expect("a daemon");
    });
}

/// The socket of a service that starts after the daemon.
#[test]
fn a_service_that_is_absent_is_waited_for() {
    let (layers, place) = (Layers::new(1), Place::default());
    let registry = Guarded::start(&layers);
    place.config("http", &registry.server.host(), &layers.lowers(), json!({}));
    let path = place.path("credentials.sock");
    let options = options(&place, &json!({"mode": "uds", "path": path}));
    let daemon = thread::scope(|scope| {
        let starting = scope.spawn(|| serve_with(&place, &options));
        until("the registry is asked", || registry.server.count() > 0);
        let reply = registry.reply("pass");
        listen(&path, move |_| reply.clone());
        starting.join().expect("a daemon")
    });
    Reader::connect(&daemon).check_all(&layers.content);
}

/// What a token server replies, and what a start says about it.
#[test]
fn a_token_server_without_a_token_ends_the_start() {
    let year = [("Retry-After", "31536000")];
    let cases = [
        (answer(200, &[], b"{}"), "Authentication failed"),
        (answer(200, &[], b"<html>"), "Authentication failed"),
        (answer(200, &[], b"{\"token\":5}"), "Authentication failed"),
        (
            answer(200, &[], b"{\"token\":\"a\\nb\"}"),
            "Authentication failed",
        ),
        (answer(401, &[], b""), "Authentication failed"),
        (answer(403, &[], b""), "Authentication failed"),
        (answer(429, &year, b""), "Too many requests"),
    ];
    for (reply, words) in cases {
        let (layers, place) = (Layers::new(1), Place::default());
        let given = reply.clone();
        let tokens = Server::start(move |_| given.clone());
        let challenge = format!("Bearer realm=\"{}\"", tokens.url("/t"));
        let registry = layers.registry_that(move |_, _| {
            answer(401, &[("WWW-Authenticate", challenge.as_str())], b"")
        });
        place.config("http", &registry.host(), &layers.lowers(), json!({}));
        let output = place.run(&[]);
        let said = String::from_utf8_lossy(&output.stderr);
        assert_eq!(output.status.code(), Some(1), "{reply:?}: {said}");
        let result = place.result();
        assert!(
            result.starts_with(&format!("failed:{words}")),
            "{reply:?}: {result}"
        );
        // Requests that are under way together ask once. At most two open each of the two layers, and
        // on a busy machine each may begin after the failure of the one before.
        assert!(
            tokens.count() <= 4,
            "{reply:?}: {} questions",
            tokens.count()
        );
    }
}

/// Token servers that fail for a while, and tokens with every lifetime that a server may give.
#[test]
fn tokens_of_every_kind_open_a_disk() {
    let bodies = [
        "{\"token\":\"T\"}",
        "{\"access_token\":\"T\"}",
        "{\"token\":\"T\",\"expires_in\":1}",
        "{\"token\":\"T\",\"expires_in\":0}",
        "{\"token\":\"T\",\"expires_in\":18446744073709551615}",
        "{\"token\":\"T\",\"expires_in\":-5}",
    ];
    for (number, body) in bodies.into_iter().enumerate() {
        let (layers, place) = (Layers::new(2), Place::default());
        let fails = AtomicBool::new(number % 2 == 0);
        let tokens = Server::start(move |_| match fails.swap(false, Ordering::SeqCst) {
            true => answer(500, &[], b""),
            false => answer(200, &[], body.as_bytes()),
        });
        let challenge = format!("Bearer realm=\"{}\",service=\"a,b\"", tokens.url("/t"));
        let registry =
            layers.registry_that(move |request, blob| match request.header("authorization") {
                Some("Bearer T") => serve(request, blob),
                _ => answer(401, &[("WWW-Authenticate", challenge.as_str())], b""),
            });
        place.config("http", &registry.host(), &layers.lowers(), json!({}));
        let daemon = place.serve(&[]);
        thread::sleep(Duration::from_millis(1100));
        Reader::connect(&daemon).check_all(&layers.content);
        let asked = tokens.received();
        let scope = format!(
            "scope=repository%3A{}%3Apull",
            REPOSITORY.replace('/', "%2F")
        );
        assert!(
            asked.iter().all(|one| one.target.contains(&scope)),
            "{asked:?}"
        );
    }
}
