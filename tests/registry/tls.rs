//! TLS: whom the client trusts, and what it shows of itself.

use std::net::TcpListener;
use std::path::PathBuf;
use std::thread;
use std::time::Duration;

use common::certificates::{Authority, Certificate, Demands};
use common::content::tagged;
use common::registry_server::{Received, Reply, Server, answer, serve};
use ovbd_vhost::registry::ClientCertificate;
use ovbd_vhost::registry::blob::BlobRef;
use ovbd_vhost::registry::client::{Client, Options};
use ovbd_vhost::registry::error::Error;
use ovbd_vhost::registry::repository::Scheme;
use rustix::net::sockopt::set_socket_linger;

use super::{blob, read};

const OWN: &str = "IP:127.0.0.1";

fn trusting(ca: Option<PathBuf>, certificate: Option<&Certificate>) -> Client {
    Client::new(Options {
        ca,
        certificate: certificate.map(|files| ClientCertificate {
            certificate: files.certificate.clone(),
            key: files.key.clone(),
        }),
        ..Options::default()
    })
    .unwrap()
}

fn secure_blob(server: &Server, bytes: &[u8]) -> BlobRef {
    let mut wanted = blob(&server.host(), "a", bytes);
    wanted.repository = wanted.repository.with_scheme(Scheme::Https);
    wanted
}

fn serving(bytes: &[u8]) -> impl Fn(&Received) -> Reply + Send + Sync + 'static {
    let bytes = bytes.to_vec();
    move |request| serve(request, &bytes)
}

#[test]
fn only_trusted_certificates_are_taken() {
    let bytes = tagged(100_000, 1);
    let (authority, other) = (Authority::new(), Authority::new());
    let ask = |certificate: &Certificate, ca: Option<PathBuf>| {
        let server = Server::start_tls(certificate.server(Demands::default()), serving(&bytes));
        let result = trusting(ca, None).read_blob(&secure_blob(&server, &bytes), 0, 100_000);
        result.map(read)
    };
    let good = authority.sign(OWN);
    assert!(ask(&good, Some(authority.file())).unwrap() == bytes);
    for (what, certificate, ca) in [
        ("unknown authority", &good, None),
        ("another authority", &good, Some(other.file())),
        (
            "wrong name",
            &authority.sign("DNS:r.example"),
            Some(authority.file()),
        ),
        (
            "expired",
            &authority.sign_until(OWN, "20200102000000Z"),
            Some(authority.file()),
        ),
    ] {
        let refused = ask(certificate, ca).unwrap_err();
        assert!(matches!(refused, Error::Tls { .. }), "{what}: {refused:?}");
        assert!(refused.is_definite());
        assert_eq!(refused.upstream_words(), "Connection failed");
    }
}

#[test]
fn the_client_shows_its_certificate() {
    let bytes = tagged(1000, 2);
    let authority = Authority::new();
    for old in [false, true] {
        let demands = Demands {
            client: Some(&authority),
            old,
        };
        let server = Server::start_tls(authority.sign(OWN).server(demands), serving(&bytes));
        let wanted = secure_blob(&server, &bytes);
        let own = authority.sign("DNS:client.example");
        let shown = trusting(Some(authority.file()), Some(&own)).read_blob(&wanted, 0, 1000);
        assert!(read(shown.unwrap()) == bytes);
        let bare = trusting(Some(authority.file()), None).read_blob(&wanted, 0, 1000);
        let bare = bare.err().unwrap();
        assert!(
            matches!(bare, Error::Tls { .. } | Error::Connection { .. }),
            "{bare:?}"
        );
    }
}

#[test]
fn certificates_that_cannot_be_used_are_refused_at_once() {
    let authority = Authority::new();
    let (one, two) = (authority.sign(OWN), authority.sign(OWN));
    let folder = tempfile::tempdir().unwrap();
    let empty = folder.path().join("empty");
    std::fs::write(&empty, "").unwrap();
    let garbage = folder.path().join("garbage");
    std::fs::write(
        &garbage,
        "-----BEGIN CERTIFICATE-----\nAAAA\n-----END CERTIFICATE-----\n",
    )
    .unwrap();
    let refused = |options: Options| {
        let error = Client::new(options).err().unwrap();
        assert!(matches!(error, Error::Setup { .. }), "{error}");
    };
    for ca in [empty.clone(), garbage, folder.path().join("absent")] {
        refused(Options {
            ca: Some(ca),
            ..Options::default()
        });
    }
    for (certificate, key) in [
        (&one.certificate, &two.key),
        (&one.certificate, &empty),
        (&empty, &one.key),
    ] {
        let certificate = Some(ClientCertificate {
            certificate: certificate.clone(),
            key: key.clone(),
        });
        refused(Options {
            certificate,
            ..Options::default()
        });
    }
}

#[test]
fn a_connection_reset_in_the_handshake_passes() {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let host = listener.local_addr().unwrap().to_string();
    let resetting = thread::spawn(move || {
        // The request is repeated once, as after an idle connection that was closed.
        for _ in 0..2 {
            let (stream, _) = listener.accept().unwrap();
            set_socket_linger(&stream, Some(Duration::ZERO)).unwrap();
        }
    });
    let mut wanted = blob(&host, "a", b"x");
    wanted.repository = wanted.repository.with_scheme(Scheme::Https);
    let refused = trusting(None, None).read_blob(&wanted, 0, 1).err().unwrap();
    assert!(matches!(refused, Error::Connection { .. }), "{refused:?}");
    assert!(!refused.is_definite());
    resetting.join().unwrap();
}

#[test]
fn no_redirect_leads_from_tls_to_plain_http() {
    let bytes = tagged(1000, 3);
    let plain = Server::start(serving(&bytes));
    let location = plain.url("/key");
    let authority = Authority::new();
    let config = authority.sign(OWN).server(Demands::default());
    let server = Server::start_tls(config, move |_| {
        answer(307, &[("Location", &location)], b"")
    });
    let client = trusting(Some(authority.file()), None);
    let refused = client
        .read_blob(&secure_blob(&server, &bytes), 0, 1)
        .err()
        .unwrap();
    assert!(matches!(refused, Error::Redirect { .. }), "{refused}");
    assert_eq!(plain.count(), 0);
}

#[test]
fn no_token_is_fetched_by_plain_http_for_a_registry_with_tls() {
    let tokens = Server::start(|_| answer(200, &[], br#"{"token":"T"}"#));
    let challenge = format!("Bearer realm=\"{}\"", tokens.url("/token"));
    let authority = Authority::new();
    let config = authority.sign(OWN).server(Demands::default());
    let server = Server::start_tls(config, move |_| {
        answer(401, &[("WWW-Authenticate", challenge.as_str())], b"")
    });
    let client = trusting(Some(authority.file()), None);
    let refused = client
        .read_blob(&secure_blob(&server, b"x"), 0, 1)
        .err()
        .unwrap();
    assert!(matches!(refused, Error::Redirect { .. }), "{refused}");
    assert_eq!(tokens.count(), 0);
}
