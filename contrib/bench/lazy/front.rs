//! The guest's side: a daemon on a cache of its own, and reads through one queue.

use std::fs;
use std::path::Path;
use std::process::{Command, Stdio};
use std::thread;
use std::time::{Duration, Instant};

use common::daemon::Daemon;
use common::load::{Load, Shape};
use common::memory::{Memory, Region};
use common::programs;
use common::remote::fetching;
use common::ring::{Addresses, Ring};
use common::session::{Session, Wanted, feature};
use tempfile::TempDir;

use crate::Result;
use crate::origin::Origin;

/// Longest replay of a trace.
const LONGEST: Duration = Duration::from_secs(300);

/// A directory with a cache and an image config.
pub struct Host {
    dir: TempDir,
}

/// How an image is named.
#[derive(Clone, Copy)]
pub enum Named {
    /// By the config that the snapshotter writes.
    Config,
    /// By its tag.
    Tag,
    /// By its digest.
    Digest,
}

impl Host {
    /// A host that has nothing of `origin`'s image.
    pub fn new(origin: &Origin) -> Result<Self> {
        let dir = tempfile::tempdir()?;
        fs::write(dir.path().join("config"), origin.config())?;
        Ok(Self { dir })
    }

    fn access(&self, origin: &Origin) -> Vec<String> {
        let cache = self.dir.path().join("cache").display().to_string();
        ["--cache", &cache, "--insecure-registry", &origin.host()]
            .map(str::to_owned)
            .into()
    }

    /// Serves the image; also the time until the socket listens.
    pub fn serve(&self, origin: &Origin, named: Named, more: &[&str]) -> (Daemon, Duration) {
        let config = self.dir.path().join("config").display().to_string();
        let mut options = match named {
            Named::Config => vec!["--config".to_owned(), config],
            Named::Tag => vec!["--image".to_owned(), origin.reference()],
            Named::Digest => vec!["--image".to_owned(), origin.pinned()],
        };
        options.extend(self.access(origin));
        options.extend(more.iter().map(|option| (*option).to_owned()));
        let options: Vec<_> = options.iter().map(String::as_str).collect();
        let start = Instant::now();
        let daemon = Daemon::with::<&str>(&[], &options);
        (daemon, start.elapsed())
    }

    /// Fetches the whole image first; the time that takes.
    pub fn pull(&self, origin: &Origin) -> Result<Duration> {
        let start = Instant::now();
        let status = Command::new(programs::path("ovbd"))
            .arg("pull")
            .arg(origin.reference())
            .args(self.access(origin))
            .stdout(Stdio::null())
            .status()?;
        match status.success() {
            true => Ok(start.elapsed()),
            false => Err("ovbd pull failed".into()),
        }
    }

    /// Serves the image while a trace is replayed, and waits until `bytes` of it arrived: the time since
    /// the start.
    pub fn replay(&self, origin: &Origin, trace: &str, bytes: u64) -> Duration {
        let control = self.path("control");
        let options = ["--control", &control, "--prefetch", trace];
        let start = Instant::now();
        let (_daemon, _) = self.serve(origin, Named::Config, &options);
        while fetching(Path::new(&control))["fetcher"]["replay_bytes"].as_u64() < Some(bytes) {
            assert!(start.elapsed() < LONGEST, "the trace does not arrive");
            thread::sleep(Duration::from_millis(5));
        }
        start.elapsed()
    }

    /// A path in the directory.
    pub fn path(&self, name: &str) -> String {
        self.dir.path().join(name).display().to_string()
    }
}

/// Reads `len` bytes at each of the sectors that `next` yields, `depth` at a time. All must succeed.
pub fn read(
    daemon: &Daemon,
    depth: u16,
    len: u32,
    mut next: impl FnMut() -> Option<u64>,
) -> Result<Duration> {
    let mut session = Session::negotiate(daemon.connect(), Wanted::all())?;
    let memory = Memory {
        regions: vec![Region::new(0x1_0000_0000, 16 << 20, 0)],
    };
    session.share(&memory)?;
    let size = (3 * depth).next_power_of_two();
    let at = Addresses::alloc(&memory, size, [0, 0, 0]);
    let ring = Ring::new(&memory, at, size, session.has(feature::EVENT_IDX));
    session.start_queue(0, &ring.vring, 0)?;
    let shape = Shape {
        depth,
        len,
        segments: 1,
        indirect: false,
    };
    let mut load = Load::new(ring, &memory, 0, shape);
    let mut failed = 0;
    let start = Instant::now();
    load.run(&mut next, |done| failed += u64::from(done.status != 0));
    let took = start.elapsed();
    match failed {
        0 => Ok(took),
        failed => Err(format!("{failed} reads failed").into()),
    }
}
