//! runtime

pub mod elf;
