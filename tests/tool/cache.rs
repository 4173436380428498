//! `ovbd cache` and the image tables that a daemon has written.

use super::*;
use common::daemon::Daemon;
use common::disk::deep;
use common::registry_server::until;
use serde_json::Value;

/// What `ovbd cache ls --json` says of image tables.
fn tables(dir: &TempDir) -> Vec<Value> {
    let stdout = succeed(dir, &["cache", "ls", "--json", "--cache", "c"], b"");
    let found: Value = serde_json::from_slice(&stdout).unwrap();
    found["tables"].as_array().unwrap().clone()
}

fn cache(dir: &TempDir, command: &[&str], code: i32) -> String {
    let arguments = [&["cache"], command, &["--cache", "c"]].concat();
    let output = ovbd(dir, &arguments, b"");
    assert_eq!(output.status.code(), Some(code), "{output:?}");
    String::from_utf8(output.stdout).unwrap()
}

/// A daemon whose image tables are in the cache `c`, and their key.
fn serve(dir: &TempDir) -> (Daemon, String) {
    let (case, _) = deep();
    let option = dir.path().join("c").display().to_string();
    let daemon = Daemon::with(&case.layers, &["--cache", &option]);
    until("the tables are written", || {
        let tables = tables(dir);
        tables.len() == 1 && tables[0]["complete"] == true
    });
    let key = tables(dir)[0]["key"].as_str().unwrap().to_owned();
    (daemon, key)
}

#[test]
fn image_tables_are_listed_verified_and_removed() {
    let dir = tempfile::tempdir().unwrap();
    let (daemon, key) = serve(&dir);
    drop(daemon);
    let (case, _) = deep();
    let found = &tables(&dir)[0];
    assert_eq!(found["layers"], case.layers.len());
    assert_eq!(found["in_use"], false);
    let table = cache(&dir, &["ls"], 0);
    let row = table.lines().find(|line| line.starts_with(&key)).unwrap();
    assert!(row.contains("complete"), "{table}");

    assert_eq!(cache(&dir, &["verify"], 0), "");
    assert_eq!(cache(&dir, &["verify", &key], 0), "");
    let (_, hex) = key.split_once(':').unwrap();
    let path = dir.path().join("c/tables").join(hex);
    let mut bytes = fs::read(&path).unwrap();
    *bytes.last_mut().unwrap() ^= 1;
    fs::remove_file(&path).unwrap();
    fs::write(&path, bytes).unwrap();
    let said = cache(&dir, &["verify"], 1);
    assert_eq!(said, format!("{key} was damaged; removed it\n"));
    assert!(tables(&dir).is_empty());
    let said = cache(&dir, &["verify", &key], 1);
    assert_eq!(said, format!("{key} is not complete\n"));
    let said = cache(&dir, &["rm", &key], 1);
    assert_eq!(said, format!("{key} is not in the cache\n"));
    let said = cache(&dir, &["rm", "--json", &key], 1);
    let removed: Value = serde_json::from_str(&said).unwrap();
    let expected = serde_json::json!({ "removed": [], "in_use": [], "absent": [key] });
    assert_eq!(removed, expected);

    let (daemon, again) = serve(&dir);
    assert_eq!(again, key);
    drop(daemon);
    let said = cache(&dir, &["rm", &key], 0);
    assert_eq!(said, format!("{key} removed\n"));
    assert!(tables(&dir).is_empty());
}

#[test]
fn image_tables_in_use_are_kept() {
    let dir = tempfile::tempdir().unwrap();
    drop(serve(&dir));
    // This daemon has mapped them.
    let (daemon, key) = serve(&dir);
    assert_eq!(tables(&dir)[0]["in_use"], true);
    let said = cache(&dir, &["rm", &key], 1);
    assert_eq!(said, format!("{key} is in use\n"));
    let said = cache(&dir, &["gc", "--size", "0"], 0);
    assert!(
        said.starts_with("removed 0 files, 0 B\ncannot remove "),
        "{said}"
    );
    assert_eq!(cache(&dir, &["verify"], 0), "");
    assert_eq!(tables(&dir).len(), 1);
    drop(daemon);
    let said = cache(&dir, &["gc", "--size", "0"], 0);
    assert!(said.starts_with("removed 1 files, "), "{said}");
    assert!(tables(&dir).is_empty());
}
