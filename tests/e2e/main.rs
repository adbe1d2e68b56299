//! The tool from the outside: every test starts `tpshard` or what it wrote, and looks at exit codes, messages and files.

mod any_ranks;
mod bench;
mod bisect;
mod c_api;
mod calibrate;
mod check;
mod check_files;
mod crash;
mod deferred;
mod determinism;
mod draft;
mod entries;
mod errors;
mod explain;
mod generate;
mod golden_plan;
mod hostile;
mod launch;
mod report_page;
mod requests;
mod shard_and_run;
mod slots;
mod split_all;
mod support;
mod traffic;
mod verify;
