//! The source of credentials that the user names: a file or a service.

use std::io::Read;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use super::credential_service::Service;
use super::credentials::{Credential, Credentials, Error, MAX_CREDENTIALS};
use super::repository::Repository;
use crate::io::regular::open_to_read;

/// Source of credentials. It is read at each login.
#[derive(Debug, Default)]
pub enum Source {
    /// Every registry is used without credentials.
    #[default]
    None,
    /// A file, which is read again each time: it may be replaced.
    File(PathBuf),
    /// A service that is asked for each repository.
    Service(Service),
}

impl Source {
    /// Verifies that a file of credentials can be read now. It may be replaced later.
    ///
    /// # Errors
    /// [`Error::Read`], [`Error::TooLong`] or an error of its contents.
    pub fn check(&self) -> Result<(), Error> {
        match self {
            Self::File(path) => read(path).map(drop),
            Self::None | Self::Service(_) => Ok(()),
        }
    }

    /// The credentials for a repository, if there are any.
    ///
    /// # Errors
    /// The file or service cannot be used: see [`Error`].
    pub fn look_up(&self, repository: &Repository) -> Result<Option<Credential>, Error> {
        match self {
            Self::None => Ok(None),
            Self::File(path) => read(path)?.find(repository),
            Self::Service(service) => service.ask(repository)?.find(repository),
        }
    }
}

fn read(path: &Path) -> Result<Credentials, Error> {
    let failed = |source| Error::Read {
        path: path.to_owned(),
        source: Arc::new(source),
    };
    let file = open_to_read(path).map_err(failed)?;
    let mut bytes = Vec::new();
    let mut bounded = file.take(MAX_CREDENTIALS + 1);
    bounded.read_to_end(&mut bytes).map_err(failed)?;
    let origin = path.display().to_string();
    if bytes.len() as u64 > MAX_CREDENTIALS {
        return Err(Error::TooLong(origin));
    }
    Credentials::parse(&bytes, &origin)
}

#[cfg(test)]
mod tests {
    use super::super::repository::Scheme;
    use super::*;

    #[test]
    fn a_pipe_is_refused_and_not_waited_for() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("pipe");
        let mode = rustix::fs::Mode::RWXU;
        rustix::fs::mkfifoat(rustix::fs::CWD, &path, mode).unwrap();
        let error = read(&path).unwrap_err();
        assert!(matches!(error, Error::Read { .. }), "{error:?}");
    }

    #[test]
    fn a_file_is_read_again_each_time() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("config.json");
        let source = Source::File(path.clone());
        let repository = Repository::new(Scheme::Https, "a".parse().unwrap(), "x").unwrap();
        let absent = source.look_up(&repository).unwrap_err();
        assert!(matches!(absent, Error::Read { .. }));
        for user in ["u", "v"] {
            let text = format!(r#"{{"auths":{{"a":{{"username":"{user}","password":"p"}}}}}}"#);
            std::fs::write(&path, text).unwrap();
            assert_eq!(
                source.look_up(&repository).unwrap(),
                Some(Credential::Password {
                    user: user.to_owned(),
                    password: "p".to_owned()
                })
            );
        }
        std::fs::write(&path, vec![b' '; MAX_CREDENTIALS as usize + 1]).unwrap();
        assert!(matches!(
            source.look_up(&repository),
            Err(Error::TooLong(_))
        ));
    }
}
