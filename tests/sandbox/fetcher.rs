//! The processes of a disk whose layers are in a registry, and what the fetcher can no longer do.
#![allow(unsafe_code)] // some calls have no safe form

use std::env;
use std::fs::{self, File};
use std::io::{self, Write};
use std::net::{TcpListener, TcpStream, ToSocketAddrs};
use std::os::unix::fs::PermissionsExt;
use std::path::Path;
use std::process::{Command, exit};
use std::ptr::null_mut;

use common::guest::{Guest, Options};
use common::registry_server::{Server, answer, serve};
use common::remote::{Layers, Place};
use ovbd_vhost::fetch::sandbox::{self, Reach};
use ovbd_vhost::format::digest::Digest;
use serde_json::json;

use crate::{assert_confined, assert_threads, field, statuses};

/// Variable of the environment that names the directory in which a process tries everything.
const INSIDE: &str = "OVBD_FETCHER_PROBE";

/// What the fetcher needs.
const WORKS: [&str; 7] = [
    "write in the cache",
    "rename in the cache",
    "remove from the cache",
    "read credentials",
    "read credentials that were replaced",
    "connect",
    "resolve a name",
];

/// What it does not need.
const FAILS: [&str; 14] = [
    "read a file elsewhere",
    "write a file elsewhere",
    "write credentials",
    "list a directory",
    "change a mode",
    "listen",
    "listen on a unix socket",
    "raw socket",
    "run a program",
    "fork",
    "new namespace",
    "signal its parent",
    "map code",
    "make a ring",
];

fn checked(result: libc::c_long) -> io::Result<()> {
    match result {
        -1 => Err(io::Error::last_os_error()),
        _ => Ok(()),
    }
}

fn attempt(what: &str, dir: &Path) -> io::Result<()> {
    let cache = dir.join("cache");
    match what {
        "write in the cache" => fs::write(cache.join("a/new"), "x"),
        "rename in the cache" => fs::rename(cache.join("a/new"), cache.join("b/new")),
        "remove from the cache" => fs::remove_file(cache.join("b/new")),
        "read credentials" => fs::read(dir.join("auth/file")).map(drop),
        "read credentials that were replaced" => fs::read(dir.join("auth/other")).map(drop),
        "connect" => {
            let address = fs::read_to_string(cache.join("address"))?;
            TcpStream::connect(address).map(drop)
        }
        "resolve a name" => ("localhost", 80).to_socket_addrs().map(drop),
        "read a file elsewhere" => fs::read(dir.join("secret")).map(drop),
        "write a file elsewhere" => fs::write(dir.join("new"), "x"),
        "write credentials" => File::options()
            .write(true)
            .open(dir.join("auth/file"))
            .map(drop),
        "list a directory" => fs::read_dir(dir).map(drop),
        "change a mode" => fs::set_permissions(&cache, fs::Permissions::from_mode(0o777)),
        "listen" => TcpListener::bind("127.0.0.1:0").map(drop),
        "listen on a unix socket" => {
            std::os::unix::net::UnixListener::bind(cache.join("socket")).map(drop)
        }
        "run a program" => Command::new("/bin/true").status().map(drop),
        // SAFETY: the calls take no pointers that are followed; a child would leave at once.
        _ => unsafe {
            match what {
                "raw socket" => checked(libc::socket(libc::AF_PACKET, libc::SOCK_RAW, 0).into()),
                "fork" => match libc::syscall(libc::SYS_clone, libc::SIGCHLD, 0, 0, 0, 0) {
                    0 => libc::_exit(0),
                    result => checked(result),
                },
                "new namespace" => checked(libc::unshare(libc::CLONE_NEWUSER).into()),
                "signal its parent" => checked(libc::kill(libc::getppid(), 0).into()),
                "map code" => {
                    let protection = libc::PROT_READ | libc::PROT_EXEC;
                    let flags = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS;
                    let mapped = libc::mmap(null_mut(), 4096, protection, flags, -1, 0);
                    checked(if mapped == libc::MAP_FAILED { -1 } else { 0 })
                }
                "make a ring" => checked(libc::syscall(libc::SYS_io_uring_setup, 1, 0)),
                _ => panic!("{what}"),
            }
        },
    }
}

/// Enters the sandbox and reports what works, on standard error.
fn probe(dir: &Path) -> ! {
    let reach = Reach {
        cache: dir.join("cache"),
        credentials: vec![dir.join("auth/file")],
    };
    sandbox::enter(&reach).expect("the sandbox");
    for what in WORKS.iter().chain(&FAILS) {
        let result = match attempt(what, dir) {
            Ok(()) => "works".to_owned(),
            Err(error) => format!("fails: {error}"),
        };
        writeln!(io::stderr(), "probe {what}: {result}").expect("standard error");
    }
    exit(0)
}

#[test]
fn the_fetcher_reaches_network_and_cache_and_nothing_else() {
    if let Ok(dir) = env::var(INSIDE) {
        probe(Path::new(&dir));
    }
    let dir = tempfile::tempdir().unwrap();
    for directory in ["cache/a", "cache/b", "auth"] {
        fs::create_dir_all(dir.path().join(directory)).unwrap();
    }
    for file in ["auth/file", "auth/other", "secret"] {
        fs::write(dir.path().join(file), "content").unwrap();
    }
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let address = listener.local_addr().unwrap().to_string();
    fs::write(dir.path().join("cache/address"), address).unwrap();
    let name = "fetcher::the_fetcher_reaches_network_and_cache_and_nothing_else";
    let output = Command::new(env::current_exe().unwrap())
        .args(["--exact", name, "--nocapture", "--test-threads=1"])
        .env(INSIDE, dir.path())
        .output()
        .unwrap();
    let text = String::from_utf8_lossy(&output.stderr);
    let end = |what: &str| {
        let line = text
            .lines()
            .find_map(|line| line.strip_prefix(&format!("probe {what}: ")));
        line.unwrap_or_else(|| panic!("{what} was not tried: {text}"))
    };
    for what in WORKS {
        assert_eq!(end(what), "works", "{what}");
    }
    for what in FAILS {
        // A kernel without Landlock leaves paths to the rights of files.
        let by_landlock =
            what.contains("file") || what.contains("credentials") || what.contains("list a");
        if by_landlock && text.contains("lacks Landlock") {
            continue;
        }
        let end = end(what);
        assert!(
            end.contains("os error 1)") || end.contains("os error 13)"),
            "{what} {end}"
        );
    }
}

#[test]
fn no_process_of_a_disk_in_a_registry_has_a_privilege_left() {
    let layers = Layers::new(1);
    let place = Place::default();
    let blobs = layers.blobs.clone();
    let server = Server::start(move |request| {
        let named = |blob: &&Vec<u8>| request.target.ends_with(&Digest::of(blob).to_string());
        blobs
            .iter()
            .find(named)
            .map_or_else(|| answer(404, &[], b""), |blob| serve(request, blob))
    });
    place.config("http", &server.host(), &layers.lowers(), json!({}));
    let daemon = place.serve(&[]);
    let mut guest = Guest::boot(daemon.connect(), Options::default()).expect("guest");
    guest.assert_reads(0, &layers.content);
    let names = ["fetch-client", "front-end", "ovbd-vhost", "queue-0"];
    assert_threads(daemon.pid(), &names);
    let (_, fetcher) = daemon.fetcher();
    let threads = statuses(fetcher.expect("a fetcher"));
    assert!(threads.len() > 10);
    for thread in &threads {
        assert!(
            field(thread, "Name").starts_with("fetch-") || field(thread, "Name") == "ovbd-fetcher"
        );
        assert_confined(thread);
    }
}
