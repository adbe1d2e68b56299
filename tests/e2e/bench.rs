//! `tpshard bench` measures what it says, and its trace can be read.

use crate::support::*;
use crate::words;
use serde_json::Value;
use std::collections::BTreeSet;

#[test]
fn runs_are_counted_and_their_steps_add_up() {
    let bench = |ranks: usize| {
        let words = words![
            "bench",
            sharded(ranks),
            "--inputs",
            prompt(),
            "--samples",
            "4",
            "--warm-up",
            "1",
            "--by-op",
            "--json"
        ];
        end(&mut tpshard(words)).ok().json()
    };
    for ranks in [1, 2] {
        let found = bench(ranks);
        let run = &found["phases"]["run"];
        assert_eq!(run["samples"], 4, "{found}");
        assert_eq!(found["ranks"].as_array().unwrap().len(), ranks);
        let seconds = |value: &Value| value.as_f64().unwrap();
        assert!(seconds(&run["least_seconds"]) <= seconds(&run["median_seconds"]));
        assert!(seconds(&run["median_seconds"]) <= seconds(&run["p95_seconds"]));
        let of_kernels: f64 = run["kernels"].as_array().unwrap().iter().map(|k| seconds(&k["seconds"])).sum();
        let most = run["all_seconds"].as_array().unwrap().iter().map(seconds).fold(0.0, f64::max);
        assert!(of_kernels > 0.0 && of_kernels <= most, "{found}");
        let collectives = run["collectives"].as_u64().unwrap();
        assert_eq!(collectives > 0, ranks > 1, "{found}");
        assert_eq!(run["communication_seconds_by_rank"].as_array().unwrap().len(), ranks);
        assert!(found["ranks"][0]["peak_bytes"].as_u64().unwrap() > 1 << 20);
    }
}

#[test]
fn decoding_keeps_the_state_and_measures_prompts_and_tokens_apart() {
    let scratch = scratch();
    let trace = scratch.path().join("trace.json");
    let words = words![
        "bench",
        sharded(2),
        "--inputs",
        prompt(),
        "--decode",
        "5",
        "--samples",
        "3",
        "--json",
        "--trace",
        trace
    ];
    let found = end(&mut tpshard(words)).ok().json();
    assert_eq!(found["phases"]["prompt"]["samples"], 3, "{found}");
    assert_eq!(found["phases"]["prompt"]["tokens"], 14, "{found}");
    assert_eq!(found["phases"]["token"]["samples"], 15, "{found}");
    let bytes = |phase: &str| found["phases"][phase]["communication_bytes"].as_u64().unwrap();
    assert!(bytes("token") > 0 && bytes("token") * 3 < bytes("prompt"), "{found}");

    let trace: Value = serde_json::from_slice(&std::fs::read(&trace).unwrap()).unwrap();
    let events = trace["traceEvents"].as_array().unwrap();
    let steps: Vec<&Value> = events.iter().filter(|e| e["ph"] == "X").collect();
    let tracks: BTreeSet<u64> = steps.iter().map(|e| e["tid"].as_u64().unwrap()).collect();
    assert_eq!(tracks, BTreeSet::from([0, 1]));
    assert!(steps.iter().all(|e| e["ts"].as_f64().unwrap() >= 0.0 && e["dur"].as_f64().unwrap() >= 0.0));
    // Both ranks are in the same collectives.
    let of =
        |rank: u64| steps.iter().filter(move |e| e["tid"] == rank && e["cat"] == "communication").count();
    assert!(of(0) > 0 && of(0) == of(1), "{} {}", of(0), of(1));
    // Steps of one rank follow each other.
    for rank in [0, 1] {
        let mut end = 0.0;
        for event in steps.iter().filter(|e| e["tid"] == rank) {
            assert!(event["ts"].as_f64().unwrap() >= end - 1e-3, "{event}");
            end = event["ts"].as_f64().unwrap() + event["dur"].as_f64().unwrap();
        }
    }
}

#[test]
fn text_names_what_was_measured() {
    let words =
        words!["bench", sharded(2), "--inputs", prompt(), "--decode", "2", "--samples", "1", "--by-op"];
    let text = end(&mut tpshard(words)).ok().stdout;
    for word in
        ["2 ranks", "prompt ", "token ", "tokens/s", "collectives with", "resident", "attention", "per token"]
    {
        assert!(text.contains(word), "`{word}` is not in\n{text}");
    }
}

#[test]
fn what_cannot_be_measured_is_refused() {
    let bench = |more: &[&str]| end(tpshard(words!["bench", sharded(1)]).args(more));
    bench(&[]).fails(2, &["--inputs FILE"]);
    let inputs = prompt();
    let inputs = inputs.to_str().unwrap();
    bench(&["--inputs", inputs, "--samples", "0"]).fails(2, &["--samples"]);
    bench(&["--inputs", inputs, "--outputs", "x.npz"]).fails(2, &["keeps no outputs"]);
    bench(&["--inputs", inputs, "--trace", "/nowhere/trace.json", "--samples", "1"]).fails(5, &["/nowhere"]);
}
