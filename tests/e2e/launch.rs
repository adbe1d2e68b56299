//! Ranks under other launchers, in the wrong place, and dying.

use crate::support::*;
use crate::words;
use std::path::{Path, PathBuf};
use std::process::{Child, Command};
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::{Duration, Instant};
use tempfile::TempDir;

/// A port that no other job of these tests names. Nothing listens on it: it only tells jobs apart.
pub(crate) fn port() -> String {
    static NEXT: AtomicU32 = AtomicU32::new(0);
    format!("{}", 20_000 + std::process::id() % 20_000 + NEXT.fetch_add(1, Ordering::Relaxed))
}

/// `program` with torchrun's variables.
pub(crate) fn as_rank(program: &Path, rank: usize, world_size: usize, port: &str) -> Command {
    let mut command = command(program);
    command.env("RANK", rank.to_string()).env("WORLD_SIZE", world_size.to_string());
    command.env("MASTER_ADDR", "localhost").env("MASTER_PORT", port).env("TPSHARD_TIMEOUT", "20");
    command
}

pub(crate) fn with_files(mut command: Command, inputs: &Path, outputs: &Path) -> Command {
    command.arg("--inputs").arg(inputs).arg("--outputs").arg(outputs);
    command
}

/// Starts every rank by hand, the last one first, and expects all to end well.
fn by_hand(program: impl Fn(usize) -> PathBuf, ranks: usize, outputs: &Path) {
    let port = port();
    let children: Vec<Child> = (0..ranks)
        .rev()
        .map(|rank| start(&mut with_files(as_rank(&program(rank), rank, ranks, &port), &prompt(), outputs)))
        .collect();
    for child in children {
        wait(child).ok();
    }
}

#[test]
fn ranks_started_by_hand_give_what_run_gives() {
    let scratch = scratch();
    let (folder, path) = (sharded(4), |name: &str| scratch.path().join(name));
    end(&mut tpshard(words!["run", folder, "--inputs", prompt(), "--outputs", path("run.npz")])).ok();
    by_hand(|rank| folder.join(format!("rank{rank}")), 4, &path("ranks.npz"));
    by_hand(|_| folder.join("run"), 4, &path("launcher.npz"));
    let expected = read(&path("run.npz"));
    assert_golden(&path("run.npz"), "outputs.npz");
    assert_eq!(read(&path("ranks.npz")), expected);
    assert_eq!(read(&path("launcher.npz")), expected);
}

#[test]
fn exec_takes_its_place_from_the_launcher() {
    let (scratch, port) = (scratch(), port());
    let outputs = scratch.path().join("got.npz");
    let children: Vec<Child> = (0..2)
        .map(|rank| {
            let mut command = as_rank(Path::new(env!("CARGO_BIN_EXE_tpshard")), rank, 2, &port);
            command.arg("exec").arg(sharded(2));
            start(&mut with_files(command, &prompt(), &outputs))
        })
        .collect();
    children.into_iter().for_each(|child| drop(wait(child).ok()));
    assert_golden(&outputs, "outputs.npz");
}

#[test]
fn mpirun_starts_the_launcher_on_every_rank() {
    if command("mpirun").arg("--version").output().is_err() {
        println!("SKIPPED: no mpirun on PATH");
        return;
    }
    let scratch = scratch();
    let outputs = scratch.path().join("got.npz");
    let mut job = command("mpirun");
    job.env("OMPI_ALLOW_RUN_AS_ROOT", "1").env("OMPI_ALLOW_RUN_AS_ROOT_CONFIRM", "1");
    job.args(["--oversubscribe", "-np", "4"]).arg(sharded(4).join("run"));
    end(&mut with_files(job, &prompt(), &outputs)).ok();
    assert_golden(&outputs, "outputs.npz");
}

#[test]
fn the_file_of_another_rank_is_refused_by_name() {
    let rank2 = sharded(4).join("rank2");
    end(&mut as_rank(&rank2, 1, 4, &port())).fails(2, &["rank 2", "rank 1", "help: ", "rank1"]);
    // Without a launcher nothing says which rank it is.
    end(&mut command(&rank2)).fails(2, &["rank 2 of 4", "help: ", "torchrun"]);
}

#[test]
fn contradicting_places_are_refused() {
    let rank1 = sharded(4).join("rank1");
    let refused = |command: &mut Command, words: &[&str]| drop(end(command).fails(2, words));
    let base = || as_rank(&rank1, 1, 4, &port());
    refused(base().env("OMPI_COMM_WORLD_RANK", "2"), &["RANK=1", "OMPI_COMM_WORLD_RANK=2", "help: "]);
    refused(base().args(["--rank", "3"]), &["RANK=1", "--rank 3", "help: "]);
    refused(base().env("WORLD_SIZE", "3"), &["4 ranks", "WORLD_SIZE=3", "help: "]);
    refused(base().env("RANK", "one"), &["RANK=one", "not a number"]);
    refused(base().env("RANK", "4"), &["RANK=4", "does not exist"]);
    refused(base().env_remove("RANK"), &["WORLD_SIZE=4", "RANK is not set", "help: "]);
    refused(base().env("TPSHARD_TIMEOUT", "soon"), &["TPSHARD_TIMEOUT=soon"]);
    let two_hosts = &["several hosts", "LOCAL_WORLD_SIZE=2", "help: "];
    refused(base().env("LOCAL_WORLD_SIZE", "2").env("LOCAL_RANK", "1"), two_hosts);
}

#[test]
fn a_missing_rank_is_named_when_time_is_over() {
    let (folder, port, scratch) = (sharded(4), port(), scratch());
    let started = Instant::now();
    let children: Vec<Child> = [0, 1, 3]
        .into_iter()
        .map(|rank| {
            let command = as_rank(&folder.join(format!("rank{rank}")), rank, 4, &port);
            let mut command = with_files(command, &prompt(), &scratch.path().join("got.npz"));
            start(command.env("TPSHARD_TIMEOUT", "2"))
        })
        .collect();
    for child in children {
        wait(child).fails(6, &["missing: [2]", "help: "]);
    }
    assert!(started.elapsed() < Duration::from_secs(10), "{:?}", started.elapsed());
    assert!(names(scratch.path()).is_empty());
}

#[test]
fn ranks_of_different_builds_do_not_start_together() {
    let (scratch, port) = (scratch(), port());
    let other = scratch.path().join("other");
    shard(2, &other, &["--output", "logits=argmax"]);
    let got = scratch.path().join("got.npz");
    let first = start(&mut with_files(as_rank(&sharded(2).join("rank0"), 0, 2, &port), &prompt(), &got));
    let second = start(&mut as_rank(&other.join("rank1"), 1, 2, &port));
    for child in [first, second] {
        wait(child).fails(6, &["do not agree", "program", "help: "]);
    }
    assert!(!got.exists());
}

/// The processes whose parent is `parent`, with their `RANK`.
pub(crate) fn children_of(parent: u32) -> Vec<(usize, i32)> {
    let list = std::fs::read_to_string(format!("/proc/{parent}/task/{parent}/children")).unwrap_or_default();
    list.split_whitespace()
        .filter_map(|pid| {
            let environment = std::fs::read(format!("/proc/{pid}/environ")).ok()?;
            let text = String::from_utf8_lossy(&environment).into_owned();
            let rank = text.split('\0').find_map(|pair| pair.strip_prefix("RANK="))?.parse().ok()?;
            Some((rank, pid.parse().ok()?))
        })
        .collect()
}

/// True once the ranks have met: they share memory then.
pub(crate) fn has_met(pid: u32) -> bool {
    std::fs::read_to_string(format!("/proc/{pid}/maps")).is_ok_and(|maps| maps.contains("memfd:tpshard"))
}

/// Nobody watches over ranks that were started by hand; those that are left notice by themselves. Rank 2 waits for its
/// weights, which are a pipe that nobody writes, while the others wait for rank 2.
#[test]
fn ranks_notice_by_themselves_that_one_was_killed() {
    let scratch = scratch();
    let folder = copy_of_sharded(4, &scratch);
    let (weights, got) = (folder.join("rank2.safetensors"), scratch.path().join("got.npz"));
    std::fs::remove_file(&weights).unwrap();
    assert!(command("mkfifo").arg(&weights).status().unwrap().success());
    let port = port();
    let mut ranks: Vec<Child> = (0..4)
        .map(|rank| {
            let program = folder.join(format!("rank{rank}"));
            start(&mut with_files(as_rank(&program, rank, 4, &port), &prompt(), &got))
        })
        .collect();
    let mut killed = ranks.remove(2);
    let deadline = Instant::now() + Duration::from_secs(20);
    while !has_met(killed.id()) || ranks.iter().any(|rank| !has_met(rank.id())) {
        assert!(Instant::now() < deadline, "the ranks do not meet");
        std::thread::sleep(Duration::from_millis(10));
    }
    let started = Instant::now();
    killed.kill().unwrap();
    killed.wait().unwrap();
    for rank in ranks {
        wait(rank).fails(6, &["rank 2"]);
    }
    assert!(started.elapsed() < Duration::from_secs(5), "{:?}", started.elapsed());
    assert!(!got.exists());
}

/// A job of 4 ranks under `tpshard run` that waits for its inputs, a pipe that nobody writes, and the ranks' processes.
fn waiting_job(scratch: &TempDir) -> (Child, Vec<(usize, i32)>) {
    let (inputs, got) = (scratch.path().join("never.npz"), scratch.path().join("got.npz"));
    assert!(command("mkfifo").arg(&inputs).status().unwrap().success());
    let mut job = start(&mut tpshard(words!["run", sharded(4), "--inputs", inputs, "--outputs", got]));
    let deadline = Instant::now() + Duration::from_secs(20);
    loop {
        let ranks = children_of(job.id());
        if ranks.len() == 4 {
            return (job, ranks);
        }
        assert!(job.try_wait().unwrap().is_none() && Instant::now() < deadline, "{ranks:?}");
        std::thread::sleep(Duration::from_millis(10));
    }
}

pub(crate) fn signal(name: &str, pid: i32) {
    assert!(command("kill").args([name, &pid.to_string()]).status().unwrap().success());
}

/// Expects the processes to go away within a few seconds.
fn assert_gone(ranks: &[(usize, i32)], scratch: &TempDir) {
    let deadline = Instant::now() + Duration::from_secs(5);
    let alive = |pid: i32| {
        let status = std::fs::read_to_string(format!("/proc/{pid}/stat")).unwrap_or_default();
        !status.is_empty() && !status.contains(") Z ")
    };
    while ranks.iter().any(|(_, pid)| alive(*pid)) {
        assert!(Instant::now() < deadline, "still running: {ranks:?}");
        std::thread::sleep(Duration::from_millis(10));
    }
    assert_eq!(names(scratch.path()), ["never.npz"]);
}

#[test]
fn a_killed_rank_ends_the_others_and_is_named() {
    let scratch = scratch();
    let (job, ranks) = waiting_job(&scratch);
    let (_, killed) = *ranks.iter().find(|(rank, _)| *rank == 2).unwrap();
    let started = Instant::now();
    signal("-KILL", killed);
    wait(job).fails(6, &["rank 2", "signal 9"]);
    assert!(started.elapsed() < Duration::from_secs(5), "{:?}", started.elapsed());
    assert_gone(&ranks, &scratch);
}

#[test]
fn an_interrupted_run_takes_its_ranks_along() {
    for name in ["-INT", "-TERM"] {
        let scratch = scratch();
        let (job, ranks) = waiting_job(&scratch);
        signal(name, job.id() as i32);
        wait(job).fails(6, &["interrupted by signal"]);
        assert_gone(&ranks, &scratch);
    }
    // Nobody is left even if there is no time for goodbyes.
    let scratch = scratch();
    let (mut job, ranks) = waiting_job(&scratch);
    job.kill().unwrap();
    job.wait().unwrap();
    assert_gone(&ranks, &scratch);
}
