//! Everything an upper does to its files, recorded; then a crash after each single step of it, by a
//! killed process or by a power loss, and what the next process finds. Now and then there is no room
//! for the index.

use std::fs::{self, File};
use std::os::unix::fs::FileExt;
use std::path::Path;
use std::thread;
use std::time::Duration;

use common::content::Random;
use common::layers::{self, LayerBuilder};
use common::recorder::{Call, Op, Recorder, after_kill, after_power_loss};
use fuser::Errno;
use ovbd_vhost::format::lsmt::writable::Kind;
use ovbd_vhost::image::Image;
use ovbd_vhost::image::config::Stack;
use ovbd_vhost::image::reader::Reader;
use ovbd_vhost::io::scatter::Scatter;
use ovbd_vhost::tool::seal::seal;
use ovbd_vhost::units::Sector;
use ovbd_vhost::writable::{Error, Options, Paths, Snapshots, Volume, create, resize};
use tempfile::TempDir;
use uuid::Uuid;
use vm_memory::VolatileSlice;

const SECTORS: u64 = 96;
/// Small, so that flushes by themselves and new logs happen.
const OPTIONS: Options = Options {
    limit: u64::MAX,
    default_size: 0,
    max_pending: 9,
    log_slack: 4,
    max_log: 1 << 20,
};

type Content = [u8; 512];

/// What a sector reads as where the upper has nothing.
const BELOW: Content = [0xBB; 512];

/// One thing the guest did.
struct Step {
    /// When it began and ended, by the recorder's count.
    began: usize,
    ended: usize,
    /// What the sectors it touched hold afterwards.
    changed: Vec<(usize, Content)>,
    is_flush: bool,
    /// The name of the snapshot that was taken, and what it holds.
    snapshot: Option<(String, Vec<Content>)>,
}

fn paths(folder: &Path) -> Paths {
    Paths {
        data: folder.join("data"),
        index: folder.join("index"),
    }
}

/// A layer that holds [`BELOW`] everywhere.
fn below() -> (TempDir, Stack) {
    let folder = tempfile::tempdir().unwrap();
    let layer = LayerBuilder::new(SECTORS * 512).data(0, [BELOW; SECTORS as usize].as_flattened());
    let path = layers::write(folder.path(), "below.obd", &layer.lsmt());
    (folder, Stack::new([path]))
}

fn open(folder: &Path, stack: &Stack) -> (Volume, Snapshots) {
    Snapshots::open(stack, &paths(folder), OPTIONS).unwrap()
}

/// From now on there is no room for a longer index of any upper.
fn fill(recorder: &Recorder) {
    for name in recorder.names() {
        let name = name.to_str().unwrap();
        if name.starts_with("index") && !name.contains("journal") {
            recorder.fail(Call::Write, name, Errno::ENOSPC);
            recorder.fail(Call::Create, &format!("{name}.new"), Errno::ENOSPC);
        }
    }
}

fn write(volume: &Volume, start: Sector, content: &mut [Content]) -> Result<(), Error> {
    let sectors = content.len() as u64;
    let mut scatter = Scatter::new();
    scatter.push(VolatileSlice::from(content.as_flattened_mut()));
    volume.write(start, sectors, scatter.cursor(0))
}

/// Gives the running system another name than the one in the journals.
fn start_machine(folder: &Path) {
    for file in fs::read_dir(folder).unwrap() {
        let path = file.unwrap().path();
        let extension = path.extension().unwrap_or_default();
        if extension.to_string_lossy().starts_with("journal") {
            let file = File::options().write(true).open(path).unwrap();
            file.write_all_at(b"another start", 8).unwrap();
        }
    }
}

fn make(recorder: &Recorder, kind: Kind) {
    let header = layers::upper_header(SECTORS * 512, Uuid::new_v4());
    create(&paths(recorder.path()), kind, &header).unwrap();
}

/// Makes an upper and works on it; returns what was done.
fn work(recorder: &Recorder, stack: &Stack, kind: Kind, random: &mut Random) -> Vec<Step> {
    make(recorder, kind);
    let mut device = open(recorder.path(), stack);
    let mut steps = Vec::new();
    let mut full = false;
    for number in 0..80_u32 {
        let start = random.below(SECTORS);
        let sectors = (1 + random.below(12)).min(SECTORS - start);
        let range = start as usize..(start + sectors) as usize;
        let began = recorder.position();
        let mut zeros = Vec::new();
        zeros.extend(range.clone().map(|sector| (sector, [0; 512])));
        let (volume, snapshots) = &device;
        let start = Sector(start);
        let mut is_flush = false;
        let mut snapshot = None;
        let mut changed = Vec::new();
        let done = match random.below(24) {
            0..=3 => {
                let flushed = volume.flush();
                is_flush = flushed.is_ok();
                flushed
            }
            4 | 5 => {
                changed = zeros;
                volume.discard(start, sectors)
            }
            6 | 7 => {
                changed = zeros;
                volume.write_zeroes(start, sectors, false)
            }
            8 => {
                drop(device);
                device = open(recorder.path(), stack);
                is_flush = !full;
                Ok(())
            }
            9 => {
                let name = format!("snapshot {number}");
                snapshots.take(volume, &name).map(|taken| {
                    assert_eq!(snapshots.take(volume, &name).unwrap(), taken);
                    snapshot = Some((name, content(volume)));
                    is_flush = true;
                })
            }
            10 | 11 => {
                full = !full;
                match full {
                    true => fill(recorder),
                    false => recorder.heal(),
                }
                Ok(())
            }
            12 | 13 => snapshots.seal(volume),
            _ => {
                let mut content = Vec::new();
                for sector in range.clone() {
                    let mut bytes = [sector as u8; 512];
                    bytes[..4].copy_from_slice(&(number + 1).to_le_bytes());
                    content.push(bytes);
                }
                let written = write(volume, start, &mut content);
                changed = range.zip(content).collect();
                written
            }
        };
        assert!(full || done.is_ok(), "{done:?}");
        if done.is_err() {
            // Old or new, from now on it is what it is.
            let now = content(&device.0);
            changed
                .iter_mut()
                .for_each(|(sector, content)| *content = now[*sector]);
        }
        steps.push(Step {
            began,
            ended: recorder.position(),
            changed,
            is_flush,
            snapshot,
        });
    }
    steps
}

fn content(volume: &Volume) -> Vec<Content> {
    let mut content = vec![BELOW; SECTORS as usize];
    let into = content.as_flattened_mut();
    volume.read(&mut Reader::new(), Sector(0), into).unwrap();
    content
}

/// Where the crashes' leftovers are written: in memory, for there are thousands.
fn leftovers() -> TempDir {
    let memory = Path::new("/dev/shm");
    match memory.is_dir() {
        true => tempfile::tempdir_in(memory).unwrap(),
        false => tempfile::tempdir().unwrap(),
    }
}

/// What is left when the process dies after it did what `log` says.
fn folder_after(log: &[Op]) -> TempDir {
    let folder = leftovers();
    after_kill(log, folder.path());
    folder
}

/// What is left when a process that opens what is in `folder`, with room or without, dies at each
/// step of that.
fn die_while_opening(folder: &Path, stack: &Stack, full: bool) -> Vec<TempDir> {
    let recorder = Recorder::mount();
    for file in fs::read_dir(folder).unwrap() {
        let path = file.unwrap().path();
        let name = path.file_name().unwrap();
        fs::write(recorder.path().join(name), fs::read(&path).unwrap()).unwrap();
    }
    let began = recorder.position();
    if full {
        fill(&recorder);
    }
    drop(open(recorder.path(), stack));
    let log = recorder.log();
    (began..=log.len())
        .map(|at| folder_after(&log[..at]))
        .collect()
}

fn crash_everywhere(kind: Kind, seed: u64) {
    let recorder = Recorder::mount();
    let mut random = Random::new(seed);
    let (_folder, stack) = below();
    let steps = work(&recorder, &stack, kind, &mut random);
    let log = recorder.log();
    for at in steps[0].began..=log.len() {
        let begun = || steps.iter().filter(|step| step.began < at);
        let over = || steps.iter().filter(|step| step.ended <= at);
        let snapshot = over().filter_map(|step| step.snapshot.as_ref()).next_back();

        // The process dies: what was answered is there; what was under way, in part.
        let folder = folder_after(&log[..at]);
        let mut expected = vec![vec![BELOW]; SECTORS as usize];
        for (sector, content) in over().flat_map(|step| &step.changed) {
            expected[*sector] = vec![*content];
        }
        for step in begun().filter(|step| step.ended > at) {
            for (sector, content) in &step.changed {
                expected[*sector].push(*content);
            }
        }
        check(folder.path(), &stack, &expected, snapshot, || {
            format!(
                "{kind:?}, seed {seed}: killed at {at} of {}: {:?}",
                log.len(),
                log.get(at)
            )
        });

        // The next process dies as well, before it has even begun to serve.
        if at % 5 == 0 {
            let full = at % 10 == 0;
            for again in die_while_opening(folder_after(&log[..at]).path(), &stack, full) {
                check(again.path(), &stack, &expected, snapshot, || {
                    format!("{kind:?}, seed {seed}: killed at {at}, and again while opening")
                });
            }
        }

        // The power fails: what was flushed is there; of what came later, anything may be.
        let flush = over()
            .filter(|step| step.is_flush)
            .map(|step| step.began)
            .max();
        let flushed = |step: &&Step| flush.is_some_and(|flush| step.ended <= flush);
        let mut expected = vec![vec![BELOW]; SECTORS as usize];
        for step in begun() {
            for (sector, content) in &step.changed {
                match flushed(&step) {
                    true => expected[*sector] = vec![*content],
                    false => expected[*sector].push(*content),
                }
            }
        }
        for luck in 0..4 {
            let folder = leftovers();
            after_power_loss(&log[..at], folder.path(), || match luck {
                0 => false,
                1 => true,
                _ => random.coin(),
            });
            start_machine(folder.path());
            check(folder.path(), &stack, &expected, snapshot, || {
                format!(
                    "{kind:?}, seed {seed}: no power at {at} of {}, luck {luck}",
                    log.len()
                )
            });
        }
    }
}

/// Asserts that the next process finds in `folder` what is `expected`, and the last snapshot that was
/// answered.
fn check(
    folder: &Path,
    stack: &Stack,
    expected: &[Vec<Content>],
    snapshot: Option<&(String, Vec<Content>)>,
    when: impl Fn() -> String,
) {
    let (volume, snapshots) = open(folder, stack);
    if let Some((name, held)) = snapshot {
        let list = snapshots.list(&volume);
        let found = list.iter().find(|found| found.name == *name);
        let found = found.unwrap_or_else(|| panic!("{}: no {name} in {list:?}", when()));
        let image = Image::open(&Stack::new(&found.layers)).unwrap();
        assert!(
            content(&Volume::read_only(image)) == *held,
            "{}: {name}",
            when()
        );
    }
    for (sector, (found, possible)) in content(&volume).iter().zip(expected).enumerate() {
        assert!(
            possible.contains(found),
            "{}: sector {sector} holds {:?}, files {:?}",
            when(),
            &found[..8],
            fs::read_dir(folder)
                .unwrap()
                .map(|file| file.unwrap().file_name())
                .collect::<Vec<_>>()
        );
    }
}

/// An index that points past the end of the data, as one whose data was never durable does, does not
/// come to point at what is appended, however far sealing or resizing got.
#[test]
fn what_is_appended_is_no_data() {
    for kind in [Kind::Append, Kind::Hybrid, Kind::Sparse] {
        let recorder = Recorder::mount();
        let (_folder, stack) = below();
        make(&recorder, kind);
        let paths = paths(recorder.path());
        let (volume, _) = open(recorder.path(), &stack);
        write(&volume, Sector(10), &mut [[1; 512]; 8]).unwrap();
        write(&volume, Sector(90), &mut [[2; 512]]).unwrap();
        volume.flush().unwrap();
        drop(volume);
        let sectors = match kind {
            Kind::Sparse => 90,
            _ => 8,
        };
        let data = File::options().write(true).open(&paths.data).unwrap();
        data.set_len(4096 + sectors * 512).unwrap();
        drop(data);
        let began = recorder.position();
        match kind {
            Kind::Sparse => drop(resize(&paths, 2 * SECTORS * 512, false).unwrap()),
            _ => drop(seal(&paths).unwrap()),
        }
        let mut expected = vec![BELOW; SECTORS as usize];
        expected[10..18].fill([1; 512]);
        let log = recorder.log();
        assert!(log.len() > began + 5);
        for at in began..=log.len() {
            let folder = folder_after(&log[..at]);
            let data = self::paths(folder.path()).data;
            let opened = Snapshots::open(&stack, &self::paths(folder.path()), OPTIONS);
            let volume = match opened {
                Err(Error::Sealed { .. }) => {
                    let layers = stack.layers().iter().chain([&data]);
                    Volume::read_only(Image::open(&Stack::new(layers)).unwrap())
                }
                opened => opened.unwrap().0,
            };
            assert!(content(&volume) == expected, "{kind:?}: killed at {at}");
        }
    }
}

/// A process is killed before the name of its new index, or of its files, is durable. What the next one
/// answers a flush for is there all the same after a power loss.
#[test]
fn names_that_were_not_durable() {
    let killed_after = |last: fn(&Op) -> bool| {
        let recorder = Recorder::mount();
        let (_folder, stack) = below();
        make(&recorder, Kind::Hybrid);
        for round in 0..40_u8 {
            let (volume, _) = open(recorder.path(), &stack);
            for sector in [0, 2, 1, 0, 2, 1] {
                write(&volume, Sector(sector), &mut [[round; 512]]).unwrap();
                volume.discard(Sector(sector), 1).unwrap();
            }
            volume.flush().unwrap();
        }
        let log = recorder.log();
        let steps = log.iter().zip(&log[1..]).enumerate();
        let unsynced = steps.filter(|(_, (op, next))| last(op) && matches!(next, Op::SyncFolder));
        let cuts: Vec<_> = unsynced.map(|(at, _)| at + 1).collect();
        assert!(!cuts.is_empty());
        // Everything but the sync came before the kill: what the next process sees is the same.
        let (volume, _) = open(recorder.path(), &stack);
        write(&volume, Sector(50), &mut [[99; 512]]).unwrap();
        volume.flush().unwrap();
        let mut log = recorder.log();
        for cut in cuts.into_iter().rev() {
            log.remove(cut);
        }
        let folder = leftovers();
        after_power_loss(&log, folder.path(), || false);
        start_machine(folder.path());
        assert_eq!(content(&open(folder.path(), &stack).0)[50], [99; 512]);
    };
    killed_after(|op| matches!(op, Op::Rename { .. }));
    killed_after(|op| matches!(op, Op::Link { .. } | Op::Remove { .. }));
}

/// While the folder with a new list is made durable, writes go on; what says that they last waits.
#[test]
fn writes_do_not_wait_until_the_list_lasts() {
    let recorder = Recorder::mount();
    let (_folder, stack) = below();
    make(&recorder, Kind::Hybrid);
    let (volume, snapshots) = open(recorder.path(), &stack);
    write(&volume, Sector(0), &mut [[1; 512]]).unwrap();
    volume.flush().unwrap();
    let mut expected = vec![vec![BELOW]; SECTORS as usize];
    expected[0] = vec![[1; 512]];
    let mut random = Random::new(7);
    let held = recorder.hold_folder_syncs("data.snapshots");
    thread::scope(|scope| {
        let taken = scope.spawn(|| snapshots.take(&volume, "one").map(drop));
        held.wait();
        write(&volume, Sector(1), &mut [[2; 512]]).unwrap();
        let flushed = scope.spawn(|| volume.flush());
        let sealed = scope.spawn(|| snapshots.seal(&volume));
        let waiting = [taken, flushed, sealed];
        thread::sleep(Duration::from_millis(50));
        assert!(waiting.iter().all(|thread| !thread.is_finished()));

        let log = recorder.log();
        expected[1] = vec![[2; 512]];
        let killed = folder_after(&log);
        check(killed.path(), &stack, &expected, None, || "killed".into());
        expected[1] = vec![BELOW, [2; 512]];
        for luck in 0..20 {
            let folder = leftovers();
            after_power_loss(&log, folder.path(), || match luck {
                0 => false,
                1 => true,
                _ => random.coin(),
            });
            start_machine(folder.path());
            check(folder.path(), &stack, &expected, None, || {
                format!("no power, luck {luck}")
            });
        }
        drop(held);
        for thread in waiting {
            thread.join().unwrap().unwrap();
        }
    });
    let now = content(&volume);
    expected[1] = vec![[2; 512]];
    let folder = leftovers();
    after_power_loss(&recorder.log(), folder.path(), || false);
    start_machine(folder.path());
    let snapshot = ("one".to_owned(), {
        let mut held = now;
        held[1] = BELOW;
        held
    });
    check(folder.path(), &stack, &expected, Some(&snapshot), || {
        "no power afterwards".into()
    });
}

/// What the index points at is not written to before it points elsewhere, whoever opens the layer
/// meanwhile.
#[test]
fn space_is_not_used_again_before_a_flush() {
    for kind in [Kind::Append, Kind::Hybrid] {
        let recorder = Recorder::mount();
        let (_folder, stack) = below();
        make(&recorder, kind);
        let (volume, _) = open(recorder.path(), &stack);
        write(&volume, Sector(0), &mut [[1; 512]; 8]).unwrap();
        volume.flush().unwrap();
        fill(&recorder);
        volume.discard(Sector(0), 8).unwrap();
        drop(volume);
        let (volume, _) = open(recorder.path(), &stack);
        write(&volume, Sector(40), &mut [[2; 512]; 8]).unwrap();
        let folder = leftovers();
        after_power_loss(&recorder.log(), folder.path(), || true);
        start_machine(folder.path());
        let mut expected = vec![vec![BELOW]; SECTORS as usize];
        expected[..8].fill(vec![[0; 512], [1; 512]]);
        expected[40..48].fill(vec![BELOW, [2; 512]]);
        check(folder.path(), &stack, &expected, None, || {
            format!("{kind:?}")
        });

        recorder.heal();
        volume.flush().unwrap();
        write(&volume, Sector(60), &mut [[3; 512]; 8]).unwrap();
        let len = fs::metadata(paths(recorder.path()).data).unwrap().len();
        assert_eq!(len, 4096 + 16 * 512, "what is free is used");
    }
}

#[test]
fn append() {
    (1..4).for_each(|seed| crash_everywhere(Kind::Append, seed));
}

#[test]
fn sparse() {
    (11..14).for_each(|seed| crash_everywhere(Kind::Sparse, seed));
}

#[test]
fn hybrid() {
    (21..24).for_each(|seed| crash_everywhere(Kind::Hybrid, seed));
}
