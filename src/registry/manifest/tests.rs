//! Manifests as convertors write them, and as enemies would.

use serde_json::{Value, json};

use super::*;

fn digest(number: u8) -> String {
    Digest::from_bytes([number; 32]).to_string()
}

fn layer(number: u8) -> Value {
    json!({
        "mediaType": "application/vnd.docker.image.rootfs.diff.tar",
        "digest": digest(number),
        "size": 512 + u64::from(number),
        "annotations": {
            "containerd.io/snapshot/overlaybd/blob-digest": digest(number),
            "containerd.io/snapshot/overlaybd/blob-size": (512 + u64::from(number)).to_string(),
            "containerd.io/snapshot/overlaybd/version": "0.1.0",
        },
    })
}

fn manifest(layers: Vec<Value>) -> Value {
    json!({
        "schemaVersion": 2,
        "mediaType": "application/vnd.docker.distribution.manifest.v2+json",
        "config": {
            "mediaType": "application/vnd.docker.container.image.v1+json",
            "digest": digest(99),
            "size": 9164,
        },
        "layers": layers,
    })
}

fn parse(value: &Value) -> Result<Document, Error> {
    Document::parse(value.to_string().as_bytes())
}

fn annotate(mut layer: Value, key: &str, value: &str) -> Value {
    layer["annotations"][format!("{ANNOTATION}{key}")] = value.into();
    layer
}

#[test]
fn the_layers_of_a_manifest_are_read() {
    let mut oci = layer(2);
    oci["mediaType"] = "application/vnd.oci.image.layer.v1.tar".into();
    let Document::Image(manifest) = parse(&manifest(vec![layer(1), oci])).unwrap() else {
        panic!("a manifest");
    };
    let sizes: Vec<_> = manifest.layers().iter().map(Layer::size).collect();
    assert_eq!(sizes, [513, 514]);
    assert_eq!(manifest.layers()[1].digest().to_string(), digest(2));
    assert_eq!(manifest.acceleration(), None);
}

#[test]
fn an_acceleration_layer_is_no_layer_of_the_disk() {
    let trace = annotate(layer(3), "acceleration-layer", "yes");
    let Document::Image(image) = parse(&manifest(vec![layer(1), trace.clone()])).unwrap() else {
        panic!("a manifest");
    };
    assert_eq!(image.layers().len(), 1);
    assert_eq!(image.acceleration().unwrap().size(), 515);

    let below = manifest(vec![trace.clone(), layer(1)]);
    assert_eq!(parse(&below), Err(Error::Acceleration(0)));
    assert_eq!(parse(&manifest(vec![trace.clone()])), Err(Error::Count(0)));
    let mut large = annotate(trace, "blob-size", "16777217");
    large["size"] = 16_777_217.into();
    let refused = parse(&manifest(vec![layer(1), large]));
    assert!(matches!(refused, Err(Error::Layer { number: 1, .. })));
}

#[test]
fn an_index_leads_to_the_manifest_for_this_machine() {
    let entry = |number: u8, os: &str, architecture: &str| {
        json!({
            "mediaType": "application/vnd.oci.image.manifest.v1+json",
            "digest": digest(number),
            "size": 500,
            "platform": {"os": os, "architecture": architecture},
        })
    };
    let mut attestation = entry(1, "linux", architecture());
    attestation["annotations"] = json!({"vnd.docker.reference.type": "attestation-manifest"});
    let unknown = entry(2, "unknown", "unknown");
    let other = entry(3, "linux", "s390x");
    let right = entry(4, "linux", architecture());
    let index = |entries: &[&Value]| json!({"schemaVersion": 2, "manifests": entries});

    let found = parse(&index(&[&attestation, &unknown, &other, &right])).unwrap();
    assert_eq!(found, Document::Index(digest(4).parse().unwrap()));
    let refused = parse(&index(&[&attestation, &unknown, &other])).unwrap_err();
    assert!(refused.to_string().contains("linux/s390x"), "{refused}");
    assert!(matches!(parse(&index(&[])), Err(Error::Platform { .. })));

    let mut nested = right;
    nested["mediaType"] = "application/vnd.oci.image.index.v1+json".into();
    assert!(matches!(
        parse(&index(&[&nested])),
        Err(Error::MediaType(_))
    ));
    nested["mediaType"] = Value::Null;
    assert!(matches!(parse(&index(&[&nested])), Err(Error::Syntax(_))));
}

#[test]
fn other_images_are_refused_by_name() {
    let mut plain = layer(1);
    plain["annotations"] = json!({});
    let bare = {
        let mut bare = layer(1);
        bare.as_object_mut().unwrap().remove("annotations");
        bare
    };
    let mut gzip = layer(2);
    gzip["mediaType"] = "application/vnd.oci.image.layer.v1.tar+gzip".into();
    let turbo = annotate(layer(2), "turbo-oci/target-digest", &digest(9));
    let fast = annotate(layer(2), "version", "0.1.0-fastoci");
    for (layers, expected) in [
        (vec![plain.clone()], Error::NotOverlayBd),
        (vec![bare], Error::NotOverlayBd),
        (vec![layer(1), plain], Error::Mixed(1)),
        (vec![layer(1), turbo], Error::Turbo(1)),
        (vec![fast], Error::Turbo(0)),
        (vec![], Error::Count(0)),
        (vec![layer(1); 257], Error::Count(257)),
    ] {
        assert_eq!(parse(&manifest(layers)), Err(expected));
    }
    let refused = parse(&manifest(vec![layer(1), gzip]));
    assert!(matches!(refused, Err(Error::LayerType { number: 1, .. })));
}

#[test]
fn contradictions_are_refused() {
    let other_digest = annotate(layer(1), "blob-digest", &digest(2));
    let other_size = annotate(layer(1), "blob-size", "7");
    for layer in [other_digest, other_size] {
        let refused = parse(&manifest(vec![layer]));
        assert!(
            matches!(refused, Err(Error::Contradiction { number: 0, .. })),
            "{refused:?}"
        );
    }
    let mut both = manifest(vec![layer(1)]);
    both["manifests"] = json!([]);
    assert!(matches!(parse(&both), Err(Error::MediaType(_))));
}

#[test]
fn hostile_values_are_refused() {
    let with = |key: &str, value: Value| {
        let mut layer = layer(1);
        layer[key] = value;
        manifest(vec![layer])
    };
    for value in [
        with("digest", "sha256:../../../../etc/passwd".into()),
        with("digest", "".into()),
        with("digest", 5.into()),
        with("size", 0.into()),
        with("size", u64::MAX.into()),
        with("size", (-1).into()),
        with("size", "5".into()),
        with("mediaType", "x".repeat(1 << 20).into()),
        with("annotations", json!([])),
        json!({"layers": {}}),
        json!({}),
        json!([]),
        json!([null, null, [layer(1)]]),
        json!(null),
        json!({"schemaVersion": 1, "fsLayers": []}),
    ] {
        let refused = parse(&value).unwrap_err();
        assert!(refused.to_string().len() < 2000);
    }
    for text in ["", "{", "\u{feff}{}", "{\"layers\":[],\"layers\":[]}", "é"] {
        assert!(Document::parse(text.as_bytes()).is_err(), "{text}");
    }
    let deep = "[".repeat(1 << 20);
    assert!(matches!(
        Document::parse(deep.as_bytes()),
        Err(Error::Syntax(_))
    ));
}
