//! `HTTPS_PROXY` and `NO_PROXY`: how a client reaches hosts that are not on this machine. Each case
//! is a process of its own, because the environment is one for all threads.

use std::env;
use std::fs;
use std::process::{Command, Output};

use common::namespace;
use common::registry_server::{Received, Reply, Server, answer, raw, serve};

use super::{blob, client, read};

const BYTES: &[u8] = b"behind the proxy";

/// Runs [`ask`] with these variables.
fn ask_with(variables: &[(&str, &str)]) -> Output {
    ask_by(Command::new(env::current_exe().unwrap()), variables)
}

fn ask_by(mut command: Command, variables: &[(&str, &str)]) -> Output {
    command.args(["--exact", "proxy::ask", "--nocapture"]);
    for name in ["ALL_PROXY", "HTTPS_PROXY", "HTTP_PROXY", "NO_PROXY"] {
        command.env_remove(name).env_remove(name.to_lowercase());
    }
    command.envs(variables.iter().copied()).output().unwrap()
}

/// Reads a blob of the host in `TEST_HOST`, which the other tests set for a process of its own;
/// else of a server here.
#[test]
fn ask() {
    let here = Server::start(|request| serve(request, BYTES));
    let host = env::var("TEST_HOST").unwrap_or_else(|_| here.host());
    let result = client().read_blob(&blob(&host, "a", BYTES), 0, BYTES.len() as u64);
    assert_eq!(
        read(result.unwrap_or_else(|error| panic!("{error}"))),
        BYTES
    );
}

/// A proxy that answers `CONNECT`, and then the requests in the tunnel itself.
fn proxy() -> Server {
    Server::start(|request: &Received| match request.method.as_str() {
        "CONNECT" => Reply::Send(raw(200, &[], b"")),
        _ => serve(request, BYTES),
    })
}

fn said(output: &Output) -> String {
    let (out, err) = (&output.stdout, &output.stderr);
    format!(
        "{}{}",
        String::from_utf8_lossy(out),
        String::from_utf8_lossy(err)
    )
}

#[test]
fn other_hosts_are_reached_through_the_proxy() {
    let proxy = proxy();
    let url = proxy.url("").replace("http://", "http://user:p%40ss@");
    // The name is the proxy's to resolve.
    let output = ask_with(&[("HTTPS_PROXY", &url), ("TEST_HOST", "r.invalid:5000")]);
    assert!(output.status.success(), "{}", said(&output));
    let asked = proxy.received();
    assert_eq!(asked[0].target, "r.invalid:5000");
    assert_eq!(
        asked[0].header("proxy-authorization"),
        Some("Basic dXNlcjpwQHNz")
    );
    assert_eq!(asked.len(), 2);
}

#[test]
fn this_machine_and_exempt_hosts_are_not() {
    let proxy = proxy();
    let server = Server::start(|request| serve(request, BYTES));
    let url = proxy.url("");
    let output = ask_with(&[("HTTPS_PROXY", &url), ("TEST_HOST", &server.host())]);
    assert!(output.status.success(), "{}", said(&output));
    assert_eq!(server.count(), 1);
    let names = tempfile::NamedTempFile::new().unwrap();
    fs::write(names.path(), "127.0.0.1 r.test\n").unwrap();
    let setup = format!("mount --bind {} /etc/hosts", names.path().display());
    let prefix = namespace::with_own(&setup);
    let mut command = Command::new(&prefix[0]);
    command.args(&prefix[1..]).arg(env::current_exe().unwrap());
    let host = server.host().replace("127.0.0.1", "r.test");
    let exempt = [
        ("HTTPS_PROXY", url.as_str()),
        ("NO_PROXY", ".test"),
        ("TEST_HOST", &host),
    ];
    let output = ask_by(command, &exempt);
    assert!(output.status.success(), "{}", said(&output));
    assert_eq!(server.count(), 2);
    assert_eq!(proxy.count(), 0);
}

#[test]
fn a_proxy_that_refuses_is_named() {
    let refusing = Server::start(|_| answer(407, &[], b""));
    let output = ask_with(&[
        ("HTTPS_PROXY", &refusing.url("")),
        ("TEST_HOST", "r.invalid"),
    ]);
    let said = said(&output);
    assert!(
        said.contains(&format!("proxy {}", refusing.host())),
        "{said}"
    );
    assert!(said.contains("407"), "{said}");
    let socks = ask_with(&[
        ("ALL_PROXY", "socks5://127.0.0.1:1"),
        ("TEST_HOST", "r.invalid"),
    ]);
    assert!(!socks.status.success());
}
