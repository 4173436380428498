//! What the system runs out of while the daemon serves, descriptors and memory, and a layer that is
//! replaced: reads go on, new connections are refused, and all is well when there is enough again.

use std::fs;

use rustix::process::{Resource, Rlimit, getrlimit, prlimit};

use common::daemon::Daemon;
use common::disk::Disk;
use common::guest::{Guest, Options};
use common::layers::{LayerBuilder, noise, write};
use common::session::{Session, Wanted};

/// Sets a soft limit of the running daemon. The hard one it has from us.
fn limit(daemon: &Daemon, resource: Resource, current: Option<u64>) {
    let maximum = getrlimit(resource).maximum;
    let current = current.or(maximum);
    prlimit(Some(daemon.pid()), resource, Rlimit { current, maximum }).expect("prlimit");
}

/// Bytes of address space the daemon has.
fn address_space(daemon: &Daemon) -> u64 {
    let path = format!("/proc/{}/statm", daemon.pid().as_raw_nonzero());
    let text = fs::read_to_string(path).expect("the daemon runs");
    let pages: u64 = text
        .split(' ')
        .next()
        .and_then(|pages| pages.parse().ok())
        .expect("pages");
    pages * rustix::param::page_size() as u64
}

#[test]
fn out_of_descriptors() {
    let mut disk = Disk::serve();
    let mut guest = disk.guest(Options::default());
    guest.assert_reads(0, &disk.content);
    let open = disk.daemon.count("fd") as u64;
    limit(&disk.daemon, Resource::Nofile, Some(open));
    // No connection can be accepted.
    let waiting = [disk.daemon.connect(), disk.daemon.connect()];
    guest.assert_reads(0, &disk.content);
    // One can be accepted, and no descriptor of its own be taken.
    limit(&disk.daemon, Resource::Nofile, Some(open + 1));
    let [waiting, _other] = waiting;
    let refused = Guest::boot(waiting, Options::default()).is_err();
    assert!(refused, "a front-end without room for its descriptors");
    limit(&disk.daemon, Resource::Nofile, None);
    disk.assert_well();
}

#[test]
fn out_of_memory_for_a_guest() {
    let mut disk = Disk::serve();
    disk.guest(Options::default())
        .assert_reads(0, &disk.content);
    // That memory is gone once another front-end is served; one that needs none is served in any
    // case.
    let no_memory = |disk: &Disk| {
        let session = Session::negotiate(disk.daemon.connect(), Wanted::all());
        let mut session = session.expect("session");
        assert_eq!(session.capacity().expect("capacity"), disk.sectors());
        session
    };
    let session = no_memory(&disk);
    // Room for the daemon's own needs, not for a guest's memory.
    let most = address_space(&disk.daemon) + (24 << 20);
    limit(&disk.daemon, Resource::As, Some(most));
    drop(session);
    let refused = Guest::boot(disk.daemon.connect(), Options::default());
    assert!(refused.is_err(), "64 MiB of memory in 24 MiB");
    drop(no_memory(&disk));
    limit(&disk.daemon, Resource::As, None);
    disk.assert_well();
}

#[test]
fn a_layer_replaced_under_its_name_is_served_as_it_was() {
    let folder = tempfile::tempdir().expect("temporary directory");
    let layer = |seed| {
        let content = noise(seed, 1 << 20);
        (LayerBuilder::new(1 << 20).data(0, &content).lsmt(), content)
    };
    let (old, old_content) = layer(1);
    let (new, new_content) = layer(2);
    let path = write(folder.path(), "layer", &old);
    let mut daemon = Daemon::serve(&[&path]);
    let mut guest = Guest::boot(daemon.connect(), Options::default()).expect("guest");
    guest.assert_reads(0, &old_content);
    fs::rename(write(folder.path(), "new", &new), &path).expect("replaced");
    guest.assert_reads(0, &old_content);
    drop(guest);
    daemon.kill();
    daemon.restart();
    let mut guest = Guest::boot(daemon.connect(), Options::default()).expect("guest");
    guest.assert_reads(0, &new_content);
    fs::remove_file(&path).expect("removed");
    guest.assert_reads(0, &new_content);
}
