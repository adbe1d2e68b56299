//! The C interface from C: its examples, its errors, and that the header and the library say the same.

use crate::support::*;
use crate::words;
use std::collections::BTreeSet;
use std::path::{Path, PathBuf};
use tpshard_ir::Tensor;
use tpshard_runtime::io::NamedTensors;

fn folder(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("..").join(name)
}

/// Where the library is that was built with this test.
fn library() -> PathBuf {
    let executable = std::env::current_exe().unwrap();
    let folder = executable.parent().unwrap().to_path_buf();
    assert!(folder.join("libtpshard.so").is_file(), "{} holds no libtpshard.so", folder.display());
    folder
}

/// A compiled program. What cargo says of where libraries are may name one that an earlier build has left behind.
fn with_library(program: &Path) -> std::process::Command {
    let mut command = command(program);
    command.env("LD_LIBRARY_PATH", library());
    command
}

/// Whether a tool is there; says so if not.
fn has(tool: &str) -> bool {
    let found = command(tool).arg("--version").output().is_ok_and(|output| output.status.success());
    if !found {
        eprintln!("SKIPPED: `{tool}` is not installed");
        assert!(!std::env::var("TPSHARD_REQUIRE").is_ok_and(|list| list.split(',').any(|t| t == tool)));
    }
    found
}

/// Compiles a C file against the library; none where there is no compiler.
fn compile(source: &Path, scratch: &Path) -> Option<PathBuf> {
    if !has("cc") {
        return None;
    }
    let program = scratch.join(source.file_stem().unwrap());
    let mut compiler = command("cc");
    compiler.args(["-std=c11", "-Wall", "-Wextra", "-Werror", "-O1", "-I"]).arg(folder("capi/include"));
    compiler.arg(source).arg("-o").arg(&program).arg("-L").arg(library());
    compiler.args(["-ltpshard", "-lm"]);
    end(&mut compiler).ok();
    Some(program)
}

#[test]
fn the_header_and_the_library_have_the_same_functions() {
    if !has("nm") {
        return;
    }
    let listed = end(command("nm").args(["-D", "--defined-only"]).arg(library().join("libtpshard.so"))).ok();
    let exported: BTreeSet<&str> =
        listed.stdout.lines().filter_map(|l| l.split_whitespace().nth(2)).collect();
    let header = std::fs::read_to_string(folder("capi/include/tpshard.h")).unwrap();
    // Comments name functions too; what is declared ends its statement outside of any.
    let code: String =
        header.split("/*").map(|part| part.split_once("*/").map_or(part, |(_, code)| code)).collect();
    let declared: BTreeSet<&str> = code
        .split(';')
        .filter_map(|statement| statement.split_once('('))
        .filter_map(|(before, _)| before.split(|c: char| c.is_whitespace() || c == '*').next_back())
        .collect();
    assert!(declared.len() > 20, "{declared:?}");
    assert_eq!(exported, declared);
}

#[test]
fn the_header_is_c_plus_plus_too() {
    let scratch = scratch();
    if !has("c++") {
        return;
    }
    let source = scratch.path().join("header.cpp");
    std::fs::write(&source, "#include \"tpshard.h\"\nint main() { return tpshard_close(nullptr); }\n")
        .unwrap();
    let mut compiler = command("c++");
    compiler.args(["-std=c++11", "-Wall", "-Wextra", "-Werror", "-fsyntax-only", "-I"]);
    end(compiler.arg(folder("capi/include")).arg(source)).ok();
}

#[test]
fn a_c_program_gets_what_the_command_gets() {
    let scratch = scratch();
    let Some(program) = compile(&folder("capi/examples/run.c"), scratch.path()) else { return };
    let inputs = read(&prompt());
    for ranks in [1, 2] {
        let expected = scratch.path().join(format!("expected{ranks}.npz"));
        let run = words!["run", sharded(ranks), "--inputs", prompt(), "--outputs", expected];
        end(&mut tpshard(run)).ok();
        let expected: NamedTensors = read(&expected);
        let results = scratch.path().join(format!("results{ranks}"));
        std::fs::create_dir(&results).unwrap();
        let mut command = with_library(&program);
        command.arg(sharded(ranks));
        for (name, tensor) in &inputs {
            let file = scratch.path().join(format!("{name}.bin"));
            std::fs::write(&file, tensor.data().to_le_bytes()).unwrap();
            let extents: Vec<String> = tensor.shape().iter().map(usize::to_string).collect();
            command.arg(format!("{name}:{}:{}", extents.join("x"), file.display()));
        }
        let said = end(command.arg(&results)).ok().stdout;
        assert_eq!(said.lines().count(), expected.len(), "{said}");
        for (name, tensor) in &expected {
            let bytes = std::fs::read(results.join(format!("{name}.bin"))).unwrap();
            let found = Tensor::from_le_bytes(tensor.dtype(), tensor.shape().to_vec(), &bytes).unwrap();
            assert!(found == *tensor, "{name} on {ranks} ranks");
        }
    }
    end(with_library(&program).args(["/nowhere", "results"])).fails(5, &["/nowhere", "help: "]);
}

#[test]
fn a_c_program_continues_several_prompts_at_once() {
    let scratch = scratch();
    let Some(program) = compile(&folder("capi/examples/generate.c"), scratch.path()) else { return };
    let prompts = ["5,100,7,42", "1", "9,8,7,6,5,4,3,2,1", "300,200,100,7"];
    for ranks in [1, 2] {
        let found = end(with_library(&program).arg(sharded(ranks)).arg("6").args(prompts)).ok().stdout;
        let lines: Vec<&str> = found.lines().collect();
        assert_eq!(lines.len(), prompts.len(), "{found}");
        for (prompt, line) in prompts.iter().zip(lines) {
            let alone =
                words!["generate", sharded(ranks), "--prompt-ids", prompt, "--max-tokens", "6", "--json"];
            let tokens = end(&mut tpshard(alone)).ok().json()["tokens"].clone();
            let tokens: Vec<String> = tokens.as_array().unwrap().iter().map(ToString::to_string).collect();
            assert_eq!(line, tokens.join(" "), "{prompt} on {ranks} ranks");
        }
    }
}

#[test]
fn wrong_arguments_are_errors_and_slots_go_on_elsewhere() {
    let scratch = scratch();
    let Some(program) = compile(&folder("tests/e2e/c_api.c"), scratch.path()) else { return };
    let file = scratch.path().join("slot.safetensors");
    for (here, there) in [(1, 2), (2, 3)] {
        let mut checks = with_library(&program);
        checks.arg("errors").arg(sharded(here)).arg(sharded(there)).arg(&file);
        let ended = end(&mut checks).ok();
        // The library prints nothing.
        assert_eq!((ended.stdout.as_str(), ended.stderr.as_str()), ("", ""));
    }
    // A folder whose weights are of another one.
    let broken = copy_of_sharded(2, &scratch);
    std::fs::copy(sharded(3).join("rank1.safetensors"), broken.join("rank1.safetensors")).unwrap();
    let Some(run) = compile(&folder("capi/examples/run.c"), scratch.path()) else { return };
    end(with_library(&run).arg(&broken).arg("results")).fails(4, &["rank1.safetensors", "help: "]);
}

#[test]
fn a_rank_can_be_a_process_of_its_own() {
    let scratch = scratch();
    let Some(program) = compile(&folder("tests/e2e/c_api.c"), scratch.path()) else { return };
    let one = end(with_library(&program).arg("rank").arg(sharded(1)).args(["1", "0"])).ok().stdout;
    for launched in [false, true] {
        let job = format!("c-api-{}-{launched}", std::process::id());
        let start = |rank: usize| {
            let mut process = with_library(&program);
            process.arg("rank").arg(sharded(2)).env("TPSHARD_RENDEZVOUS", &job);
            if launched {
                process.args(["-1", "0"]).env("RANK", rank.to_string()).env("WORLD_SIZE", "2");
                process.env("LOCAL_RANK", rank.to_string()).env("LOCAL_WORLD_SIZE", "2");
            } else {
                process.args(["2", &rank.to_string()]);
            }
            crate::support::start(&mut process)
        };
        let ranks = [start(0), start(1)].map(wait);
        let [first, second] = ranks.map(Ended::ok);
        assert_eq!(second.stdout, "");
        let numbers = |text: &str| text.lines().map(|l| l.parse::<f32>().unwrap()).collect::<Vec<_>>();
        let (found, expected) = (numbers(&first.stdout), numbers(&one));
        assert_eq!(found.len(), 512);
        assert!(found.iter().zip(&expected).all(|(a, b)| (a - b).abs() < 1e-4));
    }
}
