//! Processes over shared memory: this test binary starts itself once per rank, in a role named by a variable.

mod support;

use std::collections::BTreeMap;
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};
use tempfile::TempDir;
use tpshard_ir::Tensor;
use tpshard_runtime::comm::{CommOptions, Communicator, Group, Monoid, Tag};
use tpshard_runtime::launch::{
    Agreement, Flags, LaunchError, Rendezvous, SpawnError, connect, find_place, is_this_host, spawn_ranks,
};

const ROLE: &str = "TPSHARD_TEST_ROLE";
const REPORT: &str = "TPSHARD_TEST_REPORT";
const PIDS: &str = "TPSHARD_TEST_PIDS";

/// What a rank is told besides its place.
fn variable(name: &str) -> Option<String> {
    std::env::var(name).ok()
}

fn meet() -> Result<Box<dyn Communicator>, LaunchError> {
    let env: BTreeMap<String, String> = std::env::vars().collect();
    let place = find_place(&Flags::default(), &env, None)?.expect("ranks have a place");
    let large = variable(ROLE).as_deref() == Some("order");
    let options = CommOptions {
        stall: Duration::from_millis(600),
        slot_bytes: if large { 1 << 20 } else { 64 * 8 },
        ..CommOptions::default()
    };
    let mut meeting = Rendezvous::of_place(&place, &env, options.clone())?;
    // The rendezvous and the collectives are given different patience here.
    meeting.options = options;
    let field = |name| variable(name).unwrap_or_else(|| "same".into());
    let agreement = Agreement {
        tool_version: "0".into(),
        program_hash: field("PROGRAM"),
        weights_hash: "w".into(),
        device: "cpu".into(),
        precision: field("PRECISION"),
    };
    connect(&meeting, &agreement)
}

/// Not a test: the body of a rank. Without a role it does nothing.
#[test]
fn rank_process() {
    let Some(role) = variable(ROLE) else { return };
    let rank = variable("RANK").unwrap();
    let result = play(&role);
    let text = match &result {
        Ok(()) => "ok".into(),
        Err(error) => error.to_string(),
    };
    std::fs::write(Path::new(&variable(REPORT).unwrap()).join(rank), text).unwrap();
    if result.is_err() {
        std::process::exit(6);
    }
}

fn play(role: &str) -> Result<(), LaunchError> {
    if role == "fail" {
        std::process::exit(if variable("RANK").as_deref() == Some("1") { 5 } else { 0 });
    }
    if role == "launch" {
        let (result, _reports) = local("sleep", 2);
        return result.map_err(|e| LaunchError::NotANumber { found: e.to_string() });
    }
    if role == "sleep" {
        if let Some(pids) = variable(PIDS) {
            let file = Path::new(&pids).join(variable("RANK").unwrap());
            std::fs::write(file, std::process::id().to_string()).unwrap();
        }
        eprintln!("about to sleep");
        std::thread::sleep(Duration::from_secs(60));
    }
    let comm = meet()?;
    let world = Group::world(comm.world_size());
    let tag = |sequence| Tag { sequence, node: 3 };
    let last = comm.rank() + 1 == comm.world_size();
    match role {
        "checks" => support::check_all(&*comm, 700),
        "order" => support::check_order(&*comm),
        "killed" | "stopped" => {
            comm.barrier(&world, tag(1))?;
            if last {
                let signal = if role == "killed" {
                    rustix::process::Signal::KILL
                } else {
                    rustix::process::Signal::STOP
                };
                rustix::process::kill_process(rustix::process::getpid(), signal).unwrap();
                // The signal may reach another thread first.
                std::thread::sleep(Duration::from_millis(200));
            }
            comm.barrier(&world, tag(2))?;
        }
        "mismatch" => {
            let mut data = Tensor::from_vec(vec![2], vec![1f32; 2]).unwrap();
            let monoid = if last { Monoid::Max } else { Monoid::Sum };
            comm.all_reduce(&world, tag(1), monoid, &mut data)?;
        }
        "meet" => {}
        _ => panic!("no role {role}"),
    }
    Ok(())
}

fn rank_command(role: &str, reports: &TempDir) -> Command {
    let mut command = Command::new(std::env::current_exe().unwrap());
    command.args(["--exact", "rank_process", "--nocapture", "--test-threads=1"]);
    command.env(ROLE, role).env(REPORT, reports.path()).stdout(Stdio::null());
    command
}

/// A rank of a job without our launcher, so that what others do when one fails is seen.
fn start(
    role: &str,
    reports: &TempDir,
    key: &str,
    rank: usize,
    world: usize,
    extra: &[(&str, &str)],
) -> Child {
    let mut command = rank_command(role, reports);
    command.env("RANK", rank.to_string()).env("WORLD_SIZE", world.to_string());
    command.env("TPSHARD_RENDEZVOUS", format!("{key}-{}", std::process::id()));
    command.envs(extra.iter().copied()).stderr(Stdio::null()).spawn().unwrap()
}

fn report(reports: &TempDir, rank: usize) -> String {
    std::fs::read_to_string(reports.path().join(rank.to_string())).unwrap_or_default()
}

fn local(role: &str, world: usize) -> (Result<(), SpawnError>, TempDir) {
    let reports = tempfile::tempdir().unwrap();
    let result = spawn_ranks((0..world).map(|_| rank_command(role, &reports)).collect());
    (result, reports)
}

#[test]
fn collectives_match_the_computation_on_whole_tensors() {
    for world in 1..=5 {
        let (result, reports) = local("checks", world);
        result.unwrap();
        (0..world).for_each(|rank| assert_eq!(report(&reports, rank), "ok", "rank {rank} of {world}"));
    }
    local("order", 3).0.unwrap();
}

#[test]
fn a_killed_rank_ends_the_others_within_a_second() {
    let reports = tempfile::tempdir().unwrap();
    let mut ranks: Vec<Child> =
        (0..3).map(|rank| start("killed", &reports, "killed", rank, 3, &[])).collect();
    assert!(!ranks[2].wait().unwrap().success());
    let death = Instant::now();
    for rank in [0, 1] {
        assert_eq!(ranks[rank].wait().unwrap().code(), Some(6));
        let text = report(&reports, rank);
        assert!(text.starts_with("rank 2 ended while others still needed it"), "{text}");
    }
    assert!(death.elapsed() < Duration::from_secs(1), "{:?}", death.elapsed());
}

#[test]
fn a_stopped_rank_is_named() {
    let reports = tempfile::tempdir().unwrap();
    let mut ranks: Vec<Child> =
        (0..2).map(|rank| start("stopped", &reports, "stopped", rank, 2, &[])).collect();
    ranks[0].wait().unwrap();
    ranks[1].kill().unwrap();
    ranks[1].wait().unwrap();
    let text = report(&reports, 0);
    assert!(text.contains("no progress for 0.6 s in barrier (step 2, node 3): waiting for rank 1"), "{text}");
}

#[test]
fn a_mismatch_ends_all() {
    let reports = tempfile::tempdir().unwrap();
    let ranks: Vec<Child> =
        (0..3).map(|rank| start("mismatch", &reports, "mismatch", rank, 3, &[])).collect();
    for (rank, mut child) in ranks.into_iter().enumerate() {
        assert_eq!(child.wait().unwrap().code(), Some(6));
        let text = report(&reports, rank);
        assert!(text.contains("all_reduce(sum)") && text.contains("all_reduce(max)"), "{text}");
    }
}

#[test]
fn ranks_that_do_not_agree_are_all_told_the_same() {
    let reports = tempfile::tempdir().unwrap();
    let other: &[_] = &[("PROGRAM", "other"), ("PRECISION", "f16")];
    let ranks: Vec<Child> = (0..3)
        .map(|rank| start("meet", &reports, "agree", rank, 3, if rank == 1 { other } else { &[] }))
        .collect();
    for (rank, mut child) in ranks.into_iter().enumerate() {
        child.wait().unwrap();
        let text = report(&reports, rank);
        let expected = "program hash: `other` on rank 1, `same` on rank 0, 2; precision: `f16` on rank 1";
        assert!(text.contains(expected), "rank {rank}: {text}");
    }
}

#[test]
fn missing_and_duplicate_ranks_are_named() {
    let reports = tempfile::tempdir().unwrap();
    let patience = [("TPSHARD_TIMEOUT", "1.5")];
    let again = tempfile::tempdir().unwrap();
    let ranks = [
        start("meet", &reports, "missing", 0, 3, &patience),
        start("meet", &reports, "missing", 1, 3, &patience),
        start("meet", &again, "missing", 1, 3, &patience),
    ];
    for mut child in ranks {
        assert_eq!(child.wait().unwrap().code(), Some(6));
    }
    let text = report(&reports, 0);
    assert!(text.contains("these ranks are missing: [2]; refused: rank 1 is there already"), "{text}");
    let both = [report(&reports, 1), report(&again, 1)];
    assert!(both.iter().any(|t| t.contains("missing: [2]")), "{both:?}");
    assert!(both.iter().any(|t| t.contains("refused: rank 1 is there already")), "{both:?}");
}

#[test]
fn without_rank_0_the_others_give_up() {
    let reports = tempfile::tempdir().unwrap();
    let mut child = start("meet", &reports, "headless", 1, 2, &[("TPSHARD_TIMEOUT", "0.3")]);
    assert_eq!(child.wait().unwrap().code(), Some(6));
    assert!(report(&reports, 1).contains("rank 0 did not appear"), "{}", report(&reports, 1));
}

#[test]
fn the_launcher_names_the_rank_that_failed_first() {
    let begin = Instant::now();
    let reports = tempfile::tempdir().unwrap();
    let roles = ["sleep", "fail", "sleep"];
    let error = spawn_ranks(roles.iter().map(|role| rank_command(role, &reports)).collect()).unwrap_err();
    assert!(matches!(error, SpawnError::Failed { rank: 1, code: Some(5), .. }), "{error}");
    assert!(begin.elapsed() < Duration::from_secs(3));

    let (result, _reports) = local("killed", 3);
    let error = result.unwrap_err();
    assert!(matches!(error, SpawnError::Failed { rank: 2, signal: Some(9), .. }), "{error}");

    let missing = vec![rank_command("sleep", &reports), Command::new("no-such-program-anywhere")];
    let error = spawn_ranks(missing).unwrap_err();
    assert!(matches!(error, SpawnError::Start { rank: 1, .. }), "{error}");
}

/// True if the process is gone, or dead and only not collected yet.
fn gone(pid: &str) -> bool {
    match std::fs::read_to_string(format!("/proc/{pid}/stat")) {
        Ok(stat) => stat.rsplit(')').next().is_some_and(|rest| rest.trim_start().starts_with(['Z', 'X'])),
        Err(_) => true,
    }
}

fn soon(mut condition: impl FnMut() -> bool) -> bool {
    let start = Instant::now();
    while start.elapsed() < Duration::from_secs(5) {
        if condition() {
            return true;
        }
        std::thread::sleep(Duration::from_millis(10));
    }
    false
}

#[test]
fn no_rank_outlives_its_launcher() {
    use rustix::process::{Pid, Signal, kill_process};
    for signal in [Signal::KILL, Signal::TERM, Signal::INT] {
        let (reports, pids) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
        let place = [(PIDS, pids.path().to_str().unwrap())];
        let mut launcher = start("launch", &reports, "launch", 9, 10, &place);
        let pid = |rank: &str| std::fs::read_to_string(pids.path().join(rank)).unwrap_or_default();
        assert!(soon(|| !pid("0").is_empty() && !pid("1").is_empty()), "the ranks did not start");
        kill_process(Pid::from_child(&launcher), signal).unwrap();
        launcher.wait().unwrap();
        assert!(soon(|| gone(&pid("0")) && gone(&pid("1"))), "ranks survived {signal:?}");
        if signal != Signal::KILL {
            let expected = format!("interrupted by signal {}", signal.as_raw());
            assert!(report(&reports, 9).starts_with(&expected), "{}", report(&reports, 9));
        }
    }
}

#[test]
fn another_host_is_refused_before_anybody_waits() {
    let env = [("RANK", "0"), ("WORLD_SIZE", "2"), ("MASTER_ADDR", "192.0.2.1"), ("MASTER_PORT", "1")];
    let mut env: BTreeMap<String, String> = env.map(|(k, v)| (k.to_owned(), v.to_owned())).into();
    let attempt = |env: &BTreeMap<String, String>| {
        let place = find_place(&Flags::default(), env, None).unwrap().unwrap();
        Rendezvous::of_place(&place, env, CommOptions::default()).map_err(|e| e.to_string())
    };
    assert!(attempt(&env).unwrap_err().contains("MASTER_ADDR=192.0.2.1 is not this host"));
    env.insert("LOCAL_WORLD_SIZE".into(), "2".into());
    assert!(attempt(&env).is_ok(), "all ranks are known to be here");
    env.insert("TPSHARD_TIMEOUT".into(), "soon".into());
    assert!(attempt(&env).unwrap_err().contains("TPSHARD_TIMEOUT=soon"));
}

#[test]
fn addresses_of_this_host_are_known() {
    assert!(is_this_host("127.0.0.1") && is_this_host("localhost"));
    // From the range for documentation: nobody's.
    assert!(!is_this_host("192.0.2.1") && !is_this_host("no such name"));
}
