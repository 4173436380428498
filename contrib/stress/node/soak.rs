//! Guests that read and write on the disks of a node, and trouble for the node and its disks. A byte that is wrong, and a
//! request that is answered twice or not at all, end the run.

use std::env;
use std::fmt;
use std::fs;
use std::os::unix::net::UnixStream;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use common::PATIENCE;
use common::content::Random;
use common::guest::{Guest, Options};
use common::layers::LayerBuilder;
use common::node::NodeProcess;
use common::survivor::Survivor;
use ovbd_vhost::tool::node::client::{Content, Node, Properties};
use rustix::process::{Pid, Signal, kill_process};

/// A disk whose process ends five times within a minute is not started again: leave time between.
const KILL_PAUSE: Duration = Duration::from_secs(20);

/// Pause between two kinds of trouble.
const PAUSE: u64 = 100;

/// What happened.
#[derive(Default)]
pub struct Summary {
    requests: AtomicU64,
    reconnects: AtomicU64,
    disk_kills: u64,
    disk_restarts: u64,
    node_kills: u64,
    node_stops: u64,
    snapshots: u64,
    forks: u64,
}

impl Summary {
    /// Kinds of trouble that there were.
    pub fn kinds(&self) -> usize {
        let counts = [
            self.disk_kills,
            self.disk_restarts,
            self.node_kills,
            self.node_stops,
            self.forks,
        ];
        counts.into_iter().filter(|count| *count > 0).count()
    }
}

impl fmt::Display for Summary {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let requests = self.requests.load(Ordering::Relaxed);
        let reconnects = self.reconnects.load(Ordering::Relaxed);
        write!(
            f,
            "{requests} requests over {reconnects} further connections; disk processes: {} killed, {} replaced; \
             nodes: {} killed, {} stopped; {} snapshots, {} forks",
            self.disk_kills,
            self.disk_restarts,
            self.node_kills,
            self.node_stops,
            self.snapshots,
            self.forks
        )
    }
}

/// What makes the trouble.
struct Controller {
    node: NodeProcess,
    client: Node,
    random: Random,
    /// When the process of each disk was killed last.
    killed: Vec<Option<Instant>>,
    summary: Summary,
}

/// Runs `count` disks for `time`.
pub fn run(time: Duration, count: usize, seed: u64) -> Summary {
    let node = NodeProcess::start(&env::temp_dir());
    let layer = node.images().join("base.obd");
    fs::write(&layer, LayerBuilder::new(8 << 20).lsmt()).expect("layer");
    let client = node.client();
    let content = Content::Layers(vec![layer.to_str().expect("UTF-8").to_owned()]);
    for number in 0..count {
        add(&client, &name(number), &content, Some(&node));
    }
    let mut controller = Controller {
        client,
        node,
        random: Random::new(seed),
        killed: vec![None; count],
        summary: Summary::default(),
    };
    let stop = AtomicBool::new(false);
    let sockets: Vec<_> = (0..count)
        .map(|number| controller.node.socket(&name(number)))
        .collect();
    let (requests, reconnects) = (AtomicU64::new(0), AtomicU64::new(0));
    thread::scope(|scope| {
        for (number, socket) in sockets.into_iter().enumerate() {
            let (stop, requests, reconnects) = (&stop, &requests, &reconnects);
            scope.spawn(move || {
                let mut guest = Survivor::start(socket, seed ^ (number as u64) << 32);
                while !stop.load(Ordering::Relaxed) {
                    guest.step();
                    requests.fetch_add(1, Ordering::Relaxed);
                    thread::sleep(Duration::from_millis(1));
                }
                guest.check_all();
                reconnects.fetch_add(guest.reconnects, Ordering::Relaxed);
            });
        }
        // A panic here must end the guests too.
        let _stopper = Stopper(&stop);
        let end = Instant::now() + time;
        while Instant::now() < end {
            controller.disturb();
            let pause = controller.random.below(PAUSE);
            thread::sleep(Duration::from_millis(pause));
        }
        controller.until_all_listen();
    });
    controller.summary.requests = requests;
    controller.summary.reconnects = reconnects;
    controller.finish()
}

struct Stopper<'a>(&'a AtomicBool);

impl Drop for Stopper<'_> {
    fn drop(&mut self) {
        self.0.store(true, Ordering::Relaxed);
    }
}

fn name(number: usize) -> String {
    format!("disk{number}")
}

/// Makes a disk; writable if a node is given, in whose directory the writable layer is made.
fn add(client: &Node, id: &str, content: &Content, node: Option<&NodeProcess>) {
    let upper = node.map(|node| node.images().join(format!("{id}.upper")));
    let more = Properties {
        upper: upper.map(|path| path.to_str().expect("UTF-8").to_owned()),
        ..Properties::default()
    };
    client.add(id, content, &more).expect("the disk is made");
}

impl Controller {
    /// One kind of trouble, after which everything works again.
    fn disturb(&mut self) {
        let disk = self.random.below(self.killed.len() as u64) as usize;
        match self.random.below(16) {
            0 => {
                self.node.kill();
                // Meanwhile, a disk process may end too.
                if self.random.coin() {
                    self.kill(disk);
                }
                self.node.start_again();
                self.summary.node_kills += 1;
            }
            1 => {
                self.node.terminate();
                self.node.start_again();
                self.summary.node_stops += 1;
            }
            2..=4 => {
                self.client.restart(&name(disk)).expect("restart");
                self.until_listening(disk);
                self.summary.disk_restarts += 1;
            }
            5..=6 => self.fork(disk),
            _ => self.kill(disk),
        }
    }

    /// Kills the process of a disk, unless that was done a moment ago.
    fn kill(&mut self, disk: usize) {
        if self.killed[disk].is_some_and(|last| last.elapsed() < KILL_PAUSE) {
            return;
        }
        let Some(process) = self.process(disk) else {
            return;
        };
        self.killed[disk] = Some(Instant::now());
        // It may have ended already.
        let _ = kill_process(process, Signal::KILL);
        self.summary.disk_kills += 1;
    }

    /// The process that the state entry names: the node may be down.
    fn process(&self, disk: usize) -> Option<Pid> {
        self.node.disk_process(&name(disk))
    }

    /// Forks a disk under its guest, looks at the fork, and removes it.
    fn fork(&mut self, disk: usize) {
        self.until_listening(disk);
        let snapshot = format!("s{}", self.summary.snapshots % 4);
        let content = Content::Snapshot {
            disk: name(disk),
            name: snapshot,
        };
        self.summary.snapshots += 1;
        // The process may have been killed a moment ago.
        let Ok(fork) = self.client.add("fork", &content, &Properties::default()) else {
            return;
        };
        let socket = fork["socket"].as_str().expect("socket");
        let stream = UnixStream::connect(socket).expect("connection");
        let mut guest = Guest::boot(stream, Options::default()).expect("guest");
        guest.read(0, 0, 4096);
        drop(guest);
        self.client.remove("fork", true).expect("removal");
        self.summary.forks += 1;
    }

    fn until_listening(&self, disk: usize) {
        self.until(|disks| {
            disks
                .iter()
                .any(|one| one["id"] == name(disk).as_str() && one["state"] == "listening")
        });
    }

    fn until_all_listen(&self) {
        let count = self.killed.len();
        self.until(|disks| {
            disks
                .iter()
                .filter(|disk| disk["state"] == "listening")
                .count()
                == count
        });
    }

    fn until(&self, done: impl Fn(&[serde_json::Value]) -> bool) {
        let start = Instant::now();
        loop {
            let disks = self.client.disks(None).expect("disks");
            let failed = disks.iter().find(|disk| disk["state"] == "failed");
            assert!(failed.is_none(), "{failed:?}: {}", self.node.log());
            if done(&disks) {
                return;
            }
            assert!(start.elapsed() < PATIENCE, "{disks:?}");
            thread::sleep(Duration::from_millis(5));
        }
    }

    /// Removes all disks, and looks for what they leave.
    fn finish(self) -> Summary {
        let processes = self.node.disk_processes();
        for number in 0..self.killed.len() {
            self.client.remove(&name(number), true).expect("removal");
        }
        assert_eq!(self.client.disks(None).expect("disks").len(), 0);
        let left = self.node.run_files();
        assert!(left.is_empty(), "{left:?}");
        for process in processes {
            let link = fs::read_link(format!("/proc/{process}/exe"));
            assert!(link.is_err(), "process {process} is left");
        }
        self.summary
    }
}
