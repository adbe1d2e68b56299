//! Opening: all ranks in this process on threads, or one rank of a job of processes.

use crate::fail::{Code, Fail, Outcome};
use crate::folder::{RankFiles, program};
use crate::handle::Handle;
use std::collections::BTreeMap;
use std::path::Path;
use std::sync::Arc;
use std::thread::{Builder, JoinHandle};
use std::time::Duration;
use tpshard_frontend::deferred::OnnxEvaluator;
use tpshard_ir::deferred::SharedEvaluator;
use tpshard_runtime::comm::{CommOptions, Communicator, solo, threads};
use tpshard_runtime::launch::{Agreement, Flags, Place, Rendezvous, Source, connect, find_place};
use tpshard_runtime::session::{Session, SessionError, SessionOptions};
use tpshard_runtime::state::StateOptions;

/// A caller may leave a session alone for as long as it likes; that ranks are alive is seen without a clock.
const FOREVER: Duration = Duration::from_secs(100 * 365 * 24 * 3600);
/// How long ranks that are processes have to appear.
const APPEARANCE: Duration = Duration::from_secs(30);

/// How a session is opened, as the header says it.
#[derive(Clone, Copy, Debug, Default)]
#[repr(C)]
pub(crate) struct Options {
    pub(crate) size: u64,
    pub(crate) world_size: i32,
    pub(crate) rank: i32,
    pub(crate) threads: u32,
    pub(crate) timeout_seconds: u32,
    pub(crate) memory_limit: u64,
    pub(crate) slots: u64,
    pub(crate) capacity: u64,
}

impl Options {
    fn session(&self) -> Outcome<SessionOptions> {
        let size = |what: &str, number: u64| {
            usize::try_from(number).map_err(|_| Fail::usage(format!("{what} of {number} are too many")))
        };
        let state = match (self.slots, self.capacity) {
            (0, 0) => None,
            (slots, capacity) if slots > 0 && capacity > 0 => {
                Some(StateOptions { slots: size("slots", slots)?, capacity: size("capacity", capacity)? })
            }
            (slots, capacity) => {
                let what = format!("{slots} slots of capacity {capacity}");
                return Err(Fail::usage(format!(
                    "{what}\n  help: give both, or neither for a session without state"
                )));
            }
        };
        Ok(SessionOptions {
            threads: (self.threads > 0).then_some(self.threads as usize),
            memory_limit: (self.memory_limit > 0).then_some(self.memory_limit),
            evaluator: SharedEvaluator(Some(Arc::new(OnnxEvaluator::default()))),
            state,
            ..SessionOptions::default()
        })
    }

    fn communication(&self) -> CommOptions {
        let stall = match self.timeout_seconds {
            0 => FOREVER,
            seconds => Duration::from_secs(seconds.into()),
        };
        CommOptions { stall, ..CommOptions::default() }
    }
}

/// The other ranks in this process, each of which follows rank 0.
pub(crate) type Others = Vec<JoinHandle<Result<(), SessionError>>>;

pub(crate) fn open(folder: &Path, options: &Options) -> Outcome<Handle> {
    if options.world_size == 0 && options.rank != 0 {
        return Err(Fail::usage(format!(
            "rank {} of a job of unknown size\n  help: give world_size as well, or rank 0 to run all ranks here",
            options.rank
        )));
    }
    let (session, others) = match options.world_size {
        0 => all_ranks(folder, options)?,
        _ => (one_rank(folder, options)?, Others::new()),
    };
    Ok(Handle::new(session, others, options.slots > 0))
}

fn all_ranks(folder: &Path, options: &Options) -> Outcome<(Session, Others)> {
    let session_options = options.session()?;
    let first = RankFiles::open(folder, 0)?;
    let ranks = first.program.mesh.ranks();
    let mut files = vec![first];
    // What is wrong with a file is said before any rank waits for another.
    for rank in 1..ranks {
        files.push(RankFiles::open(folder, rank)?);
    }
    let ends = threads(ranks, &options.communication()).map_err(SessionError::from)?;
    let (mut started, mut own, mut failed) = (Others::new(), None, None);
    for ((rank, end), files) in ends.into_iter().enumerate().zip(files) {
        if rank == 0 {
            own = Some((end, files));
            continue;
        }
        let options = session_options.clone();
        let follow = move || start(files, end, &options)?.follow();
        match Builder::new().name(format!("tpshard rank {rank}")).spawn(follow) {
            Ok(thread) => started.push(thread),
            Err(error) => {
                failed = Some(Fail::new(Code::Resources, format!("cannot start rank {rank}: {error}")));
                break;
            }
        }
    }
    if let Some(failed) = failed {
        // The missing ends of the communication end those that were started.
        drop(own);
        ended(started);
        return Err(failed);
    }
    let (end, files) = own.ok_or_else(|| Fail::new(Code::Mismatch, "the folder has no ranks"))?;
    match start(files, end, &session_options) {
        Ok(session) => Ok((session, started)),
        Err(error) => {
            // The rank that failed by itself says more than those that heard of it.
            let others = ended(started).into_iter();
            let causes = std::iter::once(Fail::from(error)).chain(others);
            let cause = causes.min_by_key(|fail| fail.code == Code::Rank);
            Err(cause.unwrap_or_else(Fail::panicked))
        }
    }
}

fn start(
    files: RankFiles,
    end: Box<dyn Communicator>,
    options: &SessionOptions,
) -> Result<Session, SessionError> {
    let RankFiles { program, mut weights } = files;
    Session::open(program, &mut weights, end, options)
}

/// Waits for ranks to end; the errors with which they did.
pub(crate) fn ended(others: Others) -> Vec<Fail> {
    let end = |other: JoinHandle<Result<(), SessionError>>| match other.join() {
        Ok(result) => result.err().map(Fail::from),
        Err(_) => Some(Fail::panicked()),
    };
    others.into_iter().filter_map(end).collect()
}

fn one_rank(folder: &Path, options: &Options) -> Outcome<Session> {
    let session_options = options.session()?;
    let ranks = program(folder, 0)?.mesh.ranks();
    let place = place(options, ranks)?;
    let files = RankFiles::open(folder, place.rank)?;
    let agreement = Agreement {
        tool_version: env!("CARGO_PKG_VERSION").into(),
        program_hash: files.program.program_hash.clone(),
        weights_hash: files.program.weights_hash.clone(),
        device: session_options.device.name(&files.program).into(),
        precision: files.program.determinism.name().into(),
    };
    let end = if place.world_size == 1 {
        solo()
    } else {
        let mut meeting = Rendezvous::of_place(&place, &environment(), options.communication())?;
        meeting.timeout = if meeting.timeout == FOREVER { APPEARANCE } else { meeting.timeout };
        connect(&meeting, &agreement)?
    };
    let session_options = SessionOptions {
        local_ranks: place.local_world_size,
        local_rank: place.local_rank,
        ..session_options
    };
    Ok(start(files, end, &session_options)?)
}

/// Which rank this process is.
fn place(options: &Options, ranks: usize) -> Outcome<Place> {
    let number = |what: &str, number: i32| {
        usize::try_from(number).map_err(|_| Fail::usage(format!("{what} is {number}")))
    };
    let flags = match options.world_size {
        -1 => Flags::default(),
        world_size => {
            let (rank, world_size) = (number("rank", options.rank)?, number("world_size", world_size)?);
            Flags { rank: Some(rank), world_size: Some(world_size) }
        }
    };
    match find_place(&flags, &environment(), Some(ranks))? {
        Some(place) => Ok(place),
        None if ranks == 1 => Ok(Place {
            rank: 0,
            world_size: 1,
            local_rank: None,
            local_world_size: None,
            source: Source::Flags,
        }),
        None => Err(Fail::usage(format!(
            "the folder is for {ranks} ranks, and no launcher says which rank this process is\n  \
             help: start {ranks} processes with torchrun, mpirun or srun, or give world_size 0 to run all ranks here"
        ))),
    }
}

fn environment() -> BTreeMap<String, String> {
    std::env::vars_os()
        .filter_map(|(name, value)| Some((name.into_string().ok()?, value.into_string().ok()?)))
        .collect()
}
