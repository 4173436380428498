//! A client that a generator makes from `docs/openapi.yaml`, against a node.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use super::lifecycle::layer;
use super::node::Node;

/// A program that `contrib/install-packages` puts below `target/api-clients`.
fn program(name: &str) -> PathBuf {
    let path = Path::new(env!("CARGO_MANIFEST_DIR"))
        .join("target/api-clients/bin")
        .join(name);
    assert!(
        path.exists(),
        "{}: no such program; contrib/install-packages gets it",
        path.display()
    );
    path
}

fn run(command: &mut Command) -> String {
    let output = command.output().unwrap();
    let said = String::from_utf8_lossy(&output.stdout) + String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{command:?}: {said}");
    said.into_owned()
}

#[test]
fn a_generated_python_client_drives_a_node() {
    let node = Node::start();
    // What the node serves, not what the source has.
    let description = node.dir.path().join("openapi.yaml");
    fs::write(&description, node.get("/openapi.yaml").1.as_str().unwrap()).unwrap();
    let said = run(Command::new(program("openapi-python-client"))
        .args(["generate", "--meta", "none", "--path"])
        .arg(&description)
        .arg("--output-path")
        .arg(node.dir.path().join("client/ovbd_client")));
    // The only answer in YAML; the generator has clients of JSON.
    let warnings = said.matches("WARNING").count();
    assert!(
        warnings == 1 && said.contains("WARNING parsing GET /openapi.yaml"),
        "{said}"
    );
    let script = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/node/clients/drive.py");
    let said = run(Command::new(program("python"))
        .arg(script)
        .arg(node.dir.path().join("client"))
        .arg(node.control())
        .arg(layer(&node, "a.obd", 7))
        .arg(node.images().join("upper")));
    assert!(said.ends_with("done\n"), "{said}");
}
