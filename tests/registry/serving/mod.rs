//! The daemon with layers in registries: guest bytes, requests, refusals, outages, kills.

mod absence;
mod allowed;
mod answers;
mod background;
mod counting;
mod credentials;
mod damage;
mod eviction;
mod filesystems;
mod images;
mod kills;
mod links;
mod logins;
mod mirrors;
mod network;
mod opening;
mod outages;
mod prefetch;
mod redirects;
mod refusals;
mod removal;
mod reopening;
mod replay;
mod servers;
mod service_config;
mod shared;
mod sharing;
mod storage;
mod streaming;
mod stuck;
mod successors;
mod tls;
mod wrong_answers;

use std::path::PathBuf;
use std::sync::Arc;

use common::blk;
use common::content::difference;
use common::daemon::Daemon;
use common::load::{Load, Shape};
use common::memory::Memory;
use common::registry_server::Server;
use common::remote::{self, Place};
use common::returning::Returning;
use common::ring::{Addresses, Ring};
use common::session::{Session, feature};
use ovbd_vhost::cache::{Cache, Entry, Partial, Publication};
use ovbd_vhost::format::digest::Digest;
use ovbd_vhost::format::presence::Identity;
use rustix::process::{Signal, kill_process};
use serde_json::Value;

/// Shape of all requests of a [`Reader`].
const SHAPE: Shape = Shape {
    depth: 32,
    len: 16384,
    segments: 3,
    indirect: true,
};

const SIZE: u16 = 64;

/// A unit of a presence map, and a piece of [`common::remote::Layers::new`].
const UNIT: usize = 64 << 10;

/// A guest with many reads open at once.
struct Reader {
    load: Load,
    front_end: Returning,
    session: Session,
}

/// A ring in guest memory, and reads that fill it.
fn load(memory: &Memory) -> Load {
    let event_idx = Returning::wanted().features & feature::EVENT_IDX != 0;
    let at = Addresses::alloc(memory, SIZE, [0; 3]);
    let ring = Ring::new(memory, at, SIZE, event_idx);
    Load::new(ring, memory, 0, SHAPE)
}

impl Reader {
    fn connect(daemon: &Daemon) -> Reader {
        let memory = Memory::typical();
        let load = load(&memory);
        let mut front_end = Returning::new(memory, vec![load.ring.vring.clone()]);
        let session = front_end.connect(daemon.connect());
        Reader {
            load,
            front_end,
            session,
        }
    }

    /// Connects again, to a daemon that may be another one.
    fn reconnect(&mut self, daemon: &Daemon) {
        self.session = self.front_end.connect(daemon.connect());
    }

    /// Asks for 16 KiB at each of these bytes of the disk: at most 32 places.
    fn ask(&mut self, starts: impl IntoIterator<Item = usize>) {
        for (slot, start) in (0..).zip(starts) {
            self.load.submit(slot, start as u64 / 512);
        }
        self.load.ring.publish();
    }

    /// Waits for all answers and compares them with the disk's content.
    fn check(&mut self, content: &[u8]) {
        let mut found = vec![0; SHAPE.len as usize];
        self.load.run(
            || None,
            |done| {
                assert_eq!(done.status, blk::OK, "sector {}", done.sector);
                done.data.copy_to(&mut found);
                let start = done.sector as usize * 512;
                let wrong = difference(&found, &content[start..start + found.len()]);
                assert_eq!(wrong, None, "sector {}", done.sector);
            },
        );
    }

    /// Reads all of the disk, from its end, in requests that no read-ahead foresees.
    fn check_all(&mut self, content: &[u8]) {
        let starts = (0..content.len()).step_by(SHAPE.len as usize).rev();
        for start in starts {
            self.ask([start]);
            self.check(content);
        }
    }
}

/// What the control socket says about the fetcher and the layers.
fn fetching(place: &Place) -> Value {
    remote::fetching(&place.path("control"))
}

/// How often each unit of a blob was asked for, whole or in part.
fn asked_units(server: &Server, blob: &[u8]) -> Vec<usize> {
    let digest = Digest::of(blob).to_string();
    let mut counts = vec![0; blob.len().div_ceil(UNIT)];
    for request in server.received() {
        if !request.target.contains(&digest) {
            continue;
        }
        let (first, last) = request.range().unwrap_or((0, blob.len() - 1));
        for count in &mut counts[first / UNIT..=last.min(blob.len() - 1) / UNIT] {
            *count += 1;
        }
    }
    counts
}

/// Data file and map of a blob in the cache.
fn partial(place: &Place, blob: &[u8], extension: &str) -> PathBuf {
    let name = format!("{}-{}.{extension}", Digest::of(blob).hex(), blob.len());
    place.path("cache/partial/sha256").join(name)
}

/// The units that a bitmap of a map file has.
fn units(map: &[u8], offset: u64, count: usize) -> Vec<bool> {
    let bits = &map[offset as usize..];
    (0..count)
        .map(|unit| bits[unit / 8] >> (unit % 8) & 1 == 1)
        .collect()
}

/// Stores a blob in a cache, complete.
fn publish(cache: &Cache, bytes: &[u8]) {
    let partial = store(cache, &Digest::of(bytes), bytes);
    assert_eq!(
        partial.publish().expect("published"),
        Publication::Published
    );
}

/// Stores all units of a blob in a cache that has none of them.
fn store(cache: &Cache, digest: &Digest, bytes: &[u8]) -> Arc<Partial> {
    let identity = Identity::new(*digest, bytes.len() as u64).expect("an identity");
    let Ok(Entry::Partial(partial)) = cache.entry(identity) else {
        panic!("an empty cache")
    };
    let claim = partial
        .claim(identity.all_units())
        .expect("a claim")
        .expect("a claim");
    for unit in 0..identity.units() {
        let start = unit as usize * UNIT;
        let end = bytes.len().min(start + UNIT);
        claim.store(unit, &bytes[start..end]).expect("bytes");
    }
    drop(claim);
    partial
}

/// Kills a daemon and its fetcher at once, so that neither makes anything durable.
fn kill_all(daemon: &mut Daemon) {
    let (keeper, fetcher) = daemon.fetcher();
    for pid in [keeper, fetcher].into_iter().flatten() {
        let _ = kill_process(pid, Signal::KILL);
    }
    daemon.kill();
}
