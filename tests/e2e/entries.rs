//! Programs with several entries: one folder, the entry picked by the dims of the inputs.

use crate::support::*;
use crate::words;

const BOTH: [&str; 6] = ["--dim", "seq=1,past=8", "--dim", "seq=32,past=0", "--memory", "min"];

#[test]
fn a_folder_with_two_entries_is_right_in_both() {
    let scratch = scratch();
    let out = scratch.path().join("out");
    shard(2, &out, &BOTH);
    let config: serde_json::Value =
        serde_json::from_str(&std::fs::read_to_string(out.join("config.json")).unwrap()).unwrap();
    let names: Vec<&str> =
        config["entries"].as_array().unwrap().iter().map(|e| e["name"].as_str().unwrap()).collect();
    assert_eq!(names, ["decode", "prefill"]);
    end(&mut tpshard(words!["check", out, "--model", model()])).ok();
    end(&mut tpshard(words!["verify", out, "--golden", golden()])).ok();
    let bisected = end(&mut tpshard(words!["verify", out, "--golden", golden(), "--bisect"])).ok();
    assert!(bisected.stdout.contains("on 2 inputs"), "{}", bisected.stdout);
    // The prompt has 7 tokens, nearer to 32 than to 1; the other pair has one.
    let plan = std::fs::read_to_string(out.join("plan.txt")).unwrap();
    assert!(plan.contains("collectives (decode)") && plan.contains("collectives (prefill)"), "{plan}");
}

#[test]
fn sizes_outside_the_ranges_of_all_entries_are_refused_with_their_limits() {
    let scratch = scratch();
    let out = scratch.path().join("out");
    shard(2, &out, &["--dim", "one:seq=1,past=0..16", "--dim", "many*0.5:seq=16..64,past=0"]);
    end(&mut tpshard(words!["check", out])).ok();
    // 7 tokens fit neither entry.
    let run = end(&mut tpshard(words!["run", out, "--inputs", prompt()]));
    run.fails(2, &["`one`", "`many`", "help: "]);
    let got = scratch.path().join("got.npz");
    let inputs = golden().join("inputs_decode.npz");
    end(&mut tpshard(words!["run", out, "--inputs", inputs, "--outputs", got])).ok();
    assert_golden(&got, "outputs_decode.npz");
}

#[test]
fn entries_that_cannot_be_told_apart_or_are_named_badly() {
    let refused = |flags: &[&str], words: &[&str]| {
        let ended = end(tpshard(words!["plan", model()]).args(flags)).fails(2, words);
        assert!(ended.stderr.contains("help: "), "{}", ended.stderr);
    };
    refused(&["--dim", "seq=1", "--dim", "seq=1"], &["take the same sizes"]);
    refused(&["--dim", "seq=1..8", "--dim", "seq=4..9"], &["take the same sizes"]);
    refused(&["--dim", "a:seq=1", "--dim", "a:seq=9"], &["two entries are called `a`"]);
    refused(&["--dim", "a*0:seq=1"], &["not a weight"]);
    refused(&["--dim", "a/b:seq=1"], &["not the name of an entry"]);
    refused(&["--dim", "seq=9..1"], &["seq=9..1", "not a size"]);
    let many: Vec<String> = (1..=17).flat_map(|n| ["--dim".to_owned(), format!("seq={n}")]).collect();
    let many: Vec<&str> = many.iter().map(String::as_str).collect();
    refused(&many, &["17 times", "at most 16"]);
}

#[test]
fn a_budget_that_is_too_small_says_what_would_fit() {
    let budget = |ranks: &str, size: &str| {
        end(&mut tpshard(words![
            "plan",
            model(),
            "--ranks",
            ranks,
            "--memory",
            size,
            "--dim",
            "seq=1,past=512"
        ]))
    };
    let ended = budget("1", "800KiB").fails(5, &["at least", "help: ", "the fewest that fit"]);
    let ranks = ended.stderr.split("what would fit: ").nth(1).unwrap().split(' ').next().unwrap().to_owned();
    // That number fits, and in a table the others say what they need.
    let table = budget(&format!("1,{ranks}"), "800KiB").ok();
    assert!(table.stdout.contains("needs "), "{}", table.stdout);
    budget("1024", "1B").fails(5, &["no number of ranks"]);
}
