//! `tpshard generate` continues a prompt as running the model again and again would.

use crate::support::*;
use crate::words;
use serde_json::{Value, json};
use std::path::{Path, PathBuf};
use tpshard_ir::{Data, Tensor};
use tpshard_runtime::io::{NamedTensors, read_npz, write_npz};

const PROMPT: [i64; 4] = [5, 100, 7, 42];

/// Words `w0`, `w1`, … for the token ids, split at spaces.
fn tokenizer(folder: &Path) -> PathBuf {
    let vocabulary: serde_json::Map<String, Value> =
        (0..512).map(|id| (format!("w{id}"), json!(id))).collect();
    let tokenizer = json!({
        "version": "1.0",
        "truncation": null,
        "padding": null,
        "added_tokens": [],
        "normalizer": null,
        "pre_tokenizer": { "type": "WhitespaceSplit" },
        "post_processor": null,
        "decoder": null,
        "model": { "type": "WordLevel", "vocab": vocabulary, "unk_token": "w0" },
    });
    let path = folder.join("tokenizer.json");
    std::fs::write(&path, tokenizer.to_string()).unwrap();
    path
}

fn ids(tokens: &[i64]) -> String {
    tokens.iter().map(i64::to_string).collect::<Vec<_>>().join(",")
}

/// The most probable token after `tokens`, by the model run on all of them at once.
fn next(folder: &Path, tokens: &[i64]) -> i64 {
    let scratch = scratch();
    let (inputs, outputs) = (scratch.path().join("in.npz"), scratch.path().join("out.npz"));
    let mut given = NamedTensors::new();
    let row = |values: Vec<i64>| Tensor::new(vec![1, values.len()], Data::I64(values)).unwrap();
    given.insert("input_ids".into(), row(tokens.to_vec()));
    given.insert("attention_mask".into(), row(vec![1; tokens.len()]));
    given.insert("position_ids".into(), row((0..tokens.len() as i64).collect()));
    for layer in 0..4 {
        for kind in ["key", "value"] {
            let empty = Tensor::new(vec![1, 4, 0, 8], Data::F32(vec![])).unwrap();
            given.insert(format!("past_key_values.{layer}.{kind}"), empty);
        }
    }
    write_npz(&inputs, &given).unwrap();
    end(&mut tpshard(words!["run", folder, "--inputs", inputs, "--outputs", outputs])).ok();
    let found = read_npz(&outputs, 1 << 30).unwrap();
    let Data::F32(logits) = found["logits"].data() else { panic!("logits are not floats") };
    let last = &logits[logits.len() - 512..];
    last.iter().enumerate().max_by(|a, b| a.1.total_cmp(b.1)).unwrap().0 as i64
}

#[test]
fn greedy_tokens_are_those_of_running_the_whole_text_anew() {
    let folder = sharded(2);
    let words = words!["generate", folder, "--prompt-ids", ids(&PROMPT), "--max-tokens", "5", "--json"];
    let found = end(&mut tpshard(words)).ok().json();
    let mut text = PROMPT.to_vec();
    for _ in 0..5 {
        let token = next(&folder, &text);
        text.push(token);
    }
    assert_eq!(found["tokens"], json!(text[PROMPT.len()..]), "{found}");
    assert_eq!(found["prompt_tokens"], 4);
    assert_eq!(found["generated_tokens"], 5);
}

#[test]
fn text_goes_through_the_tokenizer_both_ways() {
    let scratch = scratch();
    let tokenizer = tokenizer(scratch.path());
    let by_ids = |more: &[&str]| {
        let words =
            words!["generate", sharded(1), "--prompt-ids", ids(&PROMPT), "--max-tokens", "6", "--json"];
        end(tpshard(words).args(more)).ok().json()
    };
    let words = words![
        "generate",
        sharded(2),
        "--prompt",
        "w5 w100 w7 w42",
        "--tokenizer",
        tokenizer,
        "--max-tokens",
        "6"
    ];
    let ended = end(&mut tpshard(words)).ok();
    let tokens: Vec<i64> =
        by_ids(&[])["tokens"].as_array().unwrap().iter().map(|t| t.as_i64().unwrap()).collect();
    let expected = tokens.iter().map(|id| format!("w{id}")).collect::<Vec<_>>().join(" ");
    assert_eq!(ended.stdout, format!("{expected}\n"));
    assert!(ended.stderr.contains("tokens/s"), "{}", ended.stderr);

    // The token that ends the text is not printed; the files beside the tokenizer may name it.
    let end_token = tokens[3];
    let position = tokens.iter().position(|&t| t == end_token).unwrap();
    let stopped = by_ids(&["--stop-token", &end_token.to_string()]);
    assert_eq!(stopped["tokens"], json!(tokens[..position]), "{stopped}");
    let config = json!({ "eos_token_id": [end_token, 511] });
    std::fs::write(scratch.path().join("generation_config.json"), config.to_string()).unwrap();
    let path = tokenizer.to_str().unwrap();
    assert_eq!(by_ids(&["--tokenizer", path])["tokens"], json!(tokens[..position]));
    assert_eq!(by_ids(&["--tokenizer", path, "--ignore-stop"])["tokens"], json!(tokens));
}

#[test]
fn drawn_tokens_depend_on_the_seed_and_on_nothing_else() {
    let draw = |ranks: usize, seed: &str| {
        let words =
            words!["generate", sharded(ranks), "--prompt-ids", ids(&PROMPT), "--max-tokens", "12", "--json"];
        let flags = ["--temperature", "2.5", "--top-k", "200", "--top-p", "0.95", "--seed", seed];
        end(tpshard(words).args(flags)).ok().json()["tokens"].clone()
    };
    assert_eq!(draw(1, "1"), draw(1, "1"));
    assert_ne!(draw(1, "1"), draw(1, "2"));
}

#[test]
fn several_prompts_are_continued_as_each_alone() {
    let prompts: [&[i64]; 4] = [&PROMPT, &[1], &[9, 8, 7, 6, 5, 4], &[300, 200, 100, 7]];
    let flags = |more: &[&str]| {
        let flags = ["--max-tokens", "7", "--temperature", "1.5", "--seed", "3"];
        flags.iter().chain(more).map(ToString::to_string).collect::<Vec<String>>()
    };
    for ranks in [1, 2, 3] {
        let alone = |prompt: &[i64], more: &[&str]| {
            let words = words!["generate", sharded(ranks), "--prompt-ids", ids(prompt), "--json"];
            end(tpshard(words).args(flags(more))).ok().json()
        };
        // One of them ends early.
        let last = alone(prompts[1], &[])["tokens"][3].to_string();
        for more in [&[][..], &["--stop-token", &last]] {
            let mut command = tpshard(words!["generate", sharded(ranks), "--json"]);
            for prompt in prompts {
                command.args(["--prompt-ids", &ids(prompt)]);
            }
            let found = end(command.args(flags(more))).ok().json();
            for (at, prompt) in prompts.into_iter().enumerate() {
                assert_eq!(found["continuations"][at]["tokens"], alone(prompt, more)["tokens"], "{prompt:?}");
                assert_eq!(found["continuations"][at]["prompt_tokens"], prompt.len());
            }
            assert_eq!(found["prompt_tokens"], 15);
            assert!(found.get("tokens").is_none());
        }
    }
    let scratch = scratch();
    let tokenizer = tokenizer(scratch.path());
    let words = words!["generate", sharded(1), "--tokenizer", tokenizer, "--max-tokens", "1"];
    let texts = ["--prompt", "w1", "--prompt", "w9 w8 w7"];
    let said = end(tpshard(words).args(texts)).ok().stdout;
    let lines: Vec<&str> = said.lines().collect();
    assert_eq!(lines.len(), 5, "{said}");
    assert_eq!((lines[0], lines[2], lines[3]), ("==> prompt 1 <==", "", "==> prompt 2 <=="));
    assert!(lines[1].starts_with('w') && lines[4].starts_with('w'), "{said}");
}

#[test]
fn what_cannot_be_continued_is_refused() {
    let scratch = scratch();
    let generate = |more: &[&str]| end(tpshard(words!["generate", sharded(1)]).args(more));
    generate(&[]).fails(2, &["--prompt"]);
    generate(&["--prompt", "hello"]).fails(2, &["needs a tokenizer", "help: "]);
    generate(&["--prompt", "hello", "--tokenizer", "/nowhere.json"]).fails(2, &["/nowhere.json", "help: "]);
    generate(&["--prompt-ids", "1", "--temperature=-1"]).fails(2, &["--temperature"]);
    generate(&["--prompt-ids", "1", "--top-p", "0"]).fails(2, &["--top-p"]);
    generate(&["--prompt-ids", "100000"]).fails(2, &["100000", "512"]);
    generate(&["--prompt-ids", "1", "--prompt-ids", "100000"]).fails(2, &["100000", "512"]);
    generate(&["--prompt-ids", "1,,2"]).fails(2, &["--prompt-ids", "is no token id"]);
    let tokenizer = tokenizer(scratch.path());
    generate(&["--prompt", "", "--tokenizer", tokenizer.to_str().unwrap()]).fails(2, &["no tokens"]);
    let second = ["--prompt", "w1", "--prompt", "", "--tokenizer", tokenizer.to_str().unwrap()];
    generate(&second).fails(2, &["prompt 2 has no tokens"]);
}
