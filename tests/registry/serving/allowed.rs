//! Answers that are unusual and legal: none costs a request more than it must.

use common::registry_server::{Received, Reply, Server, answer, raw, serve};
use common::remote::{Layers, Place};
use serde_json::{Value, json};

use super::{Reader, UNIT, asked_units, fetching};

/// Bytes of all causes that the fetcher received.
pub(super) fn received_bytes(seen: &Value) -> u64 {
    let counts = seen["fetcher"].as_object().expect("counts");
    let bytes = counts.iter().filter(|(name, _)| name.ends_with("_bytes"));
    bytes.filter_map(|(_, count)| count.as_u64()).sum()
}

fn stored_bytes(layers: &Layers) -> u64 {
    layers.blobs.iter().map(|blob| blob.len() as u64).sum()
}

/// Serves the layers, reads all of the disk, and gives what the control socket says then.
fn read_all(layers: &Layers, host: &str) -> Value {
    let place = Place::default();
    place.config("http", host, &layers.lowers(), json!({}));
    let control = place.path("control").display().to_string();
    let daemon = place.serve(&["--control", &control]);
    Reader::connect(&daemon).check_all(&layers.content);
    fetching(&place)
}

/// The range that was asked for, and a way to send it.
fn partial(request: &Received, blob: &[u8], send: impl Fn(usize, &[u8]) -> Reply) -> Reply {
    let (first, last) = request.range().expect("a range");
    send(first, &blob[first..=last.min(blob.len() - 1)])
}

fn of_unknown_length(request: &Received, blob: &[u8]) -> Reply {
    partial(request, blob, |first, body| {
        let range = format!("bytes {first}-{}/*", first + body.len() - 1);
        answer(206, &[("Content-Range", &range)], body)
    })
}

fn in_chunks(request: &Received, blob: &[u8]) -> Reply {
    partial(request, blob, |first, body| {
        let range = format!("bytes {first}-{}/{}", first + body.len() - 1, blob.len());
        let headers = [
            ("Content-Range", range.as_str()),
            ("Transfer-Encoding", "chunked"),
        ];
        let mut chunks = Vec::new();
        for chunk in body.chunks(10_000) {
            chunks.extend_from_slice(format!("{:x};x=y\r\n", chunk.len()).as_bytes());
            chunks.extend_from_slice(&[chunk, b"\r\n"].concat());
        }
        chunks.extend_from_slice(b"0\r\nTrailer: x\r\n\r\n");
        Reply::Send(raw(206, &headers, &chunks))
    })
}

/// At most 100,000 bytes of a range, as the header says: a unit and a half.
fn in_parts(request: &Received, blob: &[u8]) -> Reply {
    partial(request, blob, |first, body| {
        let body = &body[..body.len().min(100_000)];
        let range = format!("bytes {first}-{}/{}", first + body.len() - 1, blob.len());
        answer(206, &[("Content-Range", &range)], body)
    })
}

#[test]
fn unusual_answers_are_taken_as_they_are() {
    type Way = fn(&Received, &[u8]) -> Reply;
    let ways: [(&str, Way, usize); 3] = [
        ("of unknown length", of_unknown_length, 1),
        ("in chunks", in_chunks, 1),
        // The rest of a range is asked for again.
        ("in parts", in_parts, 64),
    ];
    for (name, way, most) in ways {
        let layers = Layers::new(4);
        let server = layers.registry_that(way);
        let seen = read_all(&layers, &server.host());
        assert_eq!(
            received_bytes(&seen),
            stored_bytes(&layers),
            "{name}: {seen}"
        );
        let served = seen["fetcher"]["answers_2xx"].as_u64();
        assert_eq!(served, Some(server.count() as u64), "{name}: {seen}");
        for blob in &layers.blobs {
            let counts = asked_units(&server, blob);
            let is_good = counts.iter().all(|count| (1..=most).contains(count));
            assert!(is_good, "{name}: {counts:?}");
        }
        if most == 1 {
            assert_eq!(seen["fetcher"]["retries"], 0, "{name}: {seen}");
        }
    }
}

/// A server that ignores ranges sends each blob in full once, whatever is read.
#[test]
fn a_server_that_ignores_ranges_is_asked_for_each_blob_once() {
    let layers = Layers::new(4);
    let server = layers.registry_that(|_, blob| answer(200, &[], blob));
    let seen = read_all(&layers, &server.host());
    for blob in &layers.blobs {
        let digest = ovbd_vhost::format::digest::Digest::of(blob).to_string();
        let of_blob = |one: &Received| one.target.contains(&digest);
        let asked: Vec<_> = server.received().into_iter().filter(of_blob).collect();
        let whole = asked.iter().filter(|one| one.range().is_none()).count();
        assert_eq!(whole, 1, "{asked:?}");
        // The first bytes and the last ones, and once more after a second.
        assert!(asked.len() <= 1 + 2 * 2, "{asked:?}");
    }
    // What came with the first answer may come again.
    let bytes = received_bytes(&seen);
    let most = stored_bytes(&layers) + (layers.blobs.len() * UNIT) as u64;
    assert!((stored_bytes(&layers)..=most).contains(&bytes), "{seen}");
}

/// A proxy that sends everything at the first request for a blob, and ranges from then on.
#[test]
fn a_cold_proxy_sends_each_unit_once() {
    let layers = Layers::new(4);
    let warm = std::sync::Mutex::new(std::collections::HashSet::new());
    let server: Server = layers.registry_that(move |request, blob| {
        match warm.lock().expect("blobs").insert(request.target.clone()) {
            true => answer(200, &[], blob),
            false => serve(request, blob),
        }
    });
    let seen = read_all(&layers, &server.host());
    let asked = server.received();
    assert!(asked.iter().all(|one| one.range().is_some()), "{asked:?}");
    assert_eq!(received_bytes(&seen), stored_bytes(&layers), "{seen}");
}
