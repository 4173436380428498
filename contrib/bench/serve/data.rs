//! The data set: one ext4 image of real files, in every form that is served. Made once and kept.

use std::fs::{self, File};
use std::io;
use std::os::unix::fs::{FileExt, symlink};
use std::path::{Path, PathBuf};
use std::process::Command;

use rustix::fs::{Advice, fadvise};

use crate::Result;

/// Contiguous bytes that go to one layer of several.
const PART: usize = 256 << 10;

/// How an OverlayBD layer stores its blocks.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Form {
    /// Name for files and reports.
    pub name: &'static str,
    /// Arguments of `ovbd create`.
    arguments: &'static [&'static str],
}

/// The forms of layers.
pub const FORMS: [Form; 4] = [
    Form {
        name: "lz4",
        arguments: &["--algorithm", "lz4"],
    },
    Form {
        name: "lz4-32k",
        arguments: &["--algorithm", "lz4", "--block-size", "32K"],
    },
    Form {
        name: "zstd",
        arguments: &["--algorithm", "zstd"],
    },
    Form {
        name: "plain",
        arguments: &["--algorithm", "none"],
    },
];

/// Where the files are, or will be.
pub struct Data {
    /// Directory of this size's files.
    pub dir: PathBuf,
    /// MiB of the disk.
    pub size: u64,
    /// Directory whose files the file system holds.
    pub source: PathBuf,
    /// The image tool.
    pub tool: PathBuf,
}

impl Data {
    /// The file `name`, made by `make` if it is not there.
    fn once(&self, name: &str, make: impl FnOnce(&Path) -> Result<()>) -> Result<PathBuf> {
        let path = self.dir.join(name);
        if !path.exists() {
            eprintln!("making {}", path.display());
            let unfinished = self.dir.join("unfinished");
            let _ = fs::remove_dir_all(&unfinished);
            let _ = fs::remove_file(&unfinished);
            make(&unfinished)?;
            fs::rename(&unfinished, &path)?;
        }
        Ok(path)
    }

    /// The disk as it is.
    pub fn raw(&self) -> Result<PathBuf> {
        fs::create_dir_all(&self.dir)?;
        self.once("raw.img", |path| {
            let files = self.dir.join("files");
            let _ = fs::remove_dir_all(&files);
            // Leaves room for what the file system itself needs.
            let mut room = (self.size << 20) / 100 * 93;
            copy_tree(&self.source, &files, &mut room)?;
            if room > self.size << 18 {
                return Err(format!("{} holds too few files", self.source.display()).into());
            }
            let mut command = Command::new("mke2fs");
            command.args([
                "-q",
                "-t",
                "ext4",
                "-m",
                "0",
                "-O",
                "^has_journal",
                "-i",
                "8192",
                "-d",
            ]);
            run(command.arg(&files).arg(path).arg(format!("{}M", self.size)))?;
            Ok(fs::remove_dir_all(&files)?)
        })
    }

    /// The disk as OverlayBD layers, bottom first.
    pub fn layers(&self, form: Form, count: usize) -> Result<Vec<PathBuf>> {
        if count == 1 {
            let raw = self.raw()?;
            let name = format!("{}.obd", form.name);
            return Ok(vec![
                self.once(&name, |path| self.create(form, &raw, path))?,
            ]);
        }
        let dir = self.once(&format!("{}-{count}", form.name), |dir| {
            let parts = self.parts(count)?;
            fs::create_dir(dir)?;
            for (number, part) in parts.iter().enumerate() {
                self.create(form, part, &dir.join(format!("{number:03}.obd")))?;
            }
            Ok(())
        })?;
        list(&dir)
    }

    /// A layer of the disk's size that holds nothing.
    pub fn empty(&self) -> Result<PathBuf> {
        self.once("empty.obd", |path| {
            let nothing = self.dir.join("nothing");
            File::create(&nothing)?.set_len(self.size << 20)?;
            self.create(FORMS[0], &nothing, path)?;
            Ok(fs::remove_file(nothing)?)
        })
    }

    fn create(&self, form: Form, from: &Path, to: &Path) -> Result<()> {
        let mut command = Command::new(&self.tool);
        run(command
            .arg("create")
            .args(form.arguments)
            .arg("--from")
            .arg(from)
            .arg(to))
    }

    /// The disk as a qcow2 file, compressed if a way to do so is given.
    pub fn qcow2(&self, compression: Option<&str>) -> Result<PathBuf> {
        let raw = self.raw()?;
        self.once(
            &format!("{}.qcow2", compression.unwrap_or("plain")),
            |path| {
                let mut command = Command::new("qemu-img");
                command.args(["convert", "-f", "raw", "-O", "qcow2"]);
                if let Some(compression) = compression {
                    command.args(["-c", "-o", &format!("compression_type={compression}")]);
                }
                run(command.arg(raw).arg(path))
            },
        )
    }

    /// The disk as a chain of qcow2 files, bottom first.
    pub fn chain(&self, count: usize) -> Result<Vec<PathBuf>> {
        let dir = self.once(&format!("chain-{count}"), |dir| {
            let parts = self.parts(count)?;
            fs::create_dir(dir)?;
            for (number, part) in parts.iter().enumerate() {
                let path = dir.join(format!("{number:03}.qcow2"));
                let mut create = Command::new("qemu-img");
                create.args(["create", "-q", "-f", "qcow2"]);
                if number > 0 {
                    create.args(["-F", "qcow2", "-b", &format!("{:03}.qcow2", number - 1)]);
                }
                run(create.arg(&path).arg(format!("{}M", self.size)))?;
                // Zeros of the part are left out, so that what is below shows.
                let mut fill = Command::new("qemu-img");
                fill.args([
                    "convert",
                    "-n",
                    "--target-is-zero",
                    "-f",
                    "raw",
                    "-O",
                    "qcow2",
                ]);
                run(fill.arg(part).arg(path))?;
            }
            Ok(())
        })?;
        list(&dir)
    }

    /// Raw images with holes that together make up the disk.
    fn parts(&self, count: usize) -> Result<Vec<PathBuf>> {
        let raw = self.raw()?;
        let dir = self.once(&format!("parts-{count}"), |dir| {
            fs::create_dir(dir)?;
            let raw = File::open(raw)?;
            let name = |number| dir.join(format!("{number:03}.img"));
            let files = (0..count).map(|number| File::create(name(number)));
            let files = files.collect::<io::Result<Vec<_>>>()?;
            let len = self.size << 20;
            let mut bytes = vec![0; PART];
            for (number, offset) in (0u64..).zip((0..len).step_by(PART)) {
                raw.read_exact_at(&mut bytes, offset)?;
                // Neighbours go to layers far apart, and each layer gets as much.
                let owner = (number.wrapping_mul(0x9e37_79b9_7f4a_7c15) >> 40) as usize % count;
                files[owner].write_all_at(&bytes, offset)?;
            }
            files.iter().try_for_each(|file| file.set_len(len))?;
            Ok(())
        })?;
        list(&dir)
    }
}

/// Reads files, so that the page cache holds them.
pub fn warm(files: &[PathBuf]) -> Result<()> {
    for file in files {
        io::copy(&mut File::open(file)?, &mut io::sink())?;
    }
    Ok(())
}

/// Makes the page cache forget files that no process has mapped.
pub fn forget(files: &[PathBuf]) -> Result<()> {
    for file in files {
        let file = File::open(file)?;
        // What was not written yet would stay.
        file.sync_all()?;
        fadvise(&file, 0, None, Advice::DontNeed)?;
    }
    Ok(())
}

/// Copies files, directories and links while there is room.
fn copy_tree(from: &Path, to: &Path, room: &mut u64) -> io::Result<()> {
    fs::create_dir_all(to)?;
    let mut entries = fs::read_dir(from)?.collect::<io::Result<Vec<_>>>()?;
    entries.sort_by_key(|entry| entry.file_name());
    for entry in entries {
        let (kind, target) = (entry.file_type()?, to.join(entry.file_name()));
        // A block for the directory entry and the inode, roughly.
        let cost = entry.metadata()?.len().next_multiple_of(4096) + 512;
        if cost > *room {
            continue;
        }
        if kind.is_dir() {
            *room -= cost;
            copy_tree(&entry.path(), &target, room)?;
        } else if kind.is_symlink() {
            *room -= cost;
            symlink(fs::read_link(entry.path())?, target)?;
        } else if kind.is_file() && File::open(entry.path()).is_ok() {
            *room -= cost;
            fs::copy(entry.path(), target)?;
        }
    }
    Ok(())
}

/// The files in a directory, by name.
fn list(dir: &Path) -> Result<Vec<PathBuf>> {
    let entries = fs::read_dir(dir)?.map(|entry| entry.map(|entry| entry.path()));
    let mut paths = entries.collect::<io::Result<Vec<_>>>()?;
    paths.sort();
    Ok(paths)
}

fn run(command: &mut Command) -> Result<()> {
    let status = command.status();
    let status = status.map_err(|error| format!("{}: {error}", command.get_program().display()))?;
    match status.success() {
        true => Ok(()),
        false => Err(format!("{command:?}: {status}").into()),
    }
}
