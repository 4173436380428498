//! Creates the files of an empty writable layer.

use std::fs::{self, File};
use std::os::unix::fs::FileExt;
use std::path::Path;

use rustix::fs::SeekFrom;
use rustix::io::Errno;

use super::files::sync_names;
use super::index_file::IndexFile;
use super::{Error, Paths};
use crate::format::lsmt::writable::{Kind, encode_data_header};
use crate::format::lsmt::{HEADER_LEN, Header, MAX_SECTORS};
use crate::units::{SECTOR_SIZE, Sectors};

/// Creates the files of an empty layer. They are durable, and so are their names.
///
/// # Errors
/// [`Error::Size`]; [`Error::File`] or [`Error::Bytes`] if a file of either name exists, or cannot be written.
pub fn create(paths: &Paths, kind: Kind, header: &Header) -> Result<(), Error> {
    check_size(header.virtual_size)?;
    let path = &paths.data;
    let file = File::options().write(true).create_new(true).open(path);
    let file = file.map_err(Error::file("create", path))?;
    let created = write_data_file(&file, path, kind, header)
        .and_then(|()| create_index(&paths.index, &file, kind, header))
        .and_then(|()| sync_names(paths).inspect_err(|_| remove(&paths.index)));
    // One file without the other would make the next attempt fail.
    created.inspect_err(|_| remove(path))
}

fn remove(path: &Path) {
    // Not reported: the error of the creation is.
    let _ = fs::remove_file(path);
}

fn write_data_file(file: &File, path: &Path, kind: Kind, header: &Header) -> Result<(), Error> {
    file.write_all_at(&encode_data_header(header, kind), 0)
        .map_err(Error::bytes("write", path, 0))?;
    if kind == Kind::Sparse {
        let len = header.virtual_size + HEADER_LEN as u64;
        file.set_len(len).map_err(Error::file("enlarge", path))?;
    }
    file.sync_all().map_err(Error::file("sync", path))
}

/// Creates the index file. For a sparse layer it is empty if the file system distinguishes holes from zeros: until
/// the daemon opens the layer, tools that use the holes may write to it too.
fn create_index(path: &Path, data: &File, kind: Kind, header: &Header) -> Result<(), Error> {
    let first = SeekFrom::Data(HEADER_LEN as u64);
    if kind != Kind::Sparse || rustix::fs::seek(data, first) != Err(Errno::NXIO) {
        return IndexFile::create(path, header);
    }
    let file = File::create_new(path).map_err(Error::file("create", path))?;
    file.sync_all()
        .map_err(Error::file("sync", path))
        .inspect_err(|_| remove(path))
}

/// Checks that a writable layer can have a disk of `size` bytes.
pub(super) fn check_size(size: u64) -> Result<(), Error> {
    let is_whole = size.is_multiple_of(SECTOR_SIZE) && Sectors::whole_in(size) <= MAX_SECTORS;
    match size > 0 && is_whole {
        true => Ok(()),
        false => Err(Error::Size(size)),
    }
}
