//! Answers that are not what was asked for, bodies that break off, servers that are busy or slow.

use std::io::Read;
use std::time::Duration;

use common::content::tagged;
use common::registry_server::{Reply, Server, answer, raw, serve};
use ovbd_vhost::registry::Timeouts;
use ovbd_vhost::registry::blob::BlobRef;
use ovbd_vhost::registry::client::{Client, Options};
use ovbd_vhost::registry::error::{Class, Error};

use super::{blob, client, read};

/// A client with little patience.
fn hasty() -> Client {
    let short = Duration::from_millis(300);
    Client::new(Options {
        timeouts: Timeouts {
            name: short,
            connect: short,
            tls: short,
            answer: short,
            read: short,
            small: short,
        },
        ..Options::default()
    })
    .unwrap()
}

/// What comes of asking for bytes 100 to 199 of 1000 if this is the only reply.
fn ask(reply: Reply, offset: u64) -> Result<Vec<u8>, Error> {
    let server = Server::script([reply.clone(), reply]);
    let bytes = tagged(1000, 1);
    let mut body = hasty().read_blob(&blob(&server.host(), "a", &bytes), offset, 100)?;
    let mut found = Vec::new();
    match body.read_to_end(&mut found) {
        Ok(_) => Ok(found),
        Err(error) => Err(error
            .into_inner()
            .unwrap()
            .downcast_ref::<Error>()
            .unwrap()
            .clone()),
    }
}

fn part(range: &str, len: usize) -> Reply {
    answer(206, &[("Content-Range", range)], &vec![1; len])
}

#[test]
fn only_the_range_that_was_asked_for_is_taken() {
    assert_eq!(ask(part("bytes 100-199/1000", 100), 100).unwrap(), [1; 100]);
    assert_eq!(ask(part("bytes 100-199/*", 100), 100).unwrap(), [1; 100]);
    assert_eq!(
        ask(part("bytes 100-149/1000", 50), 100).unwrap(),
        [1; 50],
        "cut short"
    );
    for reply in [
        part("bytes 99-198/1000", 100),
        part("bytes 100-200/1000", 101),
        part("bytes 0-99/1000", 100),
        part("bytes 100-199/1000", 99),
        part("bytes */1000", 100),
        part("garbage", 100),
        answer(206, &[], &[1; 100]),
        answer(
            206,
            &[("Content-Type", "multipart/byteranges; boundary=x")],
            &[1; 100],
        ),
        answer(
            206,
            &[
                ("Content-Range", "bytes 100-199/1000"),
                ("Content-Encoding", "gzip"),
            ],
            &[1; 100],
        ),
        Reply::Send(raw(204, &[], b"")),
        Reply::Send(raw(304, &[], b"")),
        answer(418, &[], b""),
    ] {
        let error = ask(reply.clone(), 100).unwrap_err();
        assert!(
            matches!(error, Error::Unexpected { .. } | Error::Status { .. }),
            "{reply:?}: {error}"
        );
        assert!(!error.is_definite());
    }
    for reply in [
        part("bytes 100-199/1001", 100),
        answer(416, &[("Content-Range", "bytes */50")], b""),
    ] {
        let error = ask(reply, 100).unwrap_err();
        assert!(matches!(error, Error::Mismatch { .. }), "{error}");
        assert!(error.is_definite());
    }
}

#[test]
fn the_whole_blob_is_taken_only_from_its_start() {
    let bytes = tagged(1000, 1);
    let whole = answer(200, &[], &bytes);
    assert_eq!(ask(whole.clone(), 0).unwrap(), bytes[..100]);
    assert!(matches!(ask(whole, 100), Err(Error::WithoutRanges { .. })));
    assert!(matches!(
        ask(answer(200, &[], &bytes[1..]), 0),
        Err(Error::Mismatch { .. })
    ));
    let empty = answer(200, &[], b"");
    assert!(matches!(ask(empty, 0), Err(Error::Unexpected { .. })));

    // A proxy that first fetches a blob itself serves ranges from then on.
    let (served, cold) = (bytes.clone(), std::sync::atomic::AtomicBool::new(true));
    let proxy = Server::start(move |request| {
        if cold.swap(false, std::sync::atomic::Ordering::SeqCst) {
            return answer(200, &[], &served);
        }
        serve(request, &served)
    });
    let wanted = blob(&proxy.host(), "a", &bytes);
    let client = client();
    let first = client.read_blob(&wanted, 500, 100);
    assert!(matches!(first, Err(Error::WithoutRanges { .. })));
    assert!(read(client.read_blob(&wanted, 500, 100).unwrap()) == bytes[500..600]);
    assert!(read(client.read_whole(&wanted).unwrap()) == bytes);
}

#[test]
fn a_416_that_lies_about_its_body_does_not_block() {
    // As docker-registry answers: the length is the blob's, the body an error's.
    let headers = [
        ("Content-Range", "bytes */50"),
        ("Content-Length", "1000000"),
    ];
    let error = ask(Reply::Stall(raw(416, &headers, b"{}")), 100).unwrap_err();
    assert!(matches!(error, Error::Mismatch { .. }), "{error}");
}

#[test]
fn bodies_that_break_off_are_errors() {
    let headers = [
        ("Content-Range", "bytes 100-199/1000"),
        ("Content-Length", "100"),
    ];
    let short = raw(206, &headers, &[1; 60]);
    let chunked = [
        ("Content-Range", "bytes 100-199/1000"),
        ("Transfer-Encoding", "chunked"),
    ];
    let chunks = |text: &[u8]| raw(206, &chunked, text);
    let bare = [("Content-Range", "bytes 100-199/1000")];
    for reply in [
        Reply::Close(short.clone()),
        Reply::Reset(short.clone()),
        Reply::Stall(short),
        Reply::Close(chunks(&[b"3c\r\n".as_slice(), &[1; 60], b"\r\n"].concat())),
        Reply::Close(chunks(
            &[b"3c\r\n".as_slice(), &[1; 60], b"\r\n0\r\n\r\n"].concat(),
        )),
        Reply::Close(chunks(
            &[b"65\r\n".as_slice(), &[1; 101], b"\r\n0\r\n\r\n"].concat(),
        )),
        Reply::Close(chunks(b"zz\r\n")),
        Reply::Close(raw(206, &bare, &[1; 60])),
        Reply::Close(raw(206, &bare, &[1; 101])),
    ] {
        let error = ask(reply.clone(), 100).unwrap_err();
        assert!(!error.is_definite(), "{reply:?}: {error}");
    }
    let good = chunks(&[b"64\r\n".as_slice(), &[1; 100], b"\r\n0\r\n\r\n"].concat());
    assert_eq!(ask(Reply::Send(good), 100).unwrap(), [1; 100]);
    assert_eq!(
        ask(Reply::Close(raw(206, &bare, &[1; 100])), 100).unwrap(),
        [1; 100]
    );
}

#[test]
fn answers_that_are_not_http_are_errors() {
    let many = vec![("X-Y", "z"); 1000];
    let long = "x".repeat(1 << 20);
    for reply in [
        Reply::Close(b"garbage\r\n\r\n".to_vec()),
        Reply::Close(b"\0\0\0\0".to_vec()),
        Reply::Close(Vec::new()),
        Reply::Reset(Vec::new()),
        Reply::Stall(Vec::new()),
        Reply::Stall(b"HTTP/1.1 200 O".to_vec()),
        Reply::Drip(
            raw(200, &[("X", "slow"); 100], b""),
            Duration::from_millis(100),
        ),
        Reply::Close(raw(206, &many, b"")),
        Reply::Close(raw(206, &[("X", &long)], b"")),
        Reply::Close(b"HTTP/1.1 100 Continue\r\n\r\n".repeat(1000)),
        Reply::Close(raw(206, &[("Content-Length", "5, 6")], b"")),
        Reply::Close(raw(206, &[("Content-Length", "-1")], b"")),
    ] {
        let error = ask(reply.clone(), 100).unwrap_err();
        assert!(!error.is_definite(), "{error}");
    }
}

#[test]
fn busy_servers_say_when_to_come_back() {
    for (status, header, expected) in [
        (429, Some("7"), Some(7)),
        (503, Some("31536000"), Some(300)),
        (503, Some("Fri, 24 May 2013 00:00:09 GMT"), Some(9)),
        (429, None, None),
        (503, Some("soon"), None),
    ] {
        let mut headers = vec![("Date", "Fri, 24 May 2013 00:00:00 GMT")];
        headers.extend(header.map(|value| ("Retry-After", value)));
        let error = ask(answer(status, &headers, b""), 100).unwrap_err();
        let retry_after = expected.map(Duration::from_secs);
        assert_eq!(error.class(), Class::Passing { retry_after }, "{header:?}");
        assert_eq!(error.upstream_words(), "Too many requests");
    }
    for status in [408, 425, 500, 502, 504] {
        let error = ask(answer(status, &[], b""), 100).unwrap_err();
        assert_eq!(
            error.class(),
            Class::Passing { retry_after: None },
            "{status}"
        );
    }
}

#[test]
fn a_failing_server_is_spared() {
    let server = Server::start(|_| answer(500, &[], b""));
    let wanted = blob(&server.host(), "a", &[0; 1000]);
    let client = client();
    let rested = (0..100).filter(|_| {
        let error = client.read_blob(&wanted, 0, 1).err().unwrap();
        matches!(error, Error::Resting { .. })
    });
    assert!(rested.count() >= 80, "{} requests", server.count());
    assert!(server.count() < 20);
}

#[test]
fn connections_are_used_again() {
    let bytes = tagged(1000, 2);
    let served = bytes.clone();
    let server = Server::start(move |request| serve(request, &served));
    let wanted = blob(&server.host(), "a", &bytes);
    let client = client();
    for offset in 0..10 {
        assert!(read(client.read_blob(&wanted, offset, 500).unwrap()).len() == 500);
    }
    assert!(
        server
            .received()
            .iter()
            .all(|request| request.connection == 0)
    );
}

#[test]
fn a_connection_closed_while_idle_costs_no_error() {
    let bytes = tagged(1000, 3);
    let (served, requests) = (bytes.clone(), std::sync::atomic::AtomicUsize::new(0));
    // Each connection answers one request. It is closed when the next one arrives.
    let server = Server::start(move |request| {
        let number = requests.fetch_add(1, std::sync::atomic::Ordering::SeqCst);
        if number % 2 == 1 {
            return Reply::Close(Vec::new());
        }
        serve(request, &served)
    });
    let wanted = blob(&server.host(), "a", &bytes);
    let client = client();
    for _ in 0..4 {
        assert!(read(client.read_blob(&wanted, 1, 500).unwrap()) == bytes[1..501]);
    }
    assert_eq!(
        server.count(),
        7,
        "three of the four were repeated, once each"
    );
}

#[test]
fn the_next_server_is_unreachable() {
    let refused = common::registries::free_address();
    let error = client()
        .read_blob(&blob(&refused, "a", b"x"), 0, 1)
        .err()
        .unwrap();
    assert!(matches!(error, Error::Connection { .. }), "{error}");
    assert_eq!(error.upstream_words(), "Connection failed");
}

#[test]
fn impossible_ranges_are_refused_without_a_request() {
    let server = Server::start(|_| answer(500, &[], b""));
    let wanted = blob(&server.host(), "a", &[0; 1000]);
    let unsized_blob = BlobRef {
        size: None,
        ..wanted.clone()
    };
    let client = client();
    for (blob, offset, len) in [
        (&wanted, 0, 0),
        (&wanted, 0, 1001),
        (&wanted, 1000, 1),
        (&unsized_blob, u64::MAX, 1),
        (&unsized_blob, 1, u64::MAX),
    ] {
        assert!(client.read_blob(blob, offset, len).is_err());
    }
    assert_eq!(server.count(), 0);
}
