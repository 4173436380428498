//! Clients that generators make from `docs/openapi.yaml`, against a node.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use super::lifecycle::layer;
use super::node::Node;

/// A program that `contrib/install-clients` puts below `target/api-clients`.
fn program(name: &str) -> PathBuf {
    let path = Path::new(env!("CARGO_MANIFEST_DIR"))
        .join("target/api-clients")
        .join(name);
    assert!(
        path.exists(),
        "{}: no such program; contrib/install-clients gets it",
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

/// The description that a node serves, not the one of the source.
fn description(node: &Node) -> PathBuf {
    let path = node.dir.path().join("openapi.yaml");
    fs::write(&path, node.get("/openapi.yaml").1.as_str().unwrap()).unwrap();
    path
}

/// A program of the tests.
fn script(name: &str) -> PathBuf {
    let directory = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/node/clients");
    directory.join(name)
}

#[test]
fn a_generated_python_client_drives_a_node() {
    let node = Node::start();
    let said = run(Command::new(program("bin/openapi-python-client"))
        .args(["generate", "--meta", "none", "--path"])
        .arg(description(&node))
        .arg("--output-path")
        .arg(node.dir.path().join("client/ovbd_client")));
    // The only answer in YAML; the generator has clients of JSON.
    let warnings = said.matches("WARNING").count();
    assert!(
        warnings == 1 && said.contains("WARNING parsing GET /openapi.yaml"),
        "{said}"
    );
    let said = run(Command::new(program("bin/python"))
        .arg(script("drive.py"))
        .arg(node.dir.path().join("client"))
        .arg(node.control())
        .arg(layer(&node, "a.obd", 7))
        .arg(node.images().join("upper")));
    assert!(said.ends_with("done\n"), "{said}");
}

/// The client needs the standard library of Go only: there is no registry of Go modules to ask.
#[test]
fn a_generated_go_client_drives_a_node() {
    let node = Node::start();
    let client = node.dir.path().join("ovbd");
    run(Command::new(program("bin/openapi-generator-cli"))
        .args(["generate", "-g", "go", "-i"])
        .arg(description(&node))
        .arg("-o")
        .arg(&client)
        .args([
            "--global-property",
            "apiTests=false,modelTests=false,apiDocs=false,modelDocs=false",
        ])
        .args([
            "--additional-properties",
            "packageName=ovbd,disallowAdditionalPropertiesIfNotPresent=false",
        ]));
    fs::write(client.join("go.mod"), "module ovbd\n\ngo 1.19\n").unwrap();
    // Its tests are those of the generator.
    let _ = fs::remove_dir_all(client.join("test"));
    let module = node.dir.path().join("drive");
    fs::create_dir(&module).unwrap();
    fs::copy(script("drive.go"), module.join("drive.go")).unwrap();
    let requires = "module drive\n\ngo 1.19\n\nrequire ovbd v0.0.0\n\nreplace ovbd => ../ovbd\n";
    fs::write(module.join("go.mod"), requires).unwrap();
    let go = program("go/bin/go");
    run(Command::new(&go)
        .args(["build", "-o", "drive", "."])
        .current_dir(&module)
        .env("GOROOT", fs::canonicalize(program("go")).unwrap())
        .env("GOCACHE", node.dir.path().join("cache"))
        .env("GOPATH", node.dir.path().join("path"))
        .envs([
            ("GOFLAGS", "-mod=mod"),
            ("GOPROXY", "off"),
            ("CGO_ENABLED", "0"),
            ("GOTOOLCHAIN", "local"),
        ]));
    let said = run(Command::new(module.join("drive"))
        .arg(node.control())
        .arg(layer(&node, "a.obd", 7))
        .arg(node.images().join("upper")));
    assert!(said.ends_with("done\n"), "{said}");
}
