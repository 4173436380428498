//! A file system in memory that records what is done to it, tells what a crash at any moment may
//! leave, and fails or does not answer on demand.

mod device;
mod log;
mod outage;
mod server;
mod state;

use std::ffi::OsString;
use std::ops::Range;
use std::path::Path;
use std::sync::{Arc, Mutex, MutexGuard};
use std::thread;
use std::time::{Duration, Instant};

use fuser::{BackgroundSession, Config, MountOption, Session, SessionACL};
use rustix::io::Errno as SystemErrno;
use tempfile::TempDir;

use super::PATIENCE;
use server::Server;
use state::State;

pub use log::{Op, after_kill, after_power_loss};
pub use outage::Failure;
pub use state::Call;

/// The mounted file system; unmounted when dropped.
pub struct Recorder {
    // Before the folder it is mounted on.
    session: Option<BackgroundSession>,
    folder: TempDir,
    state: Arc<Mutex<State>>,
    /// Whether the session does not unmount it.
    on_device: bool,
}

impl Recorder {
    /// Mounts an empty one.
    pub fn mount() -> Self {
        Self::mount_state(State::new())
    }

    /// Mounts one with a file of this name. The kernel caches what is read of it, and may map it.
    pub fn mount_with(name: &str, content: Vec<u8>) -> Self {
        let mut state = State::new();
        state.give(name, content);
        Self::mount_state(state)
    }

    fn mount_state(state: State) -> Self {
        let folder = tempfile::tempdir().unwrap();
        let state = Arc::new(Mutex::new(state));
        let mut config = Config::default();
        config.mount_options = vec![MountOption::FSName("recorder".into())];
        let session = fuser::spawn_mount(Server(Arc::clone(&state)), folder.path(), &config)
            .expect("a FUSE mount: it needs /dev/fuse, and root or fusermount3");
        Self {
            session: Some(session),
            folder,
            state,
            on_device: false,
        }
    }

    /// As [`Recorder::mount_with`], on a block device, whose content is not used: files then have the
    /// number of the device, as those of ext4 have.
    ///
    /// # Errors
    /// The kernel refuses the mount, which needs root.
    pub fn mount_on_device(name: &str, content: Vec<u8>) -> Result<Self, SystemErrno> {
        let mut state = State::new();
        state.give(name, content);
        let state = Arc::new(Mutex::new(state));
        let folder = tempfile::tempdir().unwrap();
        let (server, acl) = (device::mount(folder.path())?, SessionACL::All);
        let session = Session::from_fd(Server(Arc::clone(&state)), server, acl, Config::default())
            .and_then(Session::spawn)
            .expect("a session on a new mount");
        Ok(Self {
            session: Some(session),
            folder,
            state,
            on_device: true,
        })
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap()
    }

    /// The folder.
    pub fn path(&self) -> &Path {
        self.folder.path()
    }

    /// Number of things done so far.
    pub fn position(&self) -> usize {
        self.state().log().len()
    }

    /// All that was done.
    pub fn log(&self) -> Vec<Op> {
        self.state().log().to_vec()
    }

    /// Names of the files there are.
    pub fn names(&self) -> Vec<OsString> {
        self.state().files().names.keys().cloned().collect()
    }

    /// From now on, `call` to the file `name` fails with `errno`, and does nothing.
    pub fn fail(&self, call: Call, name: &str, errno: fuser::Errno) {
        self.state().fail(call, name, errno);
    }

    /// Number of calls so far that change something or make it durable: those that can fail.
    pub fn steps(&self) -> usize {
        self.state().outage().steps()
    }

    /// The `steps` steps that come after the next `after` fail, or fewer if one of them is a sync.
    pub fn fail_steps(&self, after: usize, steps: usize, failure: Failure) {
        self.state().outage().begin(after, steps, failure);
    }

    /// Number of steps that failed since [`Recorder::fail_steps`] asked for it.
    pub fn failures(&self) -> usize {
        self.state().outage().failures()
    }

    /// Removes all files and forgets what was done.
    pub fn clear(&self) {
        self.state().clear();
    }

    /// Reads of the file it was mounted with that touch `range` fail from now on.
    pub fn fail_reads(&self, range: Range<u64>) {
        self.state().fail_reads(range);
    }

    /// Reads of the file it was mounted with that touch `range` are not answered before what this
    /// returns is dropped.
    pub fn hold_reads(&self, range: Range<u64>) -> Held<'_> {
        self.state().hold_reads(range);
        Held(self)
    }

    /// Syncs of the file `name` are neither done nor answered before what this returns is dropped.
    pub fn hold_syncs(&self, name: &str) -> Held<'_> {
        self.state().hold_syncs(name);
        Held(self)
    }

    /// Syncs of the folder, once there is a file `name` in it, are neither done nor answered before
    /// what this returns is dropped.
    pub fn hold_folder_syncs(&self, name: &str) -> Held<'_> {
        self.state().hold_folder_syncs(name);
        Held(self)
    }

    /// `fstat` and `close` of its files are not answered before what this returns is dropped.
    pub fn hold_attributes(&self) -> Held<'_> {
        self.state().hold_attributes();
        Held(self)
    }

    /// Lets everything succeed again, and answers what was held.
    pub fn heal(&self) {
        self.state().heal();
    }
}

impl Drop for Recorder {
    fn drop(&mut self) {
        if self.on_device {
            device::unmount(self.folder.path());
        }
        drop(self.session.take());
    }
}

/// Calls that are not answered until this is dropped: a process that waits for one cannot even be
/// killed.
pub struct Held<'a>(&'a Recorder);

impl Held<'_> {
    /// Waits until a call is held.
    pub fn wait(&self) {
        let start = Instant::now();
        while !self.0.state().is_holding() {
            assert!(start.elapsed() < PATIENCE, "no call comes that is held");
            thread::sleep(Duration::from_millis(1));
        }
    }
}

impl Drop for Held<'_> {
    fn drop(&mut self) {
        self.0.heal();
    }
}
