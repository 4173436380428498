//! Another size for the disk of a writable layer.

use std::os::unix::fs::FileExt;

use super::create::check_size;
use super::extent_map::{Extent, ExtentMap, Place, mappings};
use super::load::{Access, Loaded, load};
use super::manifest::Pairs;
use super::{Error, Paths, journal};
use crate::format::lsmt::HEADER_LEN;
use crate::format::lsmt::writable::{Kind, encode_data_header};
use crate::units::{Sector, SectorRange, Sectors};

/// Changes the size of the disk, in bytes, and returns the one it had. With `cut`, data beyond the
/// new end is dropped; should the disk grow again, it reads as zeros there.
///
/// Killed at any moment, the disk has the old size or the new one, and at most data that was to be
/// dropped is missing.
///
/// # Errors
/// There is data beyond the new end, the size is impossible, a file cannot be written, a snapshot
/// froze the layer, or somebody else has it open.
pub fn resize(paths: &Paths, size: u64, cut: bool) -> Result<u64, Error> {
    check_size(size)?;
    Pairs::refuse_frozen(paths)?;
    let mut loaded = load(paths, Access::Write, ExtentMap::new())?;
    loaded.repair_index(paths)?;
    let Loaded {
        data,
        mut index,
        mut header,
        kind,
        mut map,
        by_holes,
        index_is_stale,
        ..
    } = loaded;
    let path = &paths.data;
    let old = std::mem::replace(&mut header.virtual_size, size);
    let (file_len, disk_end) = (size + HEADER_LEN as u64, Sector::at_or_after(size));
    let dropped = SectorRange::new(disk_end, map.end());
    let beyond: Sectors = map
        .within(dropped)
        .filter_map(|extent| Some(extent.data()?.len()))
        .sum();
    let beyond = beyond.bytes();
    if beyond > 0 && !cut {
        return Err(Error::DataBeyond {
            path: path.clone(),
            size,
            beyond,
        });
    }
    if kind == Kind::Sparse && size > old {
        data.set_len(file_len)
            .map_err(Error::file("enlarge", path))?;
    }
    if beyond > 0 {
        let extent = Extent {
            range: dropped,
            place: Place::Zero,
        };
        map.insert(extent, |_| ());
    }
    data.sync_all().map_err(Error::file("sync", path))?;
    // Holes need no index, but do not tell that what is dropped is zeros.
    let by_holes = by_holes && beyond == 0;
    if beyond > 0 || (index_is_stale && !by_holes) {
        index.replace(&header, mappings(&map))?;
        journal::remove(&paths.index)?;
    }
    data.write_all_at(&encode_data_header(&header, kind), 0)
        .map_err(Error::bytes("write", path, 0))?;
    data.sync_all().map_err(Error::file("sync", path))?;
    if !by_holes {
        index.set_header(&header)?;
    }
    if kind == Kind::Sparse {
        data.set_len(file_len)
            .map_err(Error::file("truncate", path))?;
        data.sync_all().map_err(Error::file("sync", path))?;
    }
    Ok(old)
}
