//! Where the layer comes from: the command line, an image config, the golden images.

use std::fs;

use ovbd_vhost::format::lsmt::Header;
use ovbd_vhost::format::lsmt::writable::Kind;
use ovbd_vhost::writable::{Paths, create};
use uuid::Uuid;

use super::{assert_beginning, assert_disk, write};
use common::content::tagged;
use common::daemon::{self, Daemon};
use common::disk::deep;
use common::guest::{Guest, Options};
use common::session::feature;
use common::writable::Writable;

fn text(path: &std::path::Path) -> String {
    path.to_str().expect("UTF-8").to_owned()
}

/// Both ways to name the files lead to the same disk.
#[test]
fn files_and_config_name_the_same_layer() {
    let mut disk = Writable::serve();
    disk.plain_guest().write(0, 5, &[7; 512]);
    disk.daemon.terminate();
    let mut model = disk.content.to_vec();
    model[5 * 512..6 * 512].fill(7);
    let (case, _) = deep();
    let (data, index) = (
        text(&disk.file("upper.data")),
        text(&disk.file("upper.index")),
    );

    let upper = format!("index={index},data={data}");
    let daemon = Daemon::with(&case.layers, &["--upper", &upper]);
    let mut guest = Guest::boot(daemon.connect(), Options::default()).expect("guest");
    assert_beginning(&mut guest, &model);
    drop(daemon);

    let lowers: Vec<_> = case.layers.iter().map(|layer| text(layer)).collect();
    let lowers: Vec<_> = lowers
        .iter()
        .map(|file| format!(r#"{{"file":"{file}"}}"#))
        .collect();
    let result = text(&disk.file("result"));
    let config = format!(
        r#"{{"lowers":[{}],"upper":{{"data":"upper.data","index":"{index}"}},"resultFile":"{result}"}}"#,
        lowers.join(",")
    );
    fs::write(disk.file("config.v1.json"), config).unwrap();
    let none: [&str; 0] = [];
    let config = text(&disk.file("config.v1.json"));
    let daemon = Daemon::with(&none, &["--config", &config]);
    let mut guest = Guest::boot(daemon.connect(), Options::default()).expect("guest");
    assert!(!guest.session.has(feature::RO));
    assert_beginning(&mut guest, &model);
    assert_eq!(fs::read(&result).unwrap(), b"success");
    drop(daemon);

    let socket = text(&disk.file("s"));
    let arguments = ["--socket", &socket, "--config", &config, "--upper", &upper];
    let output = daemon::run(arguments);
    let said = String::from_utf8_lossy(&output.stderr);
    assert_eq!(output.status.code(), Some(1), "{said}");
    assert!(said.contains("--upper"), "{said}");
}

/// The first layer of an image is written upon nothing.
#[test]
fn an_upper_needs_no_layers() {
    let folder = tempfile::tempdir().unwrap();
    let file = |name: &str| folder.path().join(name);
    let header = Header::empty(9 << 20, Uuid::from_u128(5), Uuid::nil());
    let paths = Paths {
        data: file("d"),
        index: file("i"),
    };
    create(&paths, Kind::Hybrid, &header).unwrap();
    let config = r#"{"lowers": [], "upper": {"data": "d", "index": "i"}}"#;
    fs::write(file("config.v1.json"), config).unwrap();
    let upper = format!("data={},index={}", text(&file("d")), text(&file("i")));
    let mut model = vec![0; 9 << 20];
    let none: [&str; 0] = [];
    for (number, options) in [
        ["--upper", &upper],
        ["--config", &text(&file("config.v1.json"))],
    ]
    .into_iter()
    .enumerate()
    {
        let daemon = Daemon::with(&none, &options);
        let mut guest = Guest::boot(daemon.connect(), Options::default()).expect("guest");
        assert_eq!(guest.session.capacity().unwrap(), 9 << 11);
        let data = tagged(7 * 512, number as u64);
        write(&mut guest, &mut model, 100 + 5 * number as u64, &data);
        assert_disk(&mut guest, &model);
    }
}

#[test]
fn what_is_no_upper_is_refused() {
    let folder = tempfile::tempdir().unwrap();
    let file = |name: &str| text(&folder.path().join(name));
    fs::write(file("junk"), vec![1; 10000]).unwrap();
    let (case, _) = deep();
    let layer = text(&case.layers[0]);
    for (upper, code, word) in [
        (
            format!("data={},index={}", file("absent"), file("junk")),
            1,
            "absent",
        ),
        (
            format!("data={},index={}", file("junk"), file("absent")),
            1,
            "junk",
        ),
        (format!("data={layer},index={}", file("junk")), 1, "layer"),
        (format!("data={}", file("junk")), 2, "index"),
        ("data=,index=b".to_owned(), 2, "data"),
        ("data=a,index=a".to_owned(), 2, "expected"),
        ("a,b".to_owned(), 2, "expected"),
    ] {
        let socket = file("socket");
        let arguments = ["--socket", &socket, "--layers", &layer, "--upper", &upper];
        let output = daemon::run(arguments);
        let said = String::from_utf8_lossy(&output.stderr);
        assert_eq!(output.status.code(), Some(code), "{upper}: {said}");
        assert!(said.contains(word), "{upper}: {said}");
    }
    assert!(!folder.path().join("socket").exists());
}
