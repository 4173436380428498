//! Real registries on this machine: Debian's `docker-registry` on a folder that is filled beforehand,
//! and the token server that it trusts.

use std::fs;
use std::net::{TcpListener, TcpStream};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::{SystemTime, UNIX_EPOCH};

use base64::Engine;
use base64::engine::general_purpose::{STANDARD, URL_SAFE_NO_PAD};
use ovbd_vhost::format::digest::Digest;
use ring::rand::SystemRandom;
use ring::signature::{ECDSA_P256_SHA256_FIXED_SIGNING, EcdsaKeyPair};
use serde_json::{Value, json};
use tempfile::TempDir;

use crate::object_store::{BUCKET, ObjectStore};
use crate::registry_server::{Received, Server, answer, until};

/// What a registry serves, as files on disk in its own layout.
pub struct Storage {
    folder: TempDir,
}

impl Default for Storage {
    fn default() -> Storage {
        let folder = tempfile::tempdir().expect("a folder");
        Storage { folder }
    }
}

impl Storage {
    /// The directory that the registry's paths are in.
    pub fn root(&self) -> &Path {
        self.folder.path()
    }

    /// Adds a blob to a repository.
    pub fn blob(&self, repository: &str, bytes: &[u8]) -> Digest {
        let digest = Digest::of(bytes);
        let hex = digest.hex();
        self.write(&format!("blobs/sha256/{}/{hex}/data", &hex[..2]), bytes);
        let link = format!("repositories/{repository}/_layers/sha256/{hex}/link");
        self.write(&link, digest.to_string().as_bytes());
        digest
    }

    /// Adds a manifest or index to a repository and lets a tag point to it.
    pub fn manifest(&self, repository: &str, tag: &str, text: &str) -> Digest {
        let digest = self.blob(repository, text.as_bytes());
        let link = digest.to_string();
        let manifests = format!("repositories/{repository}/_manifests");
        let hex = digest.hex();
        for path in [
            format!("{manifests}/revisions/sha256/{hex}/link"),
            format!("{manifests}/tags/{tag}/current/link"),
            format!("{manifests}/tags/{tag}/index/sha256/{hex}/link"),
        ] {
            self.write(&path, link.as_bytes());
        }
        digest
    }

    /// Adds an OverlayBD image whose layers are these blobs, and one above them that holds a trace.
    pub fn image_with_trace(
        &self,
        repository: &str,
        tag: &str,
        layers: &[&[u8]],
        trace: &[u8],
    ) -> Digest {
        let config = self.blob(repository, b"{}");
        let mut layers: Vec<_> = layers
            .iter()
            .map(|bytes| layer(&self.blob(repository, bytes), bytes.len() as u64))
            .collect();
        let mut above = layer(&self.blob(repository, trace), trace.len() as u64);
        above["annotations"]["containerd.io/snapshot/overlaybd/acceleration-layer"] = json!("yes");
        layers.push(above);
        self.manifest(repository, tag, &manifest(&config, layers).to_string())
    }

    /// Adds an OverlayBD image whose layers are these blobs, bottom first.
    pub fn image(&self, repository: &str, tag: &str, layers: &[&[u8]]) -> Digest {
        let config = self.blob(repository, b"{}");
        let layers = layers.iter().map(|bytes| {
            let digest = self.blob(repository, bytes);
            layer(&digest, bytes.len() as u64)
        });
        let text = manifest(&config, layers.collect()).to_string();
        self.manifest(repository, tag, &text)
    }

    fn write(&self, path: &str, bytes: &[u8]) {
        let path = self.folder.path().join("docker/registry/v2").join(path);
        fs::create_dir_all(path.parent().expect("a parent")).expect("a folder");
        fs::write(path, bytes).expect("a file of the registry");
    }
}

/// This machine's architecture, as image indexes name it.
pub const ARCHITECTURE: &str = if cfg!(target_arch = "aarch64") {
    "arm64"
} else {
    "amd64"
};

/// Descriptor of a layer with the annotations of the convertors.
pub fn layer(digest: &Digest, size: u64) -> Value {
    json!({
        "mediaType": "application/vnd.oci.image.layer.v1.tar",
        "digest": digest.to_string(),
        "size": size,
        "annotations": {
            "containerd.io/snapshot/overlaybd/blob-digest": digest.to_string(),
            "containerd.io/snapshot/overlaybd/blob-size": size.to_string(),
            "containerd.io/snapshot/overlaybd/version": "0.1.0",
        },
    })
}

/// Manifest of an image.
pub fn manifest(config: &Digest, layers: Vec<Value>) -> Value {
    json!({
        "schemaVersion": 2,
        "mediaType": "application/vnd.oci.image.manifest.v1+json",
        "config": {
            "mediaType": "application/vnd.oci.image.config.v1+json",
            "digest": config.to_string(),
            "size": 2,
        },
        "layers": layers,
    })
}

/// A `docker-registry` process, until it is dropped.
pub struct DockerRegistry {
    child: Child,
    host: String,
    _storage: Storage,
    folder: TempDir,
}

impl DockerRegistry {
    /// Serves a storage to all.
    pub fn open(storage: Storage) -> DockerRegistry {
        DockerRegistry::start(storage, "")
    }

    /// Redirects to signed URLs of an object store that has what `storage` holds.
    pub fn with_store(storage: Storage, store: &ObjectStore) -> DockerRegistry {
        let files = format!(
            "s3:\n    accesskey: test\n    secretkey: test\n    region: us-east-1\n    \
             regionendpoint: http://{}\n    bucket: {BUCKET}\n    secure: false\n    v4auth: true\n  \
             maintenance:\n    uploadpurging:\n      enabled: false",
            store.host()
        );
        DockerRegistry::launch(storage, &files, "")
    }

    /// Serves what another registry has, fetching it when it is asked for.
    pub fn proxy(origin: &str) -> DockerRegistry {
        let proxy = format!("proxy:\n  remoteurl: {origin}\n");
        DockerRegistry::start(Storage::default(), &proxy)
    }

    /// Serves a storage to clients with tokens of a token server.
    pub fn with_tokens(storage: Storage, tokens: &TokenServer) -> DockerRegistry {
        let auth = format!(
            "auth:\n  token:\n    realm: {}\n    service: {SERVICE}\n    issuer: {ISSUER}\n    \
             rootcertbundle: {}\n",
            tokens.server.url("/token"),
            tokens.certificate.display()
        );
        DockerRegistry::start(storage, &auth)
    }

    fn start(storage: Storage, more: &str) -> DockerRegistry {
        let root = storage.root().display();
        let files = format!("filesystem:\n    rootdirectory: {root}");
        DockerRegistry::launch(storage, &files, more)
    }

    fn launch(storage: Storage, files: &str, more: &str) -> DockerRegistry {
        let folder = tempfile::tempdir().expect("a folder");
        let host = free_address();
        let config = format!(
            "version: 0.1\nlog:\n  level: error\n  accesslog:\n    disabled: true\nstorage:\n  \
             {files}\nhttp:\n  addr: {host}\n  secret: test\n{more}"
        );
        let path = folder.path().join("config.yml");
        fs::write(&path, config).expect("a config");
        let registry = DockerRegistry {
            child: DockerRegistry::spawn(folder.path()),
            host,
            _storage: storage,
            folder,
        };
        registry.wait();
        registry
    }

    fn spawn(folder: &Path) -> Child {
        let log = fs::File::create(folder.join("log")).expect("a log");
        Command::new(server_program("usr/bin/docker-registry"))
            .arg("serve")
            .arg(folder.join("config.yml"))
            .env_remove("AWS_CA_BUNDLE")
            .stdin(Stdio::null())
            .stdout(log.try_clone().expect("a descriptor"))
            .stderr(log)
            .spawn()
            .expect("docker-registry")
    }

    fn wait(&self) {
        until("docker-registry listens", || {
            TcpStream::connect(&self.host).is_ok()
        });
    }

    /// Kills it.
    pub fn stop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }

    /// Starts it again after [`DockerRegistry::stop`], at the same address.
    pub fn restart(&mut self) {
        self.child = DockerRegistry::spawn(self.folder.path());
        self.wait();
    }

    /// `HOST:PORT`.
    pub fn host(&self) -> &str {
        &self.host
    }
}

impl Drop for DockerRegistry {
    fn drop(&mut self) {
        self.stop();
    }
}

/// A server that `contrib/install-packages` unpacked.
pub fn server_program(path: &str) -> PathBuf {
    let root = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../target/registry-servers");
    let program = root.join(path);
    assert!(
        program.is_file(),
        "{}: no such program; contrib/install-packages gets it",
        program.display()
    );
    program
}

/// An address that nothing listens on just now.
pub fn free_address() -> String {
    let listener = TcpListener::bind("127.0.0.1:0").expect("a port");
    listener.local_addr().expect("its address").to_string()
}

const SERVICE: &str = "test-registry";
const ISSUER: &str = "test-issuer";

/// The account that the token server knows.
pub const ACCOUNT: (&str, &str) = ("user", "pass:word");

/// A token server: lets one account pull, for some seconds at a time.
pub struct TokenServer {
    server: Server,
    certificate: PathBuf,
    issued: Arc<AtomicUsize>,
    _folder: TempDir,
}

impl TokenServer {
    /// Starts a server whose tokens are good for `lifetime` seconds.
    pub fn start(lifetime: u64) -> TokenServer {
        let folder = tempfile::tempdir().expect("a folder");
        let (key, certificate) = (folder.path().join("key"), folder.path().join("certificate"));
        let made = Command::new("openssl")
            .args([
                "req",
                "-x509",
                "-newkey",
                "ec",
                "-pkeyopt",
                "ec_paramgen_curve:prime256v1",
            ])
            .args(["-nodes", "-days", "2", "-subj", "/CN=tokens", "-keyout"])
            .arg(&key)
            .arg("-out")
            .arg(&certificate)
            .stderr(Stdio::null())
            .status();
        assert!(made.expect("openssl").success());
        let chain = pem(&certificate);
        let random = SystemRandom::new();
        let algorithm = &ECDSA_P256_SHA256_FIXED_SIGNING;
        let key = STANDARD.decode(pem(&key)).expect("base64");
        let key = EcdsaKeyPair::from_pkcs8(algorithm, &key, &random).expect("a key");
        let issued = Arc::new(AtomicUsize::new(0));
        let count = Arc::clone(&issued);
        let server = Server::start(move |request| {
            let (user, password) = ACCOUNT;
            let expected = format!("Basic {}", STANDARD.encode(format!("{user}:{password}")));
            if request.header("authorization") != Some(&expected) {
                return answer(401, &[], br#"{"errors":[{"code":"UNAUTHORIZED"}]}"#);
            }
            count.fetch_add(1, Ordering::SeqCst);
            let token = token(&key, &random, &chain, request, lifetime);
            let reply = json!({ "token": token, "expires_in": lifetime });
            answer(200, &[], reply.to_string().as_bytes())
        });
        TokenServer {
            server,
            certificate,
            issued,
            _folder: folder,
        }
    }

    /// Tokens handed out so far.
    pub fn issued(&self) -> usize {
        self.issued.load(Ordering::SeqCst)
    }

    /// A file of credentials for a registry that trusts this server.
    pub fn credentials(host: &str) -> String {
        let (user, password) = ACCOUNT;
        json!({"auths": {host: {"username": user, "password": password}}}).to_string()
    }
}

/// The base64 text inside a PEM file.
fn pem(path: &Path) -> String {
    let text = fs::read_to_string(path).expect("a PEM file");
    text.lines().filter(|line| !line.starts_with('-')).collect()
}

/// A signed token that lets its holder pull what the request's scope names.
fn token(
    key: &EcdsaKeyPair,
    random: &SystemRandom,
    chain: &str,
    request: &Received,
    lifetime: u64,
) -> String {
    let (_, query) = request.target.split_once('?').expect("a query");
    let scope = query
        .split('&')
        .find_map(|pair| pair.strip_prefix("scope="));
    let scope = scope
        .expect("a scope")
        .replace("%3A", ":")
        .replace("%2F", "/");
    let mut parts = scope.split(':');
    let (kind, name) = (parts.next(), parts.next());
    let now = SystemTime::now()
        .duration_since(UNIX_EPOCH)
        .expect("a clock")
        .as_secs();
    let header = json!({"typ": "JWT", "alg": "ES256", "x5c": [chain]});
    let claims = json!({
        "iss": ISSUER, "sub": ACCOUNT.0, "aud": SERVICE, "jti": "1",
        "exp": now + lifetime, "nbf": now - 10, "iat": now,
        "access": [{"type": kind, "name": name, "actions": ["pull"]}],
    });
    let part = |value: &Value| URL_SAFE_NO_PAD.encode(value.to_string());
    let signed = format!("{}.{}", part(&header), part(&claims));
    let signature = key.sign(random, signed.as_bytes()).expect("a signature");
    format!("{signed}.{}", URL_SAFE_NO_PAD.encode(signature))
}
