//! Users, groups and capabilities.
//!
//! All calls here change the calling thread; the daemon makes them while it has no other.

use std::fs;
use std::io;

use rustix::io::Errno;
use rustix::process::{Gid, Uid};
use rustix::thread::{self, CapabilitySet, CapabilitySets};

/// Who the daemon is to be.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Identity {
    uid: Uid,
    gid: Gid,
}

/// Why the daemon cannot be somebody.
#[derive(Debug, thiserror::Error)]
pub enum IdentityError {
    /// A list of users or groups cannot be read.
    #[error("cannot read {path}")]
    List {
        /// The list.
        path: &'static str,
        /// What the system said.
        source: io::Error,
    },
    /// Neither a number nor a name in the list.
    #[error("{name:?} is neither a number nor a name in {path}")]
    Unknown {
        /// What was asked for.
        name: String,
        /// The list.
        path: &'static str,
    },
    /// A user who is not listed has no group to go with.
    #[error("user {uid} is not in {PASSWD}: add --group")]
    NoGroup {
        /// The user.
        uid: u32,
    },
    /// The system refuses the change.
    #[error("cannot become user {uid} of group {gid}")]
    Refused {
        /// The user.
        uid: u32,
        /// The group.
        gid: u32,
        /// What the system said.
        source: io::Error,
    },
}

const PASSWD: &str = "/etc/passwd";
const GROUP: &str = "/etc/group";

impl Identity {
    /// `user` and `group`, by name or number; without a group, the one the user belongs to.
    ///
    /// Names are looked up in `/etc/passwd` and `/etc/group` alone: other directories of users
    /// would load code of their own into the daemon.
    ///
    /// # Errors
    ///
    /// There is no such user or group.
    pub fn find(user: &str, group: Option<&str>) -> Result<Self, IdentityError> {
        let entry = entry_of(&read(PASSWD)?, user);
        let uid = identifier(user, entry, PASSWD)?;
        let gid = match (group, entry) {
            (Some(group), _) => identifier(group, entry_of(&read(GROUP)?, group), GROUP)?,
            (None, Some(entry)) => entry.second,
            (None, None) => return Err(IdentityError::NoGroup { uid }),
        };
        Ok(Self {
            uid: Uid::from_raw(uid),
            gid: Gid::from_raw(gid),
        })
    }

    /// Becomes this user, of this group and no other.
    ///
    /// # Errors
    ///
    /// The system refuses: it takes root, or CAP_SETUID and CAP_SETGID.
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

fn read(path: &'static str) -> Result<String, IdentityError> {
    let bytes = fs::read(path).map_err(|source| IdentityError::List { path, source })?;
    Ok(String::from_utf8_lossy(&bytes).into_owned())
}

/// The numbers of a line: a user's and its group's, or a group's and nothing of use.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Entry {
    first: u32,
    second: u32,
}

/// The line of a user or group, by name or number.
fn entry_of(list: &str, wanted: &str) -> Option<Entry> {
    list.lines().find_map(|line| {
        let fields: Vec<_> = line.split(':').collect();
        let [name, _, id, group, ..] = fields[..] else {
            return None;
        };
        let entry = Entry {
            first: parse(id)?,
            second: parse(group).unwrap_or(NOBODY),
        };
        (name == wanted || id == wanted).then_some(entry)
    })
}

/// The identifier that stands for none.
const NOBODY: u32 = u32::MAX;

fn parse(text: &str) -> Option<u32> {
    text.parse().ok().filter(|id| *id != NOBODY)
}

fn identifier(name: &str, entry: Option<Entry>, path: &'static str) -> Result<u32, IdentityError> {
    let found = entry.map(|entry| entry.first).or_else(|| parse(name));
    found.ok_or_else(|| IdentityError::Unknown {
        name: name.to_owned(),
        path,
    })
}

/// Takes every capability out of the bounding set, so that none can be gained. That needs
/// CAP_SETPCAP, which becoming another user takes away: call it before.
///
/// # Errors
///
/// The system refuses, though the thread has the capability it takes.
pub fn bound() -> io::Result<()> {
    let held = thread::capabilities(None)?.effective;
    if !held.contains(CapabilitySet::SETPCAP) {
        // Nothing can be taken out, and nothing of it gained without new privileges.
        return Ok(());
    }
    for bit in 0..u64::BITS {
        let one = CapabilitySet::from_bits_retain(1 << bit);
        match thread::remove_capability_from_bounding_set(one) {
            Ok(()) => {}
            // Past the last one this kernel knows.
            Err(Errno::INVAL) => break,
            Err(errno) => return Err(errno.into()),
        }
    }
    Ok(())
}

/// Gives up all capabilities but those of `kept` that the thread has, and the right to gain any by
/// running another program.
///
/// # Errors
///
/// The system refuses.
pub fn drop_all_but(kept: CapabilitySet) -> io::Result<()> {
    thread::set_no_new_privs(true)?;
    thread::clear_ambient_capability_set()?;
    set(thread::capabilities(None)?.effective & kept)
}

/// Gives up the capabilities that [`drop_all_but`] kept.
///
/// # Errors
///
/// The system refuses.
pub fn drop_rest() -> io::Result<()> {
    set(CapabilitySet::empty())
}

fn set(kept: CapabilitySet) -> io::Result<()> {
    let sets = CapabilitySets {
        effective: kept,
        permitted: kept,
        inheritable: CapabilitySet::empty(),
    };
    Ok(thread::set_capabilities(None, sets)?)
}

#[cfg(test)]
mod tests {
    use super::*;

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
            drop_all_but(CapabilitySet::DAC_OVERRIDE).unwrap();
            let kept = thread::capabilities(None).unwrap();
            assert!(CapabilitySet::DAC_OVERRIDE.contains(kept.effective | kept.permitted));
            drop_rest().unwrap();
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
