//! Kernels: every family on random operands, compiled for the CPU through the host shim and run by one thread a block and
//! by fibers in several orders, against the reference interpreter; and the text itself.

mod case;
mod families;
mod library;
mod machine;
mod shim;
mod text;
