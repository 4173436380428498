//! Soft limits of the process (`setrlimit(2)`).

use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};

/// Raises the soft limit of `resource` to `wanted`, or to the hard limit if that is lower. Returns the
/// soft limit in force afterwards, which may be higher than `wanted`; `u64::MAX` means no limit.
pub fn raise(resource: Resource, wanted: u64) -> u64 {
    let Rlimit { current, maximum } = getrlimit(resource);
    let have = current.unwrap_or(u64::MAX);
    let allowed = maximum.map_or(wanted, |maximum| maximum.min(wanted));
    if allowed <= have {
        return have;
    }
    let raised = Rlimit {
        current: Some(allowed).filter(|allowed| *allowed != u64::MAX),
        maximum,
    };
    match setrlimit(resource, raised) {
        Ok(()) => allowed,
        Err(error) => {
            log::warn!("cannot raise the limit {resource:?} from {have} to {allowed}: {error}");
            have
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_limit_is_raised_up_to_the_hard_limit_and_never_lowered() {
        // Limits belong to the process, so this test uses one that no other test depends on.
        let resource = Resource::Msgqueue;
        let limit = |current, maximum| Rlimit {
            current: Some(current),
            maximum: Some(maximum),
        };
        setrlimit(resource, limit(100, 300)).unwrap();
        assert_eq!(raise(resource, 50), 100);
        assert_eq!(raise(resource, 200), 200);
        assert_eq!(getrlimit(resource), limit(200, 300));
        assert_eq!(raise(resource, u64::MAX), 300);
        assert_eq!(raise(resource, 301), 300);
    }
}
