//! Blobs in the cache through random stores, syncs, kills and power losses.
//!
//! A power loss keeps, of each page of the data and of the map that was written since the last sync,
//! the old or the new content, as it likes. Whatever is left, the next boot must not take a unit for
//! present that does not hold the blob's bytes, and must not lose what was synced.

use std::fs;
use std::path::Path;
use std::sync::Arc;

use common::content::Random;
use ovbd_vhost::cache::{Cache, Entry, Partial, Publication};
use ovbd_vhost::format::digest::Digest;
use ovbd_vhost::format::presence::{HEADER_LEN, Identity, UNIT, UnitRange};
use ovbd_vhost::source::presence::Bitmap;
use tempfile::TempDir;
use uuid::Uuid;

const PAGE: usize = 4096;

/// The last unit is short.
const LEN: u64 = 13 * UNIT + 777;

/// Data file and map at one moment.
#[derive(Clone)]
struct Files {
    data: Vec<u8>,
    map: Vec<u8>,
}

struct Model {
    dir: TempDir,
    random: Random,
    bytes: Vec<u8>,
    identity: Identity,
    boot: Uuid,
    partial: Option<Arc<Partial>>,
    /// What is on storage for certain.
    storage: Files,
    /// Units that were present at the last sync.
    durable: Vec<UnitRange>,
    /// Power losses after which a live bit stood for lost data.
    dangers: u32,
}

impl Model {
    fn new(seed: u64) -> Self {
        let mut random = Random::new(seed);
        let words = (0..LEN.div_ceil(8)).flat_map(|_| random.any().to_le_bytes());
        let bytes: Vec<u8> = words.take(LEN as usize).collect();
        let identity = Identity::new(Digest::of(&bytes), LEN).unwrap();
        let mut model = Self {
            dir: tempfile::tempdir().unwrap(),
            random,
            bytes,
            identity,
            boot: Uuid::new_v4(),
            partial: None,
            storage: Files {
                data: Vec::new(),
                map: Vec::new(),
            },
            durable: Vec::new(),
            dangers: 0,
        };
        model.open();
        model.partial().sync().unwrap();
        model.storage = model.files();
        model
    }

    fn path(&self, extension: &str) -> std::path::PathBuf {
        let (hex, len) = (self.identity.digest().hex(), self.identity.len());
        let name = format!("partial/sha256/{hex}-{len}.{extension}");
        self.dir.path().join(name)
    }

    fn files(&self) -> Files {
        let read = |extension| fs::read(self.path(extension)).unwrap();
        Files {
            data: read("data"),
            map: read("map"),
        }
    }

    fn open(&mut self) {
        let cache = Cache::open_in_boot(self.dir.path(), self.boot).unwrap();
        match cache.entry(self.identity).unwrap() {
            Entry::Partial(partial) => self.partial = Some(partial),
            Entry::Complete(_) => panic!("nothing was published"),
        }
    }

    fn partial(&self) -> &Arc<Partial> {
        self.partial.as_ref().unwrap()
    }

    /// Units that are absent, as runs.
    fn absent(&self) -> Vec<UnitRange> {
        self.partial().map().absent(self.identity.all_units())
    }

    fn store(&mut self) {
        let all = self.identity.units();
        let start = self.random.below(all);
        let end = (start + 1 + self.random.below(3)).min(all);
        let units = UnitRange::new(start, end);
        let claim = self.partial().claim(units).unwrap().unwrap();
        let bytes = self.identity.bytes_of(units);
        let part = &self.bytes[bytes.start as usize..bytes.end as usize];
        claim.store(units.start(), part).unwrap();
    }

    fn sync(&mut self) {
        self.partial().sync().unwrap();
        self.storage = self.files();
        self.durable = present(&self.absent(), self.identity.units());
    }

    fn kill(&mut self) {
        let before = self.absent();
        self.partial = None;
        self.open();
        assert_eq!(self.absent(), before, "a kill loses nothing");
    }

    fn lose_power(&mut self) {
        self.partial = None;
        let now = self.files();
        let data = self.mix(&self.storage.data.clone(), &now.data);
        let map = self.mix(&self.storage.map.clone(), &now.map);
        self.dangers += u32::from(self.is_dangerous(&data, &map));
        fs::write(self.path("data"), &data).unwrap();
        fs::write(self.path("map"), &map).unwrap();
        self.boot = Uuid::new_v4();
        self.open();
        for units in &self.durable {
            let map = self.partial().map();
            assert!(map.holds(Bitmap::Live, *units), "{units:?} was synced");
        }
        // The content of the files now counts as stored.
        self.storage = Files {
            data,
            map: self.files().map,
        };
        self.partial().sync().unwrap();
        self.storage = self.files();
    }

    /// Each page as it was or as it is.
    fn mix(&mut self, old: &[u8], new: &[u8]) -> Vec<u8> {
        assert_eq!(old.len(), new.len());
        let pages = old.chunks(PAGE).zip(new.chunks(PAGE));
        let mut mixed = Vec::with_capacity(new.len());
        for (old, new) in pages {
            mixed.extend_from_slice(if self.random.below(2) == 0 { old } else { new });
        }
        mixed
    }

    /// Whether a reader that believed the live bits would be served wrong bytes.
    fn is_dangerous(&self, data: &[u8], map: &[u8]) -> bool {
        let live = &map[HEADER_LEN as usize..];
        (0..self.identity.units()).any(|unit| {
            let is_set = live[unit as usize / 8] >> (unit % 8) & 1 == 1;
            let bytes = self.identity.bytes_of(UnitRange::one(unit));
            let range = bytes.start as usize..bytes.end as usize;
            is_set && data[range.clone()] != self.bytes[range]
        })
    }

    /// Everything that is present must be the blob's.
    fn check(&self) {
        let data = fs::read(self.path("data")).unwrap();
        for units in present(&self.absent(), self.identity.units()) {
            let bytes = self.identity.bytes_of(units);
            let range = bytes.start as usize..bytes.end as usize;
            assert!(data[range.clone()] == self.bytes[range], "{units:?}");
        }
    }

    fn complete(mut self) {
        for run in self.absent() {
            let claim = self.partial().claim(run).unwrap().unwrap();
            let bytes = self.identity.bytes_of(run);
            let part = &self.bytes[bytes.start as usize..bytes.end as usize];
            claim.store(run.start(), part).unwrap();
        }
        assert_eq!(self.partial().publish().unwrap(), Publication::Published);
        self.partial = None;
        let cache = Cache::open_in_boot(self.dir.path(), Uuid::new_v4()).unwrap();
        assert!(cache.entry(self.identity).unwrap().is_complete());
        let name = format!("blobs/sha256/{}", self.identity.digest().hex());
        assert!(fs::read(self.dir.path().join(name)).unwrap() == self.bytes);
    }
}

/// The gaps between absent runs.
fn present(absent: &[UnitRange], all: u64) -> Vec<UnitRange> {
    let ends = std::iter::once(0).chain(absent.iter().map(|run| run.end()));
    let starts = absent
        .iter()
        .map(|run| run.start())
        .chain(std::iter::once(all));
    ends.zip(starts)
        .map(|(from, to)| UnitRange::new(from, to))
        .filter(|run| !run.is_empty())
        .collect()
}

#[test]
fn no_kill_and_no_power_loss_turns_a_hole_into_content() {
    let mut dangers = 0;
    for seed in 0..12 {
        let mut model = Model::new(seed);
        for _ in 0..60 {
            match model.random.below(12) {
                0 => model.lose_power(),
                1 => model.kill(),
                2 | 3 => model.sync(),
                _ => model.store(),
            }
            model.check();
        }
        dangers += model.dangers;
        model.complete();
    }
    assert!(dangers > 10, "the losses were harmless: {dangers}");
}

/// Any page of either file, and either file as a whole, may be missing or be another's.
#[test]
fn whatever_a_damaged_entry_holds_is_refused_or_right() {
    let seed = |path: &Path| fs::read(path).unwrap();
    for round in 0..40 {
        let mut model = Model::new(round);
        for _ in 0..6 {
            model.store();
        }
        model.sync();
        model.partial = None;
        let map = model.path("map");
        let mut bytes = seed(&map);
        // The fixed part of the header, state and boot; bits are covered by the test above.
        for _ in 0..1 + model.random.below(3) {
            let at = model.random.below(64) as usize;
            bytes[at] ^= 1 << model.random.below(8);
        }
        if model.random.below(4) == 0 {
            bytes.truncate(model.random.below(bytes.len() as u64) as usize);
        }
        fs::write(&map, &bytes).unwrap();
        model.open();
        assert_eq!(model.absent(), [model.identity.all_units()]);
        model.check();
        model.complete();
    }
}
