//! Writes down what was planned: rank executables, weight shards and the folder that holds them.
//!
//! [`folder`] makes a folder appear complete or not at all, [`weights`] streams each rank's slices into safetensors,
//! [`elf`] puts a rank program into a copy of the runner, [`report_html`] shows the plan in a browser. How collectives
//! are carried is not known here.

pub mod build;
pub mod cubins;
pub mod cuda;
pub mod elf;
pub mod folder;
pub mod report_html;
pub mod weights;
