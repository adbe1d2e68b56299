//! Which rank this process is, from what its launcher left in the environment.
//!
//! Sources in order: flags, torchrun's `RANK`, Open MPI, Slurm, PMI. All that are present must agree, with one
//! exception: Slurm exports its variables to everything inside an allocation, so that they say nothing about a
//! process that another launcher started; they count only if no other launcher speaks.

use super::RENDEZVOUS_VARIABLE;
use crate::comm::MAX_RANKS;
use sha2::{Digest, Sha256};
use std::collections::BTreeMap;
use std::fmt;

/// Rank and world size given on the command line.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Flags {
    pub rank: Option<usize>,
    pub world_size: Option<usize>,
}

/// Who said which rank this is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Source {
    Flags,
    Torchrun,
    OpenMpi,
    Slurm,
    Pmi,
}

impl fmt::Display for Source {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Source::Flags => "by its flags",
            Source::Torchrun => "by torchrun's variables",
            Source::OpenMpi => "by Open MPI's variables",
            Source::Slurm => "by Slurm's variables",
            Source::Pmi => "by PMI's variables",
        })
    }
}

/// A process's place in its job.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Place {
    pub rank: usize,
    pub world_size: usize,
    /// Rank among the processes of this host.
    pub local_rank: Option<usize>,
    pub local_world_size: Option<usize>,
    pub source: Source,
}

/// Why a process cannot take its place.
#[derive(Debug, thiserror::Error)]
pub enum LaunchError {
    #[error(
        "the {what} is given in two ways: {first} and {second}\n  help: unset the variables of the launcher that is not in use"
    )]
    Contradiction { what: &'static str, first: String, second: String },
    #[error("{found}, which is not a number")]
    NotANumber { found: String },
    #[error("{found}, but {missing} is not set\n  help: set both, or neither to start all ranks from here")]
    Incomplete { found: String, missing: &'static str },
    #[error("{found}: rank {rank} does not exist among {world_size} ranks")]
    NoSuchRank { found: String, rank: usize, world_size: usize },
    #[error(
        "this program was split for {program} ranks, but {found}\n  help: start exactly {program} processes"
    )]
    WrongWorldSize { program: usize, found: String },
    #[error("{world_size} ranks; supported are 1 to {MAX_RANKS}")]
    BadWorldSize { world_size: usize },
    #[error(
        "the job spans several hosts ({found}), which CPU ranks cannot do\n  help: start all ranks on one host"
    )]
    SeveralHosts { found: String },
    #[error(
        "nothing tells this job from others on the host\n  help: set {RENDEZVOUS_VARIABLE} to one value, new for every job, on all ranks"
    )]
    NoJobKey,
    #[error("{0}")]
    Refused(#[from] super::Refusal),
    #[error("rank {rank} of {world_size}: {what}")]
    Rendezvous { rank: usize, world_size: usize, what: String },
    #[error(transparent)]
    Comm(#[from] crate::comm::CommError),
}

impl LaunchError {
    /// As [`SessionError::exit_code`](crate::session::SessionError::exit_code).
    pub fn exit_code(&self) -> u8 {
        match self {
            LaunchError::Refused { .. } | LaunchError::Rendezvous { .. } => 6,
            _ => 2,
        }
    }
}

/// Variables of one launcher.
struct Variables {
    source: Source,
    rank: &'static str,
    world_size: Option<&'static str>,
    local_rank: Option<&'static str>,
    local_world_size: Option<&'static str>,
}

const LAUNCHERS: [Variables; 5] = [
    Variables {
        source: Source::Torchrun,
        rank: "RANK",
        world_size: Some("WORLD_SIZE"),
        local_rank: Some("LOCAL_RANK"),
        local_world_size: Some("LOCAL_WORLD_SIZE"),
    },
    Variables {
        source: Source::OpenMpi,
        rank: "OMPI_COMM_WORLD_RANK",
        world_size: Some("OMPI_COMM_WORLD_SIZE"),
        local_rank: Some("OMPI_COMM_WORLD_LOCAL_RANK"),
        local_world_size: Some("OMPI_COMM_WORLD_LOCAL_SIZE"),
    },
    Variables {
        source: Source::Slurm,
        rank: "SLURM_PROCID",
        world_size: Some("SLURM_NTASKS"),
        local_rank: Some("SLURM_LOCALID"),
        local_world_size: None,
    },
    Variables {
        source: Source::Pmi,
        rank: "PMI_RANK",
        world_size: Some("PMI_SIZE"),
        local_rank: Some("MPI_LOCALRANKID"),
        local_world_size: Some("MPI_LOCALNRANKS"),
    },
    // PMIx has no variable for the size; it only confirms other sources, or goes with a program that knows its ranks.
    Variables {
        source: Source::Pmi,
        rank: "PMIX_RANK",
        world_size: None,
        local_rank: None,
        local_world_size: None,
    },
];

/// Variables that [`super::spawn_ranks`] clears, so that ranks started from inside another job are not confused.
pub(super) fn launcher_variables() -> impl Iterator<Item = &'static str> {
    let numbers = LAUNCHERS
        .iter()
        .flat_map(|l| [Some(l.rank), l.world_size, l.local_rank, l.local_world_size].into_iter().flatten());
    numbers.chain(["MASTER_ADDR", "MASTER_PORT", "TORCHELASTIC_RUN_ID", "PMIX_NAMESPACE", "SLURM_NNODES"])
}

/// A number and where it was found.
#[derive(Clone)]
struct Found {
    value: usize,
    text: String,
}

impl fmt::Display for Found {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.text)
    }
}

struct Claim {
    source: Source,
    rank: Option<Found>,
    world_size: Option<Found>,
    local_rank: Option<Found>,
    local_world_size: Option<Found>,
    missing: &'static str,
}

fn number(env: &BTreeMap<String, String>, name: &str) -> Result<Option<Found>, LaunchError> {
    let Some(value) = env.get(name) else { return Ok(None) };
    let text = format!("{name}={value}");
    match value.trim().parse() {
        Ok(value) => Ok(Some(Found { value, text })),
        Err(_) => Err(LaunchError::NotANumber { found: text }),
    }
}

fn claims(flags: &Flags, env: &BTreeMap<String, String>) -> Result<Vec<Claim>, LaunchError> {
    let flag =
        |name: &str, value: Option<usize>| value.map(|v| Found { value: v, text: format!("{name} {v}") });
    let mut claims = vec![Claim {
        source: Source::Flags,
        rank: flag("--rank", flags.rank),
        world_size: flag("--world-size", flags.world_size),
        local_rank: None,
        local_world_size: None,
        missing: "--rank",
    }];
    for launcher in &LAUNCHERS {
        let read = |name: Option<&str>| name.map_or(Ok(None), |name| number(env, name));
        claims.push(Claim {
            source: launcher.source,
            rank: number(env, launcher.rank)?,
            world_size: read(launcher.world_size)?,
            local_rank: read(launcher.local_rank)?,
            local_world_size: read(launcher.local_world_size)?,
            missing: launcher.rank,
        });
    }
    // An allocation's variables without a task's, or next to another launcher's, say nothing about this process.
    let spoken = claims.iter().any(|c| c.source != Source::Slurm && c.rank.is_some());
    claims.retain(|c| c.source != Source::Slurm || (!spoken && c.rank.is_some()));
    claims.retain(|c| c.rank.is_some() || c.world_size.is_some());
    Ok(claims)
}

/// The one value that all claims make, or the contradiction.
fn agreed<'a>(
    what: &'static str,
    found: impl Iterator<Item = &'a Found>,
) -> Result<Option<Found>, LaunchError> {
    let mut first: Option<&Found> = None;
    for next in found {
        match first {
            Some(first) if first.value != next.value => {
                let (first, second) = (first.to_string(), next.to_string());
                return Err(LaunchError::Contradiction { what, first, second });
            }
            Some(_) => {}
            None => first = Some(next),
        }
    }
    Ok(first.cloned())
}

/// The place of a process with these flags and variables, `None` if nobody gave it one. `program_ranks` is the number
/// of ranks that the program was split for.
///
/// # Errors
/// Every contradiction, missing half, and place that does not exist, with what was found.
pub fn find_place(
    flags: &Flags,
    env: &BTreeMap<String, String>,
    program_ranks: Option<usize>,
) -> Result<Option<Place>, LaunchError> {
    let claims = claims(flags, env)?;
    let rank = agreed("rank", claims.iter().filter_map(|c| c.rank.as_ref()))?;
    let world = agreed("number of ranks", claims.iter().filter_map(|c| c.world_size.as_ref()))?;
    if let (Some(program), Some(found)) = (program_ranks, &world)
        && found.value != program
    {
        return Err(LaunchError::WrongWorldSize { program, found: found.to_string() });
    }
    let (rank, world_size) = match (rank, world.as_ref().map(|w| w.value).or(program_ranks)) {
        (Some(rank), Some(world_size)) => (rank, world_size),
        (Some(rank), None) => {
            return Err(LaunchError::Incomplete { found: rank.to_string(), missing: "the number of ranks" });
        }
        (None, _) => {
            return match (world, claims.first()) {
                (Some(world), Some(claim)) => {
                    Err(LaunchError::Incomplete { found: world.to_string(), missing: claim.missing })
                }
                _ => Ok(None),
            };
        }
    };
    if world_size == 0 || world_size > MAX_RANKS {
        return Err(LaunchError::BadWorldSize { world_size });
    }
    if rank.value >= world_size {
        return Err(LaunchError::NoSuchRank { found: rank.to_string(), rank: rank.value, world_size });
    }
    one_host(env, &claims, world_size)?;
    let first = |get: fn(&Claim) -> Option<&Found>| claims.iter().find_map(get).map(|f| f.value);
    let source = claims.iter().find(|c| c.rank.is_some()).map_or(Source::Flags, |c| c.source);
    Ok(Some(Place {
        rank: rank.value,
        world_size,
        local_rank: first(|c| c.local_rank.as_ref()),
        local_world_size: first(|c| c.local_world_size.as_ref()),
        source,
    }))
}

fn one_host(env: &BTreeMap<String, String>, claims: &[Claim], world_size: usize) -> Result<(), LaunchError> {
    if let Some(local) = claims.iter().find_map(|c| c.local_world_size.as_ref())
        && local.value < world_size
    {
        return Err(LaunchError::SeveralHosts { found: format!("{local} of {world_size} ranks") });
    }
    if claims.iter().any(|c| c.source == Source::Slurm)
        && let Some(nodes) = number(env, "SLURM_NNODES")?
        && nodes.value > 1
    {
        return Err(LaunchError::SeveralHosts { found: nodes.to_string() });
    }
    Ok(())
}

/// What tells the processes of one job from all others on the host.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct JobKey {
    /// Name of the abstract Unix socket.
    pub name: String,
    /// Must match between the ranks.
    pub token: String,
}

impl JobKey {
    /// The key of a job that is identified by `material`.
    pub fn new(user: u32, material: &str) -> JobKey {
        let hash = |purpose: &str| {
            let digest = Sha256::digest(format!("tpshard {purpose} {user} {material}"));
            digest.iter().take(16).map(|byte| format!("{byte:02x}")).collect::<String>()
        };
        JobKey { name: format!("tpshard-{user}-{}", hash("name")), token: hash("token") }
    }
}

/// The job's key, from `TPSHARD_RENDEZVOUS` or else from what the launcher calls the job. `parent` is the parent
/// process, which stands for the job under launchers that give it no name.
///
/// # Errors
/// [`LaunchError::NoJobKey`] if nothing identifies the job.
pub fn job_key(
    source: Source,
    env: &BTreeMap<String, String>,
    user: u32,
    parent: u32,
) -> Result<JobKey, LaunchError> {
    if let Some(explicit) = env.get(RENDEZVOUS_VARIABLE) {
        return Ok(JobKey::new(user, explicit));
    }
    let names: &[&str] = match source {
        Source::Flags => &[],
        Source::Torchrun => {
            &["TORCHELASTIC_RUN_ID", "TORCHELASTIC_RESTART_COUNT", "MASTER_ADDR", "MASTER_PORT"]
        }
        Source::OpenMpi => &["PMIX_NAMESPACE", "OMPI_MCA_ess_base_jobid"],
        Source::Slurm => &["SLURM_JOB_ID", "SLURM_STEP_ID"],
        Source::Pmi => &["PMIX_NAMESPACE", "PMI_JOBID"],
    };
    let found: Vec<String> =
        names.iter().filter_map(|name| env.get(*name).map(|value| format!("{name}={value}"))).collect();
    match (found.is_empty(), source) {
        (false, _) => Ok(JobKey::new(user, &found.join("\n"))),
        (true, Source::OpenMpi | Source::Pmi) => Ok(JobKey::new(user, &format!("child of {parent}"))),
        (true, _) => Err(LaunchError::NoJobKey),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn env(text: &str) -> BTreeMap<String, String> {
        text.split_whitespace()
            .filter_map(|pair| pair.split_once('='))
            .map(|(name, value)| (name.to_owned(), value.to_owned()))
            .collect()
    }

    fn place(flags: (Option<usize>, Option<usize>), text: &str, program: Option<usize>) -> String {
        let flags = Flags { rank: flags.0, world_size: flags.1 };
        match find_place(&flags, &env(text), program) {
            Ok(None) => "alone".into(),
            Ok(Some(p)) => format!("{} of {} by {:?}", p.rank, p.world_size, p.source),
            Err(error) => error.to_string().lines().next().unwrap_or_default().to_owned(),
        }
    }

    #[test]
    fn launchers_are_understood_and_contradictions_refused() {
        let none = (None, None);
        let ompi = "OMPI_COMM_WORLD_RANK=2 OMPI_COMM_WORLD_SIZE=4";
        let slurm = "SLURM_PROCID=1 SLURM_NTASKS=2 SLURM_LOCALID=1";
        for (flags, text, program, expected) in [
            (none, "", None, "alone"),
            (none, "", Some(4), "alone"),
            (none, "RANK=1 WORLD_SIZE=2 LOCAL_RANK=1 LOCAL_WORLD_SIZE=2", Some(2), "1 of 2 by Torchrun"),
            (none, ompi, Some(4), "2 of 4 by OpenMpi"),
            (none, slurm, None, "1 of 2 by Slurm"),
            (none, "PMI_RANK=0 PMI_SIZE=3", None, "0 of 3 by Pmi"),
            (none, "PMIX_RANK=1", Some(2), "1 of 2 by Pmi"),
            (none, "PMIX_RANK=1", None, "PMIX_RANK=1, but the number of ranks is not set"),
            ((Some(1), Some(2)), "", None, "1 of 2 by Flags"),
            ((Some(1), None), "", Some(2), "1 of 2 by Flags"),
            ((Some(1), Some(2)), "RANK=1 WORLD_SIZE=2", None, "1 of 2 by Flags"),
            (
                (Some(1), None),
                "RANK=0 WORLD_SIZE=2",
                None,
                "the rank is given in two ways: --rank 1 and RANK=0",
            ),
            (
                none,
                "RANK=0 WORLD_SIZE=4 OMPI_COMM_WORLD_RANK=2 OMPI_COMM_WORLD_SIZE=4",
                None,
                "the rank is given in two ways: RANK=0 and OMPI_COMM_WORLD_RANK=2",
            ),
            (
                none,
                "RANK=2 WORLD_SIZE=3 OMPI_COMM_WORLD_RANK=2 OMPI_COMM_WORLD_SIZE=4",
                None,
                "the number of ranks is given in two ways: WORLD_SIZE=3 and OMPI_COMM_WORLD_SIZE=4",
            ),
            // sbatch gives every process inside the variables of its own first task.
            (none, "RANK=3 WORLD_SIZE=4 SLURM_PROCID=0 SLURM_NTASKS=1", None, "3 of 4 by Torchrun"),
            (none, "SLURM_NTASKS=4", None, "alone"),
            (
                none,
                "SLURM_PROCID=0 SLURM_NTASKS=2 SLURM_NNODES=2",
                None,
                "the job spans several hosts (SLURM_NNODES=2), which CPU ranks cannot do",
            ),
            (
                none,
                "RANK=0 WORLD_SIZE=4 LOCAL_WORLD_SIZE=2",
                None,
                "the job spans several hosts (LOCAL_WORLD_SIZE=2 of 4 ranks), which CPU ranks cannot do",
            ),
            (none, "RANK=2", None, "RANK=2, but the number of ranks is not set"),
            (none, "WORLD_SIZE=2", None, "WORLD_SIZE=2, but RANK is not set"),
            (none, "RANK=one WORLD_SIZE=2", None, "RANK=one, which is not a number"),
            (none, "RANK=-1 WORLD_SIZE=2", None, "RANK=-1, which is not a number"),
            (none, "RANK=2 WORLD_SIZE=2", None, "RANK=2: rank 2 does not exist among 2 ranks"),
            (none, "RANK=0 WORLD_SIZE=0", None, "0 ranks; supported are 1 to 1024"),
            (none, ompi, Some(2), "this program was split for 2 ranks, but OMPI_COMM_WORLD_SIZE=4"),
        ] {
            assert_eq!(place(flags, text, program), expected, "{flags:?} {text} {program:?}");
        }
    }

    #[test]
    fn keys_tell_jobs_and_users_apart() {
        let key = |source, text: &str| job_key(source, &env(text), 1000, 77).map(|k| k.name).ok();
        let torchrun = "TORCHELASTIC_RUN_ID=none MASTER_ADDR=localhost MASTER_PORT=29500";
        let other_port = torchrun.replace("29500", "29501");
        assert_eq!(key(Source::Torchrun, torchrun), key(Source::Torchrun, torchrun));
        assert_ne!(key(Source::Torchrun, torchrun), key(Source::Torchrun, &other_port));
        assert!(key(Source::Flags, "").is_none() && key(Source::Slurm, "").is_none());
        assert!(key(Source::Pmi, "").is_some() && key(Source::Flags, "TPSHARD_RENDEZVOUS=x").is_some());
        assert_ne!(JobKey::new(1, "x").name, JobKey::new(2, "x").name);
        let key = JobKey::new(1, "x");
        assert!(!key.name.contains(&key.token), "the token must not be readable in the socket's name");
    }
}
