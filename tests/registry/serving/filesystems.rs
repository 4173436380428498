//! The cache on every file system that hosts have: presence, restarts, no space, eviction.

use std::fs;
use std::path::PathBuf;
use std::process::Command;

use common::content::tagged;
use common::daemon::Daemon;
use common::namespace::Namespace;
use common::registry_server::{Server, until};
use common::remote::{Layers, Place};
use ovbd_vhost::cache::Cache;
use ovbd_vhost::format::digest::Digest;
use serde_json::json;

use super::{Reader, UNIT, asked_units, kill_all, publish};

/// A cache on a file system of its own, with a complete blob that no disk uses.
struct Mounted {
    place: Place,
    namespace: Namespace,
    unused: PathBuf,
}

impl Mounted {
    fn new(kind: &str) -> Mounted {
        let place = Place::default();
        let unused = tagged(16 * UNIT, 9);
        let source = place.path("other-cache");
        publish(&Cache::open(&source).expect("a cache"), &unused);
        let mounted = place.path("mounted");
        fs::create_dir(&mounted).expect("a folder");
        let (at, source) = (mounted.display(), source.display());
        let mount = match kind {
            "tmpfs" => format!("mount -t tmpfs -o size=32m tmpfs {at}"),
            _ => {
                let image = place.path("image");
                // The least that xfs takes.
                let file = fs::File::create(&image).expect("an image");
                file.set_len(320 << 20).expect("a length");
                make(kind, &image.display().to_string());
                format!("mount -t {kind} -o loop {} {at}", image.display())
            }
        };
        let setup = format!("{mount}; mkdir -m 700 {at}/cache; cp -a {source}/. {at}/cache");
        let namespace = Namespace::start(&setup);
        let name = format!("cache/blobs/sha256/{}", Digest::of(&unused).hex());
        let unused = namespace.path(&mounted.join(name));
        assert!(unused.exists());
        Mounted {
            place,
            namespace,
            unused,
        }
    }

    fn serve(&self) -> Daemon {
        let config = self.place.path("config.v1.json").display().to_string();
        let cache = self.place.path("mounted/cache").display().to_string();
        Daemon::inside(&self.namespace, &["--config", &config, "--cache", &cache])
    }

    /// Fills the file system with another file.
    fn fill(&self) -> PathBuf {
        let other = self.namespace.path(&self.place.path("mounted/other"));
        let mut file = fs::File::create(&other).expect("a file");
        let zeros = [0; 64 << 10];
        // Until the last write fails, and what remains of it in small ones.
        for piece in [&zeros[..], &zeros[..4096]] {
            while std::io::Write::write_all(&mut file, piece).is_ok() {}
            let _ = file.sync_all();
        }
        other
    }
}

/// Makes a file system in a file.
fn make(kind: &str, image: &str) {
    let program = format!("mkfs.{kind}");
    let options: &[&str] = match kind {
        // No blocks are kept for root, which tests may run as.
        "ext4" => &["-q", "-F", "-m", "0"],
        _ => &["-q", "-f"],
    };
    let output = Command::new(&program).args(options).arg(image).output();
    let output = output.unwrap_or_else(|error| {
        panic!("{program}: {error}; contrib/install-packages gets it");
    });
    assert!(output.status.success(), "{program}: {output:?}");
}

/// Whether this kernel can mount it, after loading its module if there is one.
fn is_known(kind: &str) -> bool {
    let listed = || {
        let text = fs::read_to_string("/proc/filesystems").expect("a list");
        text.lines()
            .any(|line| line.split_whitespace().next_back() == Some(kind))
    };
    let load = || Command::new("modprobe").args(["-q", kind]).status().is_ok();
    listed() || (load() && listed())
}

/// Each unit is fetched once, also if everything is killed in between.
fn presence_survives_kills(layers: &Layers, server: &Server, mounted: &Mounted) {
    let half = layers.content.len() / 2;
    let mut daemon = mounted.serve();
    let mut reader = Reader::connect(&daemon);
    // One after the other from the end: no read-ahead.
    let read_half = |reader: &mut Reader| {
        for start in (0..half).step_by(UNIT).rev() {
            reader.ask([start]);
            reader.check(&layers.content);
        }
    };
    read_half(&mut reader);
    kill_all(&mut daemon);
    daemon.restart();
    reader.reconnect(&daemon);
    read_half(&mut reader);
    let counts = asked_units(server, &layers.blobs[0]);
    assert!(counts.iter().all(|count| *count == 1), "{counts:?}");
}

/// Blobs that are not in use make room; then reads wait until there is space again.
fn a_full_file_system_is_waited_out(layers: &Layers, mounted: &Mounted) {
    let daemon = mounted.serve();
    let mut reader = Reader::connect(&daemon);
    let other = mounted.fill();
    let half = layers.content.len() / 2;
    // Nearly twice the units that the unused blob has.
    reader.ask((0..32).rev().map(|read| half + read * 3 * UNIT));
    until("the unused blob is evicted", || !mounted.unused.exists());
    until("the cache is full", || {
        daemon.log().contains("no space left")
    });
    fs::remove_file(other).expect("removed");
    reader.check(&layers.content);
    reader.check_all(&layers.content);
    until("the log says so", || {
        daemon.log().contains("has space again")
    });
}

fn check(kind: &str) {
    // The first half of the disk is in one layer, and the second one in the other.
    let layers = Layers::side_by_side(2, 6 << 20);
    let mounted = Mounted::new(kind);
    let server = layers.registry();
    let lowers = layers.lowers();
    mounted
        .place
        .config("http", &server.host(), &lowers, json!({}));
    presence_survives_kills(&layers, &server, &mounted);
    a_full_file_system_is_waited_out(&layers, &mounted);
    // All of it is there: the registry is not needed.
    drop(server);
    Reader::connect(&mounted.serve()).check_all(&layers.content);
}

#[test]
fn a_cache_on_tmpfs() {
    check("tmpfs");
}

#[test]
fn a_cache_on_ext4() {
    check("ext4");
}

/// Every kernel of a distribution has them, and some that are built for one purpose do not.
#[test]
fn a_cache_on_the_other_file_systems_of_this_kernel() {
    for kind in ["xfs", "btrfs"] {
        if is_known(kind) {
            check(kind);
        }
    }
}
