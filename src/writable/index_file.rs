//! The index file of a writable layer: a header, and mappings in the order of arrival.

use std::fs::{self, File};
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use super::Error;
use super::files::{sync_name, with_suffix};
use crate::format::lsmt::writable::{decode_log_header, encode_log_header};
use crate::format::lsmt::{ENTRY_LEN, HEADER_LEN, Header, Mapping};
use crate::io::regular::open_regular;

/// Most entries of a log, as upstream has it.
pub const MAX_ENTRIES: u64 = 128_000_000;

/// Entries read or written at a time.
const CHUNK: usize = 65536;

/// An open index file.
#[derive(Debug)]
pub struct IndexFile {
    path: PathBuf,
    file: Arc<File>,
    /// Byte after the last entry: the next one is written there.
    end: u64,
    /// Byte up to which the file is kept, whatever fails: entries behind `end` may be durable already,
    /// and are written once more.
    kept: u64,
    /// Whether it is not yet certain that the file has its name for good.
    name_is_new: bool,
}

impl IndexFile {
    /// Makes a log without entries, whole from the moment it has its name, and durable but for
    /// that.
    ///
    /// # Errors
    /// There is a file of that name, or it cannot be written.
    pub fn create(path: &Path, header: &Header) -> Result<(), Error> {
        let new = start_new(path, header)?;
        let synced = new.file.sync_all().map_err(Error::file("sync", &new.path));
        // Unlike a rename, this takes no other file's place.
        let named = synced
            .and_then(|()| fs::hard_link(&new.path, path).map_err(Error::file("create", path)));
        let removed = fs::remove_file(&new.path).map_err(Error::file("remove", &new.path));
        named.and(removed)
    }

    /// Opens a log; an empty file has neither header nor entries.
    ///
    /// # Errors
    /// It cannot be read, or is no log.
    pub fn open(path: &Path, writable: bool) -> Result<(Self, Option<Header>), Error> {
        let mut options = File::options();
        options.read(true).write(writable);
        let file = open_regular(path, options).map_err(Error::file("open", path))?;
        let len = file.metadata().map_err(Error::file("examine", path))?.len();
        let entries = len.saturating_sub(HEADER_LEN as u64) / ENTRY_LEN as u64;
        if entries > MAX_ENTRIES {
            return Err(Error::TooManyEntries {
                path: path.to_owned(),
                entries,
                most: MAX_ENTRIES,
            });
        }
        let header = match len {
            0 => None,
            found if found < HEADER_LEN as u64 => {
                return Err(Error::TooShort {
                    path: path.to_owned(),
                    expected: "index file",
                    found,
                });
            }
            _ => {
                let mut bytes = [0; HEADER_LEN];
                file.read_exact_at(&mut bytes, 0).map_err(Error::bytes(
                    "read the header",
                    path,
                    0,
                ))?;
                let header = decode_log_header(&bytes).map_err(|source| Error::Format {
                    path: path.to_owned(),
                    expected: "index file",
                    source,
                })?;
                Some(header)
            }
        };
        let log = Self {
            path: path.to_owned(),
            file: file.into(),
            end: offset_of(entries),
            kept: offset_of(entries),
            name_is_new: false,
        };
        Ok((log, header))
    }

    /// The path it was opened by.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// The file.
    pub(super) fn file(&self) -> Arc<File> {
        self.file.clone()
    }

    /// Byte after the last entry.
    pub(super) fn end(&self) -> u64 {
        self.end
    }

    /// Number of entries.
    pub fn entries(&self) -> u64 {
        (self.end - HEADER_LEN as u64) / ENTRY_LEN as u64
    }

    /// Whether somebody cut off entries.
    ///
    /// # Errors
    /// The file cannot be examined.
    pub fn is_cut_short(&self) -> Result<bool, Error> {
        Ok(self.len()? < self.end)
    }

    /// Calls `each` with all mappings, the oldest first. A torn entry at the end is none; nor is one
    /// of zeros, which is what a power loss leaves of entries on their way to storage. Returns how
    /// many of those there are.
    ///
    /// # Errors
    /// The file cannot be read, or an entry breaks a rule.
    pub fn replay(&self, mut each: impl FnMut(Mapping)) -> Result<u64, Error> {
        let mut lost = 0;
        let mut bytes = vec![0; CHUNK * ENTRY_LEN];
        let mut at = HEADER_LEN as u64;
        while at < self.end {
            let part = (self.end - at).min(bytes.len() as u64) as usize;
            self.file
                .read_exact_at(&mut bytes[..part], at)
                .map_err(Error::bytes("read", &self.path, at))?;
            let (entries, _) = bytes[..part].as_chunks();
            let first = (at - HEADER_LEN as u64) / ENTRY_LEN as u64;
            for (raw, number) in entries.iter().zip(first..) {
                if *raw == [0; ENTRY_LEN] {
                    lost += 1;
                    continue;
                }
                let mapping = Mapping::decode(raw, number).map_err(|source| Error::Entry {
                    path: self.path.clone(),
                    source,
                })?;
                mapping.into_iter().for_each(&mut each);
            }
            at += part as u64;
        }
        Ok(lost)
    }

    /// Goes back to entry number `entry` if the entries from there on are the first of `mappings`, which
    /// are then appended once more. An entry of zeros counts as any: it was not stored. Returns whether
    /// it did; if not, another program wrote the entries.
    ///
    /// # Errors
    /// The file cannot be read.
    pub fn go_back(&mut self, entry: u64, mappings: &[Mapping]) -> Result<bool, Error> {
        let found = self.entries().saturating_sub(entry);
        let Some(own) = usize::try_from(found)
            .ok()
            .and_then(|found| mappings.get(..found))
        else {
            return Ok(false);
        };
        let at = offset_of(entry);
        let mut bytes = vec![0; size_of_val(own) / size_of::<Mapping>() * ENTRY_LEN];
        self.file
            .read_exact_at(&mut bytes, at)
            .map_err(Error::bytes("read", &self.path, at))?;
        let (entries, _) = bytes.as_chunks();
        let same = |(found, own): (&[u8; ENTRY_LEN], &Mapping)| {
            *found == [0; ENTRY_LEN] || *found == own.encode()
        };
        let all = entries.iter().zip(own).all(same);
        if all {
            self.end = self.end.min(at);
        }
        Ok(all)
    }

    /// Makes all that was written to the file durable.
    ///
    /// # Errors
    /// [`Error::File`] if the sync fails.
    pub fn sync(&self) -> Result<(), Error> {
        let synced = self.file.sync_data();
        synced.map_err(Error::file("sync", &self.path))
    }

    /// Appends mappings and makes them durable. After an error the log is as before.
    ///
    /// # Errors
    /// They cannot be written, or not be made durable.
    pub fn append(&mut self, mappings: &[Mapping]) -> Result<(), Error> {
        self.sync_new_name()?;
        let entries = self.entries() + mappings.len() as u64;
        if entries > MAX_ENTRIES {
            return Err(Error::TooManyEntries {
                path: self.path.clone(),
                entries,
                most: MAX_ENTRIES,
            });
        }
        let written = self.write(mappings.iter().copied());
        match written.and_then(|end| self.sync().map(|()| end)) {
            Ok(end) => {
                self.end = end;
                self.kept = self.kept.max(end);
                Ok(())
            }
            Err(error) => {
                // If this fails as well, the next entries overwrite these.
                let _ = self.trim();
                Err(error)
            }
        }
    }

    /// Cuts off what follows the last entry.
    ///
    /// # Errors
    /// [`Error::File`] if the file cannot be truncated.
    pub fn trim(&self) -> Result<(), Error> {
        let end = self.end.max(self.kept);
        // To truncate would also give up what was reserved behind the end.
        match self.len()? > end {
            true => self.file.set_len(end),
            false => Ok(()),
        }
        .map_err(Error::file("truncate", &self.path))
    }

    fn len(&self) -> Result<u64, Error> {
        let metadata = self.file.metadata();
        let metadata = metadata.map_err(Error::file("examine", &self.path))?;
        Ok(metadata.len())
    }

    /// Puts a log of these mappings in this one's place, durable and under its name.
    ///
    /// # Errors
    /// The new file cannot be written or renamed; the old one then stays. Or it is not certain that
    /// the new one keeps its name; it is used all the same, and the next change tries again.
    pub fn replace(
        &mut self,
        header: &Header,
        mappings: impl Iterator<Item = Mapping>,
    ) -> Result<(), Error> {
        let mut new = start_new(&self.path, header)?;
        let replaced = new.write(mappings).and_then(|end| {
            new.end = end;
            new.file
                .sync_all()
                .map_err(Error::file("sync", &new.path))?;
            fs::rename(&new.path, &self.path).map_err(Error::file("replace", &self.path))
        });
        if let Err(error) = replaced {
            // It would only take space that may be what is missing.
            let _ = fs::remove_file(&new.path);
            return Err(error);
        }
        (self.file, self.end, self.kept) = (new.file, new.end, new.end);
        self.name_is_new = true;
        self.sync_new_name()
    }

    fn sync_new_name(&mut self) -> Result<(), Error> {
        if self.name_is_new {
            sync_name(&self.path)?;
            self.name_is_new = false;
        }
        Ok(())
    }

    /// Writes mappings behind the end; returns the new end.
    fn write(&self, mappings: impl Iterator<Item = Mapping>) -> Result<u64, Error> {
        let mut at = self.end;
        let mut bytes = Vec::new();
        let mut mappings = mappings.peekable();
        while mappings.peek().is_some() {
            bytes.clear();
            let chunk = mappings.by_ref().take(CHUNK);
            chunk.for_each(|mapping| bytes.extend_from_slice(&mapping.encode()));
            let written = self.file.write_all_at(&bytes, at);
            written.map_err(Error::bytes("write", &self.path, at))?;
            at += bytes.len() as u64;
        }
        Ok(at)
    }

    /// Writes the header anew, for a disk of another size.
    ///
    /// # Errors
    /// It cannot be written, or not be made durable.
    pub fn set_header(&self, header: &Header) -> Result<(), Error> {
        let written = self.file.write_all_at(&encode_log_header(header), 0);
        written.map_err(Error::bytes("write", &self.path, 0))?;
        let synced = self.file.sync_data();
        synced.map_err(Error::file("sync", &self.path))
    }
}

/// Where entry number `entry` is.
fn offset_of(entry: u64) -> u64 {
    HEADER_LEN as u64 + entry * ENTRY_LEN as u64
}

/// A new log, which is to become that of `path`, under a name of its own.
fn start_new(path: &Path, header: &Header) -> Result<IndexFile, Error> {
    let path = with_suffix(path, "new");
    let mut options = File::options();
    options.read(true).write(true).create(true).truncate(true);
    let file = open_regular(&path, options).map_err(Error::file("create", &path))?;
    if let Err(error) = file.write_all_at(&encode_log_header(header), 0) {
        let _ = fs::remove_file(&path);
        return Err(Error::bytes("write", &path, 0)(error));
    }
    Ok(IndexFile {
        path,
        file: file.into(),
        end: HEADER_LEN as u64,
        kept: HEADER_LEN as u64,
        name_is_new: false,
    })
}
