//! The C interface of sessions: open a folder, run it, step slots, read results.
//!
//! `include/tpshard.h` is the interface; what it promises is kept here. [`exports`] are the functions, each of which
//! does nothing but hand its arguments over through [`border`], the only place that looks at foreign pointers. No panic
//! passes the border, nothing is printed, and every error has a code and a message.

mod border;
mod dtype;
mod exports;
mod fail;
mod folder;
mod handle;
mod open;
mod slots;
mod tensors;
