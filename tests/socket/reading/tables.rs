//! Image tables of local layers: written after the first start, mapped by the next ones, and noticed if
//! they are stale or damaged.

use std::fs::{self, File};
use std::os::unix::fs::{FileExt, PermissionsExt};
use std::path::{Path, PathBuf};
use std::thread;
use std::time::{Duration, Instant};

use common::PATIENCE;
use common::blk;
use common::content::tagged;
use common::daemon::Daemon;
use common::guest::{Guest, Options};
use common::layers::{LayerBuilder, Pack, write, zfile};
use ovbd_vhost::format::tables::HEADER_LEN;
use tempfile::TempDir;

/// Bytes of the disk.
const LEN: usize = 1 << 20;

/// Layers in a directory of their own, and a cache.
struct Place {
    dir: TempDir,
    content: Vec<u8>,
}

impl Place {
    fn new() -> Self {
        let dir = tempfile::tempdir().unwrap();
        let content = tagged(LEN, 1);
        let place = Self { dir, content };
        place.write_layer(&place.content);
        place
    }

    fn layer(&self) -> PathBuf {
        self.dir.path().join("layer.obd")
    }

    /// Writes the layer, and waits until its times are old enough for tables.
    fn write_layer(&self, content: &[u8]) {
        // A mapping for each sector pair: tables of some pages.
        let parts = content.chunks(1024).enumerate();
        let layer = parts.fold(LayerBuilder::new(LEN as u64), |layer, (number, bytes)| {
            layer.data(number as u64 * 2, bytes)
        });
        let new = write(
            self.dir.path(),
            "new",
            &zfile(&layer.lsmt(), Pack::default()),
        );
        fs::rename(new, self.layer()).unwrap();
        thread::sleep(Duration::from_millis(60));
    }

    fn cache(&self) -> PathBuf {
        self.dir.path().join("cache")
    }

    fn serve(&self) -> Daemon {
        let cache = self.cache().display().to_string();
        Daemon::with(&[self.layer()], &["--cache", &cache])
    }

    /// The tables in the cache.
    fn tables(&self) -> Vec<PathBuf> {
        let entries = fs::read_dir(self.cache().join("tables")).unwrap();
        entries.map(|entry| entry.unwrap().path()).collect()
    }

    /// Waits until there is one complete file of tables.
    fn wait_for_tables(&self) -> PathBuf {
        until("tables are written", || {
            self.tables()
                .iter()
                .filter(|path| is_complete(path))
                .count()
                == 1
        });
        let tables = self.tables().into_iter().find(|path| is_complete(path));
        tables.unwrap()
    }

    /// Serves the layer once, so that its tables are there.
    fn prepare(&self) -> PathBuf {
        let daemon = self.serve();
        assert!(!maps_tables(&daemon));
        self.assert_reads(&daemon);
        self.wait_for_tables()
    }

    fn assert_reads(&self, daemon: &Daemon) {
        let mut guest = Guest::boot(daemon.connect(), Options::default()).unwrap();
        guest.assert_reads(0, &self.content);
    }
}

fn until(what: &str, holds: impl Fn() -> bool) {
    let start = Instant::now();
    while !holds() {
        assert!(start.elapsed() < PATIENCE, "not in time: {what}");
        thread::sleep(Duration::from_millis(5));
    }
}

/// Whether the file has the header that is written last, and its writer has let go of it.
fn is_complete(path: &Path) -> bool {
    let is_unlocked = || File::open(path).is_ok_and(|file| file.try_lock_shared().is_ok());
    fs::read(path).is_ok_and(|bytes| bytes.starts_with(b"ovbdtab1")) && is_unlocked()
}

/// Whether the daemon has mapped a file of tables.
fn maps_tables(daemon: &Daemon) -> bool {
    let maps = format!("/proc/{}/maps", daemon.pid().as_raw_nonzero());
    let maps = fs::read_to_string(maps).unwrap();
    maps.lines().any(|line| line.contains("/cache/tables/"))
}

fn writable(path: &Path) -> File {
    fs::set_permissions(path, fs::Permissions::from_mode(0o600)).unwrap();
    File::options().read(true).write(true).open(path).unwrap()
}

#[test]
fn the_second_start_maps_the_tables_of_the_first() {
    let place = Place::new();
    let path = place.prepare();
    let mode = fs::metadata(&path).unwrap().permissions().mode();
    assert_eq!(mode & 0o777, 0o444);
    let daemons = [place.serve(), place.serve()];
    for daemon in &daemons {
        assert!(maps_tables(daemon), "{}", daemon.log());
        place.assert_reads(daemon);
    }
    assert_eq!(place.tables(), [path]);
}

#[test]
fn daemons_that_start_at_once_write_one_file() {
    let place = Place::new();
    let daemons: Vec<_> = thread::scope(|scope| {
        let threads: Vec<_> = (0..4).map(|_| scope.spawn(|| place.serve())).collect();
        threads
            .into_iter()
            .map(|thread| thread.join().unwrap())
            .collect()
    });
    daemons.iter().for_each(|daemon| place.assert_reads(daemon));
    let path = place.wait_for_tables();
    assert!(maps_tables(&place.serve()));
    assert_eq!(place.tables(), [path]);
}

#[test]
fn a_layer_that_is_replaced_has_other_tables() {
    let mut place = Place::new();
    place.prepare();
    place.content = tagged(LEN, 2);
    place.write_layer(&place.content);
    let daemon = place.serve();
    assert!(!maps_tables(&daemon));
    place.assert_reads(&daemon);
    until("tables are written", || {
        place
            .tables()
            .iter()
            .filter(|path| is_complete(path))
            .count()
            == 2
    });
    let daemon = place.serve();
    assert!(maps_tables(&daemon));
    place.assert_reads(&daemon);
}

#[test]
fn damaged_tables_are_replaced() {
    type Damage = fn(&File);
    let damages: [Damage; 6] = [
        |file| file.set_len(0).unwrap(),
        |file| file.set_len(5000).unwrap(),
        |file| file.write_all_at(&[0; HEADER_LEN], 0).unwrap(),
        |file| file.write_all_at(b"x", 20).unwrap(),
        // A page that never reached storage.
        |file| file.write_all_at(&[0; 4096], 8192).unwrap(),
        |file| {
            let last = file.metadata().unwrap().len() - 2;
            let mut byte = [0];
            file.read_exact_at(&mut byte, last).unwrap();
            file.write_all_at(&[byte[0] ^ 1], last).unwrap();
        },
    ];
    let place = Place::new();
    place.prepare();
    for (number, damage) in damages.iter().enumerate() {
        let path = place.wait_for_tables();
        damage(&writable(&path));
        let daemon = place.serve();
        assert!(!maps_tables(&daemon), "damage {number}");
        place.assert_reads(&daemon);
        place.wait_for_tables();
        let daemon = place.serve();
        assert!(maps_tables(&daemon), "damage {number}: {}", daemon.log());
        place.assert_reads(&daemon);
    }
}

#[test]
fn tables_of_other_layers_under_this_name_are_not_used() {
    let place = Place::new();
    let path = place.prepare();
    let other = Place::new();
    let foreign = other.prepare();
    fs::remove_file(&path).unwrap();
    fs::copy(foreign, &path).unwrap();
    let daemon = place.serve();
    assert!(!maps_tables(&daemon));
    place.assert_reads(&daemon);
    assert!(
        daemon.log().contains("image tables belong to the stack"),
        "{}",
        daemon.log()
    );
}

#[test]
fn reads_fail_when_the_tables_are_cut_and_the_next_start_makes_new_ones() {
    let place = Place::new();
    let path = place.prepare();
    let mut daemon = place.serve();
    let mut guest = Guest::boot(daemon.connect(), Options::default()).unwrap();
    guest.assert_reads(0, &place.content[..4096]);
    writable(&path).set_len(0).unwrap();
    for sector in [0, 8, 1000] {
        let answer = guest.request(0, blk::IN, sector, 4096);
        assert_eq!(answer.status, blk::IOERR, "sector {sector}");
    }
    daemon.assert_alive();
    drop((guest, daemon));
    let daemon = place.serve();
    assert!(!maps_tables(&daemon));
    place.assert_reads(&daemon);
    place.wait_for_tables();
    assert!(maps_tables(&place.serve()));
}

#[test]
fn a_cache_that_cannot_be_written_costs_one_line() {
    let place = Place::new();
    let not_a_cache = place.dir.path().join("letters");
    fs::create_dir(&not_a_cache).unwrap();
    fs::write(not_a_cache.join("letter"), "dear").unwrap();
    let option = not_a_cache.display().to_string();
    let daemon = Daemon::with(&[place.layer()], &["--cache", &option]);
    place.assert_reads(&daemon);
    let lines = daemon.log();
    let lines = lines.lines().filter(|line| line.contains("image tables"));
    assert_eq!(lines.count(), 1, "{}", daemon.log());
}

/// Serves the layer in a mount namespace where `setup` changes the cache, which is `$cache` there; asserts
/// that the disk reads right, and returns the lines of the log about tables.
fn lines_about_tables(place: &Place, setup: &str) -> Vec<String> {
    let (layer, cache) = (place.layer(), place.cache());
    let setup = format!("cache={}; {setup}", cache.display());
    let options = [
        "--layers",
        layer.to_str().unwrap(),
        "--cache",
        cache.to_str().unwrap(),
    ];
    let daemon = Daemon::in_namespace(&setup, &options);
    place.assert_reads(&daemon);
    let lines = || {
        let log = daemon.log();
        let about = log.lines().filter(|line| line.contains("image tables"));
        about.map(str::to_owned).collect::<Vec<_>>()
    };
    until("the log has a line about tables", || !lines().is_empty());
    lines()
}

#[test]
fn a_full_file_system_costs_one_line() {
    let place = Place::new();
    place.prepare();
    fs::remove_dir_all(place.cache().join("tables")).unwrap();
    let full = "mv $cache $cache.old; mkdir -m 700 $cache; mount -t tmpfs -o size=96k,mode=700 cache $cache; \
                cp -a $cache.old/. $cache; mkdir -m 700 $cache/tables; \
                head -c 1M /dev/zero >$cache/fill 2>/dev/null || true";
    let lines = lines_about_tables(&place, full);
    assert_eq!(lines.len(), 1, "{lines:?}");
    assert!(lines[0].contains("cannot store"), "{lines:?}");
    assert!(lines[0].contains("No space left"), "{lines:?}");
}

#[test]
fn a_read_only_cache_costs_one_line() {
    let place = Place::new();
    place.prepare();
    let read_only = "mount --bind $cache $cache; mount -o remount,bind,ro $cache";
    let lines = lines_about_tables(&place, read_only);
    assert_eq!(lines.len(), 1, "{lines:?}");
    assert!(lines[0].contains("Read-only file system"), "{lines:?}");
}
