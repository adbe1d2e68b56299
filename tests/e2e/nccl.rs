//! Collectives between GPUs, what is computed beside them, and what happens when a rank is gone: on libraries that stand in
//! for NVIDIA's.

use crate::cuda::{
    COMPILER, DRIVER, PRODUCTS, has_compiler, libraries, sharded_for_gpu, with_libraries, within_tolerance,
};
use crate::launch::{as_rank, children_of, has_met, port, signal, with_files};
use crate::support::*;
use crate::words;
use std::path::{Path, PathBuf};
use std::process::{Child, Command};
use std::sync::OnceLock;
use std::time::{Duration, Instant};
use tpshard_ir::{Data, Tensor};

const COLLECTIVES: &str = "libnccl.so.2";
/// After the death of a rank, all others have ended within this time.
const SOON: Duration = Duration::from_secs(1);
/// A machine that is busy with other things may be late that often.
const ATTEMPTS: usize = 5;

/// The driver, the compiler, and what carries collectives.
fn standin() -> PathBuf {
    static MADE: OnceLock<PathBuf> = OnceLock::new();
    let folder = Path::new(env!("CARGO_TARGET_TMPDIR")).join("standin-nccl");
    MADE.get_or_init(|| libraries(&folder, &[DRIVER, COMPILER, COLLECTIVES])).clone()
}

/// A command on a device of this kind.
pub(crate) fn on<'a>(settings: &str, command: &'a mut Command) -> &'a mut Command {
    with_libraries(command, &standin()).env("TPSHARD_STANDIN", settings)
}

/// What runs say and give with this carrier, one device per rank.
fn run(ranks: usize, comm: &str, inputs: &Path, outputs: &Path) -> Ended {
    let folder = sharded_for_gpu(ranks);
    let words = words!["run", folder, "--inputs", inputs, "--outputs", outputs, "--comm", comm, "--json"];
    let ended = end(on(&format!("devices={ranks}"), &mut tpshard(words))).ok();
    // What the library says to callers who do not keep to its rules.
    assert!(!ended.stderr.contains("stand-in: "), "{}", ended.stderr);
    ended
}

#[test]
fn nccl_gives_and_counts_what_host_memory_does() {
    if !has_compiler() {
        return;
    }
    let scratch = scratch();
    let mut kinds = std::collections::BTreeSet::new();
    for ranks in [2, 3, 4] {
        for inputs in ["inputs.npz", "inputs_decode.npz"] {
            let inputs = golden().join(inputs);
            let [(nccl, counted), (shm, expected)] = ["auto", "shm"].map(|comm| {
                let outputs = scratch.path().join(format!("{comm}.npz"));
                let ended = run(ranks, comm, &inputs, &outputs);
                let said = if comm == "auto" { "collectives by NCCL 2.28.9" } else { "(--comm shm)" };
                assert_eq!(ended.stderr.matches(said).count(), ranks, "{}", ended.stderr);
                (read(&outputs), ended.json()["communication"].clone())
            });
            assert_eq!(counted, expected, "{ranks} ranks");
            within_tolerance(&nccl, &shm);
            let used = counted.as_object().unwrap().iter();
            kinds.extend(used.filter(|(_, n)| n["collectives"] != 0).map(|(kind, _)| kind.clone()));
        }
    }
    assert!(kinds.contains("all_reduce") && kinds.contains("all_gather"), "{kinds:?}");
}

/// Two prompts of so many tokens.
fn long_prompt(path: &Path, tokens: usize) {
    let mut inputs = read(&prompt());
    let mut put = |name: &str, number: &dyn Fn(usize) -> i64| {
        let numbers = (0..2 * tokens).map(number).collect();
        inputs.insert(name.into(), Tensor::new(vec![2, tokens], Data::I64(numbers)).unwrap());
    };
    put("input_ids", &|at| (31 * at as i64 + 5) % 512);
    put("attention_mask", &|_| 1);
    put("position_ids", &|at| (at % tokens) as i64);
    write(path, &inputs);
}

/// The model for two GPUs, with products in three pieces wherever they are summed; made once for all tests.
fn sharded_in_pieces() -> PathBuf {
    static MADE: OnceLock<PathBuf> = OnceLock::new();
    let make = || {
        let folder = Path::new(env!("CARGO_TARGET_TMPDIR")).join("tiny-llama-cuda-pieces");
        let words = words![model(), "--tp", "2", "--target", "cuda:sm_90", "--overlap", "3", "-o", folder];
        end(on("", tpshard(words).args(["--overwrite", "--dim", "seq=64"]))).ok();
        folder
    };
    MADE.get_or_init(make).clone()
}

#[test]
fn pieces_that_would_change_bits_are_refused() {
    let said = ["--overlap 3: with --determinism run", "help: --determinism fast"];
    end(&mut tpshard(words!["plan", model(), "--overlap", "3", "--determinism", "run"])).fails(2, &said);
    let words = words!["plan", model(), "--overlap", "1"];
    end(&mut tpshard(words)).fails(2, &["from 2 to 64"]);
}

/// Bits and counts are those of one queue, whichever of the two is late: a wait that is missing would show.
#[test]
fn pieces_and_a_second_queue_change_no_bit() {
    if !has_compiler() {
        return;
    }
    let (folder, scratch) = (sharded_in_pieces(), scratch());
    let plan = std::fs::read_to_string(folder.join("plan.txt")).unwrap();
    assert!(plan.contains("all_reduce over 2") && plan.contains(", in 3 pieces"), "{plan}");
    let with_products = libraries(&scratch.path().join("all"), &[DRIVER, COMPILER, COLLECTIVES, PRODUCTS]);
    for (tokens, libraries) in [(7, standin()), (50, standin()), (50, with_products)] {
        let inputs = scratch.path().join("inputs.npz");
        long_prompt(&inputs, tokens);
        let run = |settings: &str, overlap: &str| {
            let outputs = scratch.path().join("outputs.npz");
            let words = words!["run", folder, "--inputs", inputs, "--outputs", outputs, "--json"];
            let mut command = tpshard(words);
            with_libraries(command.args(["--comm", "nccl"]), &libraries);
            let command = command.env("TPSHARD_STANDIN", format!("devices=2 {settings}"));
            let ended = end(command.env("TPSHARD_CUDA_OVERLAP", overlap)).ok();
            assert!(!ended.stderr.contains("stand-in: "), "{}", ended.stderr);
            let off = ended.stderr.contains("which nothing is computed beside");
            assert_eq!(off, overlap == "off", "{}", ended.stderr);
            (read(&outputs), ended.json()["communication"].clone())
        };
        let (expected, counted) = run("", "off");
        for settings in ["", "delay=0", "delay=1", "delay=2"] {
            let (got, counts) = run(settings, "on");
            assert_eq!(got, expected, "{tokens} tokens, {settings}");
            assert_eq!(counts, counted, "{tokens} tokens, {settings}");
        }
    }
}

/// Each piece is a call of the library; the collective is one.
#[test]
fn a_rank_that_ends_between_pieces_is_told_by_the_collective() {
    if !has_compiler() {
        return;
    }
    let (folder, scratch) = (sharded_in_pieces(), scratch());
    let inputs = scratch.path().join("inputs.npz");
    long_prompt(&inputs, 50);
    let words = |comm| words!["run", folder, "--inputs", inputs, "--comm", comm, "--timeout", "10"];
    let mut named = std::collections::BTreeSet::new();
    for number in 2..=4 {
        let settings = format!("devices=2 end-collective={number} rank=1");
        let ended = end(on(&settings, &mut tpshard(words("nccl"))));
        let line =
            ended.stderr.lines().find(|line| line.contains("error: in all_reduce")).unwrap_or_default();
        let said = ["step ", "node %", " (/", "rank 1 ended"];
        assert!(said.iter().all(|word| line.contains(word)), "{}", ended.stderr);
        named.insert(line.split("rank 1").next().unwrap_or_default().to_owned());
        ended.fails(6, &["the last collectives of rank", ", unfinished"]);
    }
    assert!(named.len() < 3, "pieces of one collective have one name: {named:?}");
    // What is not understood is not guessed.
    let mut command = tpshard(words("nccl"));
    end(on("devices=2", command.env("TPSHARD_CUDA_OVERLAP", "maybe"))).fails(2, &["say on or off"]);
}

/// A state, steps and whole entries, with both queues late in turn.
#[test]
fn generate_waits_for_what_is_beside() {
    if !has_compiler() {
        return;
    }
    let tokens: Vec<String> = (0..40).map(|i| ((31 * i + 5) % 512).to_string()).collect();
    for folder in [sharded_in_pieces(), sharded_for_gpu(2)] {
        let [off, main, side] =
            [("off", ""), ("on", "delay=1"), ("on", "delay=2")].map(|(overlap, settings)| {
                let mut words = words!["generate", folder, "--max-tokens", "5", "--comm", "nccl"].to_vec();
                words.extend(words!["--prompt-ids", tokens.join(","), "--ignore-stop"]);
                let mut command = tpshard(words);
                end(on(&format!("devices=2 {settings}"), &mut command).env("TPSHARD_CUDA_OVERLAP", overlap))
                    .ok()
                    .stdout
            });
        assert_eq!(main, off);
        assert_eq!(side, off);
    }
}

#[test]
fn generate_keeps_its_state_on_the_gpus_and_bench_names_collectives() {
    if !has_compiler() {
        return;
    }
    for ranks in [2, 4] {
        let folder = sharded_for_gpu(ranks);
        let [nccl, shm] = ["nccl", "shm"].map(|comm| {
            let mut words = words!["generate", folder, "--max-tokens", "9", "--comm", comm].to_vec();
            words.extend(words!["--prompt-ids", "5,100,7,42", "--prompt-ids", "3,9", "--ignore-stop"]);
            end(on(&format!("devices={ranks}"), &mut tpshard(words))).ok().stdout
        });
        assert_eq!(nccl, shm);
    }
    let mut words = words!["bench", sharded_for_gpu(2), "--inputs", prompt(), "--comm", "nccl"].to_vec();
    words.extend(words!["--samples", "2", "--warm-up", "1", "--by-op", "--json"]);
    let found = end(on("devices=2", &mut tpshard(words))).ok().json();
    assert!(found.to_string().contains("all_reduce"), "{found}");
}

#[test]
fn what_carries_collectives_is_decided_by_all_ranks_and_said() {
    if !has_compiler() {
        return;
    }
    let scratch = scratch();
    let driver_only = libraries(&scratch.path().join("driver"), &[DRIVER, COMPILER]);
    let words = |comm: &str| words!["run", sharded_for_gpu(2), "--inputs", prompt(), "--comm", comm];
    let shared = end(on("devices=1", &mut tpshard(words("auto")))).ok();
    assert!(shared.stderr.contains("through host memory (ranks share a GPU)"), "{}", shared.stderr);
    let old = end(on("devices=2 nccl=22605", &mut tpshard(words("auto")))).ok();
    let why = "libnccl.so.2 is of version 2.26.5, needed is 2.27 or newer)";
    assert!(
        old.stderr.contains("through host memory (rank 0: ") && old.stderr.contains(why),
        "{}",
        old.stderr
    );
    let mut waiting = tpshard(words("auto"));
    let waiting = end(on("devices=2", &mut waiting).env("NCCL_COMM_BLOCKING", "1")).ok();
    let why = "through host memory (rank 0: NCCL_COMM_BLOCKING=1 is set)";
    assert!(waiting.stderr.contains(why), "{}", waiting.stderr);
    let mut waiting = tpshard(words("nccl"));
    let waiting = end(on("devices=2", &mut waiting).env("NCCL_COMM_BLOCKING", "1"));
    waiting.fails(5, &["NCCL_COMM_BLOCKING=1 is set", "help: unset it, or", "--comm shm"]);
    let searched = tpshard_driver::SearchPath::from_environment();
    if tpshard_driver::nccl::Nccl::load(&searched).is_err() {
        let missing = |comm: &str| {
            let mut command = tpshard(words(comm));
            end(with_libraries(&mut command, &driver_only).env("TPSHARD_STANDIN", "devices=2"))
        };
        let auto = missing("auto").ok();
        assert!(auto.stderr.contains("(rank 0: libnccl was not found)"), "{}", auto.stderr);
        missing("nccl").fails(5, &["libnccl.so.2", "TPSHARD_CUDA_PATH", "--comm shm"]);
    }
    // Asked for, NCCL itself says what it does not do.
    let nccl = |settings: &str| end(on(settings, &mut tpshard(words("nccl"))));
    nccl("devices=1").fails(6, &["Duplicate GPU detected", "--comm shm"]);
    for refusal in ["refuse=1", "refuse=2"] {
        let refused = nccl(&format!("devices=2 {refusal} rank=1"));
        // The other one has nothing against it, and hears of it.
        assert!(!refused.stderr.contains("failed on rank 0"), "{}", refused.stderr);
        refused.fails(6, &["failed on rank 1", "Network is unreachable", "rank 1 gave up"]);
    }
    // Whatever processors run, there is nothing to carry.
    let mut command = tpshard(words("nccl"));
    end(command.args(["--device", "cpu"])).ok();
}

#[test]
fn a_step_that_fails_on_one_rank_is_told_on_all() {
    if !has_compiler() {
        return;
    }
    let words = words!["run", sharded_for_gpu(2), "--inputs", prompt(), "--comm", "nccl"];
    let ended = end(on("devices=2 fail=20 rank=1", &mut tpshard(words)));
    ended.fails(6, &["rank 1: %", "CUDA_ERROR_LAUNCH_FAILED"]);
}

/// What fails after it, such as the next collective, says nothing about the cause.
#[test]
fn a_device_that_breaks_is_told_by_the_step_that_broke_it() {
    if !has_compiler() {
        return;
    }
    let words = words!["run", sharded_for_gpu(2), "--inputs", prompt(), "--comm", "nccl"];
    let ended = end(on("devices=2 break=20 rank=1", &mut tpshard(words)));
    ended.fails(6, &["rank 1: %", "cuLaunchKernel failed: CUDA_ERROR_LAUNCH_FAILED", "; after that, "]);
}

/// What the devices compute before a collective may take longer than ranks wait for each other in it.
#[test]
fn devices_that_compute_for_long_are_no_false_alarm() {
    if !has_compiler() {
        return;
    }
    let words = words!["run", sharded_for_gpu(2), "--inputs", prompt(), "--comm", "nccl", "--timeout", "1"];
    let started = Instant::now();
    end(on("devices=2 busy=1", &mut tpshard(words))).ok();
    assert!(started.elapsed() > Duration::from_secs(3), "{:?}", started.elapsed());
}

#[test]
fn a_library_that_takes_its_time_is_waited_for() {
    if !has_compiler() {
        return;
    }
    let words = words!["run", sharded_for_gpu(2), "--inputs", prompt(), "--comm", "nccl", "--timeout", "1"];
    end(on("devices=2 meeting=3000", &mut tpshard(words))).ok();
}

/// Ranks of a program as nobody watches over them.
struct Ranks(Vec<Child>);

impl Ranks {
    fn start(folder: &Path, ranks: usize, configure: impl Fn(&mut Command), outputs: &Path) -> Ranks {
        let port = port();
        let one = |rank: usize| {
            let program = folder.join(format!("rank{rank}"));
            let mut command = with_files(as_rank(&program, rank, ranks, &port), &prompt(), outputs);
            command.env("LOCAL_RANK", rank.to_string());
            configure(&mut command);
            start(&mut command)
        };
        Ranks((0..ranks).map(one).collect())
    }

    /// Returns once a rank that has met the others does nothing any more.
    fn wait_for_rest(&self, rank: usize) {
        let (pid, deadline) = (self.0[rank].id(), Instant::now() + Duration::from_secs(30));
        let mut quiet = 0;
        let mut before = String::new();
        while quiet < 5 {
            assert!(Instant::now() < deadline, "rank {rank} does not come to rest");
            std::thread::sleep(Duration::from_millis(60));
            let now = if has_met(pid) { spent(pid) } else { String::new() };
            quiet = if now == before && !now.is_empty() { quiet + 1 } else { 0 };
            before = now;
        }
    }

    /// Kills a rank; how the others ended, and when the last did.
    fn kill(mut self, rank: usize) -> (Vec<Ended>, Duration) {
        let mut killed = self.0.remove(rank);
        let started = Instant::now();
        killed.kill().unwrap();
        killed.wait().unwrap();
        let ended: Vec<Ended> = std::thread::scope(|scope| {
            let others: Vec<_> = self.0.into_iter().map(|child| scope.spawn(|| wait(child))).collect();
            others.into_iter().map(|other| other.join().unwrap()).collect()
        });
        (ended, started.elapsed())
    }
}

/// What the first thread of a process has spent on processors.
fn spent(pid: u32) -> String {
    std::fs::read_to_string(format!("/proc/{pid}/schedstat")).unwrap_or_default()
}

/// Rank 2 of 4 stops in the middle of the program and is killed there.
fn kill_in_the_middle(comm: &str) {
    if !has_compiler() {
        return;
    }
    let (folder, scratch) = (sharded_for_gpu(4), scratch());
    let mut times = Vec::new();
    for _ in 0..ATTEMPTS {
        let got = scratch.path().join("got.npz");
        let configure = |command: &mut Command| {
            on("devices=4 stop=30 rank=2", command).args(["--comm", comm]);
        };
        let ranks = Ranks::start(&folder, 4, configure, &got);
        ranks.wait_for_rest(2);
        let (ended, time) = ranks.kill(2);
        for ended in ended {
            // Rank, collective, sequence number and ONNX node; and the collectives before.
            let line = ended.stderr.lines().find(|line| line.contains("error: in ")).unwrap_or_default();
            let named = ["step ", "node %", " (/", "rank 2 ended"];
            assert!(named.iter().all(|word| line.contains(word)), "{}", ended.stderr);
            ended.fails(6, &["the last collectives of rank", ", unfinished", ", done"]);
        }
        assert!(!got.exists());
        times.push(time);
        if time < SOON {
            return;
        }
    }
    panic!("{times:?}");
}

#[test]
fn a_killed_rank_ends_the_others_at_once_with_nccl() {
    kill_in_the_middle("nccl");
}

#[test]
fn a_killed_rank_ends_the_others_at_once_through_host_memory() {
    kill_in_the_middle("shm");
}

/// Rank 2 of 4 under `tpshard bench` is killed while it runs; what is said, if the others were in the program then.
fn kill_at_work(folder: &Path, device: &str) -> (Ended, Duration) {
    let mut words = words!["bench", folder, "--inputs", prompt(), "--samples", "100000"].to_vec();
    words.extend(words!["--device", device]);
    let job = start(on("devices=4", &mut tpshard(words)));
    let deadline = Instant::now() + Duration::from_secs(30);
    let ranks = loop {
        let ranks = children_of(job.id());
        if ranks.len() == 4 && ranks.iter().all(|(_, pid)| has_met(*pid as u32)) {
            break ranks;
        }
        assert!(Instant::now() < deadline, "{ranks:?}");
        std::thread::sleep(Duration::from_millis(10));
    };
    std::thread::sleep(Duration::from_millis(1500));
    let (_, pid) = *ranks.iter().find(|(rank, _)| *rank == 2).unwrap();
    let started = Instant::now();
    signal("-KILL", pid);
    let ended = wait(job).fails(6, &["rank 2", "signal 9"]);
    (ended, started.elapsed())
}

#[test]
fn a_rank_killed_at_work_ends_the_job_at_once() {
    let mut folders = vec![(sharded(4), "cpu")];
    if has_compiler() {
        folders.push((sharded_for_gpu(4), "auto"));
    }
    for (folder, device) in folders {
        let mut seen = Vec::new();
        // Of what the ranks do, less than half is collectives of nodes.
        let good = (0..5 * ATTEMPTS).any(|_| {
            let (ended, time) = kill_at_work(&folder, device);
            // Between runs, ranks wait for each other in collectives that belong to no node.
            let named = ended.stderr.lines().any(|line| {
                line.contains("error: in ") && line.contains("node %") && line.contains("rank 2 ended")
            });
            seen.push((time, named));
            time < SOON && named
        });
        assert!(good, "{device}: {seen:?}");
    }
}

#[test]
fn a_rank_that_stops_is_named_when_time_is_over() {
    if !has_compiler() {
        return;
    }
    for comm in ["nccl", "shm"] {
        let words = words!["run", sharded_for_gpu(4), "--inputs", prompt(), "--comm", comm, "--timeout", "2"];
        let started = Instant::now();
        let ended = end(on("devices=4 stop=30 rank=1", &mut tpshard(words)));
        ended.fails(6, &["no progress for 2.0 s in ", "rank 1 (last in ", "node %"]);
        assert!(started.elapsed() < Duration::from_secs(20), "{:?}", started.elapsed());
    }
}

#[test]
fn a_process_that_ends_in_a_collective_ends_the_others() {
    if !has_compiler() {
        return;
    }
    let words = words!["run", sharded_for_gpu(4), "--inputs", prompt(), "--comm", "nccl"];
    let ended = end(on("devices=4 end-collective=5 rank=3", &mut tpshard(words)));
    ended.fails(6, &["rank 3 ended", "step "]);
}

/// A rank gets a few milliseconds of every fifth of a second while it loads, for longer than the others would wait for
/// one that does nothing.
#[test]
fn a_rank_that_loads_slowly_is_no_false_alarm() {
    let mut folders = vec![(sharded(4), "cpu")];
    if has_compiler() {
        folders.push((sharded_for_gpu(4), "auto"));
    }
    let scratch = scratch();
    for (folder, device) in folders {
        for turn in 0..3 {
            let got = scratch.path().join(format!("{device}-{turn}.npz"));
            let configure = |command: &mut Command| {
                on("devices=4", command).args(["--device", device]).env("TPSHARD_TIMEOUT", "2");
            };
            let ranks = Ranks::start(&folder, 4, configure, &got);
            let slow = ranks.0[1].id();
            let started = Instant::now();
            while !has_met(slow) && started.elapsed() < Duration::from_secs(5) {
                std::thread::sleep(Duration::from_millis(1));
            }
            let alive =
                || std::fs::read_to_string(format!("/proc/{slow}/stat")).is_ok_and(|s| !s.contains(") Z "));
            let throttled = Instant::now();
            while throttled.elapsed() < Duration::from_secs(4) && alive() {
                signal("-STOP", slow as i32);
                std::thread::sleep(Duration::from_millis(200));
                signal("-CONT", slow as i32);
                std::thread::sleep(Duration::from_millis(3));
            }
            ranks.0.into_iter().for_each(|child| drop(wait(child).ok()));
            assert_golden(&got, "outputs.npz");
        }
    }
}

/// The script does this a hundred times, and with a disk that is slow.
#[test]
fn slow_loading_is_tried_by_a_script() {
    let script = Path::new(env!("CARGO_MANIFEST_DIR")).join("../bench/throttled.sh");
    let mut command = command("sh");
    command.arg(&script).args(words!["--starts", "2", "--by", "pulse", "--slow", "5", "--timeout", "3"]);
    let ended = end(command.arg(sharded(2)).arg("--inputs").arg(prompt())).ok();
    assert!(
        ended.stdout.starts_with("2 starts of 2 ranks, rank 1 slow by pulse: 0 failed, "),
        "{}",
        ended.stdout
    );
    let mut command = self::command("sh");
    end(command.arg(&script).arg(sharded(2).join("none"))).fails(2, &["no ranks"]);
}
