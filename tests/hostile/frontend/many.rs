//! Many connections, good and bad.

use super::*;

/// Lines of the daemon's log about connections it dropped.
fn dropped(disk: &Disk) -> usize {
    disk.daemon.log().matches("dropped the connection").count()
}

/// Lines of the daemon's log about front-ends, and how many they say were left out.
fn complaints(disk: &Disk) -> (u64, u64) {
    let log = disk.daemon.log();
    let lines = log.lines().filter(|line| line.contains(" WARN "));
    lines.fold((0, 0), |(lines, left_out), line| {
        let note = line.strip_suffix(" lines left out before it)");
        let number = note.and_then(|note| note.rsplit_once('(')?.1.parse().ok());
        (lines + 1, left_out + number.unwrap_or(0))
    })
}

fn a_bad_connection_is_logged(mut disk: Disk) {
    const MANY: u64 = 2000;
    /// What the log takes at once; after that it takes one line a second.
    const BURST: u64 = 32;
    let bad = message(1000, VERSION, 0, &[]);
    let break_rules = |disk: &Disk| {
        let mut raw = connect(disk);
        if raw.send_bytes(&bad, &[]) {
            raw.assert_closed();
        }
    };
    let start = Instant::now();
    break_rules(&disk);
    disk.assert_well();
    assert_eq!(dropped(&disk), 1, "{}", disk.daemon.log());
    for _ in 1..MANY {
        break_rules(&disk);
    }
    disk.assert_well();
    let most = BURST + start.elapsed().as_secs() + 1;
    let (lines, left_out) = complaints(&disk);
    assert!(
        (BURST..=most).contains(&lines),
        "{lines} lines, {most} at most"
    );
    // The next line there is room for counts all that were left out.
    let mut connections = MANY;
    while complaints(&disk).1 == left_out {
        assert!(start.elapsed() < 2 * PATIENCE, "no line any more");
        thread::sleep(Duration::from_millis(100));
        break_rules(&disk);
        disk.assert_well();
        connections += 1;
    }
    let (lines, left_out) = complaints(&disk);
    let said = lines + left_out;
    // A connection may also have replaced the one before.
    assert!(
        (connections..=2 * connections).contains(&said),
        "{lines} lines and {left_out} left out of {connections} connections"
    );
}

#[test]
fn a_bad_connection_is_logged_once_and_many_do_not_flood_the_log() {
    a_bad_connection_is_logged(Disk::serve());
}

#[test]
fn a_bad_connection_to_a_writable_device_is_logged_once() {
    let folder = tempfile::tempdir().expect("temporary directory");
    a_bad_connection_is_logged(writable(&folder));
}

/// The same disk, with a writable layer in `folder`.
fn writable(folder: &TempDir) -> Disk {
    let path = folder.path().to_str().expect("UTF-8");
    Disk::serve_with(&["--upper-auto", path])
}

fn connections_leave_nothing_behind(mut disk: Disk, mut use_it: impl FnMut(&mut Guest)) {
    let mut use_once = |disk: &Disk| {
        let mut guest = disk.guest(Options::default());
        guest.assert_reads(0, &disk.content);
        use_it(&mut guest);
    };
    use_once(&disk);
    disk.assert_well();
    let count = |disk: &Disk| (disk.daemon.count("fd"), disk.daemon.count("task"));
    let before = settled(&disk, count);
    // Threads that live at a time take memory, of which some is kept: the least of many looks counts.
    let (mut first, mut second) = (u64::MAX, u64::MAX);
    for round in 0..10_000 {
        if round % 50 == 49 {
            let memory = disk.daemon.private_kib();
            match round {
                0..2000 => {}
                2000..6000 => first = first.min(memory),
                _ => second = second.min(memory),
            }
        }
        let raw = connect(&disk);
        match round % 100 {
            0 => drop(negotiated(&disk)),
            1 => use_once(&disk),
            2..50 => {
                raw.send(FrontendReq::GET_FEATURES, 0, &[], &[]);
            }
            _ => {}
        }
    }
    disk.assert_well();
    assert_eq!(settled(&disk, count), before, "descriptors and threads");
    // A hundred bytes of each of 4,000 connections would be 390 KiB.
    let grown = second.saturating_sub(first);
    assert!(grown < 300, "private memory grew by {grown} KiB");
}

#[test]
fn thousands_of_connections_leave_nothing_behind() {
    connections_leave_nothing_behind(Disk::serve(), |_| {});
}

#[test]
fn thousands_of_connections_to_a_writable_device_leave_nothing_behind() {
    let folder = tempfile::tempdir().expect("temporary directory");
    let disk = writable(&folder);
    // Where the tests read, what is there already; elsewhere anything.
    let same = disk.expected(0, 4096).to_vec();
    connections_leave_nothing_behind(disk, |guest| {
        guest.write(0, 0, &same);
        guest.write(0, 999, &same);
        for (kind, sector) in [(DISCARD, 1001), (WRITE_ZEROES, 1003)] {
            assert_eq!(guest.send(0, kind, 0, &range(sector, 2, 0)), OK);
        }
        guest.flush(0);
    });
}

/// The counts once they no longer change: connections end after their peer did.
fn settled(disk: &Disk, count: impl Fn(&Disk) -> (usize, usize)) -> (usize, usize) {
    let (mut last, mut same) = (count(disk), 0);
    let start = Instant::now();
    while same < 20 {
        assert!(start.elapsed() < PATIENCE, "still changing: {last:?}");
        thread::sleep(Duration::from_millis(10));
        let now = count(disk);
        same = if now == last { same + 1 } else { 0 };
        last = now;
    }
    last
}
