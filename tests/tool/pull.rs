//! `ovbd pull` from a real registry, and `ovbd cache`.

use super::*;
use common::registries::{DockerRegistry, Storage, TokenServer};
use common::registry_server::{Reply, Server, answer, until};
use ovbd_vhost::format::digest::Digest;
use serde_json::Value;

/// Layers of an image: small and large, the last one partly a unit.
fn layers() -> Vec<Vec<u8>> {
    let mut random = Random::new(5);
    [100, 70_000, 20 << 20, (1 << 20) + 1]
        .into_iter()
        .map(|len: usize| {
            let words = len.div_ceil(8);
            let bytes = (0..words).flat_map(|_| random.any().to_le_bytes());
            bytes.take(len).collect()
        })
        .collect()
}

fn storage(layers: &[Vec<u8>]) -> Storage {
    let storage = Storage::default();
    let slices: Vec<_> = layers.iter().map(Vec::as_slice).collect();
    storage.image("team/app", "1.2", &slices);
    storage
}

fn list(dir: &TempDir) -> Vec<Value> {
    let stdout = succeed(dir, &["cache", "ls", "--json", "--cache", "c"], b"");
    let found: Value = serde_json::from_slice(&stdout).unwrap();
    found["blobs"].as_array().unwrap().clone()
}

/// The command line that pulls from `host` into the cache `c`.
fn pull<'a>(host: &'a str, reference: &'a str) -> Vec<&'a str> {
    vec![
        "pull",
        "--cache",
        "c",
        "--insecure-registry",
        host,
        reference,
    ]
}

#[test]
fn a_pulled_image_is_in_the_cache_and_is_not_fetched_again() {
    let dir = tempfile::tempdir().unwrap();
    let layers = layers();
    let tokens = TokenServer::start(60);
    let registry = DockerRegistry::with_tokens(storage(&layers), &tokens);
    let host = registry.host();
    fs::write(dir.path().join("auth"), TokenServer::credentials(host)).unwrap();
    let reference = format!("{host}/team/app:1.2");
    let mut command = pull(host, &reference);
    command.extend(["--credentials", "auth"]);
    let all: usize = layers.iter().map(Vec::len).sum();

    let json = [&command[..], &["--json"]].concat();
    let pulled: Value = serde_json::from_slice(&succeed(&dir, &json, b"")).unwrap();
    assert!(pulled["manifest"].as_str().unwrap().starts_with("sha256:"));
    assert_eq!(pulled["layers"], 4);
    assert_eq!([&pulled["bytes"], &pulled["fetched"]], [all, all]);
    for layer in &layers {
        let path = dir
            .path()
            .join("c/blobs/sha256")
            .join(Digest::of(layer).hex());
        assert!(fs::read(path).unwrap() == *layer);
    }
    let again = String::from_utf8(succeed(&dir, &command, b"")).unwrap();
    assert!(again.starts_with("sha256:"), "{again}");
    assert!(again.contains(": 4 layers, "), "{again}");
    assert!(again.ends_with("iB, 0 B of them fetched\n"), "{again}");

    let blobs = list(&dir);
    assert_eq!(blobs.len(), 4);
    assert!(
        blobs
            .iter()
            .all(|blob| blob["complete"] == true && blob["in_use"] == false)
    );
    let sizes: u64 = blobs
        .iter()
        .map(|blob| blob["size"].as_u64().unwrap())
        .sum();
    assert_eq!(sizes, all as u64);
    let table = String::from_utf8(succeed(&dir, &["cache", "ls", "--cache", "c"], b"")).unwrap();
    assert_eq!(table.lines().count(), 5, "{table}");
}

/// On a terminal, a bar shows how much of how much has come, and is gone at the end.
#[test]
fn a_pull_shows_its_progress_on_a_terminal() {
    let dir = tempfile::tempdir().unwrap();
    let registry = DockerRegistry::open(storage(&layers()));
    let reference = format!("{}/team/app:1.2", registry.host());
    let command = pull(registry.host(), &reference).join(" ");
    let line = format!(
        "stty columns 100; exec {} {command}",
        env!("CARGO_BIN_EXE_ovbd")
    );
    let output = Command::new("script")
        .args(["-qefc", &line, "/dev/null"])
        .current_dir(dir.path())
        .env("TERM", "xterm")
        .stdin(Stdio::null())
        .output()
        .unwrap();
    let shown = String::from_utf8_lossy(&output.stdout);
    assert!(output.status.success(), "{shown}");
    // 20 MiB, 1 MiB and some more.
    assert!(
        shown.contains("pulling [") && shown.contains("/21.07 MiB"),
        "{shown}"
    );
    let (_, last) = shown.rsplit_once("sha256:").unwrap();
    assert!(
        last.contains(": 4 layers, ") && !last.contains("pulling"),
        "{shown}"
    );
}

#[test]
fn a_cache_is_verified_shrunk_and_emptied() {
    let dir = tempfile::tempdir().unwrap();
    let layers = layers();
    let registry = DockerRegistry::open(storage(&layers));
    let reference = format!("{}/team/app:1.2", registry.host());
    succeed(&dir, &pull(registry.host(), &reference), b"");
    assert_eq!(
        succeed(&dir, &["cache", "verify", "--cache", "c"], b""),
        b""
    );

    let digest = Digest::of(&layers[1]);
    let path = dir.path().join("c/blobs/sha256").join(digest.hex());
    let mut permissions = fs::metadata(&path).unwrap().permissions();
    std::os::unix::fs::PermissionsExt::set_mode(&mut permissions, 0o600);
    fs::set_permissions(&path, permissions).unwrap();
    File::options()
        .write(true)
        .open(&path)
        .unwrap()
        .write_all_at(b"!", 5000)
        .unwrap();
    let output = ovbd(&dir, &["cache", "verify", "--cache", "c"], b"");
    assert_eq!(output.status.code(), Some(1));
    let said = String::from_utf8(output.stdout).unwrap();
    assert_eq!(said, format!("{digest} was damaged; removed it\n"));
    let digest = digest.to_string();
    let json = ["cache", "verify", "--json", "--cache", "c", &digest];
    let output = ovbd(&dir, &json, b"");
    assert_eq!(output.status.code(), Some(1));
    let found: Value = serde_json::from_slice(&output.stdout).unwrap();
    assert_eq!(found["incomplete"], serde_json::json!([digest]));
    assert_eq!(list(&dir).len(), 3);

    let gone = Digest::of(&layers[0]).to_string();
    succeed(&dir, &["cache", "rm", "--cache", "c", &gone], b"");
    assert_eq!(list(&dir).len(), 2);
    let output = ovbd(&dir, &["cache", "rm", "--cache", "c", &gone], b"");
    assert_eq!(output.status.code(), Some(1));
    succeed(&dir, &["cache", "gc", "--cache", "c", "--size", "0"], b"");
    assert_eq!(list(&dir).len(), 0);
}

#[test]
fn a_pull_that_cannot_be_ends_with_the_reason() {
    let dir = tempfile::tempdir().unwrap();
    let registry = DockerRegistry::open(storage(&layers()));
    let host = registry.host();
    let absent = format!("{host}/team/app:none");
    let said = fail(&dir, 1, &pull(host, &absent));
    assert!(said.contains("does not have"), "{said}");
    let said = fail(&dir, 2, &pull(host, "not a reference"));
    assert!(said.contains("not a reference"), "{said}");
    fs::create_dir(dir.path().join("full")).unwrap();
    fs::write(dir.path().join("full/x"), "").unwrap();
    let reference = format!("{host}/team/app:1.2");
    let said = fail(&dir, 1, &["pull", "--cache", "full", &reference]);
    assert!(said.contains("full"), "{said}");
}

/// The registry's blob has one wrong bit, each time it is asked for.
#[test]
fn wrong_bytes_are_never_kept() {
    let dir = tempfile::tempdir().unwrap();
    let layer = vec![7u8; 100_000];
    let digest = Digest::of(&layer);
    let config = Digest::of(b"{}");
    let descriptor = common::registries::layer(&digest, layer.len() as u64);
    let manifest = common::registries::manifest(&config, vec![descriptor]).to_string();
    let mut wrong = layer;
    wrong[90_000] ^= 4;
    let server = Server::start(move |request| {
        if request.target.contains("/manifests/") {
            let kind = "application/vnd.oci.image.manifest.v1+json";
            return answer(200, &[("content-type", kind)], manifest.as_bytes());
        }
        common::registry_server::serve(request, &wrong)
    });
    let host = server.host();
    let reference = format!("{host}/a/b:1");
    let said = fail(&dir, 1, &pull(&host, &reference));
    assert!(
        said.contains("was fetched twice; its bytes have digest"),
        "{said}"
    );
    // An entry without a byte may be left.
    let left = list(&dir);
    assert!(left.iter().all(|blob| blob["present"] == 0), "{left:?}");
}

/// The process that talks to the registry is in its sandbox, and ends with the command.
#[test]
fn a_registry_is_talked_to_in_a_sandbox() {
    let dir = tempfile::tempdir().unwrap();
    let layer = vec![7u8; 100_000];
    let descriptor = common::registries::layer(&Digest::of(&layer), layer.len() as u64);
    let config = Digest::of(b"{}");
    let manifest = common::registries::manifest(&config, vec![descriptor]).to_string();
    let server = Server::start(
        move |request| match request.target.contains("/manifests/") {
            true => {
                let kind = "application/vnd.oci.image.manifest.v1+json";
                answer(200, &[("content-type", kind)], manifest.as_bytes())
            }
            false => Reply::Stall(Vec::new()),
        },
    );
    let host = server.host();
    let mut command = Command::new(common::programs::path("ovbd"))
        .current_dir(dir.path())
        .args(pull(&host, &format!("{host}/a/b:1")))
        .spawn()
        .unwrap();
    let blobs = || {
        server
            .received()
            .iter()
            .filter(|asked| asked.target.contains("/blobs/"))
            .count()
    };
    until("a blob is asked for", || blobs() > 0);
    let child = |pid: u32| {
        let tasks = fs::read_dir(format!("/proc/{pid}/task")).unwrap();
        let children = |task: fs::DirEntry| fs::read_to_string(task.path().join("children")).ok();
        let all: String = tasks.flatten().filter_map(children).collect();
        all.split_whitespace()
            .next()
            .unwrap()
            .parse::<u32>()
            .unwrap()
    };
    let fetcher = child(child(command.id()));
    let status = fs::read_to_string(format!("/proc/{fetcher}/status")).unwrap();
    assert!(status.contains("Seccomp:\t2"), "{status}");
    assert!(status.contains("CapEff:\t0000000000000000"), "{status}");
    command.kill().unwrap();
    command.wait().unwrap();
    until("the fetcher ends", || {
        !Path::new(&format!("/proc/{fetcher}/exe")).exists()
    });
}
