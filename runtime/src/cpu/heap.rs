//! Memory that was freed and will not be needed soon.
#![allow(unsafe_code, reason = "a function of the C library that Rust's does not show")]

#[cfg(all(target_os = "linux", target_env = "gnu"))]
unsafe extern "C" {
    safe fn malloc_trim(pad: usize) -> std::ffi::c_int;
}

/// Has the allocator give pages back to the system that hold nothing. It keeps large freed pieces for the next of their size,
/// splits them for small ones in between, and then takes new memory for that next one: while weights are read, one after the
/// other, a rank would hold one of them too many.
pub(super) fn give_back() {
    #[cfg(all(target_os = "linux", target_env = "gnu"))]
    malloc_trim(0);
}
