//! The Grafana dashboard asks for metrics that the node has.

use std::collections::BTreeSet;
use std::fs;
use std::path::Path;

use common::layers::LayerBuilder;
use serde_json::{Value, json};

use super::node::Node;

/// The expressions of all panels and variables.
fn expressions(value: &Value, found: &mut Vec<String>) {
    match value {
        Value::Object(fields) => {
            for (name, field) in fields {
                match (name.as_str(), field.as_str()) {
                    ("expr" | "definition", Some(text)) => found.push(text.to_owned()),
                    _ => expressions(field, found),
                }
            }
        }
        Value::Array(values) => values.iter().for_each(|value| expressions(value, found)),
        _ => {}
    }
}

/// Names of metrics in an expression.
fn names(expression: &str) -> impl Iterator<Item = &str> {
    expression
        .split(|letter: char| !letter.is_ascii_alphanumeric() && letter != '_')
        .filter(|word| word.starts_with("ovbd_") || word.starts_with("process_"))
}

#[test]
fn the_dashboard_asks_for_metrics_that_there_are() {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("contrib/grafana/ovbd.json");
    let dashboard: Value = serde_json::from_str(&fs::read_to_string(path).unwrap()).unwrap();
    let mut found = Vec::new();
    expressions(&dashboard, &mut found);
    assert!(found.len() > 20, "{found:?}");
    let node = Node::start();
    let layer = LayerBuilder::new(1 << 20).data(0, &[7; 512]).lsmt();
    fs::write(node.images().join("a.obd"), layer).unwrap();
    let layers = json!({ "layers": [node.images().join("a.obd")] });
    assert_eq!(node.put("/disks/a", &layers).0, 201);
    let (_, metrics) = node.get("!/metrics");
    let families: BTreeSet<_> = metrics
        .as_str()
        .unwrap()
        .lines()
        .filter_map(|line| line.strip_prefix("# TYPE ")?.split(' ').next())
        .collect();
    let suffixes = ["", "_total", "_info", "_bucket", "_sum", "_count"];
    let known = |name: &str| {
        let stem = |suffix| {
            name.strip_suffix(suffix)
                .filter(|stem| families.contains(stem))
        };
        suffixes.into_iter().any(|suffix| stem(suffix).is_some())
    };
    let asked: BTreeSet<_> = found.iter().flat_map(|text| names(text)).collect();
    let unknown: Vec<_> = asked.into_iter().filter(|name| !known(name)).collect();
    assert!(unknown.is_empty(), "{unknown:?} of {families:?}");
}
