//! `tpshard exec`: a folder's programs with this executable, where its own cannot be started.

use super::run::{add_flags, spawn};
use crate::arguments::ExecArguments;
use crate::failure::{Classify, Kind, Outcome};
use crate::folder::Folder;
use crate::rank_program::RankFile;
use crate::runner::{check_outputs, environment, run_rank};
use std::process::Command;
use tpshard_runtime::launch::{Flags, find_place};

pub(crate) fn exec(arguments: &ExecArguments, json: bool) -> Outcome<()> {
    let folder = Folder::open(&arguments.folder)?;
    let place = find_place(&Flags::default(), &environment(), Some(folder.ranks)).or_fail(Kind::Usage)?;
    let Some(place) = place else {
        check_outputs(&arguments.tensors)?;
        let own = std::env::current_exe().or_fail(Kind::Resource)?;
        let commands = (0..folder.ranks)
            .map(|_| {
                let mut command = Command::new(&own);
                command.arg("exec").arg(&folder.path);
                add_flags(&mut command, &arguments.tensors, json);
                command
            })
            .collect();
        return spawn(commands);
    };
    let file = RankFile::read(&folder.executable(place.rank))?;
    run_rank(&folder.path, file, &place, &arguments.tensors, json, None)
}
