//! Where a cache directory keeps what.
//!
//! ```text
//! CACHE/                            0700
//!   version                         "ovbd-cache 1"
//!   lock                            flock: held while entries are opened, published or evicted
//!   blobs/sha256/HEX                complete and verified, 0444
//!   partial/sha256/HEX-LEN.data     sparse; length of the blob
//!   partial/sha256/HEX-LEN.map      its presence map
//!   tables/HEX                      image tables; HEX of the stack's key
//!   manifests/HEX                   manifests of images
//!   refs/HEX                        which one a reference named last; HEX of the reference's digest
//!   trash/                          renamed here, about to be unlinked
//! ```
//! The length is part of a partial blob's name: a config that claims a wrong length cannot get in
//! the way of one that has it right.

use std::fs::{self, DirBuilder, File, Metadata};
use std::hash::{BuildHasher, RandomState};
use std::io::{self, Write};
use std::os::unix::fs::{DirBuilderExt, FileExt, MetadataExt, PermissionsExt};
use std::path::{Path, PathBuf};

use rustix::fs::{SeekFrom, seek};

use super::Error;
use crate::format::digest::Digest;
use crate::format::presence::Identity;
use crate::io::regular::{create_regular, read_regular};

const VERSION: &str = "ovbd-cache 1";

/// Most bytes of the version file that are read.
const MAX_VERSION: u64 = 4096;

const DIRECTORIES: [&str; 8] = [
    "blobs",
    "blobs/sha256",
    "partial",
    "partial/sha256",
    "tables",
    "manifests",
    "refs",
    "trash",
];

/// Numbers of the file systems whose mappings, locks or holes differ between hosts (`statfs(2)`).
const NETWORK: [u64; 8] = [
    0x6969,      // NFS
    0x517b,      // SMB
    0xff53_4d42, // CIFS
    0xfe53_4d42, // SMB2
    0x0102_1997, // 9P
    0x5346_414f, // AFS
    0x7375_7245, // Coda
    0x00c3_6400, // Ceph
];

/// Paths in one cache directory.
#[derive(Clone, Debug)]
pub(super) struct Layout {
    root: PathBuf,
}

impl Layout {
    /// Opens the cache directory `root`, which another program has made.
    pub(super) fn open_existing(root: &Path) -> Result<Self, Error> {
        match fs::metadata(root.join("version")) {
            Ok(_) => Self::open(root),
            Err(error) if error.kind() == io::ErrorKind::NotFound && root.is_dir() => {
                Err(Error::NotACache {
                    path: root.to_owned(),
                })
            }
            Err(error) => Err(Error::file("open", root)(error)),
        }
    }

    /// Opens the cache directory `root`; makes it if there is none, or if it is empty.
    pub(super) fn open(root: &Path) -> Result<Self, Error> {
        let layout = Self {
            root: root.to_owned(),
        };
        let mut builder = DirBuilder::new();
        builder.recursive(true).mode(0o700);
        builder.create(root).map_err(Error::file("create", root))?;
        layout.check_permissions()?;
        layout.check_version()?;
        for name in DIRECTORIES {
            let path = root.join(name);
            match DirBuilder::new().mode(0o700).create(&path) {
                Err(error) if error.kind() == io::ErrorKind::AlreadyExists => {}
                made => made.map_err(Error::file("create", &path))?,
            }
        }
        Ok(layout)
    }

    fn metadata(&self) -> Result<Metadata, Error> {
        fs::metadata(&self.root).map_err(Error::file("examine", &self.root))
    }

    fn check_permissions(&self) -> Result<(), Error> {
        let user = rustix::process::geteuid().as_raw();
        if self.is_empty()? && self.metadata()?.uid() == user {
            let private = fs::Permissions::from_mode(0o700);
            fs::set_permissions(&self.root, private).map_err(Error::file("chmod", &self.root))?;
        }
        let metadata = self.metadata()?;
        let mode = metadata.mode() & 0o777;
        if mode & 0o077 == 0 && metadata.uid() == user {
            return Ok(());
        }
        Err(Error::Permissions {
            path: self.root.clone(),
            mode,
            owner: metadata.uid(),
            user,
        })
    }

    fn is_empty(&self) -> Result<bool, Error> {
        let mut entries = fs::read_dir(&self.root).map_err(Error::file("list", &self.root))?;
        Ok(entries.next().is_none())
    }

    fn check_version(&self) -> Result<(), Error> {
        let path = self.root.join("version");
        let found = match read_regular(&path, MAX_VERSION) {
            Ok(text) => String::from_utf8_lossy(&text).into_owned(),
            Err(error) if error.kind() == io::ErrorKind::NotFound => {
                return self.initialize(&path);
            }
            Err(error) => return Err(Error::file("read", &path)(error)),
        };
        let found = found.lines().next().unwrap_or_default();
        if found == VERSION {
            return Ok(());
        }
        Err(Error::Version {
            path: self.root.clone(),
            found: found.chars().take(100).collect(),
            expected: VERSION,
        })
    }

    /// Makes an empty directory a cache. The version file appears whole and last.
    fn initialize(&self, version: &Path) -> Result<(), Error> {
        // Of processes in different namespaces, each may have the same number.
        let random = RandomState::new().hash_one(std::process::id());
        let probe = self.root.join(format!("probe-{random:016x}"));
        // Left over where another process does the same at this moment, or was killed doing it.
        let others = fs::read_dir(&self.root).map_err(Error::file("list", &self.root))?;
        let foreign = |name: &str| name != "version" && !name.starts_with("probe-");
        if others
            .flatten()
            .any(|entry| foreign(&entry.file_name().to_string_lossy()))
        {
            return Err(Error::NotACache {
                path: self.root.clone(),
            });
        }
        self.check_file_system(&probe)?;
        let failed = |error| Error::file("create", version)(error);
        let mut file = create_regular(&probe).map_err(failed)?;
        let text = format!("{VERSION}\n");
        file.write_all(text.as_bytes()).map_err(failed)?;
        file.sync_all().map_err(failed)?;
        fs::rename(&probe, version).map_err(failed)?;
        sync_dir(&self.root)
    }

    fn check_file_system(&self, probe: &Path) -> Result<(), Error> {
        let unfit = |lack| Error::FileSystem {
            path: self.root.clone(),
            lack,
        };
        let failed = |error| Error::file("create a sparse file as", probe)(error);
        let kind = rustix::fs::statfs(&self.root).map_err(|errno| failed(errno.into()))?;
        // The field's type differs between architectures.
        #[allow(clippy::unnecessary_cast)]
        if NETWORK.contains(&(kind.f_type as u64 & 0xffff_ffff)) {
            return Err(unfit("of the network, whose mappings are not coherent"));
        }
        let file = create_regular(probe).map_err(failed)?;
        let len = 4 << 20;
        file.set_len(len).map_err(failed)?;
        file.write_all_at(&[1], len / 2).map_err(failed)?;
        let hole = seek(&file, SeekFrom::Hole(0)).map_err(|errno| failed(errno.into()))?;
        if hole != 0 || file.metadata().map_err(failed)?.blocks() * 512 >= len {
            return Err(unfit("without sparse files"));
        }
        Ok(())
    }

    pub(super) fn root(&self) -> &Path {
        &self.root
    }

    pub(super) fn lock(&self) -> PathBuf {
        self.root.join("lock")
    }

    pub(super) fn blobs(&self) -> PathBuf {
        self.root.join("blobs/sha256")
    }

    pub(super) fn blob(&self, digest: &Digest) -> PathBuf {
        self.blobs().join(digest.hex())
    }

    pub(super) fn partials(&self) -> PathBuf {
        self.root.join("partial/sha256")
    }

    pub(super) fn data(&self, identity: &Identity) -> PathBuf {
        let (hex, len) = (identity.digest().hex(), identity.len());
        self.partials().join(format!("{hex}-{len}.data"))
    }

    pub(super) fn map(&self, identity: &Identity) -> PathBuf {
        self.data(identity).with_extension("map")
    }

    pub(super) fn tables(&self) -> PathBuf {
        self.root.join("tables")
    }

    pub(super) fn table(&self, key: &Digest) -> PathBuf {
        self.tables().join(key.hex())
    }

    pub(super) fn manifest(&self, digest: &Digest) -> PathBuf {
        self.root.join("manifests").join(digest.hex())
    }

    pub(super) fn reference(&self, reference: &str) -> PathBuf {
        let name = Digest::of(reference.as_bytes()).hex();
        self.root.join("refs").join(name)
    }

    pub(super) fn trash(&self) -> PathBuf {
        self.root.join("trash")
    }
}

/// The blob that the data file of this name holds a part of.
pub(super) fn partial_named(name: &str) -> Option<Identity> {
    let (hex, len) = name.strip_suffix(".data")?.split_once('-')?;
    let digest = Digest::from_hex(hex)?;
    Identity::new(digest, len.parse().ok()?).ok()
}

/// Makes the names in a directory durable.
pub(super) fn sync_dir(path: &Path) -> Result<(), Error> {
    let synced = File::open(path).and_then(|dir| dir.sync_all());
    synced.map_err(Error::file("sync", path))
}

/// Removes a file, if there is one.
pub(super) fn remove(path: &Path) -> Result<(), Error> {
    match fs::remove_file(path) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(()),
        removed => removed.map_err(Error::file("remove", path)),
    }
}

/// Removes a directory and all that is in it, if it is there.
pub(super) fn remove_directory(path: &Path) -> Result<(), Error> {
    match fs::remove_dir_all(path) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(()),
        removed => removed.map_err(Error::file("remove", path)),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn mode(path: &Path, mode: u32) {
        fs::set_permissions(path, fs::Permissions::from_mode(mode)).unwrap();
    }

    #[test]
    fn an_empty_directory_becomes_a_cache_and_stays_one() {
        let dir = tempfile::tempdir().unwrap();
        mode(dir.path(), 0o755);
        Layout::open(dir.path()).unwrap();
        let version = fs::read_to_string(dir.path().join("version")).unwrap();
        assert_eq!(version, "ovbd-cache 1\n");
        assert_eq!(fs::metadata(dir.path()).unwrap().mode() & 0o777, 0o700);
        Layout::open(dir.path()).unwrap();
        let nested = dir.path().join("trash/a/b");
        Layout::open(&nested).unwrap();
    }

    #[test]
    fn what_is_not_ours_is_refused() {
        let dir = tempfile::tempdir().unwrap();
        fs::write(dir.path().join("letter"), "dear").unwrap();
        let error = Layout::open(dir.path()).unwrap_err();
        assert!(matches!(
            error,
            Error::Permissions { .. } | Error::NotACache { .. }
        ));
        mode(dir.path(), 0o700);
        let error = Layout::open(dir.path()).unwrap_err();
        assert!(matches!(error, Error::NotACache { .. }), "{error}");
        fs::remove_file(dir.path().join("letter")).unwrap();
        Layout::open(dir.path()).unwrap();
        mode(dir.path(), 0o750);
        let error = Layout::open(dir.path()).unwrap_err();
        assert!(error.to_string().contains("mode 750"), "{error}");
        mode(dir.path(), 0o700);
        fs::write(dir.path().join("version"), "ovbd-cache 2\n").unwrap();
        let error = Layout::open(dir.path()).unwrap_err();
        assert!(error.to_string().contains("\"ovbd-cache 2\""), "{error}");
        let file = dir.path().join("version");
        assert!(Layout::open(&file).is_err());
    }

    #[test]
    fn names_of_partial_blobs() {
        let dir = tempfile::tempdir().unwrap();
        let layout = Layout::open(dir.path()).unwrap();
        let identity = Identity::new(Digest::of(b"x"), 70_000).unwrap();
        let data = layout.data(&identity);
        let name = data.file_name().unwrap().to_str().unwrap();
        assert_eq!(partial_named(name), Some(identity));
        for other in [
            "",
            "a.data",
            &name.replace('-', ""),
            &name.replace("7000", "x"),
        ] {
            assert_eq!(partial_named(other), None);
        }
    }
}
