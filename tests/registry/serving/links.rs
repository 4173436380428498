//! What expires while a disk is served: signed URLs, tokens, credentials.

use std::collections::HashMap;
use std::fs;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use common::object_store::ObjectStore;
use common::registries::{DockerRegistry, Storage, TokenServer};
use common::registry_server::{Server, answer, serve, until};
use common::remote::{Layers, Place, REPOSITORY};
use serde_json::json;

use super::Reader;

/// A registry that redirects to `store`, by a URL with these parameters and a number.
fn redirecting(layers: &Layers, store: &Server, parameters: &str, date: &str) -> Server {
    let location = store.url("");
    let (parameters, date) = (parameters.to_owned(), date.to_owned());
    let number = AtomicUsize::new(0);
    layers.registry_that(move |request, _| {
        let number = number.fetch_add(1, Ordering::SeqCst);
        let link = format!("{location}{}?{parameters}&n={number}", request.target);
        let headers = [("Location", link.as_str()), ("Date", date.as_str())];
        answer(307, &headers, b"")
    })
}

/// Signed URLs that are good for some requests: however many requests are refused with one URL, the
/// registry is asked for the next one once.
#[test]
fn links_that_expire_between_two_reads_are_renewed() {
    for status in [400, 403, 410] {
        let layers = Layers::new(4);
        let place = Place::default();
        let refused = Arc::new(AtomicUsize::new(0));
        let (count, uses) = (Arc::clone(&refused), Mutex::new(HashMap::new()));
        let store = layers.registry_that(move |request, blob| {
            let mut uses = uses.lock().expect("uses");
            let uses = uses.entry(request.target.clone()).or_insert(0);
            *uses += 1;
            if *uses > 8 {
                count.fetch_add(1, Ordering::SeqCst);
                return answer(status, &[], b"<Error><Code>ExpiredToken</Code></Error>");
            }
            serve(request, blob)
        });
        let registry = redirecting(&layers, &store, "signature=x", "");
        place.config("http", &registry.host(), &layers.lowers(), json!({}));
        let daemon = place.serve(&[]);
        let opened = registry.count();
        assert_eq!(opened, layers.blobs.len(), "a question for each blob");
        Reader::connect(&daemon).check_all(&layers.content);
        let refused = refused.load(Ordering::SeqCst);
        assert!(refused >= 4, "{refused} refusals with {status}");
        let renewed = registry.count() - opened;
        assert!((1..=refused).contains(&renewed), "{renewed} of {refused}");
        assert!(!daemon.log().contains("WARN"), "{}", daemon.log());
    }
}

/// The hint is read by the server's clock, which may be another one than this machine's.
#[test]
fn a_hint_is_read_by_the_servers_clock() {
    const DATE: &str = "Fri, 24 May 2013 01:00:00 GMT";
    for (start, renews) in [("20130524T005900Z", false), ("20130524T000000Z", true)] {
        let layers = Layers::new(4);
        let place = Place::default();
        let store = layers.registry();
        let parameters = format!("X-Amz-Date={start}&X-Amz-Expires=1200");
        let registry = redirecting(&layers, &store, &parameters, DATE);
        place.config("http", &registry.host(), &layers.lowers(), json!({}));
        let daemon = place.serve(&[]);
        let opened = registry.count();
        assert!(opened >= layers.blobs.len(), "{opened} questions");
        let mut reader = Reader::connect(&daemon);
        for at in [1 << 20, 3 << 20] {
            let before = registry.count();
            reader.ask([at]);
            reader.check(&layers.content);
            let asked = registry.count() > before;
            assert_eq!(asked, renews, "{} questions", registry.count());
        }
        reader.check_all(&layers.content);
        match renews {
            true => assert!(registry.count() <= store.count()),
            false => assert_eq!(registry.count(), layers.blobs.len()),
        }
    }
}

/// Debian's registry with its objects in an S3 store, whose URLs expire again and again.
#[test]
fn a_registry_redirects_to_a_store() {
    let layers = Layers::new(8);
    let place = Place::default();
    let storage = Storage::default();
    for blob in &layers.blobs {
        storage.blob(REPOSITORY, blob);
    }
    let store = ObjectStore::start(&storage);
    let registry = DockerRegistry::with_store(storage, &store);
    place.config("http", registry.host(), &layers.lowers(), json!({}));
    let daemon = place.serve(&[]);
    let mut reader = Reader::connect(&daemon);
    for part in (0..layers.content.len()).step_by(2 << 20).rev() {
        store.expire_urls();
        // A URL that is signed in the same second again is the same URL.
        std::thread::sleep(Duration::from_millis(1100));
        for start in (part..part + (2 << 20)).step_by(1 << 19) {
            reader.ask([start]);
            reader.check(&layers.content);
        }
    }
    assert!(store.refusals() >= 3, "{} refusals", store.refusals());
    let signed = store.signed();
    assert!(signed.len() > 8, "{} requests", signed.len());
    assert!(signed.iter().all(|request| request.range().is_some()));
}

/// A token that is good for a second is renewed before it ends, and one that is revoked after.
#[test]
fn tokens_end_under_a_served_disk() {
    let layers = Layers::new(4);
    let place = Place::default();
    let storage = Storage::default();
    for blob in &layers.blobs {
        storage.blob(REPOSITORY, blob);
    }
    let tokens = TokenServer::start(1);
    let registry = DockerRegistry::with_tokens(storage, &tokens);
    let credentials = place.path("auth");
    fs::write(&credentials, TokenServer::credentials(registry.host())).expect("credentials");
    place.config("http", registry.host(), &layers.lowers(), json!({}));
    let daemon = place.serve(&["--credentials", &credentials.display().to_string()]);
    let opened = tokens.issued();
    let mut reader = Reader::connect(&daemon);
    for start in [3, 2, 1].map(|mib| mib << 20) {
        std::thread::sleep(Duration::from_millis(1100));
        reader.ask([start]);
        reader.check(&layers.content);
    }
    assert_eq!(tokens.issued(), opened + 3);
    reader.check_all(&layers.content);
}

/// A registry that takes a token for some requests only, and says no as distribution or ECR does.
#[test]
fn refused_tokens_are_replaced_under_a_served_disk() {
    for status in [401, 403] {
        let layers = Layers::new(4);
        let place = Place::default();
        let issued = Arc::new(AtomicUsize::new(0));
        let number = Arc::clone(&issued);
        let tokens = Server::start(move |_| {
            let number = number.fetch_add(1, Ordering::SeqCst);
            let text = format!(r#"{{"token":"T{number}","expires_in":43200}}"#);
            answer(200, &[], text.as_bytes())
        });
        let challenge = format!("Bearer realm=\"{}\"", tokens.url("/t"));
        let uses = Mutex::new(HashMap::<String, usize>::new());
        let registry = layers.registry_that(move |request, blob| {
            let challenge = [("WWW-Authenticate", challenge.as_str())];
            let Some(given) = request.header("authorization") else {
                return answer(401, &challenge, b"");
            };
            let mut uses = uses.lock().expect("uses");
            let uses = uses.entry(given.to_owned()).or_default();
            *uses += 1;
            match (*uses > 10, status) {
                (true, 401) => answer(401, &challenge, b""),
                (true, _) => answer(403, &[], b"expired"),
                (false, _) => serve(request, blob),
            }
        });
        place.config("http", &registry.host(), &layers.lowers(), json!({}));
        let daemon = place.serve(&[]);
        Reader::connect(&daemon).check_all(&layers.content);
        let issued = issued.load(Ordering::SeqCst);
        assert!(
            (4..registry.count() / 4).contains(&issued),
            "{issued} tokens"
        );
        assert!(!daemon.log().contains("WARN"), "{}", daemon.log());
    }
}

/// The guest waits while its credentials are no longer good, until the file has new ones.
#[test]
fn a_replaced_file_of_credentials_ends_the_wait() {
    let layers = Layers::new(4);
    let place = Place::default();
    let is_new = Arc::new(AtomicBool::new(false));
    let refused = Arc::new(AtomicUsize::new(0));
    let (wants_new, count) = (Arc::clone(&is_new), Arc::clone(&refused));
    let registry = layers.registry_that(move |request, blob| {
        let good = match wants_new.load(Ordering::SeqCst) {
            true => "Basic dXNlcjpuZXc=",
            false => "Basic dXNlcjpwYXNz",
        };
        match request.header("authorization") {
            Some(given) if given == good => serve(request, blob),
            given => {
                count.fetch_add(usize::from(given.is_some()), Ordering::SeqCst);
                answer(401, &[("WWW-Authenticate", "Basic realm=\"r\"")], b"")
            }
        }
    });
    fs::create_dir(place.path("auth")).expect("a folder");
    let file = place.path("auth/config.json");
    super::super::password_file(&file, &registry.host(), "user", "pass");
    place.config("http", &registry.host(), &layers.lowers(), json!({}));
    let daemon = place.serve(&["--credentials", &file.display().to_string()]);
    let mut reader = Reader::connect(&daemon);
    is_new.store(true, Ordering::SeqCst);
    reader.ask([3 << 20, 2 << 20, 1 << 20]);
    until("a refusal", || refused.load(Ordering::SeqCst) > 0);
    until("the log says so", || {
        daemon.log().contains("refuses access")
    });
    assert!(reader.load.take().is_none());
    let new = place.path("auth/new");
    super::super::password_file(&new, &registry.host(), "user", "new");
    fs::rename(new, &file).expect("a replaced file");
    reader.check(&layers.content);
    reader.check_all(&layers.content);
}
