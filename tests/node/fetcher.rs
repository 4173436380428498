//! The fetcher that the disks of a node share.

use std::path::Path;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, OnceLock};
use std::thread;

use common::fetch_processes::{Role, of_cache};
use common::guest::{Guest, Options};
use common::registry_server::{Server, answer, serve};
use common::remote::{Layers, REPOSITORY};
use serde_json::json;

use super::node::{Node, kill, until};

/// A registry that wants a token, and the number of tokens that it gave.
fn registry(layers: &Layers) -> (Server, Arc<AtomicUsize>) {
    let tokens = Arc::new(AtomicUsize::new(0));
    let host = Arc::new(OnceLock::<String>::new());
    let (given, own) = (Arc::clone(&tokens), Arc::clone(&host));
    let blobs = layers.handler(serve);
    let manifest = layers.manifest().to_string();
    let server = Server::start(move |request| {
        let host = own.get().expect("an address");
        if request.target.contains("/token") {
            given.fetch_add(1, Ordering::SeqCst);
            return answer(200, &[], br#"{"token": "t", "expires_in": 3600}"#);
        }
        if request.header("authorization") != Some("Bearer t") {
            let challenge = format!(
                "Bearer realm=\"http://{host}/token\",service=\"s\",scope=\"repository:{REPOSITORY}:pull\""
            );
            return answer(401, &[("WWW-Authenticate", &challenge)], b"");
        }
        let kind = "application/vnd.oci.image.manifest.v1+json";
        match request.target.contains("/manifests/") {
            true => answer(200, &[("Content-Type", kind)], manifest.as_bytes()),
            false => blobs(request),
        }
    });
    host.set(server.host()).expect("one address");
    (server, tokens)
}

/// The processes of all fetchers of a cache, by their roles.
fn roles(cache: &Path) -> Vec<Role> {
    of_cache(cache).iter().map(|(role, _)| *role).collect()
}

const ONE_OF_EACH: [Role; 3] = [Role::Keeper, Role::Standby, Role::Fetcher];

fn kill_role(cache: &Path, victim: Role) {
    until("it runs", || roles(cache) == ONE_OF_EACH);
    let found = of_cache(cache);
    let (_, pid) = found.iter().find(|(role, _)| *role == victim).expect("one");
    kill(pid.as_raw_nonzero().get());
}

/// Reads a part of a disk that nothing has read before.
fn read(node: &Node, id: &str, layers: &Layers, part: usize) {
    let mut guest = Guest::boot(node.connect(id), Options::default()).unwrap();
    let start = part * 37 % 256 * 65536;
    let found = guest.read(0, start as u64 / 512, 65536);
    assert!(found == layers.content[start..start + 65536], "part {part}");
}

#[test]
fn ten_disks_share_a_fetcher_and_each_of_its_processes_may_be_killed() {
    let layers = Layers::new(16);
    let (server, tokens) = registry(&layers);
    let host = server.host();
    let directory = tempfile::tempdir().unwrap();
    let cache = directory.path().join("cache");
    let options = [
        "--insecure-registry",
        &host,
        "--cache",
        cache.to_str().unwrap(),
    ];
    let mut node = Node::start_with(&options);
    let spec = json!({ "image": format!("{host}/{REPOSITORY}:1") });
    let ids: Vec<_> = (0..10).map(|number| format!("d{number}")).collect();
    thread::scope(|scope| {
        for id in &ids {
            let (node, spec) = (&node, &spec);
            scope.spawn(move || {
                let (status, made) = node.put(&format!("/disks/{id}"), spec);
                assert_eq!(status, 201, "{made}");
            });
        }
    });
    until("one process of each kind runs", || {
        roles(&cache) == ONE_OF_EACH
    });
    assert_eq!(tokens.load(Ordering::SeqCst), 1, "one token for all");
    let mut parts = 0..;
    let mut read_all = |node: &Node| {
        for id in &ids[..4] {
            read(node, id, &layers, parts.next().unwrap());
        }
    };
    read_all(&node);
    for victim in [Role::Fetcher, Role::Keeper, Role::Standby] {
        kill_role(&cache, victim);
        read_all(&node);
    }
    node.kill();
    read_all(&node);
    kill_role(&cache, Role::Fetcher);
    read_all(&node);
    kill_role(&cache, Role::Keeper);
    node.start_again_with(&options);
    for id in &ids {
        node.until_state(id, "listening");
    }
    read_all(&node);
    // The disk that started the fetcher is one of these.
    for id in &ids[4..] {
        assert_eq!(node.request("DELETE", &format!("/disks/{id}"), "").0, 204);
    }
    read_all(&node);
    assert_eq!(node.put("/disks/other", &spec).0, 201);
    read(&node, "other", &layers, parts.next().unwrap());
    until("one process of each kind runs", || {
        roles(&cache) == ONE_OF_EACH
    });
    for id in ids[..4].iter().map(String::as_str).chain(["other"]) {
        let path = format!("/disks/{id}?force=true");
        assert_eq!(node.request("DELETE", &path, "").0, 204);
    }
    until("the fetcher ends with the last disk", || {
        of_cache(&cache).is_empty()
    });
}

/// A node with other options for registries starts a fetcher of its own: disks of one configuration never use the
/// credentials of another.
#[test]
fn disks_with_other_options_have_another_fetcher() {
    let layers = Layers::new(2);
    let (server, tokens) = registry(&layers);
    let host = server.host();
    let directory = tempfile::tempdir().unwrap();
    let cache = directory.path().join("cache");
    let credentials = directory.path().join("auth.json");
    std::fs::write(&credentials, r#"{"auths": {}}"#).unwrap();
    let cache_option = cache.to_str().unwrap();
    let first = ["--insecure-registry", &host, "--cache", cache_option];
    let mut node = Node::start_with(&first);
    let spec = json!({ "image": format!("{host}/{REPOSITORY}:1") });
    assert_eq!(node.put("/disks/a", &spec).0, 201);
    node.kill();
    let second = [
        &first[..],
        &["--credentials", credentials.to_str().unwrap()],
    ]
    .concat();
    node.start_again_with(&second);
    assert_eq!(node.put("/disks/b", &spec).0, 201);
    let fetchers = || {
        roles(&cache)
            .into_iter()
            .filter(|role| *role == Role::Fetcher)
    };
    assert_eq!(fetchers().count(), 2);
    assert_eq!(tokens.load(Ordering::SeqCst), 2);
    for id in ["a", "b"] {
        let mut guest = Guest::boot(node.connect(id), Options::default()).unwrap();
        guest.assert_reads(0, &layers.content);
    }
}
