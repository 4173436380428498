//! Seeds of the parsers of what registries say.

use ovbd_vhost::format::digest::Digest;
use ovbd_vhost::format::trace::{TracedRead, encode};

use super::{folder, write};

/// Seeds of one target: `texts`, each of which is one.
fn seeds(target: &str, texts: &[&str]) {
    let texts = texts.iter().map(|text| text.as_bytes().to_vec());
    assert!(write(&folder(target), texts) > 2, "{target}");
}

#[test]
fn reference() {
    let pinned = format!("r.example:5000/a/b:1.2@{}", Digest::of(b""));
    seeds(
        "reference",
        &[
            "redis",
            "docker.io/library/redis:7",
            "localhost/a",
            "[::1]:5000/a--b/c__d/e.f_g:T_1.x-",
            &pinned,
            "https://r.example/v2/a/b/blobs",
            "http://s.example:80/k?X-Amz-Date=20130524T000000Z#f",
            "../x?y",
        ],
    );
}

#[test]
fn challenge() {
    seeds(
        "challenge",
        &[
            r#"Bearer realm="https://a/token",service="r",scope="repository:a/b:pull""#,
            r#"Negotiate YII=, Basic realm="a, b", bEARER service=s , realm="https://a/\"t""#,
            "Basic",
        ],
    );
}

#[test]
fn token() {
    seeds(
        "token",
        &[
            r#"{"token":"T","expires_in":300,"issued_at":"x"}"#,
            r#"{"access_token":"T","expires_in":"1"}"#,
            r#"{"auths":{"https://index.docker.io/v1/":{"auth":"dTpw"},"a/b":{"identitytoken":"I"}}}"#,
            r#"{"auths":{"a":{}},"credHelpers":{"b":"x"},"credsStore":"y"}"#,
        ],
    );
}

#[test]
fn trace() {
    let read = |number: u32| TracedRead {
        layer: number,
        offset: u64::from(number) << 20,
        len: 4096,
    };
    let traces = [0, 1, 5].map(|count| encode(&(0..count).map(read).collect::<Vec<_>>()));
    assert!(write(&folder("trace"), traces) > 2);
}

#[test]
fn content_range() {
    seeds(
        "content_range",
        &["bytes 0-9/100", "bytes 5-5/*", "bytes */100"],
    );
}

#[test]
fn manifest() {
    let digest = Digest::of(b"");
    let annotation = "containerd.io/snapshot/overlaybd";
    let layer = |more: &str| {
        format!(
            r#"{{"mediaType":"application/vnd.oci.image.layer.v1.tar","digest":"{digest}","size":9,
            "annotations":{{"{annotation}/blob-digest":"{digest}","{annotation}/blob-size":"9"{more}}}}}"#
        )
    };
    let trace = layer(&format!(r#","{annotation}/acceleration-layer":"yes""#));
    let turbo = layer(&format!(r#","{annotation}/version":"0.1.0-turbo.ociv1""#));
    let plain = layer("");
    seeds(
        "manifest",
        &[
            &format!(r#"{{"schemaVersion":2,"layers":[{plain},{trace}]}}"#),
            &format!(r#"{{"layers":[{turbo}]}}"#),
            &format!(
                r#"{{"manifests":[{{"mediaType":"application/vnd.oci.image.manifest.v1+json",
                "digest":"{digest}","platform":{{"os":"linux","architecture":"amd64"}},
                "annotations":{{"x":"y"}}}}]}}"#
            ),
        ],
    );
}
