//! From layers to a disk: what is above them, and what the guest sees.

use std::fs::{self, File};
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::AtomicBool;

use uuid::Uuid;

use super::config::UpperSource;
use super::control::api::Device;
use super::{Config, Error};
use crate::engine::Disk;
use crate::engine::ring::Rings;
use crate::format::lsmt::HEADER_LEN;
use crate::format::lsmt::writable::Kind;
use crate::image::Image;
use crate::image::block_cache::BlockCache;
use crate::image::config::{Stack, UpperFiles};
use crate::units::SECTOR_SIZE;
use crate::virtio::config::DeviceConfig;
use crate::virtio::request::SERIAL_LEN;
use crate::writable::{self, Options, Paths, Snapshots, Volume};

/// Opens the layers of `stack`, and the writable one above them that the command line or the
/// image config (`configured`) names.
pub fn open(
    config: &Config,
    stack: &Stack,
    configured: Option<UpperFiles>,
) -> Result<Device, Error> {
    let stack = &stack.clone().with_lineage(config.lineage);
    // Kept until the layer is open, and with that locked itself.
    let mut _alone = None;
    let upper = match (&config.upper, configured) {
        (Some(_), Some(_)) => return Err(Error::TwoUppers),
        (None, None) if config.upper_limit.is_some() => return Err(Error::NothingToLimit),
        (None, None) => None,
        (None, Some(UpperFiles { data, index })) => Some(Paths { data, index }),
        (Some(UpperSource::Files(paths)), None) => Some(paths.clone()),
        (Some(UpperSource::Folder(folder)), None) => {
            _alone = Some(lock(folder)?);
            Some(find_or_create(folder, stack)?)
        }
    };
    let (volume, snapshots) = match upper {
        None => {
            let image = Image::open(stack).map_err(Error::Image)?;
            (Volume::read_only(image), None)
        }
        Some(first) => {
            let options = Options {
                limit: config.upper_limit.unwrap_or(u64::MAX),
                ..Options::default()
            };
            let opened = Snapshots::open(stack, &first, options);
            let (volume, snapshots) = opened.map_err(Error::Upper)?;
            (volume, Some(snapshots))
        }
    };
    let image = volume.image();
    let serial = config.serial.unwrap_or_else(|| {
        let mut bytes = [0; SERIAL_LEN];
        // What a snapshot has put above them since is no part of it.
        let text = image.serial(stack.layers().len());
        bytes
            .iter_mut()
            .zip(text.bytes())
            .for_each(|(byte, text)| *byte = text);
        bytes
    });
    let block_size = image.block_size();
    let cache =
        (config.block_cache > 0).then(|| Arc::new(BlockCache::new(config.block_cache, block_size)));
    let disk = Disk {
        config: DeviceConfig {
            capacity: volume.sectors(),
            queues: config.queues(),
            queue_size: config.queue_size,
            optimal_io: block_size,
            writable: volume.is_writable(),
        },
        volume,
        writeback: AtomicBool::new(true),
        serial,
        cache,
        rings: make_rings(config.rings()),
        tuning: config.tuning.clone(),
    };
    Ok(Device {
        disk: Arc::new(disk),
        snapshots,
    })
}

/// Makes io_uring rings for the queue workers, which read with `pread` where there are none.
fn make_rings(count: usize) -> Rings {
    let (rings, error) = Rings::make(count);
    if let Some(error) = error {
        let made = rings.made();
        log::warn!(
            "{made} of {count} io_uring rings could be made: other queues read with pread ({error})"
        );
    }
    rings
}

/// Makes a folder if there is none, and waits until nobody else is about to use or make the layer in
/// it, as a second daemon started by mistake would.
fn lock(folder: &Path) -> Result<File, Error> {
    let failed = |what| {
        let path = folder.to_owned();
        move |source| Error::Upper(writable::Error::File { what, path, source })
    };
    fs::create_dir_all(folder).map_err(failed("create"))?;
    let opened = File::open(folder).map_err(failed("open"))?;
    opened.lock().map_err(failed("lock"))?;
    Ok(opened)
}

/// The writable layer in `folder`, an empty one above `stack` if there was none.
fn find_or_create(folder: &Path, stack: &Stack) -> Result<Paths, Error> {
    let failed = |what, path: &Path| {
        let path = path.to_owned();
        move |source| Error::Upper(writable::Error::File { what, path, source })
    };
    let paths = Paths {
        data: folder.join("upper.data"),
        index: folder.join("upper.index"),
    };
    // The index is made last, and goes when a snapshot seals the data; a header alone was left
    // behind by one who died while making them, and nothing was ever written behind it.
    let len = paths.data.metadata().map(|data| data.len());
    if paths.index.exists() || len.as_ref().is_ok_and(|len| *len > HEADER_LEN as u64) {
        return Ok(paths);
    }
    if len.is_ok() {
        fs::remove_file(&paths.data).map_err(failed("remove", &paths.data))?;
    }
    let image = Image::open(stack).map_err(Error::Image)?;
    let size = image.sectors().0 * SECTOR_SIZE;
    let header = image.header_above(size, Uuid::new_v4());
    writable::create(&paths, Kind::Hybrid, &header).map_err(Error::Upper)?;
    log::info!("made the writable layer {}", paths.data.display());
    Ok(paths)
}

#[cfg(test)]
mod tests {
    use std::sync::Barrier;
    use std::thread;

    use super::*;
    use crate::format::lsmt::{Header, Part};
    use crate::writable::WritableLayer;

    /// An image of 5 sectors and a half that holds nothing.
    fn stack(dir: &Path) -> Stack {
        let header = Header {
            index_offset: HEADER_LEN as u64,
            index_entries: 0,
            virtual_size: 5 * 512 + 100,
            uuid: Uuid::from_u128(7),
            parent_uuid: Uuid::nil(),
            message: Vec::new(),
        };
        let mut bytes = header.encode(Part::Header).to_vec();
        bytes.extend(header.encode(Part::Trailer));
        let path = dir.join("layer");
        fs::write(&path, bytes).unwrap();
        Stack::new([path])
    }

    fn open_upper(paths: &Paths) -> Result<WritableLayer, writable::Error> {
        let options = Options::default();
        WritableLayer::open(paths, &options)
    }

    #[test]
    fn a_folder_gets_one_layer_and_keeps_it() {
        let dir = tempfile::tempdir().unwrap();
        let (stack, folder) = (stack(dir.path()), dir.path().join("a/b"));
        drop(lock(&folder).unwrap());
        let paths = find_or_create(&folder, &stack).unwrap();
        let upper = open_upper(&paths).unwrap();
        assert_eq!(upper.header().virtual_size, 6 * 512);
        assert_eq!(upper.header().parent_uuid, Uuid::from_u128(7));
        let uuid = upper.header().uuid;
        drop(upper);
        assert_eq!(find_or_create(&folder, &stack).unwrap(), paths);
        assert_eq!(open_upper(&paths).unwrap().header().uuid, uuid);
    }

    #[test]
    fn of_two_who_start_at_once_one_has_the_layer() {
        for _ in 0..8 {
            let dir = tempfile::tempdir().unwrap();
            let stack = stack(dir.path());
            let folder = dir.path().join("upper");
            let barrier = Barrier::new(2);
            let start = || {
                barrier.wait();
                let _alone = lock(&folder).unwrap();
                let paths = find_or_create(&folder, &stack).unwrap();
                (open_upper(&paths), paths)
            };
            let (one, other) = thread::scope(|scope| {
                let other = scope.spawn(start);
                (start(), other.join().unwrap())
            });
            let (opened, failed) = match one.0.is_ok() {
                true => (one, other.0),
                false => (other, one.0),
            };
            assert!(
                matches!(failed, Err(writable::Error::Busy { .. })),
                "{failed:?}"
            );
            let uuid = opened.0.unwrap().header().uuid;
            assert_eq!(open_upper(&opened.1).unwrap().header().uuid, uuid);
        }
    }

    #[test]
    fn what_is_left_of_making_one_is_made_anew_but_data_is_kept() {
        let dir = tempfile::tempdir().unwrap();
        let stack = stack(dir.path());
        let data = dir.path().join("upper.data");
        for len in [0, HEADER_LEN] {
            fs::write(&data, vec![0; len]).unwrap();
            find_or_create(dir.path(), &stack).unwrap();
            fs::remove_file(dir.path().join("upper.index")).unwrap();
        }
        fs::write(&data, vec![1; HEADER_LEN + 1]).unwrap();
        let paths = find_or_create(dir.path(), &stack).unwrap();
        assert!(open_upper(&paths).is_err());
        assert_eq!(fs::read(&data).unwrap(), vec![1; HEADER_LEN + 1]);
    }
}
