//! The units in `contrib/systemd`, run with the user, the capabilities and the directories that they set, in a mount
//! namespace. Filters of system calls (`RestrictAddressFamilies=` and the like) are not applied.

use std::collections::BTreeMap;
use std::fs;
use std::io::Write;
use std::os::unix::fs::PermissionsExt;
use std::os::unix::net::{UnixDatagram, UnixStream};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Output, Stdio};

use common::guest::{Guest, Options};
use common::layers::LayerBuilder;
use common::{PATIENCE, programs};
use tempfile::TempDir;

use super::node::{kill, kill_disks, until};

/// Directory of the programs inside the namespace, which units expect in `/usr/bin`.
const PROGRAMS: &str = "/run/programs";

fn folder() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("contrib/systemd")
}

/// A unit, by the names of its settings.
struct Unit {
    settings: BTreeMap<String, String>,
    comments: Vec<String>,
    instance: String,
}

impl Unit {
    fn read(file: &str, instance: &str) -> Self {
        let text = fs::read_to_string(folder().join(file)).unwrap();
        let (comments, lines): (Vec<_>, Vec<_>) =
            text.lines().partition(|line| line.starts_with('#'));
        let text = lines.join("\n").replace("\\\n", "").replace("%i", instance);
        let settings = text.lines().filter_map(|line| line.split_once('='));
        Self {
            settings: settings
                .map(|(name, value)| (name.to_owned(), value.to_owned()))
                .collect(),
            comments: comments.into_iter().map(str::to_owned).collect(),
            instance: instance.to_owned(),
        }
    }

    fn get(&self, name: &str) -> &str {
        self.settings.get(name).map_or("", String::as_str)
    }

    /// Lines of examples in the comments that start with `prefix`.
    fn examples(&self, prefix: &str) -> Vec<String> {
        let lines = self.comments.iter().map(|line| line[1..].trim());
        let found: Vec<_> = lines
            .filter(|line| line.starts_with(prefix))
            .map(str::to_owned)
            .collect();
        assert!(!found.is_empty(), "{prefix}");
        found
    }

    /// A shell script that does what systemd does before it runs the program, and then runs it.
    fn script(&self) -> String {
        let (user, group) = (self.get("User"), self.get("Group"));
        let mut script = format!("set -eu; umask {}\n", self.get("UMask"));
        let mut writable = Vec::new();
        for (kind, parent) in [
            ("Runtime", "/run"),
            ("State", "/var/lib"),
            ("Cache", "/var/cache"),
        ] {
            let mode = match self.get(&format!("{kind}DirectoryMode")) {
                "" => "0755",
                mode => mode,
            };
            for name in self.get(&format!("{kind}Directory")).split_whitespace() {
                let path = format!("{parent}/{name}");
                script += &format!(
                    "(umask 022; mkdir -p {path})\nchown {user}:{group} {path}\nchmod {mode} {path}\n"
                );
                writable.push(path);
            }
        }
        assert_eq!(self.get("ProtectSystem"), "strict");
        for path in writable {
            script += &format!("mount --bind {path} {path}\n");
        }
        script += "for root in / /etc /run /var/lib /var/cache; do mount -o remount,bind,ro $root; done\n";
        if self.get("PrivateTmp") == "yes" {
            script += "mount -t tmpfs private /tmp\n";
        }
        if !self.get("EnvironmentFile").is_empty() {
            script += &format!(". {}\n", self.get("EnvironmentFile"));
        }
        // The limits of this process may not allow more.
        script += &format!("ulimit -n {} 2>/dev/null || :\n", self.get("LimitNOFILE"));
        let capabilities = |name| {
            let list = self.get(name).split_whitespace();
            list.fold("-all".to_owned(), |list, one| {
                list + ",+" + &one.strip_prefix("CAP_").unwrap().to_ascii_lowercase()
            })
        };
        let ambient = capabilities("AmbientCapabilities");
        assert_eq!(self.get("NoNewPrivileges"), "yes");
        let program = self.get("ExecStart").replace("/usr/bin", PROGRAMS);
        script += &format!(
            "exec setpriv --reuid {user} --regid {group} --init-groups --inh-caps={ambient} \
             --ambient-caps={ambient} --bounding-set={} --no-new-privs -- {program}\n",
            capabilities("CapabilityBoundingSet"),
        );
        script
    }
}

/// A host on which nothing is installed but the programs and what `sysusers.d` and `tmpfiles.d` make.
struct Host {
    /// Keeps the mount namespace.
    holder: Child,
    dir: TempDir,
    notifications: UnixDatagram,
}

impl Host {
    fn new() -> Self {
        let dir = tempfile::tempdir().unwrap();
        let notify = dir.path().join("notify");
        let notifications = UnixDatagram::bind(&notify).unwrap();
        notifications.set_read_timeout(Some(PATIENCE)).unwrap();
        fs::set_permissions(&notify, fs::Permissions::from_mode(0o666)).unwrap();
        let copies: String = ["ovbd-node", "ovbd-vhost", "ovbd"]
            .map(|name| format!("cp {} {PROGRAMS}\n", programs::path(name).display()))
            .concat();
        let setup = format!(
            "set -eu\n\
             for root in /run /var/lib /var/cache; do mount -t tmpfs -o mode=755 tmpfs $root; done\n\
             mkdir /run/upper /run/work {PROGRAMS}\n\
             mount -t overlay -o lowerdir=/etc,upperdir=/run/upper,workdir=/run/work overlay /etc\n\
             systemd-sysusers {units}/sysusers.d/ovbd-vhost.conf\n\
             systemd-tmpfiles --create {units}/tmpfiles.d/ovbd-vhost.conf\n\
             {copies}\
             touch /run/notify; mount --bind {notify} /run/notify\n\
             echo ready; exec sleep 3600\n",
            units = folder().display(),
            notify = notify.display(),
        );
        let mut holder = Command::new("unshare")
            .args(["--mount", "--propagation", "private", "sh", "-c", &setup])
            .stdout(Stdio::piped())
            .spawn()
            .unwrap();
        let mut line = String::new();
        let stdout = holder.stdout.take().unwrap();
        std::io::BufRead::read_line(&mut std::io::BufReader::new(stdout), &mut line).unwrap();
        assert_eq!(line, "ready\n", "the host is set up");
        Self {
            holder,
            dir,
            notifications,
        }
    }

    /// The path of a file of the host, as this process sees it.
    fn path(&self, path: &str) -> PathBuf {
        PathBuf::from(format!("/proc/{}/root{path}", self.holder.id()))
    }

    /// Writes a file that only root can read.
    fn write(&self, path: &str, content: &[u8]) {
        let path = self.path(path);
        fs::create_dir_all(path.parent().unwrap()).unwrap();
        fs::write(&path, content).unwrap();
        fs::set_permissions(&path, fs::Permissions::from_mode(0o600)).unwrap();
    }

    fn enter(&self, program: &str) -> Command {
        let mut command = Command::new("nsenter");
        let target = self.holder.id().to_string();
        command.args(["--target", &target, "--mount", "--", program]);
        command
    }

    /// Runs a command line of a comment, which succeeds.
    fn run(&self, line: &str) -> Output {
        let mut words = line.split_whitespace();
        let program = format!("{PROGRAMS}/{}", words.next().unwrap());
        let output = self.enter(&program).args(words).output().unwrap();
        assert!(output.status.success(), "{line}: {output:?}");
        output
    }

    /// Starts a service as systemd does.
    fn start(&self, unit: &Unit) -> Service {
        let log = self.dir.path().join(format!("log{}", unit.instance));
        let file = fs::File::options().create(true).append(true).open(&log);
        let mut command = match unit.settings.get("ListenStream") {
            Some(path) => {
                let mut command = self.enter("systemd-socket-activate");
                command.args(["-E", "NOTIFY_SOCKET", "-l", path, "unshare"]);
                command
            }
            None => self.enter("unshare"),
        };
        command.args(["--mount", "--propagation", "private"]);
        if unit.get("PrivateNetwork") == "yes" {
            command.arg("--net");
        }
        let child = command
            .args(["sh", "-c", &unit.script()])
            .env("NOTIFY_SOCKET", "/run/notify")
            .stderr(file.unwrap())
            .spawn()
            .unwrap();
        Service { child, log }
    }

    /// Waits until the service manager is told that a service is ready.
    fn until_ready(&self, service: &Service) {
        let mut message = [0; 256];
        loop {
            let received = self.notifications.recv(&mut message);
            let len = received.unwrap_or_else(|error| panic!("{error}: {}", service.log()));
            if message[..len].starts_with(b"READY=1") {
                return;
            }
        }
    }

    fn guest(&self, socket: &str) -> Guest {
        let stream = UnixStream::connect(self.path(socket)).unwrap();
        Guest::boot(stream, Options::default()).unwrap()
    }
}

impl Drop for Host {
    fn drop(&mut self) {
        kill_disks(&self.path("/var/lib/ovbd/node"));
        self.holder.kill().unwrap();
        self.holder.wait().unwrap();
    }
}

struct Service {
    child: Child,
    log: PathBuf,
}

impl Service {
    fn log(&self) -> String {
        fs::read_to_string(&self.log).unwrap_or_default()
    }

    fn kill(&mut self) {
        kill(self.child.id().cast_signed());
        self.child.wait().unwrap();
    }
}

impl Drop for Service {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

fn layer(number: u8) -> Vec<u8> {
    LayerBuilder::new(1 << 20).data(0, &[number; 512]).lsmt()
}

/// The unit of one disk with its socket.
fn disk_unit() -> Unit {
    let mut unit = Unit::read("ovbd-vhost@.service", "web");
    let socket = Unit::read("ovbd-vhost@.socket", "web");
    let listen = socket.get("ListenStream").to_owned();
    unit.settings.insert("ListenStream".to_owned(), listen);
    unit
}

#[test]
fn each_image_that_the_unit_of_a_disk_names_is_served() {
    let unit = disk_unit();
    for example in unit.examples("OVBD_IMAGE=") {
        let host = Host::new();
        for (name, byte) in [("base", 7), ("web", 7)] {
            host.write(&format!("/var/lib/layers/{name}.obd"), &layer(byte));
        }
        let config = r#"{"lowers": [{"file": "/var/lib/layers/base.obd"}]}"#;
        host.write("/var/lib/images/web/config.v1.json", config.as_bytes());
        let (name, value) = example.split_once('=').unwrap();
        // systemd splits the value at blanks when it replaces `$OVBD_IMAGE`, and so does the shell.
        let file = format!("{name}='{value}'\n");
        host.write(unit.get("EnvironmentFile"), file.as_bytes());
        let mut service = host.start(&unit);
        let socket = unit.get("ListenStream");
        until("the socket listens", || {
            UnixStream::connect(host.path(socket)).is_ok()
        });
        host.until_ready(&service);
        let mut guest = host.guest(socket);
        assert_eq!(
            guest.read(0, 0, 512),
            [7; 512],
            "{example}: {}",
            service.log()
        );
        if !example.contains("--upper-auto") {
            continue;
        }
        guest.write(0, 0, &[9; 512]);
        for command in unit.examples("ovbd ctl") {
            host.run(&command);
        }
        drop(guest);
        service.kill();
        let again = host.start(&unit);
        until("the socket listens", || {
            UnixStream::connect(host.path(socket)).is_ok()
        });
        host.until_ready(&again);
        assert_eq!(host.guest(socket).read(0, 0, 512), [9; 512]);
    }
}

#[test]
fn the_unit_of_the_node_serves_disks_that_outlive_it() {
    let unit = Unit::read("ovbd-node.service", "");
    assert_eq!(unit.get("KillMode"), "process");
    assert_eq!(unit.get("RuntimeDirectoryPreserve"), "yes");
    let host = Host::new();
    host.write("/var/lib/ovbd/images/base.obd", &layer(7));
    let mut service = host.start(&unit);
    host.until_ready(&service);
    for command in unit.examples("ovbd node add") {
        host.run(&command);
    }
    let mut guest = host.guest("/run/ovbd/disks/vm7.sock");
    guest.write(0, 0, &[9; 512]);
    host.run("ovbd node snapshot vm7 first --wait");
    service.kill();
    assert_eq!(guest.read(0, 0, 512), [9; 512], "without a node");
    let service = host.start(&unit);
    host.until_ready(&service);
    let disks = host.run("ovbd node list");
    let list = String::from_utf8_lossy(&disks.stdout).into_owned();
    assert!(list.contains("vm7   listening"), "{list}");
    assert_eq!(guest.read(0, 0, 512), [9; 512]);
    drop(guest);
    host.run("ovbd node rm vm7 --force");
}

/// `systemd-analyze verify` knows each setting.
#[test]
fn systemd_knows_the_settings_of_all_units() {
    let dir = tempfile::tempdir().unwrap();
    let program = programs::path("ovbd-vhost");
    for file in [
        "ovbd-node.service",
        "ovbd-vhost@.service",
        "ovbd-vhost@.socket",
    ] {
        let text = fs::read_to_string(folder().join(file)).unwrap();
        let mut text = text
            .lines()
            .filter(|line| !line.starts_with("Documentation="))
            .map(|line| line.to_owned() + "\n")
            .collect::<String>();
        for name in ["ovbd", "ovbd-node", "ovbd-vhost"] {
            text = text.replace(
                &format!("/usr/bin/{name} "),
                &format!("{} ", program.display()),
            );
        }
        let mut copy = fs::File::create(dir.path().join(file)).unwrap();
        copy.write_all(text.as_bytes()).unwrap();
    }
    let units = [
        "ovbd-node.service",
        "ovbd-vhost@.service",
        "ovbd-vhost@.socket",
    ];
    let output = Command::new("systemd-analyze")
        .arg("verify")
        .args(units.map(|unit| dir.path().join(unit)))
        .output()
        .unwrap();
    let text = String::from_utf8_lossy(&output.stderr);
    let wrong: Vec<_> = text.lines().filter(|line| line.contains("ovbd")).collect();
    assert!(wrong.is_empty(), "{wrong:#?}");
}
