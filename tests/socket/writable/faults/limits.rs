//! Files that are cut short, and limits of the process.

use super::*;

/// Fails where its data is gone, and nowhere else; and does not make up what was there.
#[test]
fn data_cut_short() {
    for io in ["uring", "pread"] {
        let mut disk = Writable::serve_with(&["--io", io]);
        let mut guest = disk.plain_guest();
        let mut model = disk.content.to_vec();
        for sector in 0..3 {
            let data = tagged((LEN * SECTOR) as usize, sector);
            write(&mut guest, &mut model, sector * 100, &data);
        }
        guest.flush(0);
        let path = disk.file("upper.data");
        let whole = fs::read(&path).unwrap();
        let file = File::options().write(true).open(&path).unwrap();
        let middle = 4096 + (LEN + LEN / 2) * SECTOR;
        file.set_len(middle).unwrap();
        let mut expect = |guest: &mut Guest, sector: u64, sectors: u64, status: u8| {
            let answer = guest.request(0, IN, sector, (sectors * SECTOR) as u32);
            assert_eq!(answer.status, status, "{io}: {sectors} sectors at {sector}");
            if status == OK {
                assert!(answer.data == *part(&mut model, sector, sectors), "{io}");
            }
        };
        for _ in 0..2 {
            expect(&mut guest, 0, LEN, OK);
            expect(&mut guest, 100, LEN / 2, OK);
            expect(&mut guest, 100, LEN, IOERR);
            expect(&mut guest, 208, 1, IOERR);
            expect(&mut guest, 500, LEN, OK);
            // A write behind the end would make zeros of what is missing.
            let data = tagged((LEN * SECTOR) as usize, 9);
            for sector in [200, 4000, 0] {
                assert_eq!(guest.send(0, OUT, sector, &data), IOERR, "{io}");
            }
            let zeros = guest.send(0, WRITE_ZEROES, 0, &range(204, 2, 0));
            assert_eq!(zeros, IOERR, "{io}");
            assert_eq!(guest.send(0, FLUSH, 0, &[]), IOERR, "{io}");
        }
        let log = disk.daemon.log();
        assert!(log.contains("upper.data") && log.contains(&middle.to_string()));
        fs::write(&path, whole).unwrap();
        guest.flush(0);
        assert_beginning(&mut guest, &model);
        let data = tagged((LEN * SECTOR) as usize, 77);
        write(&mut guest, &mut model, 4000, &data);
        guest.flush(0);
        disk.lose_power();
        assert_beginning(&mut disk.plain_guest(), &model);
    }
}

/// Everything in it is in memory as well: the next flush makes it anew.
#[test]
fn an_index_cut_short() {
    for len in [0, 100, 4096, 4096 + 20] {
        for more in [false, true] {
            let mut disk = Writable::serve();
            let mut guest = disk.plain_guest();
            let mut model = disk.content.to_vec();
            let mut put = |guest: &mut Guest, sector: u64| {
                let data = tagged((LEN * SECTOR) as usize, sector);
                write(guest, &mut model, sector, &data);
            };
            for sector in 0..3 {
                put(&mut guest, sector * 100);
                guest.flush(0);
            }
            let file = File::options().write(true).open(disk.file("upper.index"));
            file.unwrap().set_len(len).unwrap();
            if more {
                put(&mut guest, 5000);
            }
            guest.flush(0);
            put(&mut guest, 4000);
            guest.flush(0);
            disk.lose_power();
            assert_beginning(&mut disk.plain_guest(), &model);
        }
    }
}

/// Sets a soft limit of the running daemon; the hard one stays.
fn limit(daemon: &Daemon, resource: Resource, current: Option<u64>) {
    let maximum = getrlimit(resource).maximum;
    let current = current.or(maximum);
    prlimit(Some(daemon.pid()), resource, Rlimit { current, maximum }).expect("prlimit");
}

#[test]
fn files_as_long_as_a_process_may_make_them() {
    let mut fixture = Fixture::new(Writable::serve());
    let mut guest = fixture.disk.plain_guest();
    fixture.write(&mut guest, 0);
    guest.flush(0);
    let len = fs::metadata(fixture.disk.file("upper.data")).unwrap().len();
    limit(&fixture.disk.daemon, Resource::Fsize, Some(len + 1024));
    fixture.fail_to_write(&mut guest, 1000);
    fixture.write(&mut guest, 0);
    guest.flush(0);
    limit(&fixture.disk.daemon, Resource::Fsize, Some(80));
    fixture.fail_to_write(&mut guest, 1000);
    assert_eq!(guest.send(0, DISCARD, 0, &range(4, 2, 0)), IOERR);
    limit(&fixture.disk.daemon, Resource::Fsize, None);
    fixture.assert_well(&mut guest);
}

#[test]
fn out_of_descriptors() {
    let folder = tempfile::tempdir().unwrap();
    let socket = folder.path().join("control");
    let options = ["--control", socket.to_str().unwrap()];
    let mut fixture = Fixture::new(Writable::serve_with(&options));
    let mut guest = fixture.disk.plain_guest();
    fixture.write(&mut guest, 0);
    // One for the connection that asks.
    let open = fixture.disk.daemon.count("fd") as u64 + 1;
    limit(&fixture.disk.daemon, Resource::Nofile, Some(open));
    fixture.write(&mut guest, 100);
    guest.flush(0);
    let take = || ask(&socket, "POST", "/api/v1/snapshots", "{\"name\": \"a\"}").unwrap();
    let (status, said) = take();
    assert_eq!(status, 500, "{said}");
    fixture.write(&mut guest, 200);
    guest.flush(0);
    limit(&fixture.disk.daemon, Resource::Nofile, None);
    let (status, said) = take();
    assert_eq!(status, 200, "{said}");
    fixture.assert_well(&mut guest);
}
