//! The journal against its files.

use std::fs;

use super::*;
use crate::units::Sector;

const BOOT: [u8; 36] = [b'a'; 36];

fn mapping(start: u64) -> Mapping {
    Mapping::data(Sector(start), 1, Sector(8 + start)).unwrap()
}

fn known(index: &Path, uuid: Uuid, boot: [u8; 36]) -> Vec<Mapping> {
    let found = read(index, uuid, boot).unwrap();
    found.mappings.iter().map(|(_, mapping)| *mapping).collect()
}

#[test]
fn outlives_its_process_but_not_the_boot() {
    let folder = tempfile::tempdir().unwrap();
    let index = folder.path().join("index");
    let uuid = Uuid::from_u128(1);
    let mut journal = Journal::start(&index, uuid, BOOT, 9).unwrap();
    journal.add(&[mapping(1), mapping(2)]).unwrap();
    assert_eq!(journal.begin_flush().unwrap(), 2);
    journal.add(&[mapping(3)]).unwrap();
    let all = [mapping(1), mapping(2), mapping(3)];
    assert_eq!(known(&index, uuid, BOOT), all);
    assert_eq!(known(&index, uuid, [b'b'; 36]), []);
    assert_eq!(known(&index, Uuid::from_u128(2), BOOT), []);
    // The flush failed: another one does all, and what comes meanwhile is in the same file.
    assert_eq!(journal.begin_flush().unwrap(), 3);
    journal.add(&[mapping(4)]).unwrap();
    assert_eq!(known(&index, uuid, BOOT).len(), 4);
    journal.end_flush(3, 12).unwrap();
    assert_eq!(known(&index, uuid, BOOT), [mapping(4)]);
    let found = read(&index, uuid, BOOT).unwrap();
    assert_eq!(found.first_entry(), Some(12));
    journal.begin_flush().unwrap();
    journal.end_flush(4, 13).unwrap();
    assert_eq!(known(&index, uuid, BOOT), []);
}

#[test]
fn goes_on_where_another_process_left_off() {
    let folder = tempfile::tempdir().unwrap();
    let index = folder.path().join("index");
    let uuid = Uuid::from_u128(1);
    let mut journal = Journal::start(&index, uuid, BOOT, 9).unwrap();
    let mut all = Vec::new();
    let mut entries = 9;
    for round in 0..6 {
        let new = [mapping(2 * round), mapping(2 * round + 1)];
        journal.add(&new).unwrap();
        all.extend(new);
        if round % 3 == 1 {
            journal.begin_flush().unwrap();
        }
        // Part of a record that was on its way.
        let file = &journal.current.file;
        file.write_all_at(&[1; 9], journal.end).unwrap();
        let position = read(&index, uuid, BOOT).unwrap().position.unwrap();
        journal = Journal::resume(&index, uuid, BOOT, position).unwrap();
        assert_eq!(known(&index, uuid, BOOT), all);
        if round == 3 {
            let next = journal.begin_flush().unwrap();
            entries += all.len() as u64;
            journal.end_flush(next, entries).unwrap();
            all.clear();
            assert_eq!(known(&index, uuid, BOOT), []);
        }
    }
    assert_eq!(
        read(&index, uuid, BOOT).unwrap().first_entry(),
        Some(entries)
    );
}

/// Whatever of the end of a flush fails, the index entry of the next mapping is known.
#[test]
fn the_end_of_a_flush_may_fail() {
    let folder = tempfile::tempdir().unwrap();
    let index = folder.path().join("index");
    let mut journal = Journal::start(&index, Uuid::nil(), BOOT, 9).unwrap();
    journal.add(&[mapping(1), mapping(2)]).unwrap();
    let next = journal.begin_flush().unwrap();
    journal.add(&[mapping(3)]).unwrap();
    let healthy = journal.fail().unwrap();
    journal.end_flush(next, 11).unwrap_err();
    journal.heal(healthy);
    let found = read(&index, Uuid::nil(), BOOT).unwrap();
    assert_eq!((found.mappings.len(), found.first_entry()), (3, Some(9)));
    let next = journal.begin_flush().unwrap();
    journal.add(&[mapping(4)]).unwrap();
    journal.end_flush(next, 12).unwrap();
    let found = read(&index, Uuid::nil(), BOOT).unwrap();
    assert_eq!(found.mappings, [(3, mapping(4))]);
    assert_eq!(found.first_entry(), Some(12));
}

#[test]
fn while_the_index_is_written_anew_no_entry_is_known() {
    let folder = tempfile::tempdir().unwrap();
    let index = folder.path().join("index");
    let mut journal = Journal::start(&index, Uuid::nil(), BOOT, 9).unwrap();
    journal.add(&[mapping(1)]).unwrap();
    let next = journal.begin_flush().unwrap();
    journal.begin_rewrite().unwrap();
    let found = read(&index, Uuid::nil(), BOOT).unwrap();
    assert_eq!((found.mappings.len(), found.first_entry()), (1, None));
    journal.end_flush(next, 3).unwrap();
    journal.add(&[mapping(2)]).unwrap();
    let found = read(&index, Uuid::nil(), BOOT).unwrap();
    assert_eq!((found.mappings.len(), found.first_entry()), (1, Some(3)));
}

#[test]
fn what_is_invalidated_does_not_come_back() {
    let folder = tempfile::tempdir().unwrap();
    let index = folder.path().join("index");
    let mut journal = Journal::start(&index, Uuid::nil(), BOOT, 9).unwrap();
    journal.add(&[mapping(1)]).unwrap();
    journal.begin_flush().unwrap();
    journal.add(&[mapping(2)]).unwrap();
    journal.invalidate().unwrap();
    assert_eq!(known(&index, Uuid::nil(), BOOT), []);
    Journal::start(&index, Uuid::nil(), BOOT, 9).unwrap();
    assert_eq!(known(&index, Uuid::nil(), BOOT), []);
}

#[test]
fn the_older_file_is_removed_first() {
    let folder = tempfile::tempdir().unwrap();
    let index = folder.path().join("index");
    let mut journal = Journal::start(&index, Uuid::nil(), BOOT, 9).unwrap();
    for round in 0..4 {
        journal.add(&[mapping(2 * round)]).unwrap();
        let older = journal.current.path.clone();
        let next = journal.begin_flush().unwrap();
        let newer = journal.current.path.clone();
        assert_eq!(oldest_first(&index).unwrap(), [older, newer]);
        journal.end_flush(next, 10 + round).unwrap();
    }
    remove(&index).unwrap();
    assert_eq!(oldest_first(&index).unwrap(), [] as [PathBuf; 0]);
}

#[test]
fn a_journal_of_another_version_is_refused() {
    let folder = tempfile::tempdir().unwrap();
    let index = folder.path().join("index");
    let mut journal = Journal::start(&index, Uuid::nil(), BOOT, 9).unwrap();
    journal.add(&[mapping(1)]).unwrap();
    let JournalFile { path, file } = &journal.current;
    file.write_all_at(b"2", 7).unwrap();
    let error = read(&index, Uuid::nil(), BOOT).unwrap_err();
    assert!(matches!(&error, Error::JournalVersion { path: found } if found == path));
    assert_eq!(known(&index, Uuid::nil(), [b'b'; 36]), []);
}

#[test]
fn a_torn_record_does_not_count() {
    let folder = tempfile::tempdir().unwrap();
    let index = folder.path().join("index");
    let mut journal = Journal::start(&index, Uuid::nil(), BOOT, 9).unwrap();
    journal.add(&[mapping(1), mapping(2)]).unwrap();
    let path = &journal.current.path;
    let whole = fs::read(path).unwrap();
    let first = size_of::<Head>() + size_of::<Record>();
    for cut in 0..whole.len() {
        fs::write(path, &whole[..cut]).unwrap();
        let expected = cut.saturating_sub(first) / size_of::<Record>();
        let found = known(&index, Uuid::nil(), BOOT);
        assert_eq!(found, [mapping(1), mapping(2)][..expected], "{cut}");
    }
    let mut flipped = whole;
    flipped[first + 3] ^= 1;
    fs::write(path, &flipped).unwrap();
    assert_eq!(known(&index, Uuid::nil(), BOOT), []);
}
