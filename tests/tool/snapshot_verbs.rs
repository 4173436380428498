//! `ovbd snapshot`: lists, deletes and rolls back, beside a model of the disk at every snapshot.

use super::writable::*;
use super::*;
use common::daemon::Daemon;
use common::volume::BlockingIo as _;
use ovbd_vhost::format::lsmt::Header;
use ovbd_vhost::format::lsmt::writable::Kind;
use ovbd_vhost::io::scatter::Scatter;
use ovbd_vhost::writable::{Options, Snapshots, Volume};
use serde_json::Value;
use std::sync::Arc;
use uuid::Uuid;
use vm_memory::VolatileSlice;

/// A disk above `lower` with snapshots, and what it held at each.
struct Model {
    dir: TempDir,
    kind: Kind,
    disk: Vec<u8>,
    /// Name and content, oldest first.
    snapshots: Vec<(String, Vec<u8>)>,
    random: Random,
}

impl Model {
    fn new(kind: Kind, seed: u64) -> Self {
        let dir = tempfile::tempdir().unwrap();
        let disk = lower(&dir, 4, 2 << 20);
        let header = Header {
            parent_uuid: Uuid::nil(),
            ..header(disk.len() as u64)
        };
        ovbd_vhost::writable::create(&paths(&dir), kind, &header).unwrap();
        Self {
            dir,
            kind,
            disk,
            snapshots: Vec::new(),
            random: Random::new(seed),
        }
    }

    fn open(&self) -> (Arc<Volume>, Snapshots) {
        let stack = Stack::new([self.dir.path().join("lower")]);
        common::volume::open(&stack, &paths(&self.dir), Options::default()).unwrap()
    }

    /// Closes the disk; its files are free then.
    fn close(&self, (volume, snapshots): (Arc<Volume>, Snapshots)) {
        let layers = volume.layers().into_iter();
        let files: Vec<_> = layers.map(|layer| layer.paths().data.clone()).collect();
        drop((volume, snapshots));
        files.iter().for_each(|file| free(file));
    }

    /// Writes and discards at random.
    fn change(&mut self, volume: &Volume) {
        for _ in 0..20 {
            let sectors = volume.sectors().0;
            let start = self.random.below(sectors);
            let count = self.random.within(1..=300).min(sectors - start);
            let range = start as usize * 512..(start + count) as usize * 512;
            if self.random.below(3) == 0 {
                volume.discard(common::sectors(start, count)).unwrap();
                self.disk[range].fill(0);
                continue;
            }
            let mut bytes = tagged(range.len(), self.random.any());
            self.disk[range].copy_from_slice(&bytes);
            let mut scatter = Scatter::new();
            scatter.push(VolatileSlice::from(&mut bytes[..]));
            let written = volume.write(common::sectors(start, count), scatter.cursor(0));
            written.unwrap();
        }
    }

    /// Takes so many snapshots, and goes on writing. The disk grows, and the last layer is not always sealed.
    fn work(&mut self, snapshots: usize) {
        let opened = self.open();
        for _ in 0..snapshots {
            self.change(&opened.0);
            let name = format!("s{}", self.random.below(1 << 30));
            opened.1.take(&name).unwrap();
            self.snapshots.push((name, self.disk.clone()));
            if self.random.below(2) == 0 {
                opened.1.seal().unwrap();
            }
            if self.random.below(2) == 0 {
                self.disk.resize(self.disk.len() + (64 << 10), 0);
                opened.1.grow_disk(self.disk.len() as u64).unwrap();
            }
        }
        self.change(&opened.0);
        self.close(opened);
    }

    fn list(&self) -> Vec<Value> {
        let listed = succeed(
            &self.dir,
            &["snapshot", "list", "--json", "--upper", UPPER],
            b"",
        );
        serde_json::from_slice(&listed).unwrap()
    }

    /// Asserts that the disk and all snapshots are what they should be, and that no other file is left.
    fn assert_well(&self) {
        // Unsealed layers are sealed when the disk is opened.
        let opened = self.open();
        let kind = opened.0.layers()[0].kind();
        assert_eq!(kind, self.kind);
        let active = opened.0.layers()[0].paths().data.clone();
        self.close(opened);
        let all = ["lower", "--upper", UPPER];
        let raw = succeed(&self.dir, &[&["export", "-o", "-"], &all[..]].concat(), b"");
        assert_eq!(difference(&raw, &self.disk), None);
        let checked = [&["check", "--strict"], &all[..]].concat();
        succeed(&self.dir, &checked, b"");

        let listed = self.list();
        let text = |row: &Value, key: &str| row[key].as_str().unwrap().to_owned();
        let names: Vec<_> = listed.iter().map(|row| text(row, "name")).collect();
        let expected: Vec<_> = self
            .snapshots
            .iter()
            .map(|(name, _)| name.clone())
            .collect();
        assert_eq!(names, expected);
        let mut layers = vec!["lower".to_owned()];
        for (row, (name, content)) in listed.iter().zip(&self.snapshots) {
            layers.push(text(row, "layer"));
            let layers: Vec<_> = layers.iter().map(String::as_str).collect();
            let raw = succeed(
                &self.dir,
                &[&["export", "-o", "-"], &layers[..]].concat(),
                b"",
            );
            assert_eq!(difference(&raw, content), None, "{name}");
            assert_eq!(row["sealed"], true);
            assert!(row["taken"].as_u64().unwrap() > 1_700_000_000);
            assert!(row["size_bytes"].as_u64().unwrap() >= 4096);
        }
        let known = |name: &String| {
            layers.iter().any(|layer| layer.ends_with(name.as_str()))
                || active.to_str().unwrap().ends_with(name.as_str())
        };
        let mut found = names_of_data(&self.dir);
        found.retain(|name| !known(name));
        assert_eq!(found, [""; 0], "files that no layer has");
    }
}

/// Names of data files.
fn names_of_data(dir: &TempDir) -> Vec<String> {
    let mut names = names(dir);
    names.retain(|name| name.starts_with("u.data") && name != "u.data.snapshots");
    names
}

#[test]
fn deleted_snapshots_leave_the_disk_and_the_others_as_they_are() {
    for (kind, seed) in KINDS.into_iter().zip(1..) {
        let mut model = Model::new(kind, seed);
        model.work(4);
        let mut went_on = false;
        while !model.snapshots.is_empty() {
            let at = model.random.below(model.snapshots.len() as u64) as usize;
            let (name, _) = model.snapshots.remove(at);
            let delete = ["snapshot", "delete", &name, "--upper", UPPER];
            let said = String::from_utf8(succeed(&model.dir, &delete, b"")).unwrap();
            assert!(said.starts_with(&format!("deleted {name}; ")), "{said}");
            assert_eq!(said.lines().count(), 1, "{said}");
            model.assert_well();
            let again = fail(&model.dir, 1, &delete);
            assert!(again.contains("no snapshot"), "{again}");
            if model.snapshots.len() == 2 && !went_on {
                // It is a disk as any other.
                model.work(2);
                went_on = true;
            }
        }
    }
}

#[test]
fn a_rollback_drops_what_came_later() {
    for (kind, seed) in KINDS.into_iter().zip(1..) {
        let mut model = Model::new(kind, seed);
        model.work(4);
        for newer in [0, 1, 1] {
            let at = model.snapshots.len() - 1 - newer;
            let (name, content) = model.snapshots[at].clone();
            let roll_back = ["snapshot", "rollback", &name, "--upper", UPPER];
            if newer > 0 {
                let refused = fail(&model.dir, 1, &roll_back);
                assert!(refused.contains(&model.snapshots[at + 1].0), "{refused}");
                assert!(refused.contains("--delete-newer"), "{refused}");
            }
            let roll_back = [&roll_back[..], &["--delete-newer"]].concat();
            let said = String::from_utf8(succeed(&model.dir, &roll_back, b"")).unwrap();
            assert!(
                said.starts_with(&format!("rolled back to {name}; ")),
                "{said}"
            );
            model.snapshots.truncate(at + 1);
            model.disk = content;
            model.assert_well();
            model.work(1);
            model.assert_well();
        }
    }
}

/// `--upper-auto` makes no second layer where the first pair is gone, and a disk in use is left alone.
#[test]
fn a_daemon_serves_what_is_left_and_is_asked_for_its_snapshots() {
    let dir = tempfile::tempdir().unwrap();
    lower(&dir, 4, 2 << 20);
    let folder = dir.path().join("w");
    let folder = folder.to_str().unwrap();
    let control = dir.path().join("c");
    let control = control.to_str().unwrap();
    let options = ["--upper-auto", folder, "--control", control];
    let mut daemon = Daemon::with(&[dir.path().join("lower")], &options);
    for name in ["one", "two"] {
        succeed(&dir, &["ctl", control, "snapshot", name, "--wait"], b"");
    }
    let list = |way: &[&str]| -> Value {
        let args = [&["snapshot", "list", "--json"], way].concat();
        serde_json::from_slice(&succeed(&dir, &args, b"")).unwrap()
    };
    let running = list(&["--control", control]);
    assert_eq!(running, list(&["--upper-auto", folder]));
    assert_eq!(running.as_array().unwrap().len(), 2);
    let table = succeed(&dir, &["snapshot", "list", "--control", control], b"");
    let table = String::from_utf8(table).unwrap();
    assert!(table.contains("one ") && table.contains(" ago "), "{table}");

    let delete = ["snapshot", "delete", "one", "--upper-auto", folder];
    let busy = fail(&dir, 1, &delete);
    assert!(busy.contains("in use by another process"), "{busy}");
    assert_eq!(daemon.terminate().code(), Some(0));
    succeed(&dir, &delete, b"");
    assert!(!dir.path().join("w/upper.data").exists());
    daemon.restart();
    assert!(!dir.path().join("w/upper.data").exists());
    let running = list(&["--control", control]);
    assert_eq!(running[0]["name"], "two");
    fail(&dir, 2, &["snapshot", "list"]);
    fail(
        &dir,
        2,
        &[
            "snapshot",
            "list",
            "--control",
            control,
            "--upper-auto",
            folder,
        ],
    );
}

/// A disk that was forked from a snapshot has the layers open, and could not start again without them.
#[test]
fn layers_of_a_running_fork_are_kept() {
    let mut model = Model::new(Kind::Hybrid, 9);
    model.work(3);
    model.assert_well();
    let layers: Vec<_> = model.list()[..2]
        .iter()
        .map(|row| row["layer"].as_str().unwrap().to_owned())
        .collect();
    let (first, last) = (model.snapshots[0].0.clone(), model.snapshots[2].0.clone());
    let fork = model.dir.path().join("fork");
    let options = ["--upper-auto", fork.to_str().unwrap()];
    let lower = model.dir.path().join("lower");
    let [one, two] = [0, 1].map(|number| model.dir.path().join(&layers[number]));
    let stack = [&lower, &one, &two];
    let running = Daemon::with(&stack, &options);
    let delete = ["snapshot", "delete", &first, "--upper", UPPER];
    let back = [
        "snapshot",
        "rollback",
        &first,
        "--upper",
        UPPER,
        "--delete-newer",
    ];
    let before = names(&model.dir);
    for (command, layer) in [(&delete[..], &layers[0]), (&back, &layers[1])] {
        let refused = fail(&model.dir, 1, command);
        let reason = format!("{layer} is open in another process, such as a fork");
        assert!(refused.contains(&reason), "{refused}");
        assert_eq!(names(&model.dir), before);
    }
    // The fork does not use this one.
    succeed(
        &model.dir,
        &["snapshot", "delete", &last, "--upper", UPPER],
        b"",
    );
    model.snapshots.remove(2);
    drop(running);

    // A fork with names of its own for the layers is not concerned.
    let own = ["one", "two"].map(|name| model.dir.path().join(name));
    for (layer, name) in [one, two].iter().zip(&own) {
        fs::hard_link(layer, name).unwrap();
    }
    let stack = [&lower, &own[0], &own[1]];
    let mut running = Daemon::with(&stack, &options);
    succeed(&model.dir, &delete, b"");
    assert_eq!(running.terminate().code(), Some(0));
    running.restart();
    drop(running);
    let read = ["export", "-o", "-", "lower", "one", "two"];
    let raw = succeed(&model.dir, &read, b"");
    assert_eq!(difference(&raw, &model.snapshots[1].1), None);
    model.snapshots.remove(0);
    model.assert_well();
}

/// One layer rewritten by `merge` has the name of its source, so that the layers above still find it; and so has a chain
/// that was compacted to one layer.
#[test]
fn merged_layers_keep_the_children_of_the_topmost() {
    let dir = tempfile::tempdir().unwrap();
    let mut disk = disk(3, 1 << 20);
    let mut below = String::new();
    for (number, name) in ["a", "b", "c", "d"].into_iter().enumerate() {
        disk[number * 4096..][..4096].copy_from_slice(&tagged(4096, number as u64));
        fs::write(dir.path().join("raw"), &disk).unwrap();
        let mut create = vec!["create", "--from", "raw", name];
        if !below.is_empty() {
            create.extend(["--parent", &below]);
        }
        succeed(&dir, &create, b"");
        below = format!("{below}{}{name}", if below.is_empty() { "" } else { "," });
    }
    let uuids = |layer: &str| {
        let json = succeed(&dir, &["inspect", "--json", layer], b"");
        let json: Value = serde_json::from_slice(&json).unwrap();
        let layer = &json["layers"][0];
        (layer["uuid"].clone(), layer["parent_uuid"].clone())
    };
    for (parts, stack) in [
        (&["a"][..], &["new", "b", "c", "d"][..]),
        (&["b"], &["a", "new", "c", "d"]),
        (&["d"], &["a", "b", "c", "new"]),
        (&["b", "c"], &["a", "new", "d"]),
        (&["a", "b", "c"], &["new", "d"]),
    ] {
        for format in [&["--algorithm", "zstd"][..], &["--algorithm", "none"]] {
            let merge = [&["merge", "-o", "new"], format, parts].concat();
            succeed(&dir, &merge, b"");
            let (first, last) = (parts[0], parts[parts.len() - 1]);
            assert_eq!(uuids("new"), (uuids(last).0, uuids(first).1), "{parts:?}");
            succeed(&dir, &[&["check", "--strict"], stack].concat(), b"");
            assert_reads(&dir, stack, &disk);
        }
    }
}
