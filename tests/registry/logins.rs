//! Logging in: challenges in every form, credentials that change, services that give them.

use std::fs;
use std::io::{BufRead, BufReader, Write};
use std::os::unix::net::UnixListener;
use std::path::Path;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};
use std::thread;
use std::time::Duration;

use common::content::tagged;
use common::registry_server::{Received, Reply, Server, answer, serve};
use ovbd_vhost::registry::Service;
use ovbd_vhost::registry::client::{Client, Options};
use ovbd_vhost::registry::credential_source::Source;
use ovbd_vhost::registry::error::{Class, Error};

use super::{blob, client, password_file, read, with_password};

/// A token server that gives the tokens `T1`, `T2`, ... with these further fields.
fn tokens(fields: &'static str) -> Server {
    let count = AtomicUsize::new(0);
    Server::start(move |_| {
        let number = count.fetch_add(1, Ordering::SeqCst) + 1;
        answer(
            200,
            &[],
            format!(r#"{{"token":"T{number}"{fields}}}"#).as_bytes(),
        )
    })
}

/// A registry that serves `bytes` for the authorizations in a list, and else answers `status`
/// with this challenge.
fn guarded(bytes: &[u8], status: u16, challenge: String, good: Arc<Mutex<Vec<String>>>) -> Server {
    let bytes = bytes.to_vec();
    Server::start(move |request| {
        let given = request
            .header("authorization")
            .unwrap_or_default()
            .to_owned();
        if good.lock().unwrap().contains(&given) {
            return serve(request, &bytes);
        }
        answer(status, &[("WWW-Authenticate", challenge.as_str())], b"")
    })
}

fn list(values: &[&str]) -> Arc<Mutex<Vec<String>>> {
    Arc::new(Mutex::new(
        values.iter().map(|value| (*value).to_owned()).collect(),
    ))
}

fn first_byte(client: &Client, server: &Server, bytes: &[u8]) -> Result<Vec<u8>, Error> {
    client
        .read_blob(&blob(&server.host(), "a/b", bytes), 0, 1)
        .map(read)
}

#[test]
fn challenges_are_met_in_every_form() {
    let bytes = tagged(100, 1);
    for (form, query) in [
        (
            r#"Bearer realm="R",service="s",scope="repository:a/b:pull""#,
            "?service=s&scope=repository%3Aa%2Fb%3Apull",
        ),
        (r#"bEARER realm="R""#, "?scope=repository%3Aa%2Fb%3Apull"),
        (
            r#"Negotiate, Basic realm="x, y", Bearer service="a,b" , realm="R",x=y"#,
            "?service=a%2Cb&scope=repository%3Aa%2Fb%3Apull",
        ),
        (
            r#"Bearer realm="R?q=1",scope="x:y:pull,push""#,
            "?q=1&scope=x%3Ay%3Apull%2Cpush",
        ),
    ] {
        let tokens = tokens("");
        let challenge = form.replace("\"R", &format!("\"{}", tokens.url("/token")));
        let registry = guarded(&bytes, 401, challenge, list(&["Bearer T1"]));
        let client = client();
        assert_eq!(
            first_byte(&client, &registry, &bytes).unwrap(),
            bytes[..1],
            "{form}"
        );
        first_byte(&client, &registry, &bytes).unwrap();
        let asked = tokens.received();
        assert_eq!(asked.len(), 1, "{form}");
        assert_eq!(asked[0].target, format!("/token{query}"));
        assert_eq!(asked[0].header("authorization"), None);
        assert_eq!(registry.count(), 3, "one refusal, two blobs");
    }
}

#[test]
fn a_password_is_given_to_registry_and_token_server() {
    let bytes = tagged(100, 2);
    let basic = "Basic dXNlcjpwYXNz";
    let registry = guarded(&bytes, 401, "Basic realm=\"r\"".to_owned(), list(&[basic]));
    let (client, _folder) = with_password(&registry.host());
    first_byte(&client, &registry, &bytes).unwrap();
    first_byte(&client, &registry, &bytes).unwrap();
    assert_eq!(registry.count(), 3);

    let tokens = tokens("");
    let challenge = format!("Bearer realm=\"{}\",service=\"s\"", tokens.url("/t"));
    let registry = guarded(&bytes, 401, challenge, list(&["Bearer T1"]));
    let (client, _folder) = with_password(&registry.host());
    first_byte(&client, &registry, &bytes).unwrap();
    let asked = &tokens.received()[0];
    assert_eq!(asked.header("authorization"), Some(basic));
    assert!(asked.target.ends_with("&account=user"), "{}", asked.target);
}

#[test]
fn a_token_that_stops_working_is_replaced() {
    let bytes = tagged(100, 3);
    // 401 as distribution and Harbor answer it, 403 without a challenge as ECR.
    for form in ["bearer", "basic", "forbidden"] {
        let tokens = tokens(r#","expires_in":3600"#);
        let realm = format!(
            "Bearer realm=\"{}\",error=\"invalid_token\"",
            tokens.url("/t")
        );
        let good = list(&["Bearer T1"]);
        let (served, allowed) = (bytes.clone(), Arc::clone(&good));
        let registry = Server::start(move |request| {
            let given = request.header("authorization");
            if given.is_some_and(|given| allowed.lock().unwrap().iter().any(|good| good == given)) {
                return serve(request, &served);
            }
            match (given, form) {
                (Some(_), "basic") => {
                    answer(401, &[("WWW-Authenticate", "Basic realm=\"harbor\"")], b"")
                }
                (Some(_), "forbidden") => answer(403, &[], b"expired"),
                _ => answer(401, &[("WWW-Authenticate", realm.as_str())], b""),
            }
        });
        let client = client();
        first_byte(&client, &registry, &bytes).unwrap();
        *good.lock().unwrap() = vec!["Bearer T2".to_owned()];
        assert_eq!(
            first_byte(&client, &registry, &bytes).unwrap(),
            bytes[..1],
            "{form}"
        );
        assert_eq!(tokens.count(), 2, "{form}");
    }
}

#[test]
fn a_registry_that_always_refuses_is_asked_three_times_at_most() {
    let tokens = tokens("");
    let bearer = format!("Bearer realm=\"{}\"", tokens.url("/t"));
    for (status, challenge) in [
        (401, bearer.clone()),
        (403, bearer),
        (401, "Basic".to_owned()),
    ] {
        let registry = guarded(b"x", status, challenge, list(&[]));
        let (client, _folder) = with_password(&registry.host());
        let refused = first_byte(&client, &registry, b"x").unwrap_err();
        assert!(matches!(refused, Error::Denied { .. }), "{refused}");
        assert_eq!(refused.class(), Class::Definite);
        assert!((2..=3).contains(&registry.count()), "{}", registry.count());
    }
    let bare = Server::start(|_| {
        answer(
            403,
            &[],
            br#"{"errors":[{"code":"DENIED","message":"no"}]}"#,
        )
    });
    let refused = first_byte(&client(), &bare, b"x").unwrap_err();
    assert!(refused.to_string().contains("DENIED: no"), "{refused}");
    assert_eq!(bare.count(), 1);
}

#[test]
fn useless_token_servers_are_told_apart() {
    let bytes = tagged(10, 4);
    let reply = |reply: Reply| {
        let tokens = Server::script([reply]);
        let challenge = format!("Bearer realm=\"{}\"", tokens.url("/t"));
        let registry = guarded(&bytes, 401, challenge, list(&["Bearer T"]));
        let error = first_byte(&client(), &registry, &bytes).unwrap_err();
        assert_eq!(tokens.count(), 1);
        error
    };
    for body in [
        "",
        "{}",
        "[]",
        "{\"token\":5}",
        "{\"token\":\"a\\nb\"}",
        "<html>",
    ] {
        let error = reply(answer(200, &[], body.as_bytes()));
        assert!(matches!(error, Error::Token { .. }), "{body}: {error}");
        assert!(error.is_definite());
    }
    let denied = reply(answer(401, &[], b""));
    assert!(matches!(denied, Error::Denied { .. }));
    let busy = reply(answer(429, &[("Retry-After", "7")], b""));
    let retry_after = Some(Duration::from_secs(7));
    assert_eq!(busy.class(), Class::Passing { retry_after });
    let broken = reply(answer(500, &[], b""));
    assert_eq!(broken.class(), Class::Passing { retry_after: None });
    let long = reply(answer(200, &[], &vec![b' '; 100_000]));
    assert!(matches!(long, Error::Mismatch { .. }), "{long}");
}

#[test]
fn refresh_tokens_are_exchanged() {
    let bytes = tagged(10, 5);
    for with_post in [true, false] {
        let tokens = Server::start(move |request| match request.method.as_str() {
            "POST" if !with_post => answer(405, &[], b""),
            _ => answer(200, &[], br#"{"access_token":"T"}"#),
        });
        let challenge = format!("Bearer realm=\"{}\",service=\"s\"", tokens.url("/t"));
        let registry = guarded(&bytes, 401, challenge, list(&["Bearer T"]));
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("c");
        let text = format!(
            r#"{{"auths":{{"{}":{{"identitytoken":"I&"}}}}}}"#,
            registry.host()
        );
        fs::write(&path, text).unwrap();
        let client = with_source(Source::File(path));
        first_byte(&client, &registry, &bytes).unwrap();
        let asked = tokens.received();
        assert_eq!(
            asked[0].body,
            "grant_type=refresh_token&service=s&client_id=ovbd-vhost\
             &scope=repository%3Aa%2Fb%3Apull&refresh_token=I%26"
        );
        assert_eq!(asked.len(), if with_post { 1 } else { 2 });
        if let Some(get) = asked.get(1) {
            assert_eq!(get.header("authorization"), Some("Basic PHRva2VuPjpJJg=="));
        }
    }
}

#[test]
fn replaced_credentials_are_used() {
    let bytes = tagged(10, 6);
    let good = list(&["Basic dXNlcjpwYXNz"]);
    let registry = guarded(
        &bytes,
        401,
        "Basic realm=\"r\"".to_owned(),
        Arc::clone(&good),
    );
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("config.json");
    password_file(&path, &registry.host(), "user", "pass");
    let client = with_source(Source::File(path.clone()));
    first_byte(&client, &registry, &bytes).unwrap();

    *good.lock().unwrap() = vec!["Basic dXNlcjpuZXc=".to_owned()];
    let refused = first_byte(&client, &registry, &bytes);
    assert!(matches!(refused, Err(Error::Denied { .. })));
    password_file(&path, &registry.host(), "user", "new");
    assert_eq!(first_byte(&client, &registry, &bytes).unwrap(), bytes[..1]);
    fs::remove_file(&path).unwrap();
    assert_eq!(
        first_byte(&client, &registry, &bytes).unwrap(),
        bytes[..1],
        "still logged in"
    );
}

/// Repositories of one registry with passwords of their own: neither is sent for the other.
#[test]
fn a_password_is_sent_for_its_repository_only() {
    const A: &str = "Basic dTphYQ==";
    const B: &str = "Basic dTpiYg==";
    let bytes = tagged(10, 9);
    let served = bytes.clone();
    let registry = Server::start(move |request| {
        let good = if request.target.contains("/team/a/") {
            A
        } else {
            B
        };
        match request.header("authorization") {
            Some(given) if given == good => serve(request, &served),
            _ => answer(401, &[("WWW-Authenticate", "Basic realm=\"r\"")], b""),
        }
    });
    let host = registry.host();
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("config.json");
    let entry = |name: &str, password: &str| {
        format!(r#""{host}/team/{name}":{{"username":"u","password":"{password}"}}"#)
    };
    let text = format!(
        "{{\"auths\":{{{},{}}}}}",
        entry("a", "aa"),
        entry("b", "bb")
    );
    fs::write(&path, text).unwrap();
    let client = with_source(Source::File(path));
    for _ in 0..2 {
        for name in ["team/a", "team/b"] {
            let body = client.read_blob(&blob(&host, name, &bytes), 0, 1).unwrap();
            assert_eq!(read(body), bytes[..1]);
        }
    }
    let stranger = client.read_blob(&blob(&host, "team/c", &bytes), 0, 1);
    assert!(matches!(stranger.err(), Some(Error::Denied { .. })));
    let sent = registry.received();
    let sent: Vec<_> = sent.iter().map(|one| one.header("authorization")).collect();
    let (a, b) = (Some(A), Some(B));
    assert_eq!(
        sent,
        [None, a, b, a, b, None],
        "one refusal, and that of a stranger"
    );
}

fn with_source(credentials: Source) -> Client {
    Client::new(Options {
        credentials,
        ..Options::default()
    })
    .unwrap()
}

/// A reply of a credential service for `host`.
fn service_reply(host: &str) -> String {
    format!(
        r#"{{"traceId":"x","success":true,"data":{{"auths":{{"{host}":{{"username":"user","password":"pass"}}}}}}}}"#
    )
}

#[test]
fn credential_services_are_asked_for_the_repository() {
    let bytes = tagged(10, 7);
    let registry = guarded(
        &bytes,
        401,
        "Basic".to_owned(),
        list(&["Basic dXNlcjpwYXNz"]),
    );
    let reply = service_reply(&registry.host());
    let service = Server::start(move |_: &Received| answer(200, &[], reply.as_bytes()));
    let address = format!("{}/auth", service.host());
    let second = Duration::from_secs(1);
    let source = Service::http(&address, false, second, None, None).unwrap();
    first_byte(&with_source(Source::Service(source)), &registry, &bytes).unwrap();
    let target = &service.received()[0].target;
    let expected = format!("/auth?remote_url=http://{}/v2/a/b/blobs", registry.host());
    assert_eq!(*target, expected);

    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("s");
    unix_service(&path, service_reply(&registry.host()));
    let source = Source::Service(Service::unix(path, second));
    first_byte(&with_source(source), &registry, &bytes).unwrap();
}

#[test]
fn credential_services_that_fail_are_named() {
    let registry = guarded(b"x", 401, "Basic".to_owned(), list(&[]));
    let fails = |source: Service| {
        let error = first_byte(&with_source(Source::Service(source)), &registry, b"x");
        let error = error.unwrap_err();
        assert!(matches!(error, Error::Credentials { .. }), "{error}");
        assert_eq!(error.upstream_words(), "Authentication failed");
        error
    };
    let short = Duration::from_millis(200);
    let refusing = Server::start(|_| answer(200, &[], br#"{"success":false}"#));
    assert!(
        fails(Service::http(&refusing.host(), false, short, None, None).unwrap()).is_definite()
    );
    let slow = Server::start(|_| Reply::Stall(Vec::new()));
    assert!(!fails(Service::http(&slow.host(), false, short, None, None).unwrap()).is_definite());

    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("s");
    assert!(
        !fails(Service::unix(path.clone(), short)).is_definite(),
        "absent"
    );
    let _silent = UnixListener::bind(&path).unwrap();
    assert!(!fails(Service::unix(path, short)).is_definite(), "silent");
}

/// Serves one credential request on a unix socket.
fn unix_service(path: &Path, reply: String) {
    let listener = UnixListener::bind(path).unwrap();
    thread::spawn(move || {
        let (mut stream, _) = listener.accept().unwrap();
        let mut line = String::new();
        BufReader::new(stream.try_clone().unwrap())
            .read_line(&mut line)
            .unwrap();
        assert!(
            line.starts_with("GET /auth?remote_url=http://127.0.0.1:"),
            "{line}"
        );
        let length = reply.len();
        write!(
            stream,
            "HTTP/1.1 200 OK\r\nContent-Length: {length}\r\n\r\n{reply}"
        )
        .unwrap();
    });
}
