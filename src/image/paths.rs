//! Paths of the two files of a writable layer, as options and image configs name them.

use std::ffi::{OsStr, OsString};
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};
use std::str::FromStr;

use crate::io::directory::parent_of;

/// Paths of the data file and the index file of a writable layer.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Paths {
    /// Data file: header and data.
    pub data: PathBuf,
    /// Index file: header and mappings. The journal is in the same directory.
    pub index: PathBuf,
}

impl Paths {
    /// The files of `--upper-auto DIR`.
    pub fn in_directory(directory: &Path) -> Self {
        Self {
            data: directory.join("upper.data"),
            index: directory.join("upper.index"),
        }
    }

    /// Directories of the files.
    pub fn directories(&self) -> Vec<PathBuf> {
        let mut directories: Vec<_> = [&self.data, &self.index]
            .map(|file| parent_of(file).to_owned())
            .into();
        directories.dedup();
        directories
    }

    /// The files that are symbolic links, which may point out of the directories.
    pub fn links(&self) -> Vec<PathBuf> {
        let files = [&self.data, &self.index].into_iter();
        files
            .filter(|file| file.is_symlink() && file.exists())
            .cloned()
            .collect()
    }
}

impl FromStr for Paths {
    type Err = PathsSyntax;

    /// Parses `data=FILE,index=FILE`, in either order.
    fn from_str(text: &str) -> Result<Self, PathsSyntax> {
        OsString::from(text).try_into()
    }
}

impl TryFrom<OsString> for Paths {
    type Error = PathsSyntax;

    /// Parses `data=FILE,index=FILE`, in either order. Paths need not be UTF-8.
    fn try_from(text: OsString) -> Result<Self, PathsSyntax> {
        let text = text.as_bytes();
        let (data, index) = match text.strip_prefix(b"data=") {
            Some(rest) => split_once(rest, b",index="),
            None => text
                .strip_prefix(b"index=")
                .and_then(|rest| split_once(rest, b",data="))
                .map(|(index, data)| (data, index)),
        }
        .filter(|(data, index)| !data.is_empty() && !index.is_empty() && data != index)
        .ok_or(PathsSyntax)?;
        let path = |bytes| PathBuf::from(OsStr::from_bytes(bytes));
        Ok(Self {
            data: path(data),
            index: path(index),
        })
    }
}

/// Splits `text` at the first `separator`.
fn split_once<'t>(text: &'t [u8], separator: &[u8]) -> Option<(&'t [u8], &'t [u8])> {
    let at = text
        .windows(separator.len())
        .position(|window| window == separator)?;
    let (before, rest) = text.split_at_checked(at)?;
    Some((before, rest.get(separator.len()..)?))
}

/// Text that is not `data=FILE,index=FILE`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("expected data=FILE,index=FILE")]
pub struct PathsSyntax;

#[cfg(test)]
mod tests {
    use std::os::unix::ffi::OsStringExt;

    use super::*;

    #[test]
    fn paths_are_read_in_either_order() {
        let paths = Paths {
            data: "a,b=c".into(),
            index: "/i".into(),
        };
        assert_eq!("data=a,b=c,index=/i".parse(), Ok(paths.clone()));
        assert_eq!("index=/i,data=a,b=c".parse(), Ok(paths));
        let bytes = b"data=\xff,index=i".to_vec();
        let paths = Paths::try_from(OsString::from_vec(bytes)).unwrap();
        assert_eq!(paths.data.as_os_str().as_bytes(), b"\xff");
        for wrong in [
            "",
            "a",
            "data=a",
            "data=a,index=",
            "data=,index=b",
            "a,b",
            "data=a,index=a",
        ] {
            assert_eq!(wrong.parse::<Paths>(), Err(PathsSyntax), "{wrong}");
        }
    }
}
