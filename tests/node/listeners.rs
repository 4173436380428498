//! Listening sockets that outlive the node: no front-end that waits in the backlog is lost.

use std::fs;
use std::os::fd::OwnedFd;
use std::os::unix::fs::MetadataExt;
use std::os::unix::net::UnixDatagram;
use std::process::Command;

use common::PATIENCE;
use common::guest::{Guest, Options};
use ovbd_vhost::daemon::handover;
use serde_json::json;

use super::lifecycle::layer;
use super::node::{Node, kill, until};

/// Number of the socket's file, which changes when another socket is bound at the path.
fn inode(node: &Node) -> u64 {
    let socket = node.run_dir().join("a.sock");
    fs::symlink_metadata(socket).unwrap().ino()
}

/// Waits until the operation on the disk that is under way has ended.
fn until_idle(node: &Node) {
    let labels = json!({ "labels": { "round": "1" } });
    let (status, answer) = node.request("PATCH", "/disks/a", &labels.to_string());
    assert_eq!(status, 200, "{answer}");
}

#[test]
fn the_next_node_gets_the_socket_from_the_process() {
    let mut node = Node::start();
    let spec = json!({ "layers": [layer(&node, "a.obd", 7)] });
    assert_eq!(node.put("/disks/a", &spec).0, 201);
    let (before, pid) = (inode(&node), node.pid("a"));
    let size = node.get("/disks/a").1["size_bytes"].clone();
    node.kill();
    node.start_again();
    node.until_state("a", "listening");
    until_idle(&node);
    assert_eq!(node.get("/disks/a").1["size_bytes"], size);
    assert_eq!(node.pid("a"), pid);
    kill(pid);
    // Never refused: the node has the socket of before.
    let mut guest = Guest::boot(node.connect("a"), Options::default()).unwrap();
    assert_eq!(guest.read(0, 0, 512)[0], 7);
    assert_eq!(inode(&node), before, "the same socket");
}

/// Receives messages of the node until one has a socket.
fn kept(manager: &UnixDatagram) -> (String, OwnedFd) {
    loop {
        let mut message = [0; 512];
        let (len, socket) = handover::receive(manager, &mut message).unwrap();
        if let Some(socket) = socket {
            return (String::from_utf8(message[..len].to_vec()).unwrap(), socket);
        }
    }
}

#[test]
fn the_service_manager_keeps_the_socket_while_nothing_runs() {
    let dir = tempfile::tempdir().unwrap();
    let address = dir.path().join("notify");
    let manager = UnixDatagram::bind(&address).unwrap();
    manager.set_read_timeout(Some(PATIENCE)).unwrap();
    let mut node = Node::start_in(dir, |command| {
        command.env("NOTIFY_SOCKET", &address);
    });
    let spec = json!({ "layers": [layer(&node, "a.obd", 7)] });
    assert_eq!(node.put("/disks/a", &spec).0, 201);
    let (message, socket) = kept(&manager);
    assert_eq!(message, "FDSTORE=1\nFDNAME=a\nFDPOLL=0");
    let (before, pid) = (inode(&node), node.pid("a"));
    node.kill();
    kill(pid);
    let gone = format!("/proc/{pid}/exe");
    until("the process is gone", || fs::read_link(&gone).is_err());
    // Nothing runs, and a front-end waits.
    let waiting = node.connect("a");
    node.start_again_as(|command| {
        // As the service manager passes it: `LISTEN_PID` names the process itself.
        let script = "exec 3<&0 </dev/null; export LISTEN_FDS=1 LISTEN_FDNAMES=a LISTEN_PID=$$; exec \"$0\" \"$@\"";
        let mut wrapped = Command::new("sh");
        wrapped
            .args(["-c", script])
            .arg(command.get_program())
            .args(command.get_args())
            .stdin(socket);
        *command = wrapped;
    });
    node.until_state("a", "listening");
    let mut guest = Guest::boot(waiting, Options::default()).unwrap();
    assert_eq!(guest.read(0, 0, 512)[0], 7);
    assert_eq!(inode(&node), before, "the same socket");
}
