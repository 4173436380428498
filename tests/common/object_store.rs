//! An object store with S3's API, as far as `docker-registry` uses it, on the files of a registry's
//! storage. It is the target of signed URLs, which expire when a test says so.

use std::collections::HashSet;
use std::fs;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex};

use crate::registries::Storage;
use crate::registry_server::{Received, Reply, Server, answer, serve};

/// Name of the bucket that holds the storage.
pub const BUCKET: &str = "reg";

/// An object store, until it is dropped.
pub struct ObjectStore {
    server: Server,
    urls: Arc<Mutex<Urls>>,
}

/// Signed URLs.
#[derive(Default)]
struct Urls {
    used: HashSet<String>,
    expired: HashSet<String>,
    refusals: usize,
}

impl ObjectStore {
    /// Serves what `storage` holds.
    pub fn start(storage: &Storage) -> ObjectStore {
        let root = storage.root().to_owned();
        let urls = Arc::<Mutex<Urls>>::default();
        let known = Arc::clone(&urls);
        let server = Server::start(move |request| {
            let mut urls = known.lock().expect("URLs");
            reply(&root, request, &mut urls)
        });
        ObjectStore { server, urls }
    }

    /// `HOST:PORT`.
    pub fn host(&self) -> String {
        self.server.host()
    }

    /// Lets all signed URLs expire that were used so far.
    pub fn expire_urls(&self) {
        let mut urls = self.urls.lock().expect("URLs");
        let used = std::mem::take(&mut urls.used);
        urls.expired.extend(used);
    }

    /// Requests that were refused.
    pub fn refusals(&self) -> usize {
        self.urls.lock().expect("URLs").refusals
    }

    /// Requests with signed URLs.
    pub fn signed(&self) -> Vec<Received> {
        let mut received = self.server.received();
        received.retain(is_signed);
        received
    }
}

fn is_signed(request: &Received) -> bool {
    request.target.contains("X-Amz-Signature=")
}

fn reply(root: &Path, request: &Received, urls: &mut Urls) -> Reply {
    let (path, query) = request
        .target
        .split_once('?')
        .unwrap_or((&request.target, ""));
    let with_header = request.header("authorization").is_some();
    // As S3: either kind of signature, and not both.
    let refusal = match (is_signed(request), with_header) {
        (true, true) => Some(400),
        (false, false) => Some(403),
        (true, false) if urls.expired.contains(&request.target) => Some(403),
        _ => None,
    };
    if let Some(status) = refusal {
        urls.refusals += 1;
        return answer(status, &[], b"<Error><Code>AccessDenied</Code></Error>");
    }
    if is_signed(request) {
        urls.used.insert(request.target.clone());
    }
    let prefix = query
        .split('&')
        .find_map(|pair| pair.strip_prefix("prefix="));
    if let Some(prefix) = prefix {
        return list(root, &prefix.replace("%2F", "/"));
    }
    let key = path.trim_start_matches('/').strip_prefix(BUCKET);
    match key.and_then(|key| fs::read(file(root, key)).ok()) {
        Some(bytes) => serve(request, &bytes),
        None => answer(404, &[], b"<Error><Code>NoSuchKey</Code></Error>"),
    }
}

fn file(root: &Path, key: &str) -> PathBuf {
    root.join(key.trim_start_matches('/'))
}

/// The first of the keys with this prefix: a client asks with it whether an object exists.
fn list(root: &Path, key: &str) -> Reply {
    let found = match fs::metadata(file(root, key)) {
        Ok(metadata) if metadata.is_file() => format!(
            "<Contents><Key>{key}</Key><LastModified>2020-01-01T00:00:00.000Z</LastModified>\
             <Size>{}</Size></Contents>",
            metadata.len()
        ),
        _ => String::new(),
    };
    let text = format!(
        "<ListBucketResult><Name>{BUCKET}</Name><Prefix>{key}</Prefix>\
         <IsTruncated>false</IsTruncated>{found}</ListBucketResult>"
    );
    answer(200, &[("Content-Type", "application/xml")], text.as_bytes())
}
