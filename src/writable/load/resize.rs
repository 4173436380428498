//! Resizing the disk of a writable layer that is not in use.

use super::{Access, IndexState, LoadedLayer, load};
use crate::format::lsmt::HEADER_LEN;
use crate::format::lsmt::writable::Kind;
use crate::units::{Sector, SectorRange, Sectors};
use crate::writable::create::check_size;
use crate::writable::extent_map::{Extent, ExtentMap, Place, mappings};
use crate::writable::manifest::Pairs;
use crate::writable::{Error, Paths, journal};

/// Changes the size of the disk to `size` bytes; returns the old size. With `cut`, data beyond the new end is dropped;
/// it reads as zeros should the disk grow again.
///
/// Crash-safe: an interrupted run leaves the disk with its old size or the new one, and at most data that was to be
/// dropped is missing.
///
/// # Errors
/// [`Error::Size`]; [`Error::DataBeyond`] without `cut`; [`Error::GoesOn`] if a snapshot froze the layer; those of
/// [`load`]; [`Error::File`] and [`Error::Bytes`] if a file cannot be written.
pub fn resize(paths: &Paths, size: u64, cut: bool) -> Result<u64, Error> {
    check_size(size)?;
    Pairs::refuse_frozen(paths)?;
    let mut loaded = load(paths, Access::Write, ExtentMap::new())?;
    loaded.repair_index(paths)?;
    let old = std::mem::replace(&mut loaded.header.virtual_size, size);
    let has_dropped = drop_beyond(&mut loaded, paths, size, cut)?;
    // `check_size` limits the size.
    let file_len = size.saturating_add(HEADER_LEN as u64);
    if loaded.kind == Kind::Sparse && size > old {
        set_len(&loaded, paths, "enlarge", file_len)?;
    }
    sync(&loaded, paths)?;
    // Holes need no index, but a hole does not make dropped data read as zeros.
    let by_holes = loaded.index_state == IndexState::Holes && !has_dropped;
    if has_dropped || (loaded.index_is_stale() && !by_holes) {
        let mappings = mappings(&loaded.map);
        loaded.index.replace(&loaded.header, mappings)?;
        journal::remove(&paths.index)?;
    }
    write_headers(&loaded, paths, by_holes)?;
    if loaded.kind == Kind::Sparse {
        set_len(&loaded, paths, "truncate", file_len)?;
        sync(&loaded, paths)?;
    }
    Ok(old)
}

/// Replaces data beyond the new end by zeros in the map. Returns whether there was any.
fn drop_beyond(
    loaded: &mut LoadedLayer,
    paths: &Paths,
    size: u64,
    cut: bool,
) -> Result<bool, Error> {
    let range = SectorRange::new(Sector::at_or_after(size), loaded.map.end());
    let data = loaded.map.within(range).filter_map(|extent| extent.data());
    let beyond: Sectors = data.map(SectorRange::len).sum();
    if beyond.is_zero() {
        return Ok(false);
    }
    if !cut {
        return Err(Error::DataBeyond {
            path: paths.data.clone(),
            size,
            beyond: beyond.bytes(),
        });
    }
    let place = Place::Zero;
    loaded.map.insert(Extent::new(range, place), |_| ());
    Ok(true)
}

/// Writes the header of the data file, and then that of the index file unless the holes replace it. Both are durable.
fn write_headers(loaded: &LoadedLayer, paths: &Paths, by_holes: bool) -> Result<(), Error> {
    loaded.write_data_header(paths)?;
    sync(loaded, paths)?;
    match by_holes {
        true => Ok(()),
        false => loaded.index.set_header(&loaded.header),
    }
}

fn set_len(loaded: &LoadedLayer, paths: &Paths, what: &'static str, len: u64) -> Result<(), Error> {
    let set = loaded.data.set_len(len);
    set.map_err(Error::file(what, &paths.data))
}

fn sync(loaded: &LoadedLayer, paths: &Paths) -> Result<(), Error> {
    let synced = loaded.data.sync_all();
    synced.map_err(Error::file("sync", &paths.data))
}
