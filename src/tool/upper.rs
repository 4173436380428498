//! `ovbd upper create`: creates an empty writable layer.
//!
//! A confined process parses the layers below and answers with a header ([`describe`]). Another one, which has
//! parsed no layer, creates the files ([`create`]) and takes from the answer only what depends on those layers.

use std::fmt;

use serde::Serialize;
use uuid::Uuid;

use super::Error;
use super::open_files::OpenFiles;
use super::table::{printable, size};
use crate::format::lsmt::writable::{Kind, decode_data_header, encode_data_header};
use crate::format::lsmt::{HEADER_LEN, Header};
use crate::image::Image;
use crate::writable::{self, Paths};

/// The writable layer to create.
#[derive(Clone, Debug)]
pub struct CreateUpper {
    /// Its files, which must not exist.
    pub paths: Paths,
    /// Placement of data.
    pub kind: Kind,
    /// Size of the disk in bytes. `None`: that of the layers below.
    pub size: Option<u64>,
    /// Uuid of the layer.
    pub uuid: Uuid,
}

/// A writable layer that was created. Field names are those of the JSON; sizes are in bytes.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct CreatedUpper {
    /// The data file.
    pub data: String,
    /// The index file.
    pub index: String,
    /// Placement of data: `append`, `sparse` or `hybrid`.
    pub kind: &'static str,
    /// Size of the disk.
    pub virtual_size: u64,
    /// Uuid of the layer.
    pub uuid: Uuid,
    /// Uuid of the parent layer; null if unset.
    pub parent_uuid: Option<Uuid>,
}

impl fmt::Display for CreatedUpper {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let (data, kind, disk) = (printable(&self.data), self.kind, size(self.virtual_size));
        writeln!(f, "{data}: empty {kind} layer for a disk of {disk}")
    }
}

/// Parses the layers `below`, of which the topmost becomes the parent, and returns the header of the layer.
///
/// # Errors
/// The layers cannot be opened.
pub fn describe(task: &CreateUpper, below: OpenFiles) -> Result<[u8; HEADER_LEN], Error> {
    let image = match below.layers().is_empty() && task.size.is_some() {
        true => Image::empty(below.lineage()),
        false => below.load()?,
    };
    let size = task.size.unwrap_or(image.size());
    let header = image.header_above(size, task.uuid)?;
    Ok(encode_data_header(&header, task.kind))
}

/// Creates an empty writable layer with the header that [`describe`] returned. The process that did so read
/// hostile layers: of its answer, the parent, the record of the layers below, and a size that `task` leaves
/// open are used.
///
/// # Errors
/// `described` is not a header, a file exists or cannot be written, or the size is invalid.
pub fn create(task: &CreateUpper, described: &[u8; HEADER_LEN]) -> Result<CreatedUpper, Error> {
    let (described, _) = decode_data_header(described).map_err(Error::Described)?;
    let size = task.size.unwrap_or(described.virtual_size);
    let header = Header {
        message: described.message,
        ..Header::empty(size, task.uuid, described.parent_uuid)
    };
    writable::create(&task.paths, task.kind, &header)?;
    Ok(CreatedUpper {
        data: task.paths.data.display().to_string(),
        index: task.paths.index.display().to_string(),
        kind: task.kind.name(),
        virtual_size: size,
        uuid: task.uuid,
        parent_uuid: (!header.parent_uuid.is_nil()).then_some(header.parent_uuid),
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::format::lsmt;
    use crate::format::lsmt::HeaderKind;

    #[test]
    fn only_what_depends_on_the_layers_is_taken_from_their_parser() {
        let folder = tempfile::tempdir().unwrap();
        let task = CreateUpper {
            paths: Paths {
                data: folder.path().join("data"),
                index: folder.path().join("index"),
            },
            kind: Kind::Append,
            size: Some(1 << 20),
            uuid: Uuid::from_u128(1),
        };
        let error = create(&task, &[0; HEADER_LEN]).unwrap_err();
        let magic = lsmt::Error::Magic(HeaderKind::Header);
        assert!(matches!(error, Error::Described(found) if found == magic));
        assert!(!task.paths.data.exists());
        let hostile = Header {
            index_offset: 4096,
            index_entries: 7,
            message: b"record".to_vec(),
            ..Header::empty(1 << 30, Uuid::from_u128(2), Uuid::from_u128(3))
        };
        create(&task, &encode_data_header(&hostile, Kind::Sparse)).unwrap();
        let bytes = std::fs::read(&task.paths.data).unwrap();
        let (header, kind) = decode_data_header(bytes[..].try_into().unwrap()).unwrap();
        let expected = Header {
            message: b"record".to_vec(),
            ..Header::empty(1 << 20, task.uuid, Uuid::from_u128(3))
        };
        assert_eq!((header, kind), (expected, Kind::Append));
    }
}
