//! Users, groups and capabilities.
//!
//! All functions here change the calling thread only. Call them while the process has one thread.

use std::fs;
use std::io;

use rustix::io::Errno;
use rustix::process::{Gid, Uid};
use rustix::thread::{self, CapabilitySet};

/// A user and a group for the daemon.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Identity {
    uid: Uid,
    gid: Gid,
}

/// The daemon cannot change its user.
#[derive(Debug, thiserror::Error)]
pub enum IdentityError {
    /// A list of users or groups cannot be read.
    #[error("cannot read {path}")]
    List {
        /// The list.
        path: &'static str,
        /// Error of the system.
        source: io::Error,
    },
    /// Neither a number nor a name in the list.
    #[error("{name:?} is neither a number nor a name in {path}")]
    Unknown {
        /// The name from the command line.
        name: String,
        /// The list.
        path: &'static str,
    },
    /// The group of a user that is not listed is unknown.
    #[error("user {uid} is not in {PASSWD}: add --group")]
    NoGroup {
        /// The user.
        uid: u32,
    },
    /// The system refuses the change.
    #[error("cannot switch to user {uid} of group {gid}")]
    Refused {
        /// The user.
        uid: u32,
        /// The group.
        gid: u32,
        /// Error of the system.
        source: io::Error,
    },
}

const PASSWD: &str = "/etc/passwd";
const GROUP: &str = "/etc/group";

impl Identity {
    /// Finds `user` and `group`, each a name or a number. Without `group`: the group of the user.
    ///
    /// Names are looked up in `/etc/passwd` and `/etc/group` only: other user databases would load
    /// their code into the daemon. Without these files, numbers are used as they are.
    ///
    /// # Errors
    ///
    /// [`IdentityError::Unknown`] and [`IdentityError::NoGroup`] for names and numbers that are not
    /// listed, [`IdentityError::List`] if a list cannot be read.
    pub fn find(user: &str, group: Option<&str>) -> Result<Self, IdentityError> {
        Self::find_in(&read(PASSWD)?, &read(GROUP)?, user, group)
    }

    fn find_in(
        users: &str,
        groups: &str,
        user: &str,
        group: Option<&str>,
    ) -> Result<Self, IdentityError> {
        let entry = entry_of(users, user);
        let uid = identifier(user, entry, PASSWD)?;
        let gid = match (group, entry) {
            (Some(group), _) => identifier(group, entry_of(groups, group), GROUP)?,
            (None, Some(entry)) => entry.second,
            (None, None) => return Err(IdentityError::NoGroup { uid }),
        };
        Ok(Self {
            uid: Uid::from_raw(uid),
            gid: Gid::from_raw(gid),
        })
    }

    /// Switches the calling thread to this user and this group, without supplementary groups.
    ///
    /// # Errors
    ///
    /// [`IdentityError::Refused`] without CAP_SETUID and CAP_SETGID.
    pub fn assume(self) -> Result<(), IdentityError> {
        let Self { uid, gid } = self;
        thread::set_thread_groups(&[])
            .and_then(|()| thread::set_thread_res_gid(gid, gid, gid))
            .and_then(|()| thread::set_thread_res_uid(uid, uid, uid))
            .map_err(|errno| IdentityError::Refused {
                uid: uid.as_raw(),
                gid: gid.as_raw(),
                source: errno.into(),
            })
    }
}

/// Finds the number of a user by its name or number.
///
/// # Errors
///
/// [`IdentityError::Unknown`] for a name that is not in `/etc/passwd`, [`IdentityError::List`] if that cannot be read.
pub fn user_id(user: &str) -> Result<u32, IdentityError> {
    identifier(user, entry_of(&read(PASSWD)?, user), PASSWD)
}

/// Finds the number of a group by its name or number.
///
/// # Errors
///
/// [`IdentityError::Unknown`] for a name that is not in `/etc/group`, [`IdentityError::List`] if that cannot be read.
pub fn group_id(group: &str) -> Result<u32, IdentityError> {
    identifier(group, entry_of(&read(GROUP)?, group), GROUP)
}

/// Reads a list. A missing one, as in a chroot, is empty.
fn read(path: &'static str) -> Result<String, IdentityError> {
    match fs::read(path) {
        Ok(bytes) => Ok(String::from_utf8_lossy(&bytes).into_owned()),
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(String::new()),
        Err(source) => Err(IdentityError::List { path, source }),
    }
}

/// The numbers in a line of a list: of a user and its group, or of a group.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Entry {
    first: u32,
    second: u32,
}

/// Returns the line of a user or group, by name or number.
fn entry_of(list: &str, wanted: &str) -> Option<Entry> {
    list.lines().find_map(|line| {
        let fields: Vec<_> = line.split(':').collect();
        let [name, _, id, group, ..] = fields[..] else {
            return None;
        };
        let entry = Entry {
            first: parse(id)?,
            second: parse(group).unwrap_or(UNSET),
        };
        (name == wanted || id == wanted).then_some(entry)
    })
}

/// The identifier that the kernel takes for "unchanged".
const UNSET: u32 = u32::MAX;

fn parse(text: &str) -> Option<u32> {
    text.parse().ok().filter(|id| *id != UNSET)
}

fn identifier(name: &str, entry: Option<Entry>, path: &'static str) -> Result<u32, IdentityError> {
    let found = entry.map(|entry| entry.first).or_else(|| parse(name));
    found.ok_or_else(|| IdentityError::Unknown {
        name: name.to_owned(),
        path,
    })
}

/// Empties the capability bounding set, so that no capability can be gained. Needs CAP_SETPCAP, which a
/// change of the user takes away: call it before.
///
/// # Errors
///
/// Those of `prctl(PR_CAPBSET_DROP)`. Without CAP_SETPCAP nothing is done.
pub fn bound() -> io::Result<()> {
    let held = thread::capabilities(None)?.effective;
    if !held.contains(CapabilitySet::SETPCAP) {
        // The set cannot be changed, and `no_new_privs` keeps the process from gaining any of it.
        return Ok(());
    }
    for bit in 0..u64::BITS {
        let one = CapabilitySet::from_bits_retain(1 << bit);
        match thread::remove_capability_from_bounding_set(one) {
            Ok(()) => {}
            // Beyond the last capability of this kernel.
            Err(Errno::INVAL) => break,
            Err(errno) => return Err(errno.into()),
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::io::confine;

    const USERS: &str = "root:x:0:0:root:/root:/bin/sh\n\nbad\nvm:x:64055:110::/:/bin/false\n";
    const GROUPS: &str = "root:x:0:\nkvm:x:110:vm,other\n";

    #[test]
    fn names_and_numbers_are_found() {
        let vm = Entry {
            first: 64055,
            second: 110,
        };
        assert_eq!(entry_of(USERS, "vm"), Some(vm));
        assert_eq!(entry_of(USERS, "64055"), Some(vm));
        for absent in ["v", "x", "", "110"] {
            assert_eq!(entry_of(USERS, absent), None, "{absent:?}");
        }
        assert_eq!(entry_of(GROUPS, "kvm").map(|entry| entry.first), Some(110));
    }

    #[test]
    fn numbers_need_no_list() {
        let found = Identity::find_in("", "", "64055", Some("110")).unwrap();
        assert_eq!((found.uid.as_raw(), found.gid.as_raw()), (64055, 110));
        let error = Identity::find_in("", "", "64055", None).unwrap_err();
        assert!(error.to_string().contains("add --group"), "{error}");
        let error = Identity::find_in("", "", "vm", Some("110")).unwrap_err();
        assert!(
            error.to_string().contains("neither a number nor a name"),
            "{error}"
        );
        assert_eq!(read("/no/such/list").unwrap(), "");
    }

    #[test]
    fn an_identity_is_whole_or_refused() {
        let root = Identity::find("0", None).unwrap();
        assert_eq!(root, Identity::find("root", Some("root")).unwrap());
        let number = Identity::find("4000000000", Some("4000000001")).unwrap();
        assert_eq!(number.uid.as_raw(), 4_000_000_000);
        assert_eq!(number.gid.as_raw(), 4_000_000_001);
        let error = Identity::find("4000000000", None).unwrap_err();
        assert!(error.to_string().contains("--group"), "{error}");
        for user in ["no such", "", "-1", "4294967295", "4294967296"] {
            assert!(Identity::find(user, Some("0")).is_err(), "{user:?}");
        }
        assert!(Identity::find("root", Some("no such")).is_err());
    }

    #[test]
    fn nothing_is_left_of_what_a_thread_could_do() {
        let could_bound = thread::capabilities(None)
            .unwrap()
            .effective
            .contains(CapabilitySet::SETPCAP);
        let inside = std::thread::spawn(|| {
            bound().unwrap();
            confine::drop_all_but(CapabilitySet::DAC_OVERRIDE).unwrap();
            let kept = thread::capabilities(None).unwrap();
            assert!(CapabilitySet::DAC_OVERRIDE.contains(kept.effective | kept.permitted));
            confine::drop_rest().unwrap();
            let sets = thread::capabilities(None).unwrap();
            assert_eq!(
                sets.effective | sets.permitted | sets.inheritable,
                CapabilitySet::empty()
            );
            assert!(thread::no_new_privs().unwrap());
            thread::capability_is_in_bounding_set(CapabilitySet::CHOWN).unwrap()
        });
        let still_bounding = inside.join().unwrap();
        assert!(!(could_bound && still_bounding));
    }
}
