//! The libraries with which the C library resolves names.
#![allow(unsafe_code)] // `dlopen` has no safe form

/// Loads the libraries that resolve names by files and by DNS. Call it before a sandbox that forbids to load
/// programs: glibc before 2.34 loads them when the first name is resolved. In later versions they are
/// parts of the C library, and the files are empty or absent.
pub fn load() {
    #[cfg(target_env = "gnu")]
    for library in [c"libnss_files.so.2", c"libnss_dns.so.2"] {
        // SAFETY: the name ends with a zero byte. The libraries belong to the C library, which runs their
        // constructors as it would later on; they are never unloaded.
        unsafe {
            libc::dlopen(library.as_ptr(), libc::RTLD_NOW);
        }
    }
}
