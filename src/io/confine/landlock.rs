//! Support for Landlock.
#![allow(unsafe_code)] // the query of Landlock's version has no safe form

use std::io;
use std::ptr::null;

use landlock::LandlockStatus;

use super::Support;

/// Returns whether a policy forbids Landlock with EPERM; the kernel itself never returns that.
pub fn is_forbidden() -> bool {
    const LANDLOCK_CREATE_RULESET_VERSION: u32 = 1;
    let call = libc::SYS_landlock_create_ruleset;
    // SAFETY: with this flag the call takes no pointer and returns a number.
    let version =
        unsafe { libc::syscall(call, null::<u8>(), 0usize, LANDLOCK_CREATE_RULESET_VERSION) };
    version < 0 && io::Error::last_os_error().kind() == io::ErrorKind::PermissionDenied
}

impl From<LandlockStatus> for Support {
    fn from(status: LandlockStatus) -> Self {
        match status {
            LandlockStatus::Available { .. } => Self::Full,
            LandlockStatus::NotEnabled | LandlockStatus::NotImplemented => Self::Missing,
        }
    }
}
