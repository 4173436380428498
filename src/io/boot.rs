//! Boot id of the kernel, a random UUID for each boot.

use std::fs;
use std::sync::OnceLock;

use uuid::Uuid;

const PATH: &str = "/proc/sys/kernel/random/boot_id";

/// Returns the boot id, or nil if it cannot be read. Reads it once, because the sandbox may hide `/proc`
/// later.
///
/// Callers must treat nil as different from every boot id, including nil.
pub fn boot_id() -> Uuid {
    static ID: OnceLock<Uuid> = OnceLock::new();
    *ID.get_or_init(|| {
        let read = fs::read_to_string(PATH);
        let parsed = read.ok().and_then(|text| text.trim().parse().ok());
        parsed.unwrap_or_else(|| {
            log::warn!("cannot read {PATH}; treating writes that were not synced as lost");
            Uuid::nil()
        })
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_running_system_has_one_name() {
        let id = boot_id();
        assert_eq!(id, boot_id());
        let text = fs::read_to_string(PATH).unwrap();
        assert_eq!(text.trim(), id.to_string());
    }
}
