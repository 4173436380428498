//! The files of a writable layer, as options and image configs name them.

use std::path::PathBuf;
use std::str::FromStr;

use crate::io::directory::parent_of;

/// The two files of a writable layer.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Paths {
    /// Header and data.
    pub data: PathBuf,
    /// Header and mappings. The journal lies beside it.
    pub index: PathBuf,
}

impl Paths {
    /// The directories of the files.
    pub fn directories(&self) -> Vec<PathBuf> {
        let mut directories: Vec<_> = [&self.data, &self.index]
            .map(|file| parent_of(file).to_owned())
            .into();
        directories.dedup();
        directories
    }

    /// Those of the files that are symbolic links, and may lead out of the directories.
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

    /// Reads `data=FILE,index=FILE`, in either order.
    fn from_str(text: &str) -> Result<Self, PathsSyntax> {
        let (data, index) = match text.strip_prefix("data=") {
            Some(rest) => rest.split_once(",index="),
            None => text
                .strip_prefix("index=")
                .and_then(|rest| rest.split_once(",data="))
                .map(|(index, data)| (data, index)),
        }
        .filter(|(data, index)| !data.is_empty() && !index.is_empty() && data != index)
        .ok_or(PathsSyntax)?;
        Ok(Self {
            data: data.into(),
            index: index.into(),
        })
    }
}

/// A text that does not name the files of a writable layer.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("expected data=FILE,index=FILE")]
pub struct PathsSyntax;

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn paths_are_read_in_either_order() {
        let paths = Paths {
            data: "a,b=c".into(),
            index: "/i".into(),
        };
        assert_eq!("data=a,b=c,index=/i".parse(), Ok(paths.clone()));
        assert_eq!("index=/i,data=a,b=c".parse(), Ok(paths));
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
