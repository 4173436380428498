//! `docs/openapi.yaml` against what the node answers. The routes are compared by a unit test of the router.

use std::collections::BTreeSet;

use serde_json::{Value, json};

use super::lifecycle::layer;
use super::node::Node;

/// The keys below `properties` of a schema of the description.
fn properties(yaml: &str, schema: &str) -> BTreeSet<String> {
    let start = format!("\n    {schema}:\n");
    let (_, rest) = yaml.split_once(&start).expect(schema);
    let schema = rest.lines().take_while(|line| line.starts_with("      "));
    let properties = schema
        .skip_while(|line| *line != "      properties:")
        .skip(1);
    let keys = properties.filter_map(|line| line.strip_prefix("        ")?.split_once(':'));
    let keys = keys.map(|(key, _)| key).filter(|key| !key.starts_with(' '));
    keys.map(str::to_owned).collect()
}

/// The words of an `enum` that has the word `member`.
fn words(yaml: &str, member: &str) -> BTreeSet<String> {
    let lists = yaml.lines().filter_map(|line| {
        let (_, list) = line.split_once("enum: [")?;
        let words = list.trim_end_matches(']').split(", ");
        Some(words.map(str::to_owned).collect::<BTreeSet<_>>())
    });
    lists
        .into_iter()
        .find(|words| words.contains(member))
        .expect(member)
}

fn description(node: &Node) -> String {
    node.get("/openapi.yaml").1.as_str().unwrap().to_owned()
}

/// The fields that an error about an unknown field names.
fn expected_fields(refused: &Value) -> BTreeSet<String> {
    let text = refused["error"].as_str().unwrap();
    let (_, expected) = text.split_once("expected").expect(text);
    expected
        .split('`')
        .skip(1)
        .step_by(2)
        .map(str::to_owned)
        .collect()
}

#[test]
fn answers_have_the_fields_that_are_described() {
    let node = Node::start();
    let yaml = description(&node);
    let spec = json!({ "layers": [layer(&node, "a.obd", 7)] });
    let (_, disk) = node.put("/disks/a", &spec);
    let fields: BTreeSet<_> = disk.as_object().unwrap().keys().cloned().collect();
    assert_eq!(fields, properties(&yaml, "Disk"));
    assert!(words(&yaml, "listening").contains(disk["state"].as_str().unwrap()));
    let events = node.get("/events").1;
    for event in events["events"].as_array().unwrap() {
        let fields = event.as_object().unwrap().keys().cloned().collect();
        assert!(properties(&yaml, "Event").is_superset(&fields), "{event}");
    }
    let error = node.get("/disks/none").1;
    let fields: BTreeSet<_> = error.as_object().unwrap().keys().cloned().collect();
    assert_eq!(fields, properties(&yaml, "Error"));
    assert!(words(&yaml, "not_found").contains(error["code"].as_str().unwrap()));
}

#[test]
fn requests_take_the_fields_that_are_described() {
    let node = Node::start();
    let yaml = description(&node);
    let (_, refused) = node.put("/disks/a", &json!({ "unknown": 1 }));
    assert_eq!(expected_fields(&refused), properties(&yaml, "DiskSpec"));
    let limits = json!({ "limits": { "unknown": 1 } });
    let (_, refused) = node.put("/disks/a", &limits);
    assert_eq!(expected_fields(&refused), properties(&yaml, "Limits"));
    let bucket = json!({ "limits": { "ops": { "unknown": 1 } } });
    let (_, refused) = node.put("/disks/a", &bucket);
    assert_eq!(expected_fields(&refused), properties(&yaml, "Bucket"));
    let spec = json!({ "layers": [layer(&node, "a.obd", 7)] });
    assert_eq!(node.put("/disks/a", &spec).0, 201);
    let (_, refused) = node.request("PATCH", "/disks/a", r#"{ "unknown": 1 }"#);
    let text = refused["error"].as_str().unwrap();
    for field in properties(&yaml, "DiskPatch") {
        assert!(text.contains(&field), "{field}: {text}");
    }
}

/// Requests as `curl` and generated clients send them.
#[test]
fn heads_and_bodies_of_any_client_are_read() {
    let node = Node::start();
    let body = json!({ "layers": [layer(&node, "a.obd", 7)] }).to_string();
    let len = body.len();
    let put = "PUT /api/v1/disks/a HTTP/1.1\r\nHost: localhost\r\n";
    let close = "Connection: close\r\n";
    // `curl -d` names a form; Go sends chunks if it does not know the length.
    let form = "Content-Type: application/x-www-form-urlencoded\r\n";
    let plain = format!("{put}{form}{close}Content-Length: {len}\r\n\r\n{body}");
    assert!(node.exchange(&plain).starts_with("HTTP/1.1 201"));
    let chunked =
        format!("{put}{close}Transfer-Encoding: chunked\r\n\r\n{len:x}\r\n{body}\r\n0\r\n\r\n");
    assert!(node.exchange(&chunked).starts_with("HTTP/1.1 200"));
    // `curl` waits for this with a large body.
    let expecting =
        format!("{put}{close}Expect: 100-continue\r\nContent-Length: {len}\r\n\r\n{body}");
    assert!(node.exchange(&expecting).starts_with("HTTP/1.1 100"));
    let pipelined = format!(
        "GET /api/v1/version HTTP/1.1\r\nHost: x\r\n\r\nGET /api/v1/disks HTTP/1.1\r\nHost: x\r\n{close}\r\n"
    );
    assert_eq!(node.exchange(&pipelined).matches("HTTP/1.1 200").count(), 2);
    let removed = node.exchange(&format!(
        "DELETE /api/v1/disks/a HTTP/1.1\r\nHost: x\r\n{close}\r\n"
    ));
    assert!(removed.starts_with("HTTP/1.1 204"), "{removed}");
    assert!(
        !removed.to_lowercase().contains("content-length"),
        "{removed}"
    );
    let refused = node.exchange(&format!(
        "POST /api/v1/disks HTTP/1.1\r\nHost: x\r\n{close}\r\n"
    ));
    assert!(
        refused.starts_with("HTTP/1.1 405") && refused.contains("allow: GET"),
        "{refused}"
    );
}
